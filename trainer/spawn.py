"""Starts one process a GPU of this machine and waits for all, as torchrun does on several. Called by stage.py."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ..pipeline.core.errors import EclipseError, Terminated
from .distributed import LostProcessError

GRACE_S = 30.0  # for the others to notice that one of them failed


def spawn(work: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """Call `work(*arguments)` in `count` new processes that find each other through the environment.

    Returns what rank 0 returned. SIGTERM and Ctrl-C are passed on, and all are waited for. An EclipseError, Terminated
    or KeyboardInterrupt of a process is raised here; any other failure as RuntimeError with its traceback.
    """
    context = mp.get_context("spawn")
    outcomes = context.SimpleQueue()
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    workers = [context.Process(target=_worker, args=(work, outcomes, place, arguments)) for place in places]
    with _passing_on_signals(workers) as received:
        for worker in workers:
            worker.start()
        reports = _collect(workers, outcomes)
    if received and not isinstance(reports[0], dict):
        raise KeyboardInterrupt if received[0] == signal.SIGINT else Terminated("training was stopped")
    failures = [reports[rank] for rank in sorted(reports) if isinstance(reports[rank], BaseException)]
    # One process's failure breaks the others' connections: what was meant for the user explains those.
    for kind in (EclipseError, KeyboardInterrupt, BaseException):
        for failure in failures:
            if isinstance(failure, kind) and not isinstance(failure, LostProcessError):
                raise failure
    for failure in failures:
        raise failure
    return reports[0]


def _worker(work: Callable[..., Any], outcomes: Any, place: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.update(place)
    rank = int(place["RANK"])
    try:
        outcome = work(*arguments)
    except (EclipseError, Terminated, KeyboardInterrupt) as error:
        outcome = error
    except Exception:
        outcome = RuntimeError(f"process {rank} failed:\n{traceback.format_exc()}")
    outcomes.put((rank, outcome))
    if isinstance(outcome, BaseException):
        os._exit(1)  # a process group torn down in mid-air may hang in its destructors


def _collect(workers: list[SpawnProcess], outcomes: Any) -> dict[int, Any]:
    """What each rank returned or raised. Once one has failed, the others get GRACE_S to end by themselves."""
    reports: dict[int, Any] = {}
    deadline = float("inf")
    while alive := [worker for worker in workers if worker.exitcode is None]:
        wait([worker.sentinel for worker in alive], timeout=0.5)
        while not outcomes.empty():
            rank, outcome = outcomes.get()
            reports[rank] = outcome
        if deadline == float("inf") and any(worker.exitcode not in (None, 0) for worker in workers):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for worker in alive:
                worker.kill()
    while not outcomes.empty():
        rank, outcome = outcomes.get()
        reports[rank] = outcome
    for rank, worker in enumerate(workers):
        if rank not in reports:
            reports[rank] = EclipseError(
                f"training process {rank} ended without a word, exit code {worker.exitcode}",
                hint="if it was killed for memory, lower train.microbatch; run `eclipse train` again to continue",
            )
    return reports


@contextmanager
def _passing_on_signals(workers: list[SpawnProcess]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT reach the workers, which save and end; this process waits for them. Yields what came."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for worker in workers:
            if worker.pid is not None and worker.exitcode is None:
                os.kill(worker.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
