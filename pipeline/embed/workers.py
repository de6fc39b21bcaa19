"""Worker processes, one a device, that embed shards from one queue and are replaced when they die. Used by embed.py."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ..cache.part import PartMeta
from ..core.errors import EclipseError

if TYPE_CHECKING:
    from .lane import LaneSpec
    from .run import EmbedRun

STARTS = 3  # of a worker that dies before it is ready; after that its device is given up
STOP_TIMEOUT_S = 10.0


@dataclass(eq=False)
class Worker:
    """A worker process of this machine. `hungry`: it asked for a shard and has no answer yet."""

    name: str
    device: str
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    hungry: bool = False
    false_starts: int = 0

    @classmethod
    def start(cls, index: int, device: str, spec: LaneSpec, threads: int, false_starts: int = 0) -> Worker:
        """Start a process that loads the encoder on `device`. Its end of the connection is an inherited socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "eclipse.pipeline.embed.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        worker = cls(f"worker {index} ({device})", device, process, Connection(ours.detach()))
        worker.false_starts = false_starts
        worker.send((spec, device))
        return worker

    def send(self, message: Any) -> None:
        """Send, unless it is dead: then its connection's end is noticed soon enough."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def death(self) -> str:
        """What its exit code says, once its connection has ended."""
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"

    def stop(self) -> None:
        self.connection.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_workers(devices: Sequence[str], spec: LaneSpec, run: EmbedRun) -> None:
    """Embed with one process for each device until the shards are finished or no device is left.

    Raises EclipseError if a worker cannot load the encoder, or loads another than its fellows.
    """
    pool = _Pool(devices, spec, run)
    try:
        pool.wait_until_ready()
        with run.bar():
            pool.work()
    finally:
        pool.stop()


class _Pool:
    """The workers and their messages: ("ready", meta), ("next",), ("event", event), ("error", EclipseError)."""

    def __init__(self, devices: Sequence[str], spec: LaneSpec, run: EmbedRun) -> None:
        self._spec = spec
        self._run = run
        self._threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        self._started = len(devices)
        self._workers = [Worker.start(i, device, spec, self._threads) for i, device in enumerate(devices)]

    def wait_until_ready(self) -> None:
        """Until the first worker has said which encoder it loaded."""
        while self._workers and self._run.meta is None:
            self._turn()

    def work(self) -> None:
        while self._workers and not self._run.book.finished:
            self._turn()

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _turn(self) -> None:
        for worker in self._workers:
            if worker.hungry and (task := self._run.book.take(worker.name)) is not None:
                worker.hungry = False
                worker.send(task)
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
            else:
                self._handle(worker, message)

    def _handle(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "ready":
            meta: PartMeta = content[0]
            self._run.start(meta)
            worker.ready = True
        elif kind == "next":
            worker.hungry = True
        elif kind == "event":
            self._run.report(content[0], worker.device)
        elif kind == "error":
            raise content[0]

    def _bury(self, worker: Worker) -> None:
        """Give back a dead worker's shards and put another in its place."""
        self._workers.remove(worker)
        why = worker.death()
        worker.connection.close()
        self._run.lost(worker.name, why)
        false_starts = 0 if worker.ready else worker.false_starts + 1
        if false_starts < STARTS:
            fresh = Worker.start(self._started, worker.device, self._spec, self._threads, false_starts)
            self._workers.append(fresh)
            self._started += 1
        elif not self._workers:
            raise EclipseError(
                f"no worker gets as far as loading the encoder: {worker.name} {why}",
                hint="see what it printed above; `eclipse doctor` checks devices and memory",
            )
