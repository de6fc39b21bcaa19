"""The workspace: its directory contract, its lock, and its stages. Used by every stage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from .card import STAGES, Card
from .card_file import CARD_NAME
from .errors import EclipseError, UsageError
from .files import TEMPORARIES, remove
from .stage import Stage, settle

TAKING_S = 0.5  # patience for a lock that `status` holds for a moment


class Workspace:
    """One directory with everything that a card produces. Looking creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.card_path = self.root / CARD_NAME
        self.images = self.root / "images"
        self.embeddings = self.root / "embeddings"
        self.rejected = self.root / "rejected.parquet"
        self.selection = self.root / "selection.parquet"
        self.prior = self.root / "prior"
        self.renders = self.root / "renders"
        self.reports = self.root / "reports"
        self.logs = self.root / "logs"

    @classmethod
    def create(cls, root: Path, card: Card) -> Workspace:
        """Make `root` a workspace for `card`; one that already holds this very card is opened as it is."""
        ws = cls(root)
        if ws.card_path.exists():
            ws.require_card(card)
            return ws
        if ws.root.exists() and not ws.root.is_dir():
            raise UsageError("this is a file, not a directory", where=str(ws.root), hint="name another directory")
        ws.root.mkdir(parents=True, exist_ok=True)
        card.dump(ws.card_path)
        return ws

    @classmethod
    def open(cls, root: Path | None) -> Workspace:
        """Open the workspace in `root` (None: the current directory)."""
        ws = cls(Path.cwd() if root is None else root)
        if not ws.card_path.is_file():
            raise UsageError(
                "no workspace here",
                where=f"{ws.root} has no {CARD_NAME}",
                hint="make one with `eclipse init shapes DIR`, or name one with -w DIR",
            )
        return ws

    @cached_property
    def card(self) -> Card:
        return Card.load(self.card_path)

    def require_card(self, card: Card) -> None:
        """Raise UsageError naming the keys in which `card` differs from this workspace's own."""
        if changes := self.card.differences(card):
            raise UsageError(
                f"card {card.name!r} differs from this workspace's: {'; '.join(changes[:5])}"
                + (f"; and {len(changes) - 5} more" if len(changes) > 5 else ""),
                where=str(self.card_path),
                hint="leave --card out, edit eclipse.yaml, or use another workspace (-w DIR)",
            )

    @contextmanager
    def lock(self, stage: str) -> Iterator[None]:
        """Hold the workspace for `stage`. A second process gets an EclipseError with stage, pid and host of the first.

        The kernel drops the lock with the process that took it, however that ends; forked children give up their copy.
        """
        if str(self.root) in _held.values():  # by this very process: a stage within a command that holds it already
            yield
            return
        try:
            # Never through a symbolic link: what it points to would be truncated.
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise EclipseError(f"cannot lock the workspace: {error.strerror}", where=str(self.root)) from error
        try:
            _take(descriptor, self.root)
            holder = {"stage": stage, "pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            _held[descriptor] = str(self.root)
            self._sweep()
            yield
        finally:
            if _held.pop(descriptor, None):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def holder(self) -> str | None:
        """Who holds the lock (stage, pid, host, since), or None."""
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return _holder_text(descriptor)
        finally:
            os.close(descriptor)

    def stage(
        self,
        name: str,
        *,
        overwrite: bool = False,
        go_on: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Stage:
        """The context in which the stage `name` runs, and what it has on record: see stage.py."""
        return Stage(self, name, overwrite=overwrite, go_on=go_on, options=options)

    def _sweep(self) -> None:
        """Put in order, and remove half-written, what a killed process left; for the holder of the lock alone."""
        for name in STAGES:
            settle(self, name)
        deep = (self.prior, self.renders, self.reports, self.logs)
        flat = (self.root, self.images, self.embeddings)  # nothing but files lies there, and very many
        for folder, pattern in [*((f, "**/") for f in deep), *((f, "") for f in flat)]:
            for leftover in list(folder.glob(f"{pattern}{TEMPORARIES}")):
                remove(leftover)


_held: dict[int, str] = {}  # descriptors of the locks this process holds, and of which workspace


def _release_in_child() -> None:
    # A lock belongs to the open file, which fork shares: an orphaned pool would hold a dead parent's workspace.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _take(descriptor: int, root: Path) -> None:
    deadline = time.monotonic() + TAKING_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise EclipseError(f"cannot lock the workspace: {error.strerror}", where=str(root)) from error
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        raise EclipseError(
            f"the workspace is in use by {_holder_text(descriptor)}",
            where=str(root),
            hint="wait for it, or stop it, and try again",
        )


def _holder_text(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"{holder['stage']}, pid {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
