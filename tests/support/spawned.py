"""What the processes of test_trainer_spawn.py do: here, so that they import nothing heavy."""

from __future__ import annotations

import os
import signal
import time

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


def stop_when_told(started: str) -> None:
    def stop(number: int, frame: object) -> None:
        raise Terminated("saved and stopped")

    signal.signal(signal.SIGTERM, stop)
    with open(f"{started}.{os.environ['RANK']}", "w"):  # noqa: PTH123 - a marker, nothing more
        pass
    time.sleep(60)
