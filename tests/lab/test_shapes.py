"""The shapes world: seeded, balanced, honest about what is held out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from eclipse.lab.captions import fitting_categories
from eclipse.lab.shapes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    World,
)

SHARES = (0.15, 0.5, 0.8)


def compositions(scene: Scene) -> set[tuple[str, str]]:
    return {thing.composition for thing in scene.things}


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(COLORS) >= 8 and len(SHAPES) >= 6 and len(TEXTURES) == 3 and len(SIZES) == 2 and len(BACKGROUNDS) >= 3
    assert IMAGE_SIZE >= 64
    assert set(CATEGORIES) == {"color", "shape", "texture", "spatial", "numeracy", "complex"}


@pytest.mark.parametrize("share", SHARES)
def test_held_out_compositions_never_occur_in_training_scenes(share: float) -> None:
    world = World(seed=2, held_out=share)
    held = world.held_out_pairs
    assert ("orange", "square") in held
    assert len(held) == round(share * len(COLORS) * len(SHAPES))
    kept = {(color, shape) for color in COLORS for shape in SHAPES} - held
    assert {color for color, _ in kept} == set(COLORS) and {shape for _, shape in kept} == set(SHAPES)
    drawn = [compositions(world.scene(i)) for i in range(800)]
    assert not held & set().union(*drawn)
    assert set().union(*drawn) == kept, "training scenes show every other composition"
    assert all(held & compositions(world.scene(i, "unseen")) for i in range(200))


def test_nothing_held_out() -> None:
    world = World(held_out=0.0)
    assert not world.held_out_pairs
    assert world.prompts("color", 5, "seen")


def test_scenes_are_a_function_of_seed_split_and_index() -> None:
    assert World(seed=1).scene(7) == World(seed=1).scene(7)
    different = {World(seed=1).scene(7), World(seed=2).scene(7), World(seed=1).scene(8), World(seed=1).scene(7, "any")}
    assert len(different) == 4


def test_scenes_use_the_whole_vocabulary_about_evenly() -> None:
    scenes = [World(seed=3).scene(i, "any") for i in range(1500)]
    things = [thing for scene in scenes for thing in scene.things]
    assert set(Counter(len(scene.things) for scene in scenes)) == {1, 2, 3, 4}
    for name, values in {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "size": SIZES}.items():
        counts = Counter(getattr(thing, name) for thing in things)
        assert min(counts[v] for v in values) > 0.6 * len(things) / len(values), name
    assert set(Counter(scene.background for scene in scenes)) == set(BACKGROUNDS)


def test_objects_stand_inside_the_picture_and_apart() -> None:
    for scene in (World(seed=4).scene(i, "any") for i in range(500)):
        for i, thing in enumerate(scene.things):
            assert thing.radius * 0.9 < thing.x < IMAGE_SIZE - thing.radius * 0.9
            assert thing.radius * 0.9 < thing.y < IMAGE_SIZE - thing.radius * 0.9
            for other in scene.things[:i]:
                assert max(abs(thing.x - other.x), abs(thing.y - other.y)) > 0.96 * (thing.radius + other.radius)


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_distinct_and_their_split_says_what_they_name(category: str) -> None:
    world = World(seed=6)
    for split in ("seen", "unseen"):
        prompts = world.prompts(category, 60, split)
        assert len({prompt.text for prompt in prompts}) == 60
        assert prompts == world.prompts(category, 60, split)
        for prompt in prompts:
            named = {(wanted.color, wanted.shape) for wanted in prompt.wanted}
            assert bool(named & world.held_out_pairs) == (split == "unseen"), prompt.text
            assert (prompt.category, prompt.split) == (category, split)
            assert 1 <= sum(wanted.count for wanted in prompt.wanted) <= 4
            assert all(f"{wanted.color} {wanted.shape}" in prompt.text for wanted in prompt.wanted)
            assert (prompt.relation is not None) == (category in ("spatial", "complex"))


def test_an_unknown_category_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown category 'taste'.*color"):
        World().prompts("taste", 1)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_for_a_prompt_holds_what_it_asks(category: str) -> None:
    world = World(seed=6)
    for prompt in world.prompts(category, 40, "unseen"):
        scene = world.scene_for(prompt, seed=1)
        assert scene == world.scene_for(prompt, seed=1) != world.scene_for(prompt, seed=2)
        assert len(scene.things) == sum(wanted.count for wanted in prompt.wanted)
        for wanted in prompt.wanted:
            alike = [t for t in scene.things if (t.color, t.shape) == (wanted.color, wanted.shape)]
            assert len(alike) == wanted.count
            assert all(wanted.texture in (None, t.texture) and wanted.size in (None, t.size) for t in alike)
        assert prompt.background in (None, scene.background)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_told_again_has_the_same_captions_and_is_another(category: str) -> None:
    world, rng, told = World(seed=4), np.random.default_rng(0), 0
    for index in range(150):
        scene = world.scene(index, "any")
        if category not in fitting_categories(scene) or (category == "complex" and len(scene.things) != 2):
            with pytest.raises(ValueError, match=category):
                world.retold(scene, category, rng)
            continue
        other, told = world.retold(scene, category, rng), told + 1
        assert other != scene
        for seed in range(3):
            captions = [world.caption(s, np.random.default_rng(seed), category) for s in (scene, other)]
            assert captions[0] == captions[1]
    assert told > 20
