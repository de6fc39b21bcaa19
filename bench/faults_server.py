"""Forks one `eclipse` command after the other, everything heavy imported once. Started by faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    "eclipse.cli", "eclipse.pipeline.run", "eclipse.pipeline.report.index", "torch", "diffusers", "open_clip",
    "faiss", "polars", "matplotlib.figure", "torch.utils.tensorboard", "jinja2",
    "scipy.sparse.csgraph", "eclipse.pipeline.download.stage", "eclipse.pipeline.embed.stage",
    "eclipse.pipeline.embed.lane", "eclipse.pipeline.filter.stage",
    "eclipse.pipeline.report.download", "eclipse.pipeline.report.embed",
    "eclipse.trainer.stage", "eclipse.decode.render", "eclipse.decode.kandinsky", "eclipse.decode.gallery",
    "eclipse.lab.score",
)  # fmt: skip


def child(job: dict[str, Any]) -> NoReturn:
    """Be the command: its standard outputs go to a file, its exit code is this process's."""
    from ..cli import app

    descriptor = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    sys.argv = ["eclipse", *job["arguments"]]
    code = 1
    try:
        app(job["arguments"])
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _draw_nothing() -> None:
    """Files with drawings in them are still written, without what takes most of a small run's time."""
    from matplotlib.figure import Figure

    def savefig(figure: Figure, file: Any, **options: Any) -> None:
        if isinstance(file, (str, os.PathLike)):
            Path(file).write_bytes(b"a drawing")
        else:
            file.write("<svg></svg>")

    Figure.savefig = savefig


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
    for name in HEAVY:
        with contextlib.suppress(ImportError):  # a module that has moved only costs time
            import_module(name)
    _draw_nothing()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        answers.write(json.dumps(wait(pid, job["timeout_s"], job["signals"])) + "\n")


if __name__ == "__main__":
    main()
