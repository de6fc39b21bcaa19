"""Worker processes for `download`: hands shards to worker.py, replaces one that dies, ends all with the stage."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import EclipseError
from .worker import SHARDS_AT_A_TIME, FetchSpec, shard_name

TRIES = 2  # a shard whose process dies is begun again once
Event = dict[str, Any]
Order = tuple[int, dict[int, str]]  # a shard, and user:password of its URLs that have one, by their place in it


class Fetchers:
    """The worker processes of one download. The first starts at once, since importing img2dataset takes seconds.

    say: for what people should know while it runs. asked_wait_s: the longest rest that a server has asked for.
    """

    def __init__(self, spec: FetchSpec, say: Callable[[str], None]) -> None:
        self.spec, self._say = spec, say
        self.asked_wait_s = 0.0
        self._events: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()
        self._workers = [_Worker(spec, self._events)]
        self._tries: dict[int, int] = {}
        self._counted: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Fetchers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()

    def fetch(self, orders: Iterable[Order], *, workers: int, advance: Callable[[int, int], None]) -> None:
        """Download and commit shards whose rows lie in their work folders; `orders` is read as workers become free.

        advance(rows, failures) is told as rows are tried, negative numbers when a worker died and a shard begins
        again. Raises EclipseError for a full disk, for a shard that fails for good, and when nothing answers.
        """
        waiting = iter(orders)
        self._workers += [_Worker(self.spec, self._events) for _ in range(workers - len(self._workers))]
        for _ in range(SHARDS_AT_A_TIME):  # in turn: two shards are for two processes
            for worker in self._workers:
                self._feed(worker, waiting)
        while any(worker.shards for worker in self._workers):
            worker, event = self._events.get()
            if event is None:
                self._replace(worker, advance)
            elif event["event"] == "rows":
                done, failed = self._counted.get(event["shard"], (0, 0))
                self._counted[event["shard"]] = done + event["done"], failed + event["failed"]
                advance(event["done"], event["failed"])
            elif event["event"] == "outage":
                patience = f"{self.spec.client.patience_s:g} s"
                waits = f"nothing answers any more: waiting, for {patience} at most"
                self._say(waits if event["waiting"] else "fetching goes on")
            elif event["event"] == "fault":
                raise self._fault(event)
            else:
                self.asked_wait_s = max(self.asked_wait_s, event["asked_wait_s"])
                del worker.shards[event["shard"]]
                self._feed(worker, waiting)

    def _feed(self, worker: _Worker, orders: Iterator[Order]) -> None:
        if len(worker.shards) < SHARDS_AT_A_TIME and (order := next(orders, None)) is not None:
            worker.give(*order)

    def _replace(self, worker: _Worker, advance: Callable[[int, int], None]) -> None:
        """A worker ended by itself: out of memory, or killed. Its shards go to a fresh one."""
        worker.kill()
        self._workers.remove(worker)
        fresh = _Worker(self.spec, self._events)
        self._workers.append(fresh)
        for shard, auths in sorted(worker.shards.items()):
            self._tries[shard] = self._tries.get(shard, 1) + 1
            if self._tries[shard] > TRIES:
                raise EclipseError(
                    "the process that downloads died twice over this shard",
                    where=f"shard {shard_name(shard)}",
                    hint=f"see {self.spec.log}; the machine may be out of memory",
                )
            done, failed = self._counted.pop(shard, (0, 0))
            advance(-done, -failed)
            fresh.give(shard, auths)

    def _fault(self, event: Event) -> EclipseError:
        where = f"shard {shard_name(event['shard'])}, in {self.spec.images}"
        if event["errno"] in (errno.ENOSPC, errno.EDQUOT):
            return EclipseError("the disk is full", where=where, hint="make room, and run `eclipse download` again")
        if event["what"] == "outage":
            return EclipseError(
                f"nothing has answered for {self.spec.client.patience_s:g} s: the network or the servers are out",
                where=where,
                hint="finished shards are kept; `eclipse download` goes on when they are back",
            )
        return EclipseError(f"img2dataset failed: {event['what']}", where=where, hint=f"see {self.spec.log}")


class _Worker:
    """One process, and the thread that reads what it reports (None: it ended)."""

    def __init__(self, spec: FetchSpec, events: queue.Queue[tuple[_Worker, Event | None]]) -> None:
        self.shards: dict[int, dict[int, str]] = {}
        # -P: a queue.py in the user's directory must not be taken for Python's own. A session of its own keeps Ctrl-C
        # from it: the parent ends it.
        with Path(spec.log).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"},
            )
        self._write(spec.to_json())
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def give(self, shard: int, auths: dict[int, str]) -> None:
        self.shards[shard] = auths
        self._write(json.dumps({"shard": shard, "auths": auths}))  # a pipe: credentials lie in no file

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: its listener says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _listen(self, events: queue.Queue[tuple[_Worker, Event | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # the last line of a process that was killed
                events.put((self, json.loads(line)))
        events.put((self, None))
