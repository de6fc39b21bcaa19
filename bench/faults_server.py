"""Forks one `eclipse` command after the other, everything heavy imported once. Started by faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from importlib import import_module
from typing import Any, NoReturn

HEAVY = (
    "torch", "diffusers", "open_clip", "faiss", "polars", "matplotlib.figure", "torch.utils.tensorboard", "jinja2",
    "scipy.sparse.csgraph", "eclipse.pipeline.download.stage", "eclipse.pipeline.embed.stage",
    "eclipse.pipeline.embed.lane", "eclipse.pipeline.filter.stage", "eclipse.pipeline.report.stages",
    "eclipse.trainer.loop", "eclipse.decode.render", "eclipse.decode.kandinsky", "eclipse.decode.gallery",
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


def wait(pid: int, timeout_s: float) -> int | None:
    """The exit code of a child, negative for a signal; None if it took too long and was killed."""
    deadline = time.monotonic() + timeout_s
    while True:
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
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        answers.write(json.dumps(wait(pid, job["timeout_s"])) + "\n")


if __name__ == "__main__":
    main()
