"""Judges a picture by pixel against a prompt: `read`, then `judge`. Called by the scorer and by the world's page.

Scores, by category (0 … 1; objects that nobody asked for cost nothing except in numeracy):

- color, shape   share of the wanted objects that are there with the right color *and* shape on one object
- texture        the same with color, shape and texture on one object
- spatial        1 if both objects are there with color and shape and the relation holds between them, else 0
- numeracy       share of the wanted kinds (color and shape) of which exactly as many are there as were asked for
- complex        share of four facts: each object with its color, shape, texture and size; the relation; the background

A relation holds if the centres differ in its direction by at least MIN_OFFSET pixels and by more than across it, the
rule of T2I-CompBench (arXiv 2307.06350).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .reading import UNCLEAR, Reading, Seen, read, read_all
from .shapes import Prompt, Wanted

__all__ = ["UNCLEAR", "Fact", "Reading", "Seen", "Verdict", "judge", "read", "read_all"]

MIN_OFFSET = 8.0
_ATTRIBUTES = ("color", "shape", "texture", "size")
_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Fact:
    """One thing that a prompt asks: what was asked, what was seen instead or indeed, and the objects it was judged by
    (indices into Reading.things). `about` is 'object', 'count', 'relation' or 'background'."""

    about: str
    asked: str
    seen: str
    right: bool
    things: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """score 0..1 is the share of `facts` that are right (spatial: of the relation alone); all_right: every one is.

    The facts on wanted objects (numeracy: kinds) come first, in the prompt's order; then relation, then background.
    """

    score: float
    facts: tuple[Fact, ...]
    all_right: bool


def judge(reading: Reading, prompt: Prompt) -> Verdict:
    """Compare what a picture holds with what a prompt asks. Pure; the reading was made without the prompt."""
    if prompt.category == "numeracy":
        facts = [_count_fact(reading, wanted) for wanted in prompt.wanted]
        return _verdict(facts, facts)
    wanted = [kind for kind in prompt.wanted for _ in range(kind.count)]
    chosen = _assign(wanted, reading, prompt.relation)
    facts = [_object_fact(kind, reading, index) for kind, index in zip(wanted, chosen, strict=True)]
    if prompt.relation is not None:
        facts.append(_relation_fact(prompt.relation, wanted, reading, chosen))
    if prompt.background is not None:
        right = reading.background == prompt.background
        facts.append(Fact("background", prompt.background, reading.background, right))
    if prompt.category == "spatial":
        return _verdict([fact for fact in facts if fact.about == "relation"], facts)
    return _verdict(facts, facts)


def asked_attributes(wanted: Wanted) -> tuple[str, ...]:
    """The attributes that a wanted object does not leave open: color and shape, and perhaps texture and size."""
    return tuple(name for name in _ATTRIBUTES if getattr(wanted, name) is not None)


def holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether `first` is, say, 'left of' `second`."""
    right, down = _DIRECTIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * right, abs(dy)) if right else (dy * down, abs(dx))
    return along >= MIN_OFFSET and along > across


def _verdict(scored: list[Fact], facts: list[Fact]) -> Verdict:
    score = sum(fact.right for fact in scored) / len(scored)
    return Verdict(score, tuple(facts), all(fact.right for fact in facts))


def _assign(wanted: list[Wanted], reading: Reading, relation: str | None) -> list[int | None]:
    """For each wanted object the one seen that stands for it: as many fully right as can be, then as many attributes.

    With a relation, pairs are tried one by one, so that of several equal objects the two that fulfil it are chosen.
    """
    if not reading.things:
        return [None] * len(wanted)
    gain = np.array([[_likeness(kind, seen) for seen in reading.things] for kind in wanted])
    if relation is not None and len(reading.things) > 1:

        def worth(pair: tuple[int, int]) -> tuple[float, bool]:
            return gain[0, pair[0]] + gain[1, pair[1]], holds(relation, *(reading.things[i] for i in pair))

        return list(max(itertools.permutations(range(len(reading.things)), 2), key=worth))
    rows, columns = linear_sum_assignment(gain, maximize=True)
    found = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [found.get(row) for row in range(len(wanted))]


def _likeness(kind: Wanted, seen: Seen) -> float:
    asked = asked_attributes(kind)
    right = sum(getattr(kind, name) == getattr(seen, name) for name in asked)
    return right / len(asked) + (10.0 if right == len(asked) else 0.0)


def _object_fact(kind: Wanted, reading: Reading, index: int | None) -> Fact:
    asked = asked_attributes(kind)
    if index is None:
        return Fact("object", _words(kind, asked), "nothing", False)
    seen = reading.things[index]
    right = all(getattr(kind, name) == getattr(seen, name) for name in asked)
    return Fact("object", _words(kind, asked), _words(seen, asked), right, (index,))


def _relation_fact(relation: str, wanted: list[Wanted], reading: Reading, chosen: list[int | None]) -> Fact:
    first, second = chosen[:2]
    names = [_words(kind, ("color", "shape")) for kind in wanted[:2]]
    asked = f"{names[0]} {relation} {names[1]}"
    if first is None or second is None:
        return Fact("relation", asked, "an object is missing", False)
    pair = reading.things[first], reading.things[second]
    there = all(_words(seen, ("color", "shape")) == name for seen, name in zip(pair, names, strict=True))
    met = next((name for name in _DIRECTIONS if holds(name, *pair)), "beside")
    seen = f"{_words(pair[0], ('color', 'shape'))} {met} {_words(pair[1], ('color', 'shape'))}"
    return Fact("relation", asked, seen, there and met == relation, (first, second))


def _count_fact(reading: Reading, kind: Wanted) -> Fact:
    asked = asked_attributes(kind)
    name = _words(kind, asked)
    same = tuple(i for i, seen in enumerate(reading.things) if _words(seen, asked) == name)
    return Fact("count", f"{kind.count} × {name}", f"{len(same)} × {name}", len(same) == kind.count, same)


def _words(thing: Wanted | Seen, attributes: tuple[str, ...]) -> str:
    order = [name for name in ("size", "texture", "color", "shape") if name in attributes]
    return " ".join(getattr(thing, name) for name in order)
