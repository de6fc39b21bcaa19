"""A worker process of `embed`: loads the encoder on one device, embeds the shards it is sent. Started by workers.py."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..core.errors import EclipseError

if TYPE_CHECKING:
    from .lane import LaneSpec
    from .tasks import ShardTask


def main(descriptor: int) -> None:
    """Serve the parent at the other end of this socket until it closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = _Parent(Connection(descriptor))
    spec, device = parent.first()
    try:
        lane = spec.build(device)
    except EclipseError as error:
        parent.send("error", error)
        return
    parent.send("ready", lane.meta)
    lane.run(parent.tasks(), lambda event: parent.send("event", event))


class _Parent:
    """The connection to the parent. A thread listens, so that a parent's death ends this process at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._inbox: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name="listen").start()

    def first(self) -> tuple[LaneSpec, str]:
        return self._inbox.get()

    def tasks(self) -> Iterator[ShardTask]:
        """Shards as the parent hands them out; ends only with the process."""
        while True:
            self.send("next")
            yield self._inbox.get()

    def send(self, kind: str, *content: Any) -> None:
        with self._lock:
            self._connection.send((kind, *content))

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
