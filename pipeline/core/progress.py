"""Progress and messages on standard error: rich bars on a terminal, plain lines elsewhere. Used by every stage."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL_S = 10.0
PROMISED_AT, LATE_S = 0.1, 10.0  # the share of a task that promises its end; how much later, and twice as long, is late
LONGEST_MESSAGE = 4000  # characters; names and values come from data, and data may be of any length
# What a terminal obeys instead of showing: control characters but tab and line end (ESC begins the sequences that move
# the cursor or set the title), the same again as C1, overrides of the writing direction, halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` as it may reach a terminal: control characters spelled out, cut where it is far too long.

    Every message, bar, table and summary goes through here; none of them escapes by itself.
    """
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]}… ({len(text) - LONGEST_MESSAGE:,} more characters)"
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class Task:
    """One counted piece of work. Safe to advance from several threads."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.failures = 0
        self.note = ""
        self.started_at = time.monotonic()
        self.promised_s: float | None = None  # what all of it will take, as its first tenth had it
        self._lock = threading.Lock()

    def advance(self, n: int = 1, *, failures: int = 0) -> None:
        """Count n more units as done, `failures` of them without a result."""
        with self._lock:
            self.done += n
            self.failures += failures
            if self.promised_s is None and self.total and self.done >= self.total * PROMISED_AT:
                self.promised_s = (time.monotonic() - self.started_at) * self.total / self.done
            self._changed()

    def lateness(self) -> str:
        """What to say of a task that took far longer than its first tenth promised; empty for the others."""
        seconds = time.monotonic() - self.started_at
        if self.promised_s is None or seconds < 2 * self.promised_s or seconds < self.promised_s + LATE_S:
            return ""
        return f"{self.title} took {_clock(seconds)}; its first tenth promised {_clock(self.promised_s)}"

    def describe(self, text: str) -> None:
        """Show a short remark beside the bar, such as the current loss."""
        with self._lock:
            self.note = text
            self._changed()

    def _changed(self) -> None:
        """Called under the lock after every change; a quiet task shows nothing."""

    def _close(self) -> None:
        """Called once when the task ends."""


class _PlainTask(Task):
    """Writes a line every few seconds and one at the end."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        super().__init__(title, total, unit)
        self._last_line_at = self.started_at

    def _changed(self) -> None:
        now = time.monotonic()
        if now - self._last_line_at >= PLAIN_INTERVAL_S:
            self._last_line_at = now
            self._write(remaining=True)

    def _close(self) -> None:
        self._write(remaining=False)

    def _write(self, *, remaining: bool) -> None:
        seconds = time.monotonic() - self.started_at
        rate = self.done / seconds if seconds > 0 else 0.0
        of_total = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.title}: {self.done:,}{of_total} {self.unit}", f"{rate:,.1f}/s"]
        if remaining and self.total is not None and rate > 0:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        else:
            parts.append(_clock(seconds))
        if self.failures:
            parts.append(f"{self.failures:,} failed")
        if self.note:
            parts.append(self.note)
        print(printable(", ".join(parts)), file=sys.stderr, flush=True)


class _BarTask(Task):
    """Forwards every change to a rich bar."""

    def __init__(self, title: str, total: int | None, unit: str, bars: Any) -> None:
        super().__init__(title, total, unit)
        self._bars = bars
        self._id = bars.add_task(title, total=total, unit=unit, remarks="", rate="")

    def _changed(self) -> None:
        seconds = time.monotonic() - self.started_at
        rate = f"{self.done / seconds:,.1f} {self.unit}/s" if seconds > 0.2 else ""
        failed = f"[red]{self.failures:,} failed[/red] " if self.failures else ""
        from rich.markup import escape

        self._bars.update(self._id, completed=self.done, rate=rate, remarks=failed + escape(printable(self.note)))

    def _close(self) -> None:
        self._changed()
        self._bars.stop_task(self._id)


class Progress:
    """Where a stage says what it does. Everything goes to standard error: standard output is for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: Any = None
        self._open_tasks = 0

    def say(self, message: str) -> None:
        """Print one message, above the bars if there are any."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(printable(message), markup=False, highlight=False)
        else:
            print(printable(message), file=sys.stderr, flush=True)

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        """A bar with rate, remaining time and failures for as long as the block runs. total None: unknown."""
        task = self._start(title, total, unit)
        self._open_tasks += 1
        try:
            yield task
        finally:
            task._close()
            self._open_tasks -= 1
            if self._open_tasks == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None
            if late := task.lateness():
                self.say(late)

    def _start(self, title: str, total: int | None, unit: str) -> Task:
        if self.quiet:
            return Task(title, total, unit)
        if not sys.stderr.isatty():
            return _PlainTask(title, total, unit)
        if self._bars is None:
            self._bars = _rich_bars()
            self._bars.start()
        return _BarTask(title, total, unit, self._bars)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _rich_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("[cyan]{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remarks]}"),
        console=Console(stderr=True),
    )
