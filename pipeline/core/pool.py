"""Workers that are handed tasks and replaced when they die: processes here, or Ray actors. Used by embed and download.

A stage says what a worker is (`Job`) and who hands out its tasks (`Desk`); how a worker is reached is the transport's:
`Processes` or `Actors`. Either way the same job is built by the same call, under the same environment, and says the
same things: ("ready", what it loaded), ("next", None), ("event", …), ("error", EclipseError), ("dead", why).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from .errors import EclipseError, UsageError

STDERR = 2
STARTS = 3  # of a worker that dies before it is ready; after that its place is given up
Message = tuple[str, Any]


class Service(Protocol):
    """What a job becomes where it runs. meta: what it loaded, for the stage to compare."""

    @property
    def meta(self) -> Any: ...
    def run(self, tasks: Iterable[Any], report: Callable[[Any], None]) -> None: ...


class Job(Protocol):
    """What every worker of a stage is sent, picklable: `sharing` workers use the machine where it is built."""

    def build(self, device: str, sharing: int) -> Service: ...


class Desk(Protocol):
    """Who hands out a stage's tasks and hears of them; called in the thread that runs the pool."""

    def ready(self, worker: str, meta: Any) -> None: ...
    def take(self, worker: str) -> Any | None: ...
    def report(self, worker: str, event: Any) -> None: ...
    def lost(self, worker: str, why: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """Room for one worker. sharing: places of the same machine; options: Ray's, for an actor there."""

    name: str
    device: str = "cpu"
    sharing: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Worker:
    """A worker in its place. `hungry`: it asked for a task and has no answer yet; handle: process, or actor."""

    place: Place
    handle: Any
    line: Any  # where its messages come from: a Connection, or the Ray call under way
    false_starts: int = 0
    ready: bool = False
    hungry: bool = False


class Pool:
    """The workers of one stage. Leaving its context ends them, whatever they are at."""

    def __init__(self, transport: Processes | Actors, desk: Desk, places: Sequence[Place] = ()) -> None:
        self._transport, self._desk = transport, desk
        self._workers: list[Worker] = []
        self.add(places)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._transport.stop(worker)

    def add(self, places: Iterable[Place]) -> None:
        for place in places:
            self._workers.append(self._transport.start(place))

    @property
    def names(self) -> list[str]:
        """The places that have a worker, one that is still starting among them."""
        return [worker.place.name for worker in self._workers]

    def until(self, over: Callable[[], bool]) -> None:
        """Hand out tasks and pass on reports until `over()`, or until no worker is left.

        Raises what the desk raises, an EclipseError of a worker's own, and one if no worker gets as far as ready.
        """
        while True:
            for worker in self._workers:
                if worker.hungry and (task := self._desk.take(worker.place.name)) is not None:
                    worker.hungry = False
                    self._transport.give(worker, task)
            if over() or not self._workers:
                return
            for worker, (kind, content) in self._transport.messages(self._workers):
                if kind == "ready":
                    self._desk.ready(worker.place.name, content)
                    worker.ready = True
                elif kind == "next":
                    worker.hungry = True
                elif kind == "event":
                    self._desk.report(worker.place.name, content)
                elif kind == "error":
                    raise content
                else:
                    self._replace(worker, content)

    def _replace(self, dead: Worker, why: str) -> None:
        """Give back a dead worker's tasks and put another in its place."""
        self._workers.remove(dead)
        self._transport.stop(dead)
        self._desk.lost(dead.place.name, why)
        false_starts = 0 if dead.ready else dead.false_starts + 1
        if false_starts < STARTS:
            self._workers.append(fresh := self._transport.start(dead.place))
            fresh.false_starts = false_starts
        elif not self._workers:
            what = f"no worker gets as far as its first task: {dead.place.name} {why}"
            raise EclipseError(what, hint=self._transport.hint)


def environment(cores: int, sharing: int) -> dict[str, str]:
    """What every worker's process starts with: its share of the cores, and no package that asks the web for news."""
    return {"OMP_NUM_THREADS": str(max(1, cores // sharing)), "NO_ALBUMENTATIONS_UPDATE": "1"}


class Processes:
    """Workers in processes of this machine, each at the other end of a socket that it inherits."""

    def __init__(self, job: Job, *, log: Path | None = None) -> None:
        self._job, self._log = job, log
        self.hint = f"see {log or 'what it printed above'}; `eclipse doctor` checks devices and memory"

    def start(self, place: Place) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as stack:
            # Never our standard output, which may be a summary in JSON.
            out = stack.enter_context(self._log.open("ab")) if self._log is not None else STDERR
            process = subprocess.Popen(
                # -P: a queue.py in the user's directory must not be taken for Python's own.
                [sys.executable, "-P", "-m", "eclipse.pipeline.core.pool", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the parent to take: it ends them
                env={**os.environ, **environment(len(os.sched_getaffinity(0)), place.sharing)},
            )
        worker = Worker(place, process, Connection(ours.detach()))
        self.give(worker, (self._job, place.device, place.sharing))
        return worker

    def give(self, worker: Worker, task: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead: the end of its connection is noticed soon enough
            worker.line.send(task)

    def messages(self, workers: Sequence[Worker]) -> Iterator[tuple[Worker, Message]]:
        """Waits for at least one."""
        by_line = {worker.line: worker for worker in workers}
        for line in wait(list(by_line)):
            worker = by_line[line]
            try:
                yield worker, worker.line.recv()
            except (EOFError, OSError):
                code = worker.handle.wait()
                killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
                yield worker, ("dead", killed)

    def stop(self, worker: Worker) -> None:
        """At once: what it was writing is whole only when committed."""
        worker.line.close()
        worker.handle.kill()
        worker.handle.wait()


def serve(descriptor: int) -> None:
    """The worker's side: serve the process at the other end of this socket until that closes it, or dies."""
    parent, lock = Connection(descriptor), threading.Lock()
    job, device, sharing = parent.recv()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(parent.recv())
        except (EOFError, OSError):
            os._exit(0)  # whatever is under way: nobody waits for it any more

    def send(kind: str, content: Any = None) -> None:
        with lock:
            parent.send((kind, content))

    def tasks() -> Iterator[Any]:
        while True:
            send("next")
            yield inbox.get()

    threading.Thread(target=listen, daemon=True, name="listen").start()
    try:
        service = job.build(device, sharing)
    except EclipseError as error:
        send("error", error)
        return
    send("ready", service.meta)
    service.run(tasks(), lambda event: send("event", event))


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected (`ray`: to the cluster this machine belongs to). UsageError, EclipseError without."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed", hint="install eclipse-prior[ray]") from error
    try:
        ray.init(address="auto" if address == "ray" else address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        hint = "start one with `ray start --head`, or leave --cluster out"
        raise EclipseError(f"no Ray cluster: {error}", where=address, hint=hint) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Actors:
    """Workers in actors of a Ray cluster, one call in flight for each: a call is a task, and returns its events.

    root: a directory that every node must see, since tasks name files in it.
    """

    hint = "`ray logs` has what it printed"

    def __init__(self, ray: Any, job: Job, root: Path) -> None:
        self._ray, self._job, self._root = ray, job, root

    def places(self, *, gpus: bool) -> list[Place]:
        """One for each GPU of the cluster; if it has none or none is wanted, one for each node with all its cores."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        gpus = gpus and any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        places = []
        for number, node in enumerate(nodes):
            cores = max(1, int(node["Resources"].get("CPU", 1)))
            count = int(node["Resources"].get("GPU", 0)) if gpus else 1
            options: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": cores}
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options["runtime_env"] = {"env_vars": environment(cores, max(1, count))}
            for index in range(count):
                name = f"{node['NodeManagerHostname']}/{number} gpu {index}" if gpus else f"node {number}"
                places.append(Place(name, "cuda:0" if gpus else "cpu", count, options))  # Ray shows it one GPU
        return places

    def start(self, place: Place) -> Worker:
        build = self._ray.remote(_Actor).options(**place.options)
        actor = build.remote(self._job, place.device, place.sharing, str(self._root))
        return Worker(place, actor, actor.meta.remote())

    def give(self, worker: Worker, task: Any) -> None:
        worker.line = worker.handle.run.remote(task)

    def messages(self, workers: Sequence[Worker]) -> Iterator[tuple[Worker, Message]]:
        """Waits for at least one call to end."""
        under_way = {worker.line: worker for worker in workers if worker.line is not None}
        for call in self._ray.wait(list(under_way), num_returns=1)[0]:
            worker, worker.line = under_way[call], None
            try:
                result = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                # Raised inside an actor that lives on, or by its constructor; else the actor or its node is gone.
                cause = getattr(error, "cause", None) or error.__cause__
                cause = getattr(cause, "cause", cause)
                said = f"failed: {cause}" if cause is not None else f"died: {type(error).__name__}"
                yield worker, ("error", cause) if isinstance(cause, EclipseError) else ("dead", said)
                continue
            yield from ((worker, message) for message in result)

    def stop(self, worker: Worker) -> None:
        self._ray.kill(worker.handle)


class _Actor:
    """Runs in a Ray worker process: builds the job once, then does one task a call."""

    def __init__(self, job: Job, device: str, sharing: int, root: str) -> None:
        if not Path(root).is_dir():
            hint = "put it where every node has the same path"
            raise EclipseError("this node does not see the workspace", where=root, hint=hint)
        self._service = job.build(device, sharing)

    def meta(self) -> list[Message]:
        return [("ready", self._service.meta), ("next", None)]

    def run(self, task: Any) -> list[Message]:
        """What a process of this machine would have said meanwhile."""
        messages: list[Message] = []
        self._service.run([task], lambda event: messages.append(("event", event)))
        return [*messages, ("next", None)]


if __name__ == "__main__":
    serve(int(sys.argv[1]))
