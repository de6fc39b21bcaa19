"""What the processes of test_trainer_spawn.py do: here, so that they import nothing heavy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from eclipse.pipeline.core.errors import EclipseError, Terminated


def place(offset: int) -> dict[str, int]:
    return {name: int(os.environ[name]) + offset for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise EclipseError("this part is damaged", where="part-00001.parquet")
    raise ConnectionError("lost the other process")


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def die_amid_a_collective() -> None:
    _collective(lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_amid_a_collective() -> None:
    def fail() -> None:
        from eclipse.trainer.distributed import LostProcessError

        raise LostProcessError("as it is on a machine whose peers are elsewhere: nothing more is known")

    _collective(fail)


def _collective(end: Callable[[], None]) -> None:
    import torch
    from eclipse.trainer.distributed import join

    with join(on_cpu=True) as world:
        if world.rank == 1:
            end()
        for _ in range(1000):
            world.mean(torch.zeros(1))


def stop_when_told(started: str) -> None:
    def stop(number: int, frame: object) -> None:
        raise Terminated("saved and stopped")

    signal.signal(signal.SIGTERM, stop)
    with open(f"{started}.{os.environ['RANK']}", "w"):  # noqa: PTH123 - a marker, nothing more
        pass
    time.sleep(60)
