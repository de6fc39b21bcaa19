"""A data card: what to fetch, which encoder, which rules, which prior and decoder. Read by every stage.

Its sections are in sections.py and source.py, its file in card_file.py. A section says which stage's output its keys
decide (`decides`), and a key that decides none is marked NOTHING where it is defined: how fast something is made, or
how often it is looked at. What a changed key makes stale follows from that. A key added later gets the default under
which everything stays as it was made before.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from .card_file import INSTALLATION, find_card, read_file, renamed
from .errors import UsageError
from .files import atomic_path
from .sections import (
    Decides,
    DecoderSection,
    EncoderSection,
    EvaluateSection,
    FilterSection,
    PriorSection,
    RenderSection,
    Section,
    TrainSection,
)
from .source import SOURCES, Source

MODELS = INSTALLATION / "lab" / "models"
SHOWN_KEYS = 12  # of those that are wrong

# Whose outputs a stage's own are made from. Rendering and evaluating do not depend on each other.
BUILT_ON: dict[str, str | None] = {
    "download": None,
    "embed": "download",
    "filter": "embed",
    "train": "filter",
    "render": "train",
    "evaluate": "train",
}
STAGES = tuple(BUILT_ON)


class Card(Section):
    """Everything a workspace needs to know before it starts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="short name")
    title: str = Field("", description="one line for `eclipse cards`")
    description: str = Field("", description="what it is, where the list comes from, what to expect")
    licence: str = Field("", description="licence of the list and of the pictures")
    source: Source
    encoder: EncoderSection
    filter: FilterSection = FilterSection()  # type: ignore[call-arg]
    prior: PriorSection = PriorSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    decoder: DecoderSection
    render: RenderSection = RenderSection()  # type: ignore[call-arg]
    evaluate: EvaluateSection = EvaluateSection()  # type: ignore[call-arg]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Card:
        """Read a card by its name (`shapes`) or its path. UsageError names file, key and the allowed values."""
        return cls.read(name_or_path)[0]

    @classmethod
    def read(cls, name_or_path: str | Path) -> tuple[Card, list[str]]:
        """The same, with a note for each key that goes by another name now."""
        data, notes = read_file(path := find_card(name_or_path))
        try:
            return cls.model_validate(data), [f"{path.name}: {note}" for note in notes]
        except ValidationError as error:
            raise UsageError(_explain(error), where=str(path), hint="`eclipse cards --keys` shows every key") from error

    def fingerprint(self, stage: str) -> str:
        """SHA-256 over every key that decides what `stage` makes, its own and those of the stages it is built on.

        Keys that are null do not count: an option added later, and left out, changes no fingerprint.
        """
        return digest(self._deciding(lambda stages: bool(set(stages) & set(lineage(stage)))))

    def section_fingerprint(self, section: str) -> str:
        """The same over the deciding keys of one section."""
        return digest({section: self._deciding(bool)[section]})

    def _deciding(self, wanted: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
        """The keys of each section, as in a file, whose decided stages are `wanted`; sections without any left out."""
        data = self.model_dump(mode="json", by_alias=True)
        chosen: dict[str, Any] = {}
        for key in keys(self):
            if wanted(key.decides):
                chosen.setdefault(key.section, {})[key.name] = data[key.section][key.name]
        return chosen

    def differences(self, other: Card) -> list[str]:
        """`train.steps: 100 → 200` for every key of the sections in which `other` differs."""
        return differences(self.model_dump(mode="json", by_alias=True), other.model_dump(mode="json", by_alias=True))

    def dump(self, path: Path) -> None:
        """Write the resolved card, every key spelled out."""
        text = yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110
        )
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


SECTIONS = ("source", "encoder", "filter", "prior", "train", "decoder", "render", "evaluate")


def resolve(text: str) -> str:
    """Replace `{models}` by the directory of the weights that ship with the installation."""
    return text.replace("{models}", str(MODELS))


def every_key() -> Iterator[tuple[str, dict[str, str]]]:
    """Each key of a card: type, default, the first stages that it decides, meaning. For `eclipse cards --keys`."""
    decides = {(key.section, key.name): key.decides for key in keys()}
    for section in SECTIONS:
        for model in _models_of(section):
            kind = f" (kind: {model.model_fields['kind'].default})" if section == "source" else ""
            for name, field in model.model_fields.items():
                required = field.is_required()
                default = (
                    "required" if required else json.dumps(field.get_default(call_default_factory=True), default=str)
                )
                yield (
                    f"{section}.{field.alias or name}{kind}",
                    {
                        "type": _type_text(field.annotation),
                        "default": default,
                        "decides": ", ".join(decides[section, field.alias or name]) or "nothing",
                        "meaning": field.description or "",
                    },
                )


def _type_text(annotation: Any) -> str:
    """`int | null`, `adamw | muon`: a key's type as somebody who writes YAML would say it."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(annotation)))
    if annotation is NoneType:
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


@dataclass(frozen=True)
class Key:
    """One key of a card: where it stands, what it is, and the first stages whose outputs it decides."""

    section: str
    name: str
    field: FieldInfo
    decides: tuple[str, ...]


def keys(card: Card | None = None) -> Iterator[Key]:
    """Every key that a card has; None: that any card can have, those of each kind of source among them."""
    for section in SECTIONS:
        models = [type(getattr(card, section))] if card is not None else _models_of(section)
        seen: set[str] = set()
        for model in models:
            for attribute, field in model.model_fields.items():
                name = field.alias or attribute
                marks = [mark.stages for mark in field.metadata if isinstance(mark, Decides)]
                if name not in seen:
                    yield Key(section, name, field, marks[0] if marks else model.decides)
                seen.add(name)


def lineage(stage: str) -> list[str]:
    """The stage and those it is built on, itself first."""
    stages: list[str] = []
    while stage:
        stages.append(stage)
        stage = BUILT_ON[stage] or ""
    return stages


def digest(data: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of sections; keys that are null do not count."""
    plain = {
        section: {key: value for key, value in values.items() if value is not None}
        if isinstance(values, dict)
        else values
        for section, values in data.items()
    }
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any], stage: str | None = None) -> list[str]:
    """`train.steps: 100 → 200` for each key of two dumped cards that differs; with `stage`, of those that decide it.

    Names, titles and descriptions do not count. A key that a card of an earlier version lacks had what is its default.
    """
    old, new = (_flatten({key: renamed(card)[0].get(key) for key in SECTIONS}) for card in (before, after))
    idle = {f"{key.section}.{key.name}" for key in keys() if stage and not set(key.decides) & set(lineage(stage))}
    names = [name for name in dict.fromkeys([*old, *new]) if name not in idle]
    names.sort(key=lambda name: not name.endswith(".kind"))  # what explains most of the others
    later = {
        f"{key.section}.{key.name}": key.field.get_default(call_default_factory=True)
        for key in keys()
        if not key.field.is_required()
    }
    old = {**{name: later.get(name) for name in new}, **old}
    return [f"{name}: {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _explain(error: ValidationError) -> str:
    """One line for each wrong key, with what is allowed there."""
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in _without_tag(detail["loc"]))
        if detail["type"] == "extra_forbidden":
            allowed = _keys_beside(detail["loc"])
            near = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            lines.append(f"unknown key {key} ({meant}allowed: {', '.join(allowed)})")
        elif detail["type"] == "missing":
            lines.append(f"missing key {key}")
        else:
            lines.append(f"{key}: {detail['msg'].removeprefix('Value error, ')}, not {_shown(detail['input'])}")
    count, more = len(lines), [f"and {len(lines) - SHOWN_KEYS} more"] if len(lines) > SHOWN_KEYS else []
    return lines[0] if count == 1 else "\n  - ".join([f"{count} keys are wrong:", *lines[:SHOWN_KEYS], *more])


def _without_tag(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts the tag of a discriminated union into the location: source.shapes.rows is source.rows."""
    return loc[:1] + loc[2:] if loc[:1] == ("source",) else loc


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    section = str(loc[0])
    if section == "source" and len(loc) > 2:
        models = [SOURCES[str(loc[1])]]
    else:
        models = [Card] if len(loc) == 1 else _models_of(section)
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _models_of(section: str) -> list[type[Section]]:
    """The classes that a section can be of: one, but for the source."""
    if section == "source":
        return list(SOURCES.values())
    annotation = Card.model_fields[section].annotation
    return [model for model in (annotation, *get_args(annotation)) if isinstance(model, type)]
