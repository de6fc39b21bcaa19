"""How many fetches a process has under way at a time: as many as machine and line bear. Used by http.py."""

from __future__ import annotations

import asyncio
import time
from collections import deque

FEWEST, FIRST = 16, 32  # fetches at a time, however crowded the line; to begin with
CROWDED = 0.05  # share of late answers from hosts that do answer: some URLs are dead without any crowd


class Crowd:
    """So many fetches at a time as machine and line bear: one more with every round that goes well, fewer when
    more than a few answers of hosts that answered a moment ago come too late.
    """

    def __init__(self, most: int) -> None:
        self.allowed = float(min(FIRST, most))
        self._most, self._running = most, 0
        self._cut_at = self._late = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        while self._running >= int(self.allowed):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._running += 1

    async def __aexit__(self, *_: object) -> None:
        self._running -= 1
        for _turn in range(min(len(self._waiting), max(int(self.allowed) - self._running, 0))):
            if not (turn := self._waiting.popleft()).done():
                turn.set_result(None)

    def went_well(self) -> None:
        self._late *= 0.99
        self.allowed = min(self._most, self.allowed + 1 / self.allowed)

    def was_too_late(self) -> None:
        self._late += 0.01 * (1 - self._late)  # a moving share, of about the last hundred answers
        # What was under way together is one sign, not many.
        if self._late > CROWDED and time.monotonic() - self._cut_at > 1:
            self._cut_at = time.monotonic()
            self.allowed = max(FEWEST, 0.7 * self.allowed)
