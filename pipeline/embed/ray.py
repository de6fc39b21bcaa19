"""The shard tasks of `embed` on a Ray cluster: one actor a GPU, or one a node without any. Used by embed.py.

The workspace must lie at the same path on every node (a shared file system): nodes read tars and write parts there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import EclipseError, UsageError
from .tasks import Event, ShardTask

if TYPE_CHECKING:
    from ..cache.part import PartMeta
    from .lane import LaneSpec
    from .run import EmbedRun

STARTS = 3  # of actors that end before they have loaded the encoder; after that their place is given up


@dataclass
class Place:
    """Room for one actor: a GPU of a node, or a node's processors."""

    name: str
    node: str
    options: dict[str, Any]
    device: str
    lanes: int  # places of the same node, which share its processors
    actor: Any = None
    false_starts: int = 0
    ready: bool = False


class ShardActor:
    """Runs in a Ray worker process: loads the encoder once, then embeds one shard a call."""

    def __init__(self, spec: LaneSpec, device: str, root: str) -> None:
        from pathlib import Path

        if not Path(root).is_dir():
            raise EclipseError(
                "this node does not see the workspace", where=root, hint="put it where every node has the same path"
            )
        self._lane = spec.build(device)

    def meta(self) -> PartMeta:
        return self._lane.meta

    def embed(self, task: ShardTask) -> list[Event]:
        """Embed one shard; returns what a local worker would have reported."""
        events: list[Event] = []
        self._lane.run([task], events.append)
        return events


def run_on_ray(address: str, spec: LaneSpec, run: EmbedRun, *, gpus: bool) -> None:
    """Embed on the Ray cluster at `address` (`ray`: the one this machine belongs to) until the shards are finished.

    gpus: use its GPUs, if it has any; one actor a node on its processors otherwise.
    Raises UsageError if Ray is not installed, EclipseError if there is no cluster or no actor can load the encoder.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed", hint="install eclipse-prior[ray]") from error
    try:
        ray.init(address="auto" if address == "ray" else address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise EclipseError(
            f"no Ray cluster: {error}", where=address, hint="start one with `ray start --head`, or leave --cluster out"
        ) from error
    try:
        _Cluster(ray, spec, run, gpus).work()
    finally:
        ray.shutdown()


class _Cluster:
    """The actors and what they are doing: one call in flight for each."""

    def __init__(self, ray: Any, spec: LaneSpec, run: EmbedRun, gpus: bool) -> None:
        self._ray = ray
        self._spec = spec
        self._run = run
        self._root = str(run.tasks[0].part.parent.parent)
        self._calls: dict[Any, Place] = {}
        self._idle: list[Place] = []
        for place in _places(ray.nodes(), gpus):
            self._start(place)

    def work(self) -> None:
        while self._calls and self._run.meta is None:
            self._turn()
        with self._run.bar():
            while not self._run.book.finished and (self._calls or self._idle):
                self._turn()

    def _start(self, place: Place) -> None:
        place.ready = False
        remote = self._ray.remote(ShardActor).options(**place.options)
        # How many threads decode is for the node to say: the driver's own cores are of no matter.
        place.actor = remote.remote(replace(self._spec, lanes=place.lanes), place.device, self._root)
        self._calls[place.actor.meta.remote()] = place

    def _turn(self) -> None:
        """Give every idle actor a shard, then take in the first call that ends."""
        for place in list(self._idle):
            if (task := self._run.book.take(place.name)) is not None:
                self._idle.remove(place)
                self._calls[place.actor.embed.remote(task)] = place
        ended, _ = self._ray.wait(list(self._calls), num_returns=1)
        for call in ended:
            self._take_in(self._calls.pop(call), call)

    def _take_in(self, place: Place, call: Any) -> None:
        try:
            result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:  # raised inside the actor, which lives on
            if isinstance(error.cause, EclipseError):
                raise error.cause from None
            self._replace(place, f"failed: {error.cause}")
            return
        except self._ray.exceptions.RayError as error:
            if isinstance(cause := _creation_error(error), EclipseError):
                raise cause from None
            self._replace(place, f"died: {type(error).__name__}")
            return
        if place.ready:
            for event in result:
                self._run.report(event, place.name)
        else:
            self._run.start(result)
            place.ready = True
        self._idle.append(place)

    def _replace(self, place: Place, why: str) -> None:
        self._run.lost(place.name, why)
        place.false_starts = 0 if place.ready else place.false_starts + 1
        if place.false_starts < STARTS:
            self._start(place)
        elif not self._calls and not self._idle:
            raise EclipseError(f"no actor gets as far as loading the encoder: {place.name} {why}")


def _creation_error(error: Any) -> BaseException | None:
    """What the constructor of an actor raised, if that is why the actor died."""
    cause = getattr(error, "cause", None) or error.__cause__
    return getattr(cause, "cause", cause)


def _places(nodes: list[dict[str, Any]], gpus: bool) -> list[Place]:
    """One for each GPU of the cluster; if it has none or none is wanted, one for each node, with all its processors."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in nodes if node["Alive"]]
    gpus = gpus and any(node["Resources"].get("GPU", 0) >= 1 for node in alive)
    places = []
    for number, node in enumerate(alive):
        pin = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        cores = max(1, int(node["Resources"].get("CPU", 1)))
        count = int(node["Resources"].get("GPU", 0)) if gpus else 1
        for index in range(count):
            threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, cores // count))}}
            options: dict[str, Any] = {**pin, "runtime_env": threads}
            options |= {"num_gpus": 1} if gpus else {"num_cpus": cores}
            name = f"{node['NodeManagerHostname']}/{number} gpu {index}" if gpus else f"node {number}"
            device = "cuda:0" if gpus else "cpu"  # Ray shows it one GPU
            places.append(Place(name, node["NodeID"], options, device, lanes=count))
    return places
