"""The one way a stage runs: `with ws.stage("embed", …) as run:`. Used by every stage's entry point.

It owns what all stages need: whether the stage is complete, and for which settings; the workspace's lock; what becomes
of earlier results under --overwrite; the record that a resume goes by; the digests of what was made; the traceback of
a defect. A stage's own work, between `begin` and `finish`, must be resumable or made in one go.

    with ws.stage("embed", overwrite=overwrite) as run:
        if run.complete:
            return run.summary
        …                       # read, load and check all that can fail; nothing old is touched yet
        run.begin()             # from here on it is this run's: under --overwrite what was there is set aside
        …                       # make it; whole pieces appear under PIECES
        run.finish(summary, report=page)
    return run.summary

On disk, in logs/state/: NAME.json of a finished stage, NAME.begun.json while it is not, NAME.stale.json when a stage
that it is built on was made anew and came out otherwise, NAME.aside.json while an overwrite may still be undone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from .card import BUILT_ON, Card, differences, digest, lineage
from .card_file import renamed
from .errors import EclipseError
from .files import file_sha256, remove, sealed, unsealed, write_json
from .interrupts import asked_to_stop

if TYPE_CHECKING:
    from .workspace import Workspace

# Patterns below the workspace's root. OUTPUTS: what a finished stage leaves for later ones and for people.
OUTPUTS = {
    "download": "images/*.tar",
    "embed": "embeddings/part-*.parquet",
    "filter": "selection.parquet",
    "train": "prior/final/*",
    "render": "renders/default/**/*",
    "evaluate": "reports/evaluate.*",
}
# PIECES: whole pieces of unfinished work that a later run continues from. Stages without any are made in one go.
PIECES = {
    "download": "images/*.tar",
    "embed": "embeddings/part-*.parquet",
    "train": "prior/checkpoints/step-*",
}
# REPLACED: folders that --overwrite begins anew; the other stages replace their files one by one.
REPLACED = {"download": ("images",), "embed": ("embeddings", "logs/embed"), "train": ("prior",)}
SECTIONS_BEFORE = {  # what fingerprints were made of until keys said what they decide: all keys of these sections
    "download": ("source",),
    "embed": ("source", "encoder"),
    "filter": ("source", "encoder", "filter"),
    "train": ("source", "encoder", "filter", "prior", "train"),
    "render": ("source", "encoder", "filter", "prior", "train", "decoder", "render"),
    "evaluate": ("source", "encoder", "filter", "prior", "train", "decoder", "evaluate"),
}
# Reading this much takes well under a second. What a stage leaves beyond it is checked by its size alone.
DIGESTED_BYTES = 256 << 20


@dataclass(frozen=True)
class Settings:
    """What a stage was, or is, made with: the card as dumped, and options of the command line that stand in for it.

    fingerprint covers both, card_fingerprint the card alone; "" where a former version did not note it.
    """

    fingerprint: str
    card: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None  # None: noted by a former version, hidden in the fingerprint
    card_fingerprint: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.card, dict) and isinstance(self.options, dict | None)):
            raise TypeError("card and options are objects")


@dataclass(frozen=True)
class StageState(Settings):
    """What a finished stage left behind: its settings, its summary, and size and SHA-256 of its files."""

    stage: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    finished_at: str = ""
    files: dict[str, int] = field(default_factory=dict)  # bytes, by path below the workspace
    sha256: dict[str, str] = field(default_factory=dict)  # of those that are cheap to read

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(value, dict) for value in (self.summary, self.files, self.sha256)):
            raise TypeError("summary, files and sha256 are objects")


Record = TypeVar("Record", bound=Settings)


class Stage:
    """One stage of a workspace: its records, and the context in which it runs.

    options: those of the command line that stand in for keys of the card, without those that were left out. go_on:
    there is more to do though the stage is complete. Which process leads is told by RANK, as torchrun sets it; the
    others neither lock nor write here.
    """

    def __init__(
        self,
        ws: Workspace,
        name: str,
        *,
        overwrite: bool = False,
        go_on: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.ws, self.name, self.overwrite, self.go_on = ws, name, overwrite, go_on
        self.options = dict(options or {})
        self.complete = False
        self.summary: dict[str, Any] = {}
        self.leads = os.environ.get("RANK", "0") == "0"
        self._lock, self._locked = ws.lock(name), False
        self._before: StageState | None = None  # what this run makes anew

    @property
    def finished(self) -> StageState | None:
        """The record of the stage if it is finished."""
        return self._record("json", StageState)

    @property
    def begun(self) -> Settings | None:
        """The settings under which the stage began, if it has not finished."""
        return self._record("begun.json", Settings)

    @property
    def stale(self) -> Settings | None:
        """The settings of a stage whose inputs were made anew since, so that it is to be run again."""
        return self._record("stale.json", StageState)

    def _record(self, ending: str, kind: type[Record]) -> Record | None:
        path = self.path(ending)
        try:
            return kind(**unsealed(json.loads(path.read_text())))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            hint = f"run `eclipse {self.name} --overwrite`"
            raise EclipseError(f"unreadable record of a stage: {error}", where=str(path), hint=hint) from error

    def path(self, ending: str) -> Path:
        return self.ws.logs / "state" / f"{self.name}.{ending}"

    def damage(self, *, thorough: bool = True) -> str | None:
        """Which file that the finished stage left is gone or changed; None if none is. Not thorough: by sizes alone."""
        state = self.finished
        if state is None:
            return None
        for name, size in state.files.items():
            path = self.ws.root / name
            if not path.is_file():
                return f"{path} is gone"
            if path.stat().st_size != size:
                return f"{path} is of another size"
            if thorough and name in state.sha256 and file_sha256(path) != state.sha256[name]:
                return f"{path} has other content"
        return None

    def completed(self) -> dict[str, Any] | None:
        """The stored summary with already_complete set, if the stage finished with these settings; None: (re)start it.

        None too where a file it left is gone or changed, and while a stage that it is built on is being made again.
        Raises EclipseError naming the changed keys if it finished, or began, with other settings.
        """
        for record, how in ((self.finished, "finished"), (self.begun, "began")):
            if record is not None and self._carried(record) is None and not self.extends(record):
                raise self._changed(record, how)
        state, earlier = self.finished, lineage(self.name)[1:]
        if state is None or any(Stage(self.ws, name).begun for name in earlier) or self.damage() is not None:
            return None
        if self._carried(state) is None:
            return None
        return {**state.summary, "already_complete": True}

    def extends(self, record: Settings) -> bool:
        """Whether today's settings ask for more of the same than the record's: a training of more steps, else equal."""
        if self.name != "train":
            return False
        now, then = (dict(options or {}) for options in (self.options, record.options))
        card = self.ws.card
        steps = now.pop("steps", card.train.steps)
        try:
            before = Card.model_validate(renamed(record.card)[0])
        except ValidationError:
            return False
        fewer = then.pop("steps", before.train.steps)
        same = before.model_copy(update={"train": before.train.model_copy(update={"steps": card.train.steps})})
        return steps > fewer and now == then and same.fingerprint("train") == card.fingerprint("train")

    def _carried(self, record: Settings) -> Settings | None:
        """The record's settings if they come to the same as today's, else None.

        What an unfinished stage made carries the fingerprint under which it began; a run that continues it must go by
        that one, though a later version of the program computes another for the same settings.
        """
        today, card = self._today(), self.ws.card
        if record.fingerprint == today.fingerprint:
            return today
        before = record.card_fingerprint or digest({s: record.card.get(s, {}) for s in SECTIONS_BEFORE[self.name]})
        if record.options is None:  # a former version: which options it had can only be tried
            known = (_fingerprint(before, self.options), f"{before} text_states={self.options.get('text_states')}")
            if record.fingerprint not in known:
                return None
        elif record.options != self.options:
            return None
        try:
            then = Card.model_validate(renamed(record.card)[0])
        except ValidationError:
            return None
        same = then.fingerprint(self.name) == card.fingerprint(self.name)
        return Settings(record.fingerprint, record.card, self.options, before) if same else None

    def _today(self) -> Settings:
        card = self.ws.card.fingerprint(self.name)
        dumped = self.ws.card.model_dump(mode="json", by_alias=True)
        return Settings(_fingerprint(card, self.options), dumped, self.options, card)

    def _changed(self, record: Settings, how: str) -> EclipseError:
        changes = differences(record.card, self._today().card, self.name)
        options = record.options or {}
        changes += [
            f"--{name.replace('_', '-')}: {options.get(name, 'not given')} → {self.options.get(name, 'not given')}"
            for name in dict.fromkeys([*options, *self.options])
            if options.get(name) != self.options.get(name)
        ]
        return EclipseError(
            f"{self.name} {how} with other settings: {'; '.join(changes[:5]) or 'other options on the command line'}",
            where=str(self.ws.card_path),
            hint=f"undo the change, use another workspace, or redo the stage with `eclipse {self.name} --overwrite`",
        )

    def __enter__(self) -> Stage:
        self._started = time.monotonic()
        if self._is_complete():
            return self
        if self.leads:
            self._lock.__enter__()
            self._locked = True
        try:
            if not self._is_complete():  # by whoever held the lock before
                self._require_inputs()
                self.settings = self._settings()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, (EclipseError, OSError)) and not asked_to_stop():
                self._keep_traceback(error)
            if self._locked:
                settle(self.ws, self.name)
        finally:
            if self._locked:
                self._lock.__exit__(None, None, None)
                self._locked = False

    def _is_complete(self) -> bool:
        done = None if self.overwrite else self.completed()
        if done is not None and not self.go_on:
            self.complete, self.summary = True, done
        return self.complete

    def _require_inputs(self) -> None:
        """The stage that this one is built on must not be half made. Only `embed` takes what there is."""
        if (before := BUILT_ON[self.name]) is None:
            return
        earlier = Stage(self.ws, before)
        earlier.require_intact()
        if self.name != "embed" and earlier.begun is not None:
            raise EclipseError(
                f"`eclipse {before}` began and has not finished",
                where=str(self.ws.root),
                hint=f"run `eclipse {before}` first: it goes on where it stopped",
            )

    def _settings(self) -> Settings:
        """Those that this run goes by: of the work that it continues, or today's."""
        if not self.overwrite:
            for record in (self.begun, self.finished, self.stale):
                if record is not None and (carried := self._carried(record)) is not None:
                    return carried
        return self._today()

    @property
    def fingerprint(self) -> str:
        """What this run's checkpoints carry."""
        return self.settings.fingerprint

    @property
    def card_fingerprint(self) -> str:
        """The same of the card alone, whatever options were given: what embedding parts carry."""
        return self.settings.card_fingerprint

    def require_intact(self) -> None:
        """Raise EclipseError if the stage finished and a file it left is gone or changed. For stages built on it."""
        if (damage := self.damage()) is not None:
            raise EclipseError(
                f"what `eclipse {self.name}` made is no longer whole",
                where=damage,
                hint=f"run `eclipse {self.name}`: it mends what is missing",
            )

    def begin(self) -> None:
        """Everything asked for makes sense: note the settings. Under --overwrite what was there is set aside.

        It comes back by itself if the run fails, or is killed, before it has made a whole piece; it goes for good with
        `finish`, or with `give_up_old`.
        """
        if not self.leads:
            return
        self._before = self.finished
        if self.overwrite:
            self._set_aside()
        elif self.go_on and self._before is not None:  # no longer complete, and what it made stays
            self.path("json").replace(self.path("stale.json"))
        write_json(self.path("begun.json"), sealed(asdict(self.settings)))

    def give_up_old(self) -> None:
        """Once a whole piece is made, remove what was set aside: old and new together might fill the disk."""
        if self.leads and self.overwrite and any(self.ws.root.glob(PIECES[self.name])):
            settle(self.ws, self.name)

    def finish(self, summary: dict[str, Any], *, report: Path | None = None) -> None:
        """Commit the stage: a second run reports this summary. What is built on other outputs than these is stale."""
        page = {"report": str(report)} if report is not None else {}
        self.summary = {**summary, **page}
        self.summary.setdefault("seconds", round(time.monotonic() - self._started, 2))
        if not self.leads:
            return
        files, sha256 = self._digests()
        state = StageState(
            **asdict(self.settings),
            stage=self.name,
            summary=self.summary,
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            files=files,
            sha256=sha256,
        )
        # The same files as before, and all of them by digest: what was made from them stays as good as it was.
        before = self._before
        same = before is not None and before.files == files and before.sha256 == sha256 and len(sha256) == len(files)
        for name in BUILT_ON:
            later = Stage(self.ws, name)
            if name != self.name and self.name in lineage(name) and not same:
                with suppress(FileNotFoundError):
                    later.path("json").replace(later.path("stale.json"))
        # In this order: a run killed in between is finished once more, where a record of both would be neither.
        for ending in ("begun.json", "stale.json"):
            self.path(ending).unlink(missing_ok=True)
        write_json(self.path("json"), sealed(asdict(state)))
        settle(self.ws, self.name, keep_new=True)

    def _digests(self) -> tuple[dict[str, int], dict[str, str]]:
        """Size of each file that the stage made, and SHA-256 of as many as DIGESTED_BYTES hold."""
        paths = [path for path in sorted(self.ws.root.glob(OUTPUTS[self.name])) if path.is_file()]
        files = {str(path.relative_to(self.ws.root)): path.stat().st_size for path in paths}
        sha256, left = {}, DIGESTED_BYTES
        for name, size in files.items():
            if size <= left:
                sha256[name], left = file_sha256(self.ws.root / name), left - size
        return files, sha256

    def replaced(self) -> list[tuple[Path, Path]]:
        """What --overwrite sets aside, and where. Folders first: without them, `settle` knows that nothing is new."""
        folders = [self.ws.root / name for name in REPLACED.get(self.name, ())]
        records = [self.path(ending) for ending in ("json", "begun.json", "stale.json")]
        # A folder may be a link to another disk: what it points to is moved, on that disk.
        places = [path.resolve() if path.is_symlink() else path for path in (*folders, *records)]
        return [(path, path.with_name(f".aside-{path.name}")) for path in places]

    def _set_aside(self) -> None:
        write_json(self.path("aside.json"), {"since": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid()})
        for place, aside in self.replaced():
            remove(aside)
            if place.exists():
                place.rename(aside)
        for name in REPLACED.get(self.name, ()):
            if (self.ws.root / name).is_symlink():
                (self.ws.root / name).resolve().mkdir(exist_ok=True)

    def _keep_traceback(self, error: Exception) -> None:
        self.ws.logs.mkdir(exist_ok=True)
        with (self.ws.logs / "tracebacks.txt").open("a") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}\n{''.join(traceback.format_exception(error))}\n"
            )


def settle(ws: Workspace, name: str, *, keep_new: bool = False) -> None:
    """End an overwrite: remove what `begin` set aside if the new run made a whole piece, else put it all back.

    Called when a run ends, and by the next holder of the lock for one that was killed.
    """
    stage = Stage(ws, name)
    if not stage.path("aside.json").exists():
        return
    keep_new = keep_new or (name in PIECES and any(ws.root.glob(PIECES[name])))
    if not keep_new:
        stage.path("begun.json").unlink(missing_ok=True)
    for place, aside in stage.replaced():
        if aside.exists() and not keep_new:
            remove(place)
            aside.rename(place)
        remove(aside)
    stage.path("aside.json").unlink()


def _fingerprint(card: str, options: Mapping[str, Any]) -> str:
    """Of a card's fingerprint and the options that stand in for some of its keys."""
    return hashlib.sha256(json.dumps([card, options], sort_keys=True).encode()).hexdigest() if options else card
