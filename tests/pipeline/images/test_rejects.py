"""rejected.parquet: each stage replaces its own rows and drops those that were computed from them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.images.rejects import Reject, read_rejected, write_rejected


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws", Card.load("shapes"))


def stages(ws: Workspace) -> list[str]:
    return read_rejected(ws)["stage"].to_pylist()


def test_a_stage_replaces_its_rows_and_later_ones(ws: Workspace):
    assert len(read_rejected(ws)) == 0
    many = (Reject("00000", f"{i}", "http_404" if i % 3 else "timed_out", "http://u", "c") for i in range(25_000))
    assert write_rejected(ws, "download", many) == {"http_404": 16_666, "timed_out": 8_334}
    assert write_rejected(ws, "embed", [Reject("00001", "k\udcff", "unreadable")]) == {"unreadable": 1}
    assert len(read_rejected(ws)) == 25_001
    embed = read_rejected(ws, "embed").to_pylist()
    assert embed == [
        {"stage": "embed", "shard": "00001", "key": "k?", "reason": "unreadable", "url": "", "caption": ""}
    ]
    write_rejected(ws, "embed", [])
    assert set(stages(ws)) == {"download"}
    write_rejected(ws, "embed", [Reject("00001", "k", "unreadable")])
    write_rejected(ws, "download", [Reject("", "row 0", "empty_url")])
    assert stages(ws) == ["download"]


def test_an_error_leaves_the_old_file_and_damage_is_named(ws: Workspace):
    write_rejected(ws, "download", [Reject("", "row 0", "empty_url")])

    def breaking():
        yield Reject("", "row 1", "empty_url")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rejected(ws, "download", breaking())
    assert read_rejected(ws)["key"].to_pylist() == ["row 0"]
    assert [path.name for path in ws.root.iterdir() if path.name.startswith(".tmp")] == []
    ws.rejected.write_bytes(b"PAR1")
    with pytest.raises(EclipseError, match="unreadable"):
        write_rejected(ws, "embed", [])


def test_an_unreadable_file_is_named_and_a_download_replaces_it(ws: Workspace):
    for content in (b"PAR1", b"", None):
        if content is None:
            pq.write_table(pa.table({"stage": ["download"], "other": [1]}), ws.rejected)
        else:
            ws.rejected.write_bytes(content)
        for use in (lambda: read_rejected(ws), lambda: write_rejected(ws, "embed", [])):
            with pytest.raises(EclipseError, match="list of rejects is unreadable") as error:
                use()
            assert str(ws.rejected) in str(error.value) and "download --overwrite" in str(error.value)
        write_rejected(ws, "download", [Reject("", "row 0", "empty_url")])
        assert stages(ws) == ["download"]


def test_what_is_no_file_is_refused(ws: Workspace):
    for make in (os.mkdir, os.mkfifo):
        make(ws.rejected)
        with pytest.raises(EclipseError, match="list of rejects is unreadable"):
            read_rejected(ws)
        with pytest.raises(EclipseError, match="list of rejects is unreadable"):
            write_rejected(ws, "embed", [])
        if ws.rejected.is_dir():
            with pytest.raises(EclipseError, match="list of rejects is unreadable"):
                write_rejected(ws, "download", [])
            ws.rejected.rmdir()
