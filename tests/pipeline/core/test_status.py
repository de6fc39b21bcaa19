"""`eclipse status`: what it says about stages that are done, begun, changed, stale or waiting, and what is next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eclipse.pipeline.core.card import Card, differences
from eclipse.pipeline.core.files import sealed, unsealed, write_json
from eclipse.pipeline.core.status import gather
from eclipse.pipeline.core.workspace import Workspace
from records import begin, finish, forget


@pytest.fixture
def ws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    ws = Workspace.create(tmp_path, Card.load("shapes"))
    monkeypatch.chdir(tmp_path)
    ws.images.mkdir()
    finish(ws, "download", summary={"rows": 7800, "failed": 200, "folder": "x"})
    begin(ws, "embed")
    ws.embeddings.mkdir()
    for number in range(3):
        (ws.embeddings / f"part-{number:05d}.parquet").write_bytes(b"rows")
    return ws


def states(found: dict) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in found["stages"]}


def test_tars_that_somebody_put_there_are_embedded_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ws = Workspace.create(tmp_path, Card.load("coco"))
    monkeypatch.chdir(tmp_path)
    assert gather(ws)["next"] == "eclipse download"
    ws.images.mkdir()
    (ws.images / "mine.tar").touch()
    assert gather(ws)["next"] == "eclipse embed"
    ws.embeddings.mkdir()
    finish(ws, "embed", summary={"rows": 1})
    assert gather(ws)["next"] == "eclipse filter"


def test_a_key_that_came_later_is_no_change(ws: Workspace):
    """A record of an earlier version lacks it; its default is what that version did."""
    path = ws.stage("download").path("json")
    record = unsealed(json.loads(path.read_text()))
    del record["card"]["source"]["rows_per_shard"], record["card"]["source"]["captions"]
    write_json(path, sealed(record))
    changed = [row for row in gather(ws)["stages"] if row["stage"] == "download"]
    assert sorted(changed[0]["changes"]) == ["source.captions: None → 3", "source.rows_per_shard: 10000 → 1000"]
    for key, default in (("captions", None), ("rows_per_shard", 10_000)):
        card = ws.card.model_dump(mode="json", by_alias=True)
        card["source"][key] = default
        without = {**card, "source": {name: value for name, value in card["source"].items() if name != key}}
        assert differences(without, card) == []


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
    finish(ws, *states(gather(ws)))
    assert gather(ws)["next"] is None


def test_looking_leaves_no_trace(ws: Workspace):
    before = sorted(ws.root.rglob("*"))
    gather(ws)
    assert sorted(ws.root.rglob("*")) == before


def test_a_missing_part_is_shown_and_what_mends_it(ws: Workspace):
    finish(ws, "embed")
    part = ws.embeddings / "part-00000.parquet"
    part.unlink()
    found = gather(ws)
    assert [row["state"] for row in found["stages"][:2]] == ["complete", "damaged"]
    assert str(part) in found["stages"][1]["counts"] and found["next"] == "eclipse embed"


def test_a_prior_of_other_rows_is_begun_anew(ws: Workspace):
    (ws.prior / "checkpoints" / "step-00000003").mkdir(parents=True)
    ws.selection.write_text("rows")
    finish(ws, "embed", "filter", "train")
    ws.selection.write_text("other rows")
    finish(ws, "filter")
    found = gather(ws)
    assert states(found)["train"] == "stale" and found["next"] == "eclipse train --overwrite"


def test_what_is_next_repeats_the_options_and_the_place(ws: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    finish(ws, "embed", "filter")
    begin(ws, "train", steps=5, arm="projection")
    assert gather(ws)["next"] == "eclipse train --steps 5 --arm projection"
    monkeypatch.chdir("/")
    forget(ws, "embed")
    begin(ws, "embed", text_states=False)
    assert gather(ws)["next"] == f"eclipse embed --no-text-states -w {tmp_path}"
