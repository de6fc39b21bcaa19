"""The workspace: whole-or-nothing files, the lock between real processes, stage states and what makes them stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.workspace import StageState, Workspace, atomic_path, write_json


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws", Card.load("shapes"))


def edit(ws: Workspace, before: str, after: str) -> Workspace:
    text = ws.card_path.read_text()
    assert before in text
    ws.card_path.write_text(text.replace(before, after))
    return Workspace.open(ws.root)


def test_create_writes_the_resolved_card_and_nothing_else(ws: Workspace):
    assert [path.name for path in ws.root.iterdir()] == ["eclipse.yaml"]
    assert Workspace.open(ws.root).card == Card.load("shapes")


def test_open_finds_the_current_directory(ws: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ws.root)
    assert Workspace.open(None).root == ws.root


def test_open_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(UsageError, match="no workspace here") as caught:
        Workspace.open(tmp_path)
    assert "eclipse init" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_create_refuses_another_card_and_names_the_keys(ws: Workspace):
    other = edit(ws, "held_out: 0.15", "held_out: 0.5")
    with pytest.raises(UsageError, match=r"source\.held_out: 0\.5 → 0\.15"):
        Workspace.create(other.root, Card.load("shapes"))


def test_create_refuses_a_file(tmp_path: Path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UsageError, match="not a directory"):
        Workspace.create(tmp_path / "taken", Card.load("shapes"))


def test_atomic_path_replaces_files_and_directories_whole(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".txt"
        assert target.read_text() == text
    for name in ("a", "b"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "deep", "file.txt", "folder"]


def test_atomic_path_keeps_the_old_file_on_an_error(tmp_path: Path):
    target = tmp_path / "file.json"
    write_json(target, {"good": 1})
    with pytest.raises(TypeError):
        write_json(target, {"bad": object()})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(target.read_text()) == {"good": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


HOLD = """
import os, sys, time
from pathlib import Path
from eclipse.pipeline.core.workspace import Workspace

with Workspace(Path(sys.argv[1])).lock("embed"):
    if sys.argv[2] == "fork":
        child = os.fork()
        if child:
            time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
"""


@pytest.mark.parametrize("children", ["fork", "none"])
def test_a_second_process_is_told_who_holds_the_workspace_and_kill_9_frees_it(ws: Workspace, children: str):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(ws.root), children]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    speaker = int(holder.stdout.readline())  # the forked child if there is one
    try:
        with pytest.raises(EclipseError, match=rf"in use by embed, pid {holder.pid} on {os.uname().nodename}"):
            ws.lock("train").__enter__()
        assert f"pid {holder.pid}" in str(ws.holder())
        holder.kill()
        holder.wait()
        if children == "fork":
            assert speaker != holder.pid and Path(f"/proc/{speaker}").exists(), "the orphan must outlive the holder"
        with ws.lock("train"):
            assert f"pid {os.getpid()}" in str(ws.holder())
        assert ws.holder() is None
    finally:
        holder.kill()
        if children == "fork":
            os.kill(speaker, signal.SIGKILL)


def test_a_new_holder_sweeps_what_a_killed_one_left_half_written(ws: Workspace):
    for name in ("embeddings", "renders"):
        (ws.root / name).mkdir()
    (ws.embeddings / ".tmp-1-part-00000.parquet").write_text("half")
    (ws.renders / ".tmp-1-set").mkdir()
    (ws.renders / ".tmp-1-set" / "0.png").write_text("half")
    (ws.embeddings / "part-00000.parquet").write_text("whole")
    with ws.lock("embed"):
        pass
    assert [path.name for path in ws.embeddings.iterdir()] == ["part-00000.parquet"]
    assert list(ws.renders.iterdir()) == []


def finish(ws: Workspace, stage: str, outputs: Path) -> str:
    fingerprint = ws.card.fingerprint("source") if stage == "download" else f"print of {stage}"
    outputs.mkdir(parents=True, exist_ok=True)
    ws.finish(stage, fingerprint, {"rows": 3})
    return fingerprint


def test_a_finished_stage_returns_its_summary(ws: Workspace):
    fingerprint = finish(ws, "download", ws.images)
    assert ws.completed("download", fingerprint) == {"rows": 3, "already_complete": True}
    state = ws.state("download")
    assert isinstance(state, StageState) and state.summary == {"rows": 3} and state.finished_at
    assert ws.state("embed") is None


def test_a_changed_card_is_noticed_and_named(ws: Workspace):
    finish(ws, "download", ws.images)
    changed = edit(edit(ws, "rows: 16000", "rows: 9000"), "preset: tiny", "preset: small")
    with pytest.raises(EclipseError, match=r"source\.rows: 16000 → 9000") as caught:
        changed.completed("download", changed.card.fingerprint("source"))
    assert "prior.preset" not in str(caught.value), "download does not depend on the prior"
    assert "--overwrite" in str(caught.value)


def test_a_stage_begun_under_another_card_is_not_continued(ws: Workspace):
    ws.begin("download", ws.card.fingerprint("source"))
    assert ws.completed("download", ws.card.fingerprint("source")) is None
    changed = edit(ws, "rows: 16000", "rows: 9000")
    with pytest.raises(EclipseError, match="download began with other settings"):
        changed.completed("download", changed.card.fingerprint("source"))
    changed.reset("download")
    assert changed.completed("download", changed.card.fingerprint("source")) is None


def test_redoing_a_stage_makes_the_later_ones_stale(ws: Workspace):
    stages = {"download": ws.images, "embed": ws.embeddings, "train": ws.prior, "render": ws.renders}
    for stage, outputs in stages.items():
        finish(ws, stage, outputs)
    finish(ws, "render", ws.renders)
    assert ws.state("train") is not None
    finish(ws, "embed", ws.embeddings)
    assert [stage for stage in stages if ws.state(stage)] == ["download", "embed"]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_stage_whose_output_is_damaged_is_not_complete(ws: Workspace, damage: str):
    ws.embeddings.mkdir()
    for number in range(3):
        (ws.embeddings / f"part-0000{number}.parquet").write_bytes(b"rows" * 10)
    fingerprint = finish(ws, "embed", ws.embeddings)
    assert ws.completed("embed", fingerprint) is not None
    ws.require_intact("embed")
    part = ws.embeddings / "part-00001.parquet"
    part.unlink() if damage == "gone" else part.write_bytes(b"rows")
    assert ws.completed("embed", fingerprint) is None
    with pytest.raises(EclipseError, match="no longer whole") as caught:
        ws.require_intact("embed")
    assert str(part) in str(caught.value) and "`eclipse embed`" in str(caught.value)


def test_an_overwrite_that_fails_at_once_leaves_everything_as_it_was(ws: Workspace):
    for stage, outputs in (("train", ws.prior), ("render", ws.renders)):
        finish(ws, stage, outputs)
    (ws.prior / "weights").write_text("old")
    ws.begin("render", "of another card")
    before = {path: path.read_bytes() for path in ws.root.rglob("*") if path.is_file()}
    with pytest.raises(UsageError), ws.redoing("train", ws.prior):
        assert not ws.prior.exists() and ws.state("train") is None and ws.state("render") is None
        ws.begin("train", "new")
        ws.prior.mkdir()
        raise UsageError("no such option")
    assert {path: path.read_bytes() for path in ws.root.rglob("*") if path.is_file()} == before


def test_an_overwrite_that_got_somewhere_keeps_what_is_new(ws: Workspace):
    finish(ws, "train", ws.prior)
    (ws.prior / "weights").write_text("old")
    new = ws.prior / "checkpoint"
    with pytest.raises(KeyboardInterrupt), ws.redoing("train", ws.prior, made=new.exists):
        ws.begin("train", "new")
        ws.prior.mkdir()
        new.write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in ws.prior.iterdir()] == ["checkpoint"]
    assert ws.state("train") is None and ws.begun("train") is not None
    assert not list(ws.root.glob(".tmp-*"))


def test_an_unreadable_state_is_named(ws: Workspace):
    finish(ws, "download", ws.images)
    (ws.logs / "state" / "download.json").write_text("{")
    with pytest.raises(EclipseError, match="unreadable stage state") as caught:
        ws.state("download")
    assert "download.json" in str(caught.value)
