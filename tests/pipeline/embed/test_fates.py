"""The account of a shard: what was written comes back, what is damaged counts as none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from eclipse.pipeline.embed.fates import Fate
from eclipse.pipeline.images.rejects import Reject

FATE = Fate("00000.tar", "c" * 64, inputs=3, rows=2, truncated=1, rejected=[Reject("00000", "k\udcff", "unreadable")])


def test_an_account_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "00000.json"
    assert Fate.load(path) is None
    FATE.save(path)
    assert Fate.load(path) == FATE


REJECT = {"shard": "00000", "key": "k", "reason": "unreadable", "url": 5, "caption": ""}


@pytest.mark.parametrize(
    "change", [None, {"rows": "2"}, {"truncated": []}, {"tar": None}, {"rejected": [REJECT]}, {"rejected": [[]]}]
)
def test_damage_counts_as_no_account(tmp_path: Path, change: dict[str, Any] | None) -> None:
    path = tmp_path / "00000.json"
    FATE.save(path)
    path.write_text(json.dumps([] if change is None else json.loads(path.read_text()) | change))
    assert Fate.load(path) is None


def test_a_pipe_is_no_account(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "00000.json")
    assert Fate.load(tmp_path / "00000.json") is None
