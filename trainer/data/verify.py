"""Checks the pages that training reads while it already runs; nothing is kept of what it learns before. For loop.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ...pipeline.cache.store import Store

READ = (
    "image_embedding",
    "text_embedding",
    "n_tokens",
    "text_states",
)  # in place, past the Parquet library's own check
POLL_S = 0.1
GRACE_S = 5.0  # a scheduler that asks a process to stop gives it some thirty seconds


class PageCheck:
    """Compares the checksum of every page that a run reads with the one written beside it, in a thread.

    Training may begin before that is done, if only no checkpoint is made before: a cache far larger than memory would
    otherwise be read once more before the first step. Several processes share the parts. failure: what was found.
    """

    def __init__(self, store: Store, *, rank: int = 0, world_size: int = 1) -> None:
        self.failure: BaseException | None = None
        self._store, self._share = store, (rank, world_size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, told_to_stop: Callable[[], bool]) -> None:
        """Come back when all is checked, or some seconds after `told_to_stop()` is true."""
        patience = GRACE_S
        while self.running and patience > 0:
            self._thread.join(POLL_S)
            patience -= POLL_S if told_to_stop() else 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._store.verify(columns=READ, share=self._share, stopped=self._closed.is_set)
        except BaseException as error:  # raised where training waits for it
            self.failure = error
