"""Ctrl-C and SIGTERM as exceptions, each raised once. Used by console.py, and by the training loop, which stops itself.

They unwind whatever the main thread is in. A library in C that is calling Python just then may drop the exception and
raise one of its own, as matplotlib does ("Invalid affine transformation matrix"): that is still the stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from .errors import Terminated

INTERRUPTED = 130
PATIENCE_S = 2.0  # for how long after a first Ctrl-C further ones are taken for the same one


class Interrupts:
    """What Ctrl-C does: the first one raises KeyboardInterrupt, and what follows within a moment is the same one.

    Raised again while the first unwinds through libraries' threads, it would abort in C++ or leave half-written files.
    One that comes later is impatience: it ends the process as `kill -9` would, which every stage recovers from.
    """

    def __init__(self, end_at_once: Callable[[], object]) -> None:
        self.since: float | None = None
        self.raised = False
        self._end_at_once = end_at_once
        self._owner = os.getpid()

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a forked worker: one interrupt is the end of it
            raise KeyboardInterrupt
        if self.since is None:
            self.took()
            self.raised = True
            raise KeyboardInterrupt
        if time.monotonic() - self.since > PATIENCE_S:
            os.write(2, b"error: ended at once; run the same command again to continue\n")
            self._end_at_once()
            os._exit(INTERRUPTED)

    def took(self) -> None:
        """Note that an interrupt came; a stage that stops by itself, as training does, says so."""
        self.since = time.monotonic() if self.since is None else self.since


class Termination:
    """What SIGTERM does: the first one raises Terminated, further ones nothing."""

    def __init__(self, hint: str) -> None:
        self.raised = False
        self.hint = hint
        self._owner = os.getpid()

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a forked worker inherits the handler, not the duty
            os._exit(128 + number)
        if not self.raised:
            self.raised = True
            raise Terminated("stopped by SIGTERM", hint=self.hint)


def asked_to_stop() -> bool:
    """Whether a signal was raised as an exception in this process, so that what unwinds now comes of it."""
    handlers = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    return any(handler.raised for handler in handlers if isinstance(handler, Interrupts | Termination))


@contextlib.contextmanager
def one_termination(hint: str) -> Iterator[None]:
    """SIGTERM raises Terminated once while the block runs, so that stages clean up and save. hint: how to go on."""
    termination = Termination(hint)
    try:
        before = signal.signal(signal.SIGTERM, termination)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    except Exception as error:
        if termination.raised:
            raise Terminated("stopped by SIGTERM", hint=hint) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_interrupt(end_at_once: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once while the block runs. end_at_once: called before an impatient end."""
    interrupts = Interrupts(end_at_once)
    try:
        before = signal.signal(signal.SIGINT, interrupts)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    except Exception as error:
        if interrupts.raised:
            raise KeyboardInterrupt from error
        raise
    finally:
        # After one the process is ending, and Python itself would take another for the default, death by signal.
        signal.signal(signal.SIGINT, before if interrupts.since is None else signal.SIG_IGN)
