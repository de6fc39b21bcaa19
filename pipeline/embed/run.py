"""The embed stage while it runs: shards left, what the workers report, what people see of it. Used by embed.py."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..cache.part import PartMeta
from ..core.errors import EclipseError
from .fates import finished
from .tasks import Advanced, Event, ShardDone, ShardFailed, ShardTask, TaskBook

if TYPE_CHECKING:
    from ..core.progress import Progress, Task
    from .lane import LaneSpec

SHOWN_SHARDS = 5


class EmbedRun:
    """One run of the stage over `tasks`. Thread-safe once started.

    ready: called once, when the first encoder is loaded and before anything is written. piece_done: after each part.
    """

    def __init__(
        self,
        tasks: Sequence[ShardTask],
        progress: Progress,
        ready: Callable[[], None],
        piece_done: Callable[[], None] = lambda: None,
    ) -> None:
        self.tasks = tasks
        self.progress = progress
        self.ready, self.piece_done = ready, piece_done
        self.meta: PartMeta | None = None
        self.book = TaskBook([])
        self.embedded = 0
        self.seconds = 0.0
        self.rates: Counter[str] = Counter()
        self._bar: Task | None = None
        self._fatal: str | None = None
        self._lock = threading.Lock()

    def start(self, meta: PartMeta) -> None:
        """Check what is finished against the encoder's `meta`; the rest goes into the book.

        Every worker's meta passes through here: one whose encoder differs from the first's raises EclipseError.
        """
        if self.meta is not None:
            if meta != self.meta:
                raise EclipseError(
                    "workers loaded different encoders",
                    where=f"{meta.encoder}: {meta.encoder_fingerprint[:12]} and {self.meta.encoder_fingerprint[:12]}",
                    hint="make sure that every node has the same weights",
                )
            return
        self.ready()
        left = [task for task in self.tasks if finished(task, meta) is None]
        if len(left) < len(self.tasks):
            self.progress.say(f"{len(self.tasks) - len(left):,} of {len(self.tasks):,} shards are embedded already")
        self.meta, self.book = meta, TaskBook(left)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show progress and measure time for as long as the block runs."""
        started = time.monotonic()
        with self.progress.task("embed", _expected(self.book.tasks), "pictures") as self._bar:
            try:
                yield
            finally:
                self.seconds = time.monotonic() - started

    def here(self, spec: LaneSpec) -> None:
        """Embed in this process, on the CPU."""
        lane = spec.build("cpu")
        self.start(lane.meta)
        with self.bar():
            try:
                lane.run(self.book.wait_for("cpu"), lambda event: self.report(event, "cpu"))
            finally:
                self.book.close()

    def report(self, event: Event, device: str) -> None:
        """Take a worker's event into account."""
        if isinstance(event, Advanced):
            self._advance(event, device)
        elif isinstance(event, ShardDone):
            self.book.done(event.number)
            self.piece_done()
        elif isinstance(event, ShardFailed):
            self.progress.say(f"shard {event.number:05d} failed: {event.error}")
            self.book.failed(event.number, event.error)
            if event.fatal:
                self._fatal = event.error
                self.book.close()

    def lost(self, worker: str, why: str) -> None:
        """A worker died: its shards are tried again."""
        numbers = self.book.lost(worker, why)
        shards = ", ".join(f"{number:05d}" for number in numbers) or "none"
        self.progress.say(f"{worker} {why}; its shards go to another: {shards}")

    def require_complete(self) -> None:
        """Raise EclipseError naming the shards that failed for good, or what made going on useless."""
        if self._fatal:
            raise EclipseError(f"cannot write embeddings: {self._fatal}", hint="finished parts are kept; run it again")
        if given_up := self.book.given_up:
            names = {task.number: task.shard for task in self.tasks}
            shown = [f"{names[n].name}: {why}" for n, why in sorted(given_up.items())[:SHOWN_SHARDS]]
            more = f"\n  and {len(given_up) - SHOWN_SHARDS} more" if len(given_up) > SHOWN_SHARDS else ""
            raise EclipseError(
                f"{len(given_up)} of {len(self.tasks)} shards could not be embedded",
                where="\n  ".join(shown) + more,
                hint="the others are kept; repair or move these away, then run it again",
            )
        if self.book.left:
            raise EclipseError("no worker is left", hint="the finished parts are kept; run it again")

    def _advance(self, event: Advanced, device: str) -> None:
        with self._lock:
            self.embedded += event.pictures
            self.rates[device] += event.pictures
        if self._bar is None:
            return
        self._bar.advance(event.pictures + event.rejected, failures=event.rejected)
        if len(self.rates) > 1:
            seconds = max(time.monotonic() - self._bar.started_at, 1e-9)
            self._bar.describe(", ".join(f"{name} {n / seconds:,.0f}/s" for name, n in sorted(self.rates.items())))


def _expected(tasks: Sequence[ShardTask]) -> int | None:
    """Pictures in these shards by their own counts; None if a shard has none."""
    counts = [task.shard.expected() for task in tasks]
    return None if None in counts else sum(count or 0 for count in counts)
