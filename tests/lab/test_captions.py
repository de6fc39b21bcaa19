"""Captions say what is in the scene, in several phrasings of six categories."""

from __future__ import annotations

import re

import numpy as np
import pytest
from eclipse.lab.captions import fitting_categories
from eclipse.lab.shapes import BACKGROUNDS, CATEGORIES, COLORS, SHAPES, SIZES, TEXTURES, Scene, World

WORLD = World(seed=8)
SCENES = [WORLD.scene(i, "any") for i in range(300)]
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PHRASE = re.compile(
    rf"\b({'|'.join(NUMBERS)}) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(TEXTURES)}) )?"
    rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:es|s)?\b"
)


def told(caption: str) -> list[tuple[int, str, str, str, str]]:
    return [(NUMBERS[number], *rest) for number, *rest in PHRASE.findall(caption)]  # type: ignore[misc]


def fits(scene: Scene, caption: str) -> bool:
    """Every phrase is true of as many objects as it says, and all objects are named."""
    phrases = told(caption)
    kinds = [(t.size, t.texture, t.color, t.shape) for t in scene.things]
    for _, *said in phrases:
        same = [k for k in kinds if all(s in ("", value) for s, value in zip(said, k, strict=True))]
        if len(same) < sum(n for n, *other in phrases if other == said):
            return False
    return sum(n for n, *_ in phrases) == len(kinds)


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_of_every_category_are_true(category: str) -> None:
    rng = np.random.default_rng(0)
    scenes = [scene for scene in SCENES if category in fitting_categories(scene)]
    assert len(scenes) > 20
    for scene in scenes:
        caption = WORLD.caption(scene, rng, category)
        assert fits(scene, caption), caption


def test_categories_say_what_is_theirs() -> None:
    rng = np.random.default_rng(1)
    for scene in SCENES:
        for category in fitting_categories(scene):
            caption = WORLD.caption(scene, rng, category)
            assert any(word in caption for word in TEXTURES) == (category in ("texture", "complex"))
            assert any(word in caption.split() for word in SIZES) == (category == "complex")
            assert caption.endswith("background") == (category == "complex")


def test_spatial_captions_hold_in_the_picture() -> None:
    rng = np.random.default_rng(2)
    words = {
        "left of": (-1, 0),
        "right of": (1, 0),
        "above": (0, -1),
        "over": (0, -1),
        "below": (0, 1),
        "under": (0, 1),
    }
    checked = set()
    for scene in SCENES:
        if "spatial" not in fitting_categories(scene):
            continue
        caption = WORLD.caption(scene, rng, "spatial")
        (_, _, _, *first), (_, _, _, *second) = told(caption)
        one, two = (next(t for t in scene.things if [t.color, t.shape] == names) for names in (first, second))
        word = next(w for w in words if f" {w} " in f" {caption} ")
        right, down = words[word]
        assert (one.x - two.x) * right + (one.y - two.y) * down > 8, caption
        checked.add(word)
    assert checked == set(words)


def test_phrasings_vary() -> None:
    openings = {WORLD.caption(SCENES[0], np.random.default_rng(i), "color").split(" of ")[0] for i in range(60)}
    assert len(openings) >= 4


def test_the_full_caption_says_everything() -> None:
    for scene in SCENES:
        caption = WORLD.full_caption(scene)
        for t in scene.things:
            assert re.search(rf"a {t.size} {t.texture} {t.color} {t.shape} (in|at) the {t.position}\b", caption)
        assert caption.endswith(f"on a {scene.background} background") and scene.background in BACKGROUNDS


def test_a_category_that_does_not_fit_is_refused() -> None:
    single = next(scene for scene in SCENES if len(scene.things) == 1)
    with pytest.raises(ValueError, match="'spatial' does not fit this scene"):
        WORLD.caption(single, np.random.default_rng(0), "spatial")
