"""The shapes world: seeded scenes, their captions and prompts. Called by the lab's server, scorer and model builder.

A scene holds one to four objects on a background. A picture shows far more than any one caption says (sizes, textures,
angles, shades, layout, lighting), as photographs do. Some (color, shape) compositions are held out: they never occur in
scenes of the `train` split, so a prior trained there meets them first in a prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from .captions import CATEGORIES, caption_of, full_caption, groups, open_categories, prompt_text

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "tan")

IMAGE_SIZE = 64
RADIUS = {"small": 9.5, "large": 13.5}
# Hue, saturation, value (0..1) of each color's centre; every object is shaded a little around it.
HSV = {
    "red": (0.0, 0.95, 0.92), "orange": (0.085, 0.95, 0.97), "yellow": (0.155, 0.92, 0.97), "green": (0.34, 0.90, 0.72),
    "cyan": (0.50, 0.90, 0.92), "blue": (0.62, 0.90, 0.92), "purple": (0.76, 0.85, 0.75), "pink": (0.905, 0.62, 0.98),
}  # fmt: skip
BACKGROUND_RGB = {"black": (0.07, 0.07, 0.07), "gray": (0.42, 0.42, 0.42), "tan": (0.70, 0.59, 0.45)}
# Where objects stand: name → centre in pixels. A layout is a set of these.
POSITIONS = {
    "center": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48),
    "top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48),
}  # fmt: skip
_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_SPLIT_STREAM = {"train": 0, "any": 1, "unseen": 2}

EVALUATION, VALIDATION = 13, 19  # streams of the seed for prompts

Split = Literal["train", "any", "unseen"]
Composition = tuple[str, str]


@dataclass(frozen=True)
class Thing:
    """One object: what captions may say of it, and what none does (x, y, radius in pixels, angle in radians, rgb)."""

    shape: str
    color: str
    texture: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def composition(self) -> Composition:
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a background; `light` is the brightness slope over the picture (right, down)."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: tuple[float, float, float]
    light: tuple[float, float]


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks of `count` objects; None where it leaves the choice open."""

    shape: str
    color: str
    texture: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Prompt:
    """A prompt and its meaning. `relation` ('left of', 'above', …) is that of the first wanted object to the second."""

    text: str
    category: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None
    split: str = "seen"


@dataclass(frozen=True)
class World:
    """A world is its seed and its share of held-out (color, shape) compositions (0 ≤ held_out < 1)."""

    seed: int = 0
    held_out: float = 0.15
    max_objects: int = 4
    object_weights: tuple[float, ...] = field(default=(0.3, 0.4, 0.2, 0.1))

    @cached_property
    def _fewer(self) -> list[float]:
        """Shares of scenes with at most 1, 2, … objects."""
        shares = np.cumsum(self.object_weights)
        return (shares / shares[-1]).tolist()

    @cached_property
    def held_out_pairs(self) -> frozenset[Composition]:
        """Compositions that no `train` scene holds, *orange square* first; each color and shape still occurs."""
        rng = np.random.default_rng([self.seed, 7])
        pairs = [(color, shape) for color in COLORS for shape in SHAPES]
        wanted = round(self.held_out * len(pairs))
        order = [
            ("orange", "square"),
            *(pairs[i] for i in rng.permutation(len(pairs)) if pairs[i] != ("orange", "square")),
        ]
        held: set[Composition] = set()
        for pair in order:
            if len(held) == wanted:
                break
            kept = [p for p in pairs if p not in held and p != pair]
            if {c for c, _ in kept} == set(COLORS) and {s for _, s in kept} == set(SHAPES):
                held.add(pair)
        return frozenset(held)

    def scene(self, index: int, split: Split = "train") -> Scene:
        """Scene number `index` of a split: `train` has no held-out composition, `unseen` at least one."""
        rng = np.random.default_rng([self.seed, 11, _SPLIT_STREAM[split], index])
        more = bisect_right(self._fewer, rng.random())  # what rng.choice draws by these weights, at a tenth of its time
        count = min(more + 1, self.max_objects)
        grouped = count > 1 and rng.random() < 0.3
        kinds: list[Wanted] = []
        while sum(k.count for k in kinds) < count:
            left = count - sum(k.count for k in kinds)
            kind = self._kind(rng, split if split == "train" or not kinds else "any")
            if all((kind.color, kind.shape) != (k.color, k.shape) for k in kinds):
                kinds.append(
                    Wanted(kind.shape, kind.color, count=int(rng.integers(2, left + 1)) if grouped and left > 1 else 1)
                )
        return _arrange(kinds, rng)

    def caption(self, scene: Scene, rng: np.random.Generator, category: str | None = None) -> str:
        """A caption in one of the scene's possible categories: it names every object, not all that is seen of it."""
        return caption_of(scene, rng, category)

    def retold(self, scene: Scene, category: str, rng: np.random.Generator) -> Scene:
        """Another scene that has `scene`'s captions of `category`: all that these leave open is drawn again.

        Raises ValueError for a category that does not fit the scene, or whose captions name every place.
        """
        if category not in open_categories(scene):
            raise ValueError(f"nothing to draw again by a caption of category {category!r}")
        kinds = [
            Wanted(
                alike[0].shape,
                alike[0].color,
                alike[0].texture if category in ("texture", "complex") else None,
                alike[0].size if category == "complex" else None,
                len(alike),
            )
            for alike in groups(scene)
        ]
        relation = None
        if category in ("spatial", "complex"):
            relation = "left of" if scene.things[0].position == "left" else "above"
        return _arrange(kinds, rng, relation, scene.background if category == "complex" else None)

    def full_caption(self, scene: Scene) -> str:
        """All that can be said: size, texture, color, shape and place of each object, and the background."""
        return full_caption(scene)

    def prompts(
        self, category: str, n: int, split: Literal["seen", "unseen"] = "seen", stream: int = EVALUATION
    ) -> list[Prompt]:
        """`n` distinct prompts of one category; `unseen` ones name a held-out composition, `seen` ones none.

        stream: of the seed; another one gives other prompts, of which some may be among these too.
        """
        if category not in CATEGORIES:
            raise ValueError(f"unknown category {category!r}: one of {', '.join(CATEGORIES)}")
        rng = np.random.default_rng([self.seed, stream, CATEGORIES.index(category), int(split == "unseen")])
        found: dict[str, Prompt] = {}
        for _ in range(200 * n):
            if len(found) == n:
                break
            prompt = self._prompt(category, split, rng)
            found.setdefault(prompt.text, prompt)
        return list(found.values())

    def scene_for(self, prompt: Prompt, seed: int = 0) -> Scene:
        """A scene that fulfils a prompt, everything left open drawn at random: what the oracle is shown."""
        rng = np.random.default_rng([self.seed, 17, seed, *prompt.text.encode()])
        return _arrange(list(prompt.wanted), rng, prompt.relation, prompt.background)

    def _kind(self, rng: np.random.Generator, split: str) -> Wanted:
        held = sorted(self.held_out_pairs)
        if split == "unseen" and held:
            color, shape = held[rng.integers(len(held))]
            return Wanted(shape, color)
        while True:
            color, shape = COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
            if split == "any" or (color, shape) not in self.held_out_pairs:
                return Wanted(shape, color)

    def _prompt(self, category: str, split: str, rng: np.random.Generator) -> Prompt:
        kind_split = "train" if split == "seen" else "unseen"
        first = self._kind(rng, kind_split)
        second = self._kind(rng, "train")
        while second.color == first.color or second.shape == first.shape:
            second = self._kind(rng, "train")
        pair = [first, second] if rng.random() < 0.5 else [second, first]
        relation = background = None
        if category == "texture":
            pair = [Wanted(k.shape, k.color, TEXTURES[rng.integers(3)]) for k in pair]
        elif category == "numeracy":
            counts = (
                [(2, 1), (3, 1), (2, 2), (1, 3), (1, 2)][rng.integers(5)]
                if rng.random() < 0.5
                else (int(rng.integers(2, 5)), 0)
            )
            pair = [Wanted(k.shape, k.color, count=c) for k, c in zip([first, second], counts, strict=True) if c]
        elif category == "complex":
            pair = [Wanted(k.shape, k.color, TEXTURES[rng.integers(3)], SIZES[rng.integers(2)]) for k in pair]
            background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        if category in ("spatial", "complex"):
            relation = ("left of", "right of", "above", "below")[rng.integers(4)]
        text = prompt_text(category, pair, relation, background, rng)
        return Prompt(text, category, tuple(pair), relation, background, split)


def _arrange(
    kinds: Sequence[Wanted], rng: np.random.Generator, relation: str | None = None, background: str | None = None
) -> Scene:
    """Place the wanted objects, choosing all that is open."""
    wanted = [kind for kind in kinds for _ in range(kind.count)]
    shared = {
        id(kind): (kind.texture or TEXTURES[rng.integers(len(TEXTURES))], kind.size or SIZES[rng.integers(len(SIZES))])
        for kind in kinds
    }
    places = _places(len(wanted), rng, relation)
    things = []
    for kind, position in zip(wanted, places, strict=True):
        texture, size = shared[id(kind)]
        jitter = 6.0 if position == "center" else 2.0
        x, y = (centre + rng.uniform(-jitter, jitter) for centre in POSITIONS[position])
        angle = np.deg2rad(rng.uniform(-15, 15))
        radius = RADIUS[size] * rng.uniform(0.95, 1.04)
        things.append(
            Thing(kind.shape, kind.color, texture, size, position, x, y, radius, float(angle), _shade(kind.color, rng))
        )
    order = list(POSITIONS)
    things.sort(key=lambda t: (order.index(t.position),))
    background = background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    shift = rng.uniform(-0.03, 0.03)
    r, g, b = (max(channel + shift, 0.02) for channel in BACKGROUND_RGB[background])
    light = tuple(rng.uniform(-0.04, 0.04, size=2).tolist())
    return Scene(tuple(things), background, (r, g, b), (light[0], light[1]))


def _places(count: int, rng: np.random.Generator, relation: str | None) -> list[str]:
    """One position for each object, in the order in which the objects are given."""
    if count == 1:
        return ["center"]
    if count == 2:
        ordered = {
            "left of": ["left", "right"],
            "right of": ["right", "left"],
            "above": ["top", "bottom"],
            "below": ["bottom", "top"],
        }
        if relation is not None:
            return ordered[relation]
        return ["left", "right"] if rng.random() < 0.6 else ["top", "bottom"]
    places: list[str] = list(_CORNERS)
    if count == 3:
        places.pop(int(rng.integers(4)))
    return places


def _shade(color: str, rng: np.random.Generator) -> tuple[float, float, float]:
    hue, saturation, value = HSV[color]
    hue = (hue + rng.uniform(-0.012, 0.012)) % 1.0
    saturation = min(saturation * rng.uniform(0.92, 1.05), 1.0)
    value = min(value * rng.uniform(0.88, 1.04), 1.0)
    sector, fraction = divmod(hue * 6.0, 1.0)
    p, q, t = value * (1 - saturation), value * (1 - saturation * fraction), value * (1 - saturation * (1 - fraction))
    return [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)][int(sector) % 6]
