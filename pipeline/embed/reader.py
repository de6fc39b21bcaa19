"""The start of a lane: a thread that reads shards ahead of the encoder and has samples decoded. Used by lane.py."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from ..images.decode import Sample
from ..images.rejects import Reject
from .tasks import ShardTask
from .writer import Row, Shard

GROUP = 32  # pictures that one thread decodes at a time: keeps the queue's cost off the single picture

Group = tuple[Shard, "Future[list[Row | Reject]] | None"]


class LaneReader:
    """Reads shards and starts the decoding of their samples, at most `ahead` groups before the encoder.

    Iterating gives (shard, group being decoded) in order, and (shard, None) at a shard's end.
    """

    def __init__(
        self,
        tasks: Iterable[ShardTask],
        start: Callable[[list[Sample | Reject]], Future[list[Row | Reject]]],
        ahead: int,
    ) -> None:
        self._tasks = tasks
        self._start = start
        self._room = threading.Semaphore(ahead)
        self._groups: queue.Queue[Group | BaseException | None] = queue.Queue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="read")

    def __enter__(self) -> LaneReader:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._room.release(2)  # a reader that waits for room goes on, and stops

    def __iter__(self) -> LaneReader:
        return self

    def __next__(self) -> Group:
        item = self._groups.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        if item[1] is not None:
            self._room.release()
        return item

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
        items: list[Sample | Reject] = []
        for item in shard.task.shard.samples() if shard.error is None else ():
            shard.fate.inputs += 1
            items.append(item)
            if len(items) == GROUP:
                self._submit(shard, items)
                items = []
            if self._stopped:
                return
        if items:
            self._submit(shard, items)

    def _submit(self, shard: Shard, items: list[Sample | Reject]) -> None:
        self._room.acquire()
        if not self._stopped:
            self._groups.put((shard, self._start(items)))
