"""The checker reads what was drawn, spoiled or not, and judges it against prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from eclipse.lab.accuracy import MISSING, blur_and_jpeg, measure, nearest
from eclipse.lab.checker import UNCLEAR, Reading, Seen, holds, judge, read, read_all
from eclipse.lab.drawing import draw
from eclipse.lab.shapes import CATEGORIES, Prompt, Scene, Thing, Wanted, World
from scipy import ndimage

WORLD = World(seed=5)


def seen(shape: str, color: str, x: float = 16, y: float = 32, texture: str = "solid", size: str = "large") -> Seen:
    return Seen(shape, color, texture, size, x, y, 13.0, 0.0, (0, 0, 26, 26), (0.0, 0.0, 0.0), 1.0)


def prompt(category: str, *wanted: Wanted, relation: str | None = None, background: str | None = None) -> Prompt:
    return Prompt("", category, wanted, relation, background)


@pytest.mark.parametrize(("spoil", "least"), [(None, 0.99), (blur_and_jpeg, 0.97)], ids=["clean", "blur+jpeg"])
def test_reads_fresh_scenes(spoil, least: float) -> None:
    for matrix in measure(WORLD, range(500_000, 500_600), spoil):
        assert matrix.accuracy >= least, matrix.name
        assert matrix.total >= 600


def test_tells_place_size_and_background_of_what_was_drawn() -> None:
    scenes = [WORLD.scene(i, "any") for i in range(80)]
    for scene, reading in zip(scenes, read_all(draw(scenes)), strict=True):
        assert reading.background == scene.background
        for thing in scene.things:
            found = nearest(thing, reading.things)
            assert found is not None
            assert np.hypot(found.x - thing.x, found.y - thing.y) < 1.0
            assert abs(found.radius - thing.radius) < 1.0
            left, top, right, bottom = found.box
            assert left < thing.x < right and top < thing.y < bottom
            assert np.abs(np.subtract(found.rgb, thing.rgb)).max() < 0.1


def test_survives_specks_off_colors_and_uneven_backgrounds() -> None:
    rng = np.random.default_rng(0)
    scenes = [WORLD.scene(i, "any") for i in range(700_000, 700_150)]
    pictures = draw(scenes).astype(np.float32)
    for picture in pictures:
        for _ in range(4):
            x, y = rng.integers(0, 62, 2)
            picture[y : y + 2, x : x + 2] = rng.integers(0, 255, 3)
    pictures *= rng.uniform(0.95, 1.05, (150, 1, 1, 3)) + rng.normal(0, 0.04, pictures.shape)
    pictures += ndimage.gaussian_filter(rng.normal(0, 60, (150, 64, 64, 1)), (0, 8, 8, 0))
    readings = read_all(ndimage.gaussian_filter(pictures, (0, 0.8, 0.8, 0)).clip(0, 255).astype(np.uint8))
    right = [
        (thing.shape, thing.color, thing.texture, thing.size) == (s.shape, s.color, s.texture, s.size)
        for scene, reading in zip(scenes, readings, strict=True)
        for thing in scene.things
        if (s := nearest(thing, reading.things)) is not None
    ]
    assert sum(right) >= 0.95 * sum(len(scene.things) for scene in scenes)
    assert np.mean([len(r.things) == len(s.things) for r, s in zip(readings, scenes, strict=True)]) >= 0.97


def test_touching_objects_are_two() -> None:
    things = tuple(
        Thing("cross", "pink", "solid", "large", position, x, 32, 14.0, 0.0, (0.95, 0.35, 0.7))
        for position, x in (("left", 17.5), ("right", 46.2))
    )
    reading = read(draw([Scene(things, "gray", (0.42, 0.42, 0.42), (0.0, 0.0))])[0])
    assert [(s.shape, s.color, s.size) for s in reading.things] == [("cross", "pink", "large")] * 2


def test_an_empty_picture_holds_nothing() -> None:
    reading = read(np.full((64, 64, 3), 107, dtype=np.uint8))
    assert reading == Reading((), "gray")
    verdict = judge(reading, prompt("color", Wanted("star", "red"), Wanted("heart", "blue")))
    assert verdict.score == 0 and [fact.seen for fact in verdict.facts] == ["nothing", "nothing"]


def test_what_the_world_does_not_know_is_unclear() -> None:
    picture = np.full((64, 64, 3), 18, dtype=np.uint8)
    picture[24:30, 8:56] = (235, 235, 235)  # a white bar
    reading = read(picture)
    assert [(s.shape, s.color) for s in reading.things] == [(UNCLEAR, UNCLEAR)]
    assert read(np.full((64, 64, 3), (20, 20, 220), dtype=np.uint8)).background == UNCLEAR
    picture[10:54, 10:54] = (220, 20, 20)  # a square far too large
    assert [(s.shape, s.color, s.size) for s in read(picture).things] == [(UNCLEAR, "red", UNCLEAR)]


def test_noise_does_not_pass_for_a_scene() -> None:
    noise = np.random.default_rng(3).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8)
    asked = [WORLD.prompts(category, 4) for category in CATEGORIES]
    scores = [judge(reading, p).score for reading in read_all(noise) for prompts in asked for p in prompts]
    assert np.mean(scores) < 0.03


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 3), (64, 64, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(B, 64, 64, 3\)"):
        read(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="float64"):
        read(np.zeros((64, 64, 3)))


def test_confusions_name_the_mistake() -> None:
    def swap_channels_and_hide_left(pictures: np.ndarray) -> np.ndarray:
        spoiled = pictures[..., [1, 0, 2]].copy()
        spoiled[:, :, :32] = spoiled[:, :1, :1]
        return spoiled

    colors = next(c for c in measure(WORLD, range(200), swap_channels_and_hide_left) if c.name == "color")
    red = colors.counts[colors.rows.index("red")]
    assert red[colors.columns.index("green")] > 0 and red[colors.columns.index("red")] == 0
    assert colors.counts[:, colors.columns.index(MISSING)].sum() > 20


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_right_picture_scores_one_and_a_wrong_one_hardly(category: str) -> None:
    for split in ("seen", "unseen"):
        prompts = WORLD.prompts(category, 100, split)
        readings = read_all(draw([WORLD.scene_for(p) for p in prompts]))
        right = [judge(reading, p) for reading, p in zip(readings, prompts, strict=True)]
        assert np.mean([v.score == 1 and v.all_right for v in right]) >= 0.99
        wrong = [judge(reading, p).score for reading, p in zip(readings[1:] + readings[:1], prompts, strict=True)]
        assert np.mean(wrong) < 0.15


def test_color_and_shape_must_be_on_one_object() -> None:
    asked = prompt("color", Wanted("star", "red"), Wanted("heart", "blue"))
    swapped = Reading((seen("star", "blue"), seen("heart", "red")), "gray")
    assert judge(swapped, asked).score == 0
    half = Reading((seen("star", "red"), seen("heart", "green"), seen("cross", "blue")), "gray")
    verdict = judge(half, asked)
    assert verdict.score == 0.5 and not verdict.all_right
    assert [fact.right for fact in verdict.facts] == [True, False]
    assert verdict.facts[0].things == (0,) and verdict.facts[1].asked == "blue heart"


def test_texture_counts_the_whole_object() -> None:
    asked = prompt("texture", Wanted("star", "red", "dotted"), Wanted("heart", "blue", "solid"))
    reading = Reading((seen("star", "red", texture="striped"), seen("heart", "blue")), "gray")
    assert judge(reading, asked).score == 0.5
    assert judge(reading, prompt("color", Wanted("star", "red"), Wanted("heart", "blue"))).score == 1


@pytest.mark.parametrize(
    ("relation", "first", "second"),
    [("left of", (16, 32), (48, 30)), ("right of", (48, 32), (16, 32)), ("above", (30, 16), (32, 48)),
     ("below", (32, 48), (32, 16))],
)  # fmt: skip
def test_spatial_needs_both_objects_and_the_relation(relation: str, first, second) -> None:
    asked = prompt("spatial", Wanted("star", "red"), Wanted("heart", "blue"), relation=relation)
    reading = Reading((seen("star", "red", *first), seen("heart", "blue", *second)), "gray")
    assert holds(relation, *reading.things)
    assert judge(reading, asked).score == 1
    turned = Reading((seen("star", "red", *second), seen("heart", "blue", *first)), "gray")
    assert judge(turned, asked).score == 0
    wrong = Reading((seen("star", "green", *first), seen("heart", "blue", *second)), "gray")
    assert judge(wrong, asked).score == 0
    assert judge(Reading(reading.things[:1], "gray"), asked).score == 0


def test_relations_need_a_clear_offset() -> None:
    assert not holds("left of", seen("star", "red", 30, 32), seen("heart", "blue", 34, 32))
    assert not holds("left of", seen("star", "red", 16, 16), seen("heart", "blue", 40, 48))


def test_of_equal_objects_the_pair_that_fulfils_the_relation_is_chosen() -> None:
    asked = prompt("spatial", Wanted("star", "red"), Wanted("heart", "blue"), relation="right of")
    things = (seen("star", "red", 16, 32), seen("heart", "blue", 32, 32), seen("star", "red", 48, 32))
    assert judge(Reading(things, "gray"), asked).score == 1


def test_numeracy_wants_exact_counts_of_each_kind() -> None:
    asked = prompt("numeracy", Wanted("star", "red", count=2), Wanted("heart", "blue"))
    stars, heart = [seen("star", "red", 16), seen("star", "red", 48)], seen("heart", "blue", 32, 50)
    assert judge(Reading((*stars, heart), "gray"), asked).score == 1
    assert judge(Reading((*stars, heart, seen("cross", "green")), "gray"), asked).score == 1
    assert judge(Reading((*stars, heart, seen("star", "red", 32, 10)), "gray"), asked).score == 0.5
    verdict = judge(Reading((stars[0],), "gray"), asked)
    assert verdict.score == 0 and [fact.seen for fact in verdict.facts] == ["1 × red star", "0 × blue heart"]


def test_complex_is_the_share_of_four_facts() -> None:
    asked = prompt(
        "complex", Wanted("star", "red", "solid", "large"), Wanted("heart", "blue", "dotted", "small"),
        relation="left of", background="tan",
    )  # fmt: skip
    star, heart = seen("star", "red"), seen("heart", "blue", 48, texture="dotted", size="small")
    perfect = judge(Reading((star, heart), "tan"), asked)
    assert perfect.score == 1 and perfect.all_right
    assert [fact.about for fact in perfect.facts] == ["object", "object", "relation", "background"]
    assert judge(Reading((star, heart), "gray"), asked).score == 0.75
    assert judge(Reading((star, replace(heart, size="large")), "gray"), asked).score == 0.5
    assert judge(Reading((), "tan"), asked).score == 0.25
