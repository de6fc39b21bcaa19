"""`eclipse status`: what it says about stages that are done, begun, changed or waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
from eclipse.pipeline.core.card import STAGE_SECTIONS, Card
from eclipse.pipeline.core.status import gather
from eclipse.pipeline.core.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    ws = Workspace.create(tmp_path, Card.load("shapes"))
    ws.images.mkdir()
    ws.finish("download", ws.card.fingerprint("source"), {"rows": 7800, "failed": 200, "folder": "x", "seconds": 1.5})
    ws.begin("embed", ws.card.fingerprint("source", "encoder"))
    ws.embeddings.mkdir()
    for number in range(3):
        (ws.embeddings / f"part-{number:05d}.parquet").touch()
    return ws


def states(found: dict) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in found["stages"]}


def test_done_begun_and_waiting(ws: Workspace):
    found = gather(ws)
    expected = {"download": "complete", "embed": "begun", "filter": "waiting", "train": "waiting"}
    assert states(found) == {**expected, "render": "waiting", "evaluate": "waiting"}
    download, embed = found["stages"][:2]
    assert download["counts"] == "7,800 rows, 200 failed" and download["finished_at"]
    assert embed["counts"] == "3 parts so far"
    assert found["next"] == "eclipse embed" and found["holder"] is None


def test_changed_settings_are_named_with_the_way_out(ws: Workspace):
    ws.card_path.write_text(ws.card_path.read_text().replace("held_out: 0.15", "held_out: 0.5"))
    found = gather(Workspace.open(ws.root))
    assert states(found)["download"] == states(found)["embed"] == "changed"
    assert found["stages"][0]["changes"] == ["source.held_out: 0.15 → 0.5"]
    assert found["next"] == "eclipse download --overwrite"


def test_nothing_is_next_when_everything_is_complete(ws: Workspace):
    for stage in states(gather(ws)):
        ws.finish(stage, "any", {})
    assert gather(ws)["next"] is None


def test_looking_leaves_no_trace(ws: Workspace):
    before = sorted(ws.root.rglob("*"))
    gather(ws)
    assert sorted(ws.root.rglob("*")) == before


def test_a_missing_part_is_shown_and_what_mends_it(tmp_path: Path):
    ws = Workspace.create(tmp_path / "ws", Card.load("shapes"))
    ws.embeddings.mkdir()
    part = ws.embeddings / "part-00000.parquet"
    part.write_bytes(b"rows")
    for stage in ("download", "embed"):
        ws.finish(stage, ws.card.fingerprint(*STAGE_SECTIONS[stage]), {"rows": 1})
    part.unlink()
    found = gather(ws)
    assert [row["state"] for row in found["stages"][:2]] == ["complete", "damaged"]
    assert str(part) in found["stages"][1]["counts"] and found["next"] == "eclipse embed"
