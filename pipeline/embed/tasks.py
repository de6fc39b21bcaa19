"""Which image shards are still to embed, who has them, what becomes of failures. Used by embed.py and its workers."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..images.shards import ImageShard

ATTEMPTS = 3


@dataclass(frozen=True)
class ShardTask:
    """One image shard to embed into one part. `fate`: where older versions kept the account of its inputs."""

    number: int
    shard: ImageShard
    part: Path
    fate: Path
    batch_size: int
    attempt: int = 0


@dataclass(frozen=True)
class Advanced:
    """Some pictures were encoded, some were set aside."""

    pictures: int
    rejected: int


@dataclass(frozen=True)
class ShardDone:
    """The shard's part and its account are on disk."""

    number: int


@dataclass(frozen=True)
class ShardFailed:
    """The shard got no part. `fatal`: no use trying again, such as a full disk."""

    number: int
    error: str
    fatal: bool = False


Event = Advanced | ShardDone | ShardFailed


@dataclass
class TaskBook:
    """Hands out shards and takes them back. Thread-safe.

    A shard that failed, or that a dead worker held, is tried again with half the batch, alone on a worker that holds
    nothing else: so one bad shard cannot spoil its neighbours' retries. After three attempts it is given up.
    """

    tasks: Sequence[ShardTask]
    given_up: dict[int, str] = field(default_factory=dict)
    retries: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._fresh = deque(self.tasks)
        self._again: deque[ShardTask] = deque()
        self._held: dict[int, tuple[str, ShardTask]] = {}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def left(self) -> int:
        """Shards that wait or that somebody holds."""
        return len(self._fresh) + len(self._again) + len(self._held)

    @property
    def finished(self) -> bool:
        """Nothing more will be handed out."""
        return self._closed or self.left == 0

    def take(self, worker: str) -> ShardTask | None:
        """The next shard for `worker`; None: nothing now, though there may be later unless `finished`."""
        with self._changed:
            return self._take(worker)

    def wait_for(self, worker: str) -> Iterator[ShardTask]:
        """Shards for `worker` until all are finished; blocks while only others' unfinished ones are left."""
        while True:
            with self._changed:
                task = self._take(worker)
                while task is None and not self.finished:
                    self._changed.wait()
                    task = self._take(worker)
            if task is None:
                return
            yield task

    def done(self, number: int) -> None:
        with self._changed:
            del self._held[number]
            self._changed.notify_all()

    def failed(self, number: int, error: str) -> None:
        with self._changed:
            self._return(number, error)
            self._changed.notify_all()

    def lost(self, worker: str, why: str) -> list[int]:
        """A worker died: its shards go back. Returns their numbers."""
        with self._changed:
            numbers = [number for number, (holder, _) in self._held.items() if holder == worker]
            for number in numbers:
                self._return(number, why)
            self._changed.notify_all()
            return numbers

    def close(self) -> None:
        """Hand out nothing more; whoever waits is released."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, worker: str) -> ShardTask | None:
        held = [task for holder, task in self._held.values() if holder == worker]
        if self._closed or any(task.attempt for task in held):
            return None
        if self._fresh:
            task = self._fresh.popleft()
        elif self._again and not held:
            task = self._again.popleft()
        else:
            return None
        self._held[task.number] = (worker, task)
        return task

    def _return(self, number: int, error: str) -> None:
        _, task = self._held.pop(number)
        if task.attempt + 1 >= ATTEMPTS:
            self.given_up[number] = error
        else:
            self.retries[number] += 1
            self._again.append(replace(task, attempt=task.attempt + 1, batch_size=max(1, task.batch_size // 2)))
