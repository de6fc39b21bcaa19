"""Tells a network that is out from URLs that are dead: an outage is no result. Used by http.py.

A URL to which there is no connection may be dead, or everything may be. Such failures are held back until something
answers (then they are results), or until there are so many in a row that URLs which were fine before are asked. If
these are silent too, all fetching waits, and what was held back is tried again once anything answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

SILENT_LIMIT = 50  # failures in a row; of hosts of which even half are dead, so many are silent once in 10^15
KNOWN = 4  # hosts that are asked whether they still answer
LONGEST_WAIT_S = 30.0


class OutageError(Exception):
    """Nothing has answered for as long as the card is patient."""


class Outage:
    """What is known of the network; for one event loop.

    probe(url) says whether anything answers there. known: URLs that were fine before. said(waiting) is told when the
    waiting begins and when fetching goes on. in_flight() counts the fetches that may still be answered.
    """

    def __init__(
        self,
        probe: Callable[[str], Awaitable[bool]],
        patience_s: float,
        known: Iterable[str],
        said: Callable[[bool], None],
        in_flight: Callable[[], int],
    ) -> None:
        self._probe, self._patience_s, self._said, self._in_flight = probe, patience_s, said, in_flight
        self._known: dict[str, str] = {}  # by host, the latest last
        for url in known:
            self._remember(url)
        self._silent: deque[str] = deque(maxlen=SILENT_LIMIT)
        self._failures = 0  # in a row
        self._verdict: asyncio.Future[bool] | None = None
        self._judging: asyncio.Task[None] | None = None
        self._out = False
        self._alive = asyncio.Event()  # something answered since it was last cleared
        self._gate: deque[asyncio.Future[None]] = deque()  # fetches that wait while everything is out
        self._given_up = False

    async def passed(self) -> None:
        """Wait while everything is out. Raises OutageError once patience is over."""
        while self._out:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._gate.append(turn)
            await turn
            if self._out:  # let through, to see whether this one is answered
                return
        if self._given_up:
            raise OutageError

    def answered(self, url: str, *, fine: bool) -> None:
        """Somebody answered, if only with an error: what was held back is a result. fine: with a picture's bytes."""
        if fine:
            self._remember(url)
        self._failures = 0
        self._alive.set()
        if not self._out:  # else what is held back is tried again, since the judge finds out now
            self._silent.clear()
            self._decide(False)

    async def held_back(self, url: str) -> bool:
        """Call after a failure without a connection: True if it is to be tried again, False if it is a result."""
        self._failures += 1
        self._silent.append(url)
        if self._verdict is None:
            self._verdict = asyncio.get_running_loop().create_future()
        verdict = self._verdict
        if self._judging is None and (self._failures >= SILENT_LIMIT or self._in_flight() == 0):
            self._judging = asyncio.create_task(self._judge())
        again = await verdict
        await self.passed()
        return again

    def _decide(self, again: bool) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(again)
        self._verdict = None

    def _remember(self, url: str) -> None:
        host = urlsplit(url).netloc
        self._known.pop(host, None)
        self._known[host] = url
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    async def _judge(self) -> None:
        """Ask what was fine before; while it is silent, hold everything, and ask again with growing pauses."""
        try:
            if self._failures < SILENT_LIMIT:
                await asyncio.sleep(0.2)
                if self._in_flight():  # more has come: its fate says more
                    return
            self._alive.clear()
            if await self._anything(list(self._known.values())) or self._alive.is_set():
                self._failures = 0
                self._decide(False)
                return
            self._out = True
            self._said(True)
            deadline, wait = time.monotonic() + self._patience_s, 0.5
            while not self._alive.is_set() and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._alive.wait(), min(left, wait * random.uniform(0.5, 1.5)))
                wait = min(2 * wait, LONGEST_WAIT_S)
                self._let_through(KNOWN)
                silent = random.sample(list(self._silent), min(len(self._silent), KNOWN))
                if await self._anything([*self._known.values(), *silent]):
                    self._alive.set()
            self._given_up = not self._alive.is_set()
            self._out, self._failures = False, 0
            self._silent.clear()
            if not self._given_up:
                self._said(False)
            self._let_through(len(self._gate))
            self._decide(True)
        finally:
            self._judging = None

    def _let_through(self, most: int) -> None:
        for _ in range(min(most, len(self._gate))):
            if not (turn := self._gate.popleft()).done():
                turn.set_result(None)

    async def _anything(self, urls: list[str]) -> bool:
        """Whether any of these answers; the first to do so ends the asking."""
        tasks = [asyncio.create_task(self._probe(url)) for url in urls]  # type: ignore[arg-type]
        try:
            for done in asyncio.as_completed(tasks):
                if await done:
                    return True
            return False
        finally:
            for task in tasks:
                task.cancel()
