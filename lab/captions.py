"""What is said of a scene: captions in six categories, and the text of prompts. Called by `shapes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .shapes import Scene, Thing, Wanted

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_RELATIONS = {
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPENINGS = ("", "", "a picture of ", "a drawing of ", "an image of ")
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption_of(scene: Scene, rng: np.random.Generator, category: str | None = None) -> str:
    """A caption in `category`, or in one chosen among those that fit the scene."""
    fitting = fitting_categories(scene)
    if category is None:
        category = fitting[int(rng.integers(len(fitting)))]
    elif category not in fitting:
        raise ValueError(f"category {category!r} does not fit this scene: one of {', '.join(fitting)}")
    if category in ("spatial", "complex") and len(scene.things) == 2:
        first, second = scene.things
        relation = "left of" if first.position == "left" else "above"
        if rng.random() < 0.5:
            first, second, relation = second, first, _INVERSE[relation]
        return _related(category, first, second, relation, scene.background, rng)
    if category == "complex":
        return full_caption(scene)
    listing = _join([_counted(things, category) for things in groups(scene)])
    return _opening(rng) + listing


def fitting_categories(scene: Scene) -> tuple[str, ...]:
    """Relations need two different objects; a count worth saying needs a repeated one."""
    pair = len(scene.things) == 2 and scene.things[0].composition != scene.things[1].composition
    repeated = len(groups(scene)) < len(scene.things)
    return (
        "color",
        "shape",
        "texture",
        *(("spatial",) if pair else ()),
        *(("numeracy",) if repeated else ()),
        "complex",
    )


def open_categories(scene: Scene) -> tuple[str, ...]:
    """Those of `fitting_categories` whose captions leave something open: `complex` names every place but of a pair."""
    return tuple(c for c in fitting_categories(scene) if c != "complex" or len(scene.things) == 2)


def full_caption(scene: Scene) -> str:
    """Size, texture, color, shape and place of every object, and the background."""
    parts = [
        f"a {t.size} {t.texture} {t.color} {t.shape} "
        + (f"in the {t.position}" if t.position == "center" else f"at the {t.position}")
        for t in scene.things
    ]
    return _join(parts) + f" on a {scene.background} background"


def prompt_text(
    category: str, wanted: Sequence[Wanted], relation: str | None, background: str | None, rng: np.random.Generator
) -> str:
    """The words of a prompt, in the same phrasings as the captions."""
    if relation is not None:
        return _related(category, wanted[0], wanted[1], relation, background, rng)
    phrases = [_phrase(w, category, w.count, say_one=category == "numeracy") for w in wanted]
    return _opening(rng) + _join(phrases)


def _related(
    category: str,
    first: Thing | Wanted,
    second: Thing | Wanted,
    relation: str,
    background: str | None,
    rng: np.random.Generator,
) -> str:
    words = _RELATIONS[relation][int(rng.integers(2))]
    text = f"{_opening(rng)}{_phrase(first, category)} {words} {_phrase(second, category)}"
    return f"{text} on a {background} background" if category == "complex" else text


def groups(scene: Scene) -> list[list[Thing]]:
    """The objects of a scene, those that look alike together, in reading order of the first of each."""
    alike: dict[tuple[str, ...], list[Thing]] = {}
    for thing in scene.things:
        alike.setdefault((thing.color, thing.shape, thing.texture, thing.size), []).append(thing)
    return list(alike.values())


def _counted(things: list[Thing], category: str) -> str:
    return _phrase(things[0], category, len(things), say_one=category == "numeracy")


def _phrase(thing: Thing | Wanted, category: str, count: int = 1, *, say_one: bool = False) -> str:
    words = [thing.color, thing.shape]
    if category in ("texture", "complex") and thing.texture:
        words.insert(0, thing.texture)
    if category == "complex" and thing.size:
        words.insert(0, thing.size)
    if count == 1 and not say_one:
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    plural = "" if count == 1 else ("es" if words[-1].endswith("ss") else "s")
    return f"{_NUMBERS[count]} {' '.join(words)}{plural}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _opening(rng: np.random.Generator) -> str:
    return _OPENINGS[int(rng.integers(len(_OPENINGS)))]
