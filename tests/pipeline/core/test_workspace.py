"""The workspace: how it is made and found, and the lock between real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.workspace import Workspace


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


@pytest.mark.parametrize("place", ["renders/default", "prior/checkpoints", "logs/state", "logs/embed", "reports"])
def test_what_a_killed_one_left_is_swept_at_any_depth(ws: Workspace, place: str):
    folder = ws.root / place
    folder.mkdir(parents=True)
    (folder / ".tmp-1-manifest.json").write_text("half")
    (folder / "whole").write_text("whole")
    with ws.lock("render"):
        assert [path.name for path in folder.iterdir()] == ["whole"]


def test_the_lock_is_never_opened_through_a_link(ws: Workspace, tmp_path: Path):
    (tmp_path / "precious").write_text("text")
    (ws.root / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(EclipseError, match="cannot lock the workspace"), ws.lock("train"):
        pass
    assert ws.holder() is None and (tmp_path / "precious").read_text() == "text"


def test_a_look_at_the_holder_does_not_refuse_a_stage(ws: Workspace):
    with ws.lock("embed"):
        pass
    with (ws.root / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with ws.lock("train"):
            assert "train" in str(ws.holder())
