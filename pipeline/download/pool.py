"""The desk of `download`'s worker processes: hands out shards, hears what became of them. Used by stage.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..core.errors import EclipseError
from ..core.pool import Place, Pool, Processes
from .worker import Event, FetchSpec, Order, Outage, Rows, shard_name

TRIES = 2  # a shard whose process dies is begun again once


class Fetchers:
    """The worker processes of one download. The first starts at once, since importing img2dataset takes seconds.

    say: for what people should know while it runs. asked_wait_s: the longest rest that a server has asked for.
    """

    def __init__(self, spec: FetchSpec, say: Callable[[str], None]) -> None:
        self.spec, self._say = spec, say
        self.asked_wait_s = 0.0
        self._orders: Iterator[Order] = iter(())
        self._advance: Callable[[int, int], None]
        self._exhausted = False
        self._again: list[Order] = []
        self._held: dict[str, dict[int, Order]] = {}  # by worker
        self._deaths: dict[int, int] = {}
        self._counted: dict[int, tuple[int, int]] = {}
        self._pool = Pool(Processes(spec, log=Path(spec.log)), self, [Place("process 1")])

    def __enter__(self) -> Fetchers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()

    def fetch(self, orders: Iterable[Order], *, workers: int, advance: Callable[[int, int], None]) -> None:
        """Download and commit shards whose rows lie in their work folders; `orders` is read as workers become free.

        advance(rows, failures) is told as rows are tried, negative numbers when a worker died and a shard begins
        again. Raises EclipseError for a full disk, for a shard that fails for good, and when nothing answers.
        """
        self._orders, self._advance, self._exhausted = iter(orders), advance, False
        self._pool.add(Place(f"process {n}") for n in range(len(self._pool.names) + 1, workers + 1))
        self._pool.until(lambda: self._exhausted and not self._again and not any(self._held.values()))

    def ready(self, worker: str, meta: None) -> None:
        """It has imported what it needs; there is nothing to compare."""

    def take(self, worker: str) -> Order | None:
        """A shard for `worker`: a second one once every other has its first, since two shards are for two processes."""
        held = self._held.setdefault(worker, {})
        if held and not all(self._held.get(name) for name in self._pool.names):
            return None
        order = self._again.pop() if self._again else next(self._orders, None)
        if order is None:
            self._exhausted = True
        else:
            held[order.shard] = order
        return order

    def report(self, worker: str, event: Event) -> None:
        if isinstance(event, Rows):
            done, failed = self._counted.get(event.shard, (0, 0))
            self._counted[event.shard] = done + event.done, failed + event.failed
            self._advance(event.done, event.failed)
        elif isinstance(event, Outage):
            waits = f"nothing answers any more: waiting, for {self.spec.client.patience_s:g} s at most"
            self._say(waits if event.waiting else "fetching goes on")
        elif isinstance(event, EclipseError):
            raise event
        else:
            self.asked_wait_s = max(self.asked_wait_s, event.asked_wait_s)
            del self._held[worker][event.shard]

    def lost(self, worker: str, why: str) -> None:
        """It ended by itself: out of memory, or killed. Its shards are for whoever is free."""
        for shard, order in self._held.pop(worker, {}).items():
            self._deaths[shard] = self._deaths.get(shard, 0) + 1
            if self._deaths[shard] == TRIES:
                raise EclipseError(
                    "the process that downloads died twice over this shard",
                    where=f"shard {shard_name(shard)}: it {why}",
                    hint=f"see {self.spec.log}; the machine may be out of memory",
                )
            done, failed = self._counted.pop(shard, (0, 0))
            self._advance(-done, -failed)
            self._again.append(order)
