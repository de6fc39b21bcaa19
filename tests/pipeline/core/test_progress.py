"""Progress: plain lines in a log, bars on a terminal, nothing when quiet; never on standard output."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
import typer
from eclipse.pipeline.core.console import present, show_summary, table
from eclipse.pipeline.core.errors import UsageError
from eclipse.pipeline.core.progress import Progress

WORK = """
import sys
from eclipse.pipeline.core.progress import Progress

progress = Progress(quiet="quiet" in sys.argv)
progress.say("before [1/6]")
with progress.task("embed", 1200, "images") as task:
    for _ in range(12):
        task.advance(100, failures=1)
    task.describe("loss 0.5")
    progress.say("within")
with progress.task("count", None, "rows") as task:
    task.advance(3)
"""


def test_a_log_gets_plain_lines():
    result = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    before, within, embed, count = result.stderr.splitlines()
    assert (before, within) == ("before [1/6]", "within")
    assert embed.startswith("embed: 1,200/1,200 images, ") and embed.endswith("12 failed, loss 0.5")
    assert count.startswith("count: 3 rows, ") and "/s" in count
    assert result.stdout == ""


def test_a_task_says_that_it_is_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for title, pace in (("even", 1.0), ("late", 5.0)):
        with Progress().task(title, 100, "rows") as task:
            for step in range(100):
                now[0] += 1.0 if step < 10 else pace
                task.advance()
    lines = [line for line in capsys.readouterr().err.splitlines() if "promised" in line]
    assert lines == ["late took 7:40; its first tenth promised 1:40"]


def test_quiet_is_silent():
    result = subprocess.run([sys.executable, "-c", WORK, "quiet"], capture_output=True, text=True, check=True)
    assert result.stderr == result.stdout == ""


def test_a_terminal_gets_a_bar_with_rate_and_failures():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    text = shown.decode()
    assert process.returncode == 0 and out == b""
    for words in ("embed", "━", "1200/1200", "12 failed", "loss 0.5", "before [1/6]", "within", "3/?"):
        assert words in text


HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\ud800e\x07"


def test_nothing_from_data_steers_the_terminal(capsys: pytest.CaptureFixture[str]):
    progress = Progress()
    progress.say(HOSTILE)
    with progress.task("embed", 1, "images") as task:
        task.describe(HOSTILE)
    table([HOSTILE], [[HOSTILE]], title=HOSTILE)
    show_summary({"kept": HOSTILE, "by": {HOSTILE: 1}, "grid": {HOSTILE: {HOSTILE: 1}}}, title="filter")
    with pytest.raises(typer.Exit):
        present(lambda progress: _fail(HOSTILE), print)
    with pytest.raises(typer.Exit):
        present(lambda progress: _fail(HOSTILE), print, as_json=True)
    present(lambda progress: {"name": HOSTILE}, print, as_json=True)
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x9b\u202e\ud800\x07") and "\\x1b[2J" in out and "\\x9b31m" in err
    assert json.loads(out[out.rindex('{\n "name"') :]) == {"name": HOSTILE}


def _fail(text: str) -> dict[str, Any]:
    raise UsageError(text, where=text, hint=text)


def test_a_message_of_megabytes_is_cut(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit):
        present(lambda progress: _fail("x" * 4_000_000), print)
    assert len(capsys.readouterr().err) < 20_000
