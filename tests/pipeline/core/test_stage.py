"""How a stage runs: what makes it complete, begun or stale, and what an overwrite costs that comes to nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.files import unsealed
from eclipse.pipeline.core.workspace import Workspace
from records import begin, finish

FORMER = Path(__file__).with_name("former_records.json")  # as the first version of this program left them


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws", Card.load("shapes"))


def edit(ws: Workspace, before: str, after: str) -> Workspace:
    text = ws.card_path.read_text()
    assert before in text
    ws.card_path.write_text(text.replace(before, after))
    return Workspace.open(ws.root)


def contents(ws: Workspace) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in ws.root.rglob("*") if path.is_file() and path.name != ".lock"}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_finished_stage_returns_its_summary(ws: Workspace):
    finish(ws, "download")
    with ws.stage("download") as run:
        assert run.complete and run.summary.pop("seconds") < 60
        assert run.summary == {"rows": 3, "already_complete": True}
    state = ws.stage("download").finished
    assert state is not None and state.finished_at
    assert ws.stage("embed").finished is None


def test_a_run_holds_the_workspace_and_a_complete_one_does_not(ws: Workspace):
    with ws.stage("download") as run:
        run.begin()
        assert f"download, pid {os.getpid()}" in str(ws.holder())
        run.finish({})
    assert ws.holder() is None
    with ws.stage("download") as run:
        assert run.complete and ws.holder() is None


def test_a_changed_card_is_noticed_and_named(ws: Workspace):
    finish(ws, "download")
    changed = edit(edit(ws, "rows: 16000", "rows: 9000"), "preset: tiny", "preset: small")
    with pytest.raises(EclipseError, match=r"source\.rows: 16000 → 9000") as caught:
        changed.stage("download").__enter__()
    assert "prior.preset" not in str(caught.value), "download does not depend on the prior"
    assert "--overwrite" in str(caught.value)


def test_what_decides_no_output_changes_no_stage(ws: Workspace):
    finish(ws, "download", "embed", "filter", "train")
    changed = edit(edit(ws, "timeout_s: 2", "timeout_s: 30"), "checkpoint_every: 1000", "checkpoint_every: 7")
    assert changed.stage("train").completed() is not None


def test_a_stage_begun_under_another_card_is_not_continued(ws: Workspace):
    begin(ws, "download")
    assert ws.stage("download").completed() is None
    changed = edit(ws, "rows: 16000", "rows: 9000")
    with pytest.raises(EclipseError, match="download began with other settings"):
        changed.stage("download").completed()
    finish(changed, "download")
    assert changed.stage("download").completed() is not None


def test_options_of_the_command_line_are_settings_too(ws: Workspace):
    finish(ws, "train", steps=10**7)  # fewer steps are another training, more of them go on
    assert ws.stage("train", options={"steps": 10**7}).completed() is not None
    with pytest.raises(EclipseError, match="--steps: 10000000 → not given"):
        ws.stage("train").completed()


def test_a_stage_made_anew_makes_the_later_ones_stale(ws: Workspace):
    stages = ("download", "embed", "train", "render")
    finish(ws, *stages)
    write(ws.embeddings / "part-00000.parquet", "rows")
    finish(ws, "embed")
    assert [name for name in stages if ws.stage(name).finished] == ["download", "embed"]
    assert ws.stage("train").stale is not None


def test_what_comes_out_as_before_makes_nothing_stale(ws: Workspace):
    write(ws.selection, "rows")
    finish(ws, "filter", "train")
    for text, kept in (("rows", True), ("sows", False)):
        with ws.stage("filter", overwrite=True) as run:
            run.begin()
            write(ws.selection, text)
            run.finish({})
        assert (ws.stage("train").finished is not None) is kept


def test_later_stages_wait_for_one_that_is_being_made_again(ws: Workspace):
    write(ws.selection, "rows")
    finish(ws, "filter", "train")
    with pytest.raises(KeyboardInterrupt), ws.stage("filter", overwrite=True) as run:
        run.begin()
        assert ws.stage("train").completed() is None
        raise KeyboardInterrupt
    assert ws.stage("train").completed() is not None, "it was put back"
    ws.stage("filter").path("json").unlink()
    begin(ws, "filter")
    with pytest.raises(EclipseError, match="`eclipse filter` began and has not finished"):
        ws.stage("train").__enter__()
    assert ws.holder() is None


@pytest.mark.parametrize("damage", ["gone", "cut", "other content"])
def test_a_stage_whose_output_is_damaged_is_not_complete(ws: Workspace, damage: str):
    for number in range(3):
        write(ws.embeddings / f"part-0000{number}.parquet", "rows" * 10)
    finish(ws, "embed")
    assert ws.stage("embed").completed() is not None
    ws.stage("embed").require_intact()
    part = ws.embeddings / "part-00001.parquet"
    part.unlink() if damage == "gone" else part.write_text("rows" if damage == "cut" else "sows" * 10)
    assert ws.stage("embed").completed() is None
    with pytest.raises(EclipseError, match="no longer whole") as caught:
        ws.stage("filter").__enter__()
    assert str(part) in str(caught.value) and "`eclipse embed`" in str(caught.value)


def test_an_overwrite_that_fails_at_once_leaves_everything_as_it_was(ws: Workspace):
    write(ws.prior / "weights", "old")
    finish(ws, "train", "render")
    before = contents(ws)
    with pytest.raises(UsageError), ws.stage("train", overwrite=True) as run:
        run.begin()
        assert not ws.prior.exists() and ws.stage("train").finished is None
        write(ws.prior / "half", "new")
        raise UsageError("no such option")
    assert contents(ws) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from eclipse.pipeline.core.workspace import Workspace

ws = Workspace.open(Path(sys.argv[1]))
with ws.stage("train", overwrite=True) as run:
    run.begin()
    (ws.prior / "checkpoints" / sys.argv[2]).mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("made", "weights"), [("nothing", "old"), ("step-00000001", None)])
def test_an_overwrite_that_is_killed_loses_nothing_until_something_new_is_whole(
    ws: Workspace, made: str, weights: str | None
):
    write(ws.prior / "final" / "weights", "old")
    finish(ws, "train")
    before = contents(ws)
    done = subprocess.run([sys.executable, "-c", KILLED, str(ws.root), made], check=False)
    assert done.returncode == -signal.SIGKILL and not (ws.prior / "final").exists()
    with ws.lock("embed"):
        pass
    assert not list(ws.root.rglob(".aside*"))
    if weights:
        assert contents(ws) == before
    else:
        assert not (ws.prior / "final").exists() and ws.stage("train").begun is not None


def test_an_overwrite_that_got_somewhere_keeps_what_is_new(ws: Workspace):
    write(ws.prior / "weights", "old")
    finish(ws, "train")
    with pytest.raises(KeyboardInterrupt), ws.stage("train", overwrite=True) as run:
        run.begin()
        write(ws.prior / "checkpoints" / "step-00000001" / "state.json", "new")
        run.give_up_old()
        raise KeyboardInterrupt
    assert [path.name for path in ws.prior.iterdir()] == ["checkpoints"]
    assert ws.stage("train").finished is None and ws.stage("train").begun is not None
    assert not list(ws.root.rglob(".aside*"))


def test_a_folder_that_is_a_link_stays_one(ws: Workspace, tmp_path: Path):
    (tmp_path / "big-disk" / "images").mkdir(parents=True)
    ws.images.symlink_to(tmp_path / "big-disk" / "images")
    write(ws.images / "00000.tar", "old")
    finish(ws, "download")
    with pytest.raises(UsageError), ws.stage("download", overwrite=True) as run:
        run.begin()
        assert ws.images.is_symlink() and list(ws.images.iterdir()) == []
        raise UsageError("no network")
    assert ws.images.is_symlink() and (tmp_path / "big-disk" / "images" / "00000.tar").read_text() == "old"
    assert [path.name for path in (tmp_path / "big-disk").iterdir()] == ["images"]


def test_an_unreadable_record_is_named(ws: Workspace):
    finish(ws, "download")
    deep = "[" * 100_000
    for text in ("{", "[]", deep, '{"fingerprint": "x", "summary": 3}', '{"fingerprint": "x", "files": []}'):
        ws.stage("download").path("json").write_text(text)
        with pytest.raises(EclipseError, match="unreadable record") as caught:
            ws.stage("download").completed()
        assert "download.json" in str(caught.value)


@pytest.fixture
def former(tmp_path: Path) -> Workspace:
    """A workspace of the first version: every key of a section counted, options were hidden in the fingerprint."""
    files: dict[str, Any] = json.loads(FORMER.read_text())
    root = tmp_path / "former"
    write(root / "eclipse.yaml", files.pop("eclipse.yaml"))
    write(root / "images" / "00000.tar", "tar")
    for name, record in files.items():
        write(root / "logs" / "state" / name, json.dumps(record))
    return Workspace.open(root)


def test_records_of_a_former_version_are_recognised(former: Workspace):
    assert former.stage("download").completed() == {"rows": 9, "already_complete": True}
    assert former.stage("embed", options={"text_states": False}).completed() is not None
    with pytest.raises(EclipseError, match="embed finished with other settings"):
        former.stage("embed").completed()
    assert former.stage("filter").completed() is None
    assert former.stage("train", options={"steps": 50}).completed() is None
    with pytest.raises(EclipseError, match="train began with other settings"):
        former.stage("train").completed()


def test_work_that_a_former_version_began_is_continued_under_its_own_fingerprint(former: Workspace):
    begun = former.stage("filter").begun
    assert begun is not None
    former.stage("train").path("begun.json").unlink()
    with former.stage("filter") as run:
        assert run.fingerprint == run.card_fingerprint == begun.fingerprint != former.card.fingerprint("filter")
        run.begin()
        run.finish({"rows": 8})
    assert former.stage("filter").completed() is not None
    changed = edit(former, "retries: 1", "retries: 5")
    assert changed.stage("filter").completed() is not None
    with changed.stage("embed", overwrite=True, options={}) as run:
        assert run.card_fingerprint == changed.card.fingerprint("embed")
    with pytest.raises(EclipseError, match=r"source\.urls"):
        edit(former, "list.csv", "other.csv").stage("filter").completed()


def test_parts_of_a_former_version_keep_the_cards_fingerprint_they_carry(former: Workspace):
    state = former.stage("embed").finished
    assert state is not None
    with former.stage("embed", options={"text_states": False}) as run:
        assert run.complete
    write(former.root / "embeddings" / "part-00000.parquet", "rows")
    record = json.loads(former.stage("embed").path("json").read_text())
    record["files"] = {"embeddings/part-00000.parquet": 5}  # which it has not: it is to be mended
    former.stage("embed").path("json").write_text(json.dumps(record))
    with former.stage("embed", options={"text_states": False}) as run:
        assert run.card_fingerprint == state.fingerprint.removesuffix(" text_states=False")


def test_a_renamed_key_is_no_change(former: Workspace, monkeypatch: pytest.MonkeyPatch):
    finish(former, "download")
    record = unsealed(json.loads(former.stage("download").path("json").read_text()))
    record["card"]["source"]["tries"] = record["card"]["source"].pop("retries")
    record["card"]["source"]["links"] = record["card"]["source"].pop("urls")
    record["fingerprint"] = record["card_fingerprint"] = "of another version"
    former.stage("download").path("json").write_text(json.dumps(record))
    with pytest.raises(EclipseError, match="finished with other settings"):
        former.stage("download").completed()
    monkeypatch.setitem(
        sys.modules["eclipse.pipeline.core.card_file"].RENAMED, "source", {"tries": "retries", "links": "urls"}
    )
    assert former.stage("download").completed() is not None


def test_a_record_that_was_changed_is_refused_by_name(ws: Workspace):
    finish(ws, "download")
    path = ws.stage("download").path("json")
    text = path.read_text()
    path.write_text(text.replace('"rows": 16000', '"rows": 16001'))
    assert path.read_text() != text
    with pytest.raises(EclipseError, match="its checksum does not match") as caught:
        ws.stage("embed").__enter__()
    assert str(path) in str(caught.value)
