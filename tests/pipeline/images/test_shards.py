"""Pictures found again in shards: numbering, keys with folders and dots, and what happens when they are gone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import synthetic_cache
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.filter.stage import filter_cache
from eclipse.pipeline.images.shards import TarShard, numbered_shards, picture_files, small_pictures
from eclipse.pipeline.images.sources import shards_of

QUIET = Progress(quiet=True)


def test_shards_are_numbered_by_name_or_else_by_order(tmp_path: Path) -> None:
    for name in ("00007.tar", "00003.tar"):
        (tmp_path / name).touch()
    assert {n: p.name for n, p in numbered_shards(tmp_path).items()} == {3: "00003.tar", 7: "00007.tar"}
    (tmp_path / "extra.tar").touch()
    assert list(numbered_shards(tmp_path)) == [0, 1, 2]


def test_a_number_that_no_part_can_have_is_named(tmp_path: Path) -> None:
    for name in ("00003.tar", "2147483647.tar"):
        (tmp_path / name).touch()
    assert list(numbered_shards(tmp_path)) == [3, 2**31 - 1]
    (tmp_path / "99999999999.tar").touch()
    with pytest.raises(EclipseError, match="beyond 2,147,483,647") as error:
        numbered_shards(tmp_path)
    assert "99999999999.tar" in str(error.value)


def test_files_are_found_by_key(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("a/x.json", "a/x.jpg", "b/x.JPG", "y.seg.png", "y.png"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    (tmp_path / "00001.tar").write_bytes(b"no tar at all")
    found = dict(
        picture_files(
            {0: TarShard(tmp_path / "00000.tar"), 1: TarShard(tmp_path / "00001.tar")},
            [(0, "a/x"), (0, "y"), (0, "absent"), (1, "z"), (2, "z")],
        )
    )
    assert found == {(0, "a/x"): b"a/x.jpg", (0, "y"): b"y.png"}


@pytest.mark.parametrize("stats", ["{", "[]", '{"successes": "many"}', '{"successes": 1e999}', "[" * 100_000])
def test_statistics_that_cannot_be_read_count_nothing(tmp_path: Path, stats: str) -> None:
    (tmp_path / "00000_stats.json").write_text('{"successes": 3}')
    assert TarShard(tmp_path / "00000.tar").expected() == 3
    (tmp_path / "00000_stats.json").write_text(stats)
    assert TarShard(tmp_path / "00000.tar").expected() is None


def test_rows_get_their_own_pictures_in_any_order(tmp_path: Path) -> None:
    table, _ = synthetic_cache.plant(600)
    ws = synthetic_cache.write(tmp_path / "ws", table)
    rows = np.array([599, 3, 250])
    pictures = small_pictures(shards_of(ws), Store.open(ws.embeddings), rows, 16, QUIET)
    for row, picture in zip(rows, pictures, strict=True):
        levels = np.clip(table[row].grey, 0, 255)
        assert np.corrcoef(levels.ravel(), picture.mean(axis=2).ravel())[0, 1] > 0.95


def test_missing_shards_are_named_and_the_way_out_works(tmp_path: Path) -> None:
    table, truth = synthetic_cache.plant(600)
    ws = synthetic_cache.write(tmp_path / "ws", table)
    (ws.images / "00000.tar").unlink()
    with pytest.raises(EclipseError, match="cannot be read") as error:
        filter_cache(ws, QUIET)
    assert "near_copy_picture" in str(error.value) and not ws.selection.exists()
    text = ws.card_path.read_text().replace("near_copy_picture: 0.96", "near_copy_picture: null")
    ws.card_path.write_text(text)
    summary = filter_cache(type(ws)(ws.root), QUIET, overwrite=True)
    assert summary["rejected"]["near_copy"] == len(truth.near)
