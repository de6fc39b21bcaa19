"""The workspace: its directory contract, whole-or-nothing files, its lock and its stage states. Used by every stage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EclipseError, UsageError

if TYPE_CHECKING:
    from .card import Card

CARD_NAME = "eclipse.yaml"
TEMPORARY_PREFIX = ".tmp-"
STAGES = ("download", "embed", "filter", "train", "render", "evaluate")
OUTPUTS = {  # what a finished stage leaves for later ones and for people, as patterns below the root
    "download": "images/*.tar",
    "embed": "embeddings/part-*.parquet",
    "filter": "selection.parquet",
    "train": "prior/final/*",
    "render": "renders/default/**/*",
    "evaluate": "reports/evaluate.*",
}


@dataclass(frozen=True)
class StageState:
    """What a finished stage left behind: its fingerprint, its summary, the card it ran with, and its files' sizes."""

    stage: str
    fingerprint: str
    summary: dict[str, Any]
    finished_at: str
    card: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)  # bytes, by path below the workspace

    def __post_init__(self) -> None:
        if not all(isinstance(value, dict) for value in (self.summary, self.card, self.files)):
            raise TypeError("summary, card and files are objects")


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
        from .card import Card

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
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EclipseError(f"cannot lock the workspace: {error.strerror}", where=str(self.root)) from error
        try:
            _take(descriptor, self.root)
            holder = {"stage": stage, "pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            _held.add(descriptor)
            self._sweep()
            yield
            os.ftruncate(descriptor, 0)
        finally:
            _held.discard(descriptor)
            os.close(descriptor)

    def holder(self) -> str | None:
        """Who holds the lock (stage, pid, host, since), or None."""
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return _holder_text(descriptor)
        finally:
            os.close(descriptor)

    def state(self, stage: str) -> StageState | None:
        """The finished state of `stage`, or None."""
        path = self._state_path(stage)
        try:
            return StageState(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise EclipseError(
                f"unreadable stage state: {error}", where=str(path), hint=f"run `eclipse {stage} --overwrite`"
            ) from error

    def completed(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """The stored summary with already_complete set, if `stage` finished with this fingerprint; None: (re)start it.

        None too where a file it left is gone or of another size. Raises EclipseError naming the changed card keys if
        it finished, or began, with another fingerprint. A stage calls this first (unless told to overwrite, when it
        calls `redoing` or `reset`), then `begin`, and `finish` at its end.
        """
        state = self.state(stage)
        if state is not None and state.fingerprint == fingerprint:
            return {**state.summary, "already_complete": True} if self.damage(stage) is None else None
        if state is not None:
            raise self._changed(stage, state.card, "finished")
        begun = self.begun(stage)
        if begun is not None and begun["fingerprint"] != fingerprint:
            raise self._changed(stage, begun["card"], "began")
        return None

    def damage(self, stage: str) -> str | None:
        """Which file that a finished stage left is gone or of another size; None if there is none such."""
        state = self.state(stage)
        for name, size in state.files.items() if state else ():
            path = self.root / name
            if not path.is_file():
                return f"{path} is gone"
            if path.stat().st_size != size:
                return f"{path} is of another size"
        return None

    def require_intact(self, stage: str) -> None:
        """Raise EclipseError if `stage` finished and a file it left is gone or of another size."""
        if (damage := self.damage(stage)) is not None:
            raise EclipseError(
                f"what `eclipse {stage}` made is no longer whole",
                where=damage,
                hint=f"run `eclipse {stage}`: it mends what is missing",
            )

    def begun(self, stage: str) -> dict[str, Any] | None:
        """Fingerprint and card of a stage that began and has not finished, or None."""
        path = self._begun_path(stage)
        try:
            record = json.loads(path.read_text())
            return {"fingerprint": str(record["fingerprint"]), "card": dict(record["card"])}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise EclipseError(
                f"unreadable record of a stage that began: {error}",
                where=str(path),
                hint=f"run `eclipse {stage} --overwrite`",
            ) from error

    def begin(self, stage: str, fingerprint: str) -> None:
        """Record that `stage` started with this fingerprint, so that a resume under another card is noticed."""
        card = self.card.model_dump(mode="json", by_alias=True)
        write_json(self._begun_path(stage), {"fingerprint": fingerprint, "card": card})

    def finish(self, stage: str, fingerprint: str, summary: dict[str, Any]) -> None:
        """Commit the stage: a second run reports this summary, and stages built on it are no longer complete."""
        card = self.card.model_dump(mode="json", by_alias=True)
        for later in _later(stage):
            self._state_path(later).unlink(missing_ok=True)
        left = {str(path.relative_to(self.root)): path.stat().st_size for path in self._left_by(stage)}
        write_json(self._state_path(stage), asdict(StageState(stage, fingerprint, summary, _now(), card, left)))
        self._begun_path(stage).unlink(missing_ok=True)

    def once(
        self, stage: str, fingerprint: str, make: Callable[[], dict[str, Any]], *, overwrite: bool
    ) -> dict[str, Any]:
        """A stage that is made in one go: the stored summary if it is complete, else that of `make()`, recorded."""
        if not overwrite and (done := self.completed(stage, fingerprint)):
            return done
        with self.redoing(stage) if overwrite else contextlib.nullcontext():
            self.begin(stage, fingerprint)
            summary = make()
            self.finish(stage, fingerprint, summary)
        return summary

    def reset(self, stage: str) -> None:
        """Forget that `stage`, and every stage built on it, was done. Its files are the stage's own to remove."""
        for name in (stage, *_later(stage)):
            self._state_path(name).unlink(missing_ok=True)
        self._begun_path(stage).unlink(missing_ok=True)

    @contextmanager
    def redoing(self, stage: str, *paths: Path, made: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Set what `stage` left aside, its `paths` and its state, while the block makes it anew; for --overwrite.

        Where the block fails before `made()` is true, all of it is put back: a mistyped option costs nothing.
        """
        names = (stage, *_later(stage))
        records = [path for name in names for path in (self._state_path(name), self._begun_path(name))]
        before = {path: path.read_bytes() for path in records if path.exists()}
        aside = {path: path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}") for path in paths}
        for path, place in aside.items():
            if path.exists():
                path.rename(place)
        self.reset(stage)
        try:
            yield
        except BaseException:
            if not made():
                self._put_back(aside)
                self._begun_path(stage).unlink(missing_ok=True)
                for path, content in before.items():
                    path.write_bytes(content)
            raise
        finally:
            for place in aside.values():
                _remove(place)

    @staticmethod
    def _put_back(aside: dict[Path, Path]) -> None:
        for path, place in aside.items():
            _remove(path)
            if place.exists():
                place.rename(path)

    def _state_path(self, stage: str) -> Path:
        return self.logs / "state" / f"{stage}.json"

    def _left_by(self, stage: str) -> list[Path]:
        """The files that `stage` has made."""
        return [path for path in sorted(self.root.glob(OUTPUTS[stage])) if path.is_file()]

    def _begun_path(self, stage: str) -> Path:
        return self.logs / "state" / f"{stage}.begun.json"

    def _changed(self, stage: str, before: dict[str, Any], how: str) -> EclipseError:
        from .card import STAGE_SECTIONS, differences

        after = self.card.model_dump(mode="json", by_alias=True)
        changes = differences(before, after, STAGE_SECTIONS.get(stage))
        what = "; ".join(changes[:5]) or "what it was given on the command line"
        return EclipseError(
            f"{stage} {how} with other settings: {what}",
            where=str(self.card_path),
            hint=f"undo the change, use another workspace, or redo the stage with `eclipse {stage} --overwrite`",
        )

    def _sweep(self) -> None:
        """Remove what a killed process left half-written; only the holder of the lock may."""
        for folder in (self.root, self.images, self.embeddings, self.prior, self.renders, self.reports, self.logs):
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                _remove(leftover)


_held: set[int] = set()  # descriptors of the locks this process holds


def _release_in_child() -> None:
    # A lock belongs to the open file, which fork shares: an orphaned pool would hold a dead parent's workspace.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _take(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise EclipseError(f"cannot lock the workspace: {error.strerror}", where=str(root)) from error
        raise EclipseError(
            f"the workspace is in use by {_holder_text(descriptor)}",
            where=str(root),
            hint="wait for it, or stop it, and try again",
        ) from error


def _holder_text(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"{holder['stage']}, pid {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"


def _later(stage: str) -> tuple[str, ...]:
    """The stages whose input `stage` makes. Rendering and evaluating do not depend on each other."""
    chain = ("download", "embed", "filter", "train")
    return STAGES[STAGES.index(stage) + 1 :] if stage in chain else ()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a directory to; synced and renamed to `path` when the block ends well.

    On any error the half-written one is removed and an old `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    _remove(temporary)
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else ():
            _sync(file)
        _sync(temporary)
        _replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    _sync(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir() and temporary.is_dir():  # rename(2) refuses a directory that is not empty
        old = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}")
        path.rename(old)
        temporary.rename(path)
        _remove(old)
    else:
        temporary.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
