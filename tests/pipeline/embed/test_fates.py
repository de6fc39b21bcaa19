"""The account of a shard: what was written comes back, what is damaged counts as none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from eclipse.pipeline.cache.part import PartMeta, PartWriter, read_part
from eclipse.pipeline.embed.fates import Fate
from eclipse.pipeline.embed.tasks import ShardTask
from eclipse.pipeline.images.rejects import Reject
from eclipse.pipeline.images.shards import TarShard

FATE = Fate("00000.tar", "c" * 64, inputs=1, rows=0, truncated=1, rejected=[Reject("00000", "k\udcff", "unreadable")])
META = PartMeta("clip", "f" * 64, "{}", "fp32", embedding_dim=2, text_width=2, card="card")


@pytest.fixture
def task(tmp_path: Path) -> ShardTask:
    """Its part holds no account, as those of older versions."""
    task = ShardTask(0, TarShard(tmp_path / "00000.tar"), tmp_path / "part-00000.parquet", tmp_path / "00000.json", 1)
    with PartWriter(task.part, META):
        pass
    return task


def test_an_account_lies_in_the_part_itself(task: ShardTask) -> None:
    assert Fate.load(task) is None
    with PartWriter(task.part, META) as writer:
        writer.account = FATE.to_dict()
    assert Fate.load(task) == FATE
    assert read_part(task.part).meta == META


def test_the_file_of_older_versions_is_read_where_the_part_has_none(task: ShardTask) -> None:
    task.fate.write_text(json.dumps(FATE.to_dict()))
    assert Fate.load(task) == FATE


REJECT = {"shard": "00000", "key": "k", "reason": "unreadable", "url": 5, "caption": ""}


@pytest.mark.parametrize(
    "change", [None, {"rows": "2"}, {"truncated": []}, {"tar": None}, {"rejected": [REJECT]}, {"rejected": [[]]}]
)
def test_damage_counts_as_no_account(task: ShardTask, change: dict[str, Any] | None) -> None:
    task.fate.write_text(json.dumps([] if change is None else FATE.to_dict() | change))
    assert Fate.load(task) is None


def test_a_pipe_is_no_account(task: ShardTask) -> None:
    os.mkfifo(task.fate)
    assert Fate.load(task) is None
