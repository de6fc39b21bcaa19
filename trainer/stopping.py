"""SIGTERM and Ctrl-C as flags that the training loop looks at after each step. Used by stage.py and loop.py."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from ..pipeline.core.errors import Terminated
from ..pipeline.core.interrupts import Interrupts


class StopSignals:
    """Collects the first of SIGTERM and SIGINT for as long as the block runs; handlers are put back after it."""

    def __init__(self) -> None:
        self.received: int = 0  # the signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        before = self._before.get(signal.SIGINT)
        if self.received == signal.SIGINT and isinstance(before, Interrupts):
            before.took()  # more of them shall not disturb what follows

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def flags(self) -> list[float]:
        """[SIGTERM, SIGINT] received, as numbers to be averaged over processes.

        A process whose parent has died stops as well: nobody holds the workspace for it any more.
        """
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            self.received = self.received or signal.SIGTERM
        return [float(self.received == number) for number in (signal.SIGTERM, signal.SIGINT)]

    @staticmethod
    def signal_of(flags: list[float]) -> int:
        """The signal that any process received, from the mean of their flags; 0 if none."""
        terminate, interrupt = flags
        return signal.SIGTERM if terminate > 0 else signal.SIGINT if interrupt > 0 else 0


def raise_stopped(number: int, step: int, *, saved: bool = True) -> None:
    """Terminated for SIGTERM, KeyboardInterrupt for SIGINT. saved: whether a checkpoint of this step was written."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if not saved:
        what = f"training was stopped after step {step}, before every embedding was verified: these steps are not kept"
        raise Terminated(what, hint="`eclipse train` continues from the checkpoint before them")
    raise Terminated(f"training was stopped after step {step} and saved", hint="`eclipse train` continues from there")
