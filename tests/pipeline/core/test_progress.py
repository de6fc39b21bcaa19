"""Progress: plain lines in a log, bars on a terminal, nothing when quiet; never on standard output."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

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
