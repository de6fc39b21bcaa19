"""Forks one `eclipse` command after the other, in a process that has imported what they need. Started by faults.py."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn


def child(job: dict[str, Any]) -> NoReturn:
    """Be the command: its standard outputs go to a file, its exit code is this process's."""
    from ..cli import app

    descriptor = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    sys.argv = ["eclipse", *job["arguments"]]
    code, before = 1, set(sys.modules)
    try:
        app(job["arguments"])
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    Path(job["imported"]).write_text("\n".join(name for name in sys.modules if name not in before))
    os._exit(code)


def draw_nothing() -> None:
    """Pages are still written, without what takes most of a small run's time."""
    from markupsafe import Markup

    from ..pipeline.report import charts

    for name, drawn in vars(charts).items():
        if inspect.isfunction(drawn) and not name.startswith("_"):
            setattr(charts, name, lambda *_, **__: Markup("<svg></svg>"))


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child_pid in map(int, task.read_text().split()):
                found += [child_pid, *descendants(child_pid)]
    return found


def wait(pid: int, timeout_s: float, signals: list[tuple[float, str, int]]) -> int | None:
    """The exit code of a child, negative for a signal; None if it took too long and was killed. Sends the signals."""
    began, left = time.monotonic(), list(signals)
    deadline = began + timeout_s
    while True:
        if left and time.monotonic() - began >= left[0][0]:
            _, whom, number = left.pop(0)
            for each in [pid] if whom == "main" else descendants(pid)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, number)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def main() -> None:
    """One job a line in, one exit code a line out, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    draw_nothing()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        answers.write(json.dumps(wait(pid, job["timeout_s"], job["signals"])) + "\n")
        imported = Path(job["imported"])
        if imported.exists():  # so that the next run finds it
            for name in imported.read_text().splitlines():
                with contextlib.suppress(Exception):
                    import_module(name)
            imported.unlink()


if __name__ == "__main__":
    main()
