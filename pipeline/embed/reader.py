"""The start of a lane: a thread that reads shards ahead of the encoder and has samples decoded. Used by lane.py."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from ..images.decode import Sample
from ..images.rejects import Reject
from ..images.shards import ImageShard
from .tasks import ShardTask
from .writer import Picture, Shard

GROUP = 32  # pictures that one thread decodes at a time: keeps the queue's cost off the single picture
GROUP_BYTES = 8 << 20  # of files in a group, unless one alone is larger
BYTES_AHEAD = 256 << 20  # of files read and not decoded yet: members may have 256 MB each, and groups are many

Items = list[Sample | Reject]
Group = tuple[Shard, "Future[list[Picture | Reject]] | None"]


def groups_of(shard: ImageShard) -> Iterator[Items]:
    """What a shard holds, in order, GROUP or GROUP_BYTES at a time."""
    items: Items = []
    size = 0
    for item in shard.samples():
        length = len(item.data) if isinstance(item, Sample) else 0
        if items and (len(items) == GROUP or size + length > GROUP_BYTES):
            yield items
            items, size = [], 0
        items.append(item)
        size += length
    if items:
        yield items


class LaneReader:
    """Reads shards and starts the decoding of their samples, at most `ahead` groups before the encoder.

    Iterating gives (shard, group being decoded) in order, and (shard, None) at a shard's end. Of files that are read
    and not decoded yet it holds at most BYTES_AHEAD, or one group if that alone is larger. read: how it comes by a
    shard's groups, in its thread.
    """

    def __init__(
        self,
        tasks: Iterable[ShardTask],
        start: Callable[[Items], Future[list[Picture | Reject]]],
        ahead: int,
        read: Callable[[ImageShard], Iterable[Items]] = groups_of,
    ) -> None:
        self._tasks = tasks
        self._start = start
        self._read_groups = read
        self._ahead = ahead
        self._count = self._bytes = 0  # groups not taken by the encoder, bytes not decoded
        self._changed = threading.Condition()
        self._groups: queue.Queue[Group | BaseException | None] = queue.Queue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="read")

    def __enter__(self) -> LaneReader:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._less(0, 0)  # a reader that waits for room goes on, and stops

    def __iter__(self) -> LaneReader:
        return self

    def __next__(self) -> Group:
        item = self._groups.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        if item[1] is not None:
            self._less(1, 0)
        return item

    def fail(self, error: BaseException) -> None:
        """Raise this from `__next__`, though it may be waiting for shards."""
        self._groups.put(error)

    def _run(self) -> None:
        try:
            for task in self._tasks:
                shard = Shard.begin(task)
                try:
                    self._read(shard)
                except Exception as error:
                    shard.error = error
                if self._stopped:
                    return
                self._groups.put((shard, None))
            self._groups.put(None)
        except BaseException as error:
            self._groups.put(error)

    def _read(self, shard: Shard) -> None:
        for items in self._read_groups(shard.task.shard) if shard.error is None else ():
            shard.fate.inputs += sum(len(item.captions) if isinstance(item, Sample) else 1 for item in items)
            self._submit(shard, items)
            if self._stopped:
                return

    def _submit(self, shard: Shard, items: Items) -> None:
        size = sum(len(item.data) for item in items if isinstance(item, Sample))
        with self._changed:
            while not self._stopped and (
                self._count >= self._ahead or (self._bytes and self._bytes + size > BYTES_AHEAD)
            ):
                self._changed.wait()
            self._count += 1
            self._bytes += size
        if not self._stopped:
            group = self._start(items)
            group.add_done_callback(lambda _: self._less(0, size))
            self._groups.put((shard, group))

    def _less(self, count: int, size: int) -> None:
        with self._changed:
            self._count -= count
            self._bytes -= size
            self._changed.notify_all()
