"""The embed stage while it runs: shards left, what the workers report, what people see of it. Used by stage.py."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..cache.part import PartMeta
from ..core.errors import EclipseError
from ..core.pool import Actors, Place, Pool, Processes
from .fates import finished
from .tasks import Advanced, Event, ShardDone, ShardFailed, ShardTask, TaskBook

if TYPE_CHECKING:
    from ..core.progress import Progress, Task
    from .lane import LaneSpec

SHOWN_SHARDS = 5


class EmbedRun:
    """One run of the stage over `tasks`, and the desk of its workers. Thread-safe once started.

    begin: called once, when the first encoder is loaded and before anything is written. piece_done: after each part.
    """

    def __init__(
        self,
        tasks: Sequence[ShardTask],
        progress: Progress,
        begin: Callable[[], None],
        piece_done: Callable[[], None] = lambda: None,
    ) -> None:
        self.tasks = tasks
        self.progress = progress
        self.begin, self.piece_done = begin, piece_done
        self.meta: PartMeta | None = None
        self.book = TaskBook([])
        self.embedded = 0
        self.seconds = 0.0
        self.rates: Counter[str] = Counter()
        self._bar: Task | None = None
        self._fatal: str | None = None
        self._lock = threading.Lock()

    def ready(self, worker: str, meta: PartMeta) -> None:
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
        self.begin()
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
        self.ready("cpu", lane.meta)
        with self.bar():
            try:
                lane.run(self.book.wait_for("cpu"), lambda event: self.report("cpu", event))
            finally:
                self.book.close()

    def by(self, transport: Processes | Actors, places: Sequence[Place]) -> None:
        """Embed by workers, one in each place, until the shards are finished or no worker is left."""
        with Pool(transport, self, places) as pool:
            pool.until(lambda: self.meta is not None)
            with self.bar():
                pool.until(lambda: self.book.finished)

    def take(self, worker: str) -> ShardTask | None:
        """The next shard for `worker`, if there is one for it now."""
        return self.book.take(worker)

    def report(self, worker: str, event: Event) -> None:
        """Take a worker's event into account."""
        if isinstance(event, Advanced):
            self._advance(event, worker)
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
        self.progress.say(f"the worker on {worker} {why}; its shards go to another: {shards}")

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

    def _advance(self, event: Advanced, worker: str) -> None:
        with self._lock:
            self.embedded += event.pictures
            self.rates[worker] += event.pictures
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
