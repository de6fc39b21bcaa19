"""The dirt planted in the shapes world's list, a pure function of the card. Used by the server that serves it, and by
the report that measures how much of it was found; no stage looks here.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .captions import CATEGORIES, fitting_categories
from .shapes import Scene, World

Kind = Literal["clean", "dead", "exact_copy", "near_copy", "wrong_caption"]
Fault = Literal["not_found", "reset", "stall", "truncated"]

SHARES: dict[Kind, float] = {"dead": 0.03, "exact_copy": 0.05, "near_copy": 0.05, "wrong_caption": 0.04}
FAULTS: tuple[Fault, ...] = ("not_found", "reset", "truncated", "not_found", "truncated", "stall")  # in turn
ASKED = 100  # prompts per category and split that are kept out of the list's captions
_PLAN, _CAPTION, _FURTHER = 23, 29, 37  # streams of the seed; shapes.py uses others


@dataclass(frozen=True, slots=True)
class Planted:
    """What one picture of the list is. `scene` is a scene number of the train split; `original` the one that a copy
    copies.

    A row and its copies are one group: whichever a filter keeps, the others are the copies.
    """

    row: int
    kind: Kind
    scene: int
    original: int | None = None
    fault: Fault | None = None

    @property
    def path(self) -> str:
        """The path of the row's URL. Near copies are JPEG files, all others PNG."""
        return f"/{self.row:06d}.{'jpg' if self.kind == 'near_copy' else 'png'}"


def planted(seed: int, rows: int) -> list[Planted]:
    """The plan of a list: one entry a row, dirt spread by the seed. Only clean rows are copied, each at most once."""
    rng = np.random.default_rng([seed, _PLAN])
    order = [int(row) for row in rng.permutation(rows)]
    plan = [Planted(row, "clean", row) for row in range(rows)]
    taken: dict[Kind, list[int]] = {}
    for kind, share in SHARES.items():
        count = round(share * rows)
        taken[kind], order = order[:count], order[count:]
    for i, row in enumerate(taken["dead"]):
        plan[row] = Planted(row, "dead", row, fault=FAULTS[i % len(FAULTS)])
    for row in taken["wrong_caption"]:
        plan[row] = Planted(row, "wrong_caption", row)
    copies: list[tuple[int, Kind]] = [(row, kind) for kind in ("exact_copy", "near_copy") for row in taken[kind]]
    for (row, kind), original in zip(copies, order, strict=False):
        plan[row] = Planted(row, kind, original, original=original)
    return plan


def caption_of(world: World, entry: Planted, rows: int) -> str:
    """The first caption of a picture. A copy has its original's or another of the same scene, half of the time each."""
    return _first(world, entry, _told(world, entry, rows))


def _first(world: World, entry: Planted, scene: Scene) -> str:
    rng = np.random.default_rng([world.seed, _CAPTION, entry.row])
    if entry.original is not None and rng.random() < 0.5:
        rng = np.random.default_rng([world.seed, _CAPTION, entry.original])
    return world.caption(scene, rng)


def captions_of(world: World, entry: Planted, rows: int, most: int, without: Set[str] = frozenset()) -> list[str]:
    """Up to `most` different captions of a picture, the first `caption_of`, then one of every category that fits.

    without: texts that no caption may be; a picture of which nothing else can be said keeps its first caption.
    """
    scene = _told(world, entry, rows)
    first = _first(world, entry, scene)
    rng = np.random.default_rng([world.seed, _FURTHER, entry.row])
    fitting = fitting_categories(scene)
    further = [world.caption(scene, rng, fitting[i]) for i in rng.permutation(len(fitting))]
    found = [caption for caption in dict.fromkeys([first, *further]) if caption not in without]
    return found[:most] or [first]


def _told(world: World, entry: Planted, rows: int) -> Scene:
    """What a row's captions tell: its own scene, or for wrong captions one beyond the list, in which no (color, shape)
    of the row's own scene occurs.
    """
    scene = world.scene(entry.scene)
    if entry.kind == "wrong_caption":
        shown = {thing.composition for thing in scene.things}
        number = rows + 64 * entry.row
        while shown & {thing.composition for thing in world.scene(number).things}:
            number += 1
        scene = world.scene(number)
    return scene


def evaluation_texts(world: World, most: int = ASKED) -> set[str]:
    """What `evaluate` asks, up to so many prompts per category and split: no prior should have learnt from these."""
    return {p.text for c in CATEGORIES for split in ("seen", "unseen") for p in world.prompts(c, most, split)}


def row_of(url: str) -> int:
    """The row of the list behind a URL of the served list."""
    return int(url.rpartition("/")[2].partition(".")[0])
