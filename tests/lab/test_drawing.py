"""Pictures are drawn as the scene says, the same every time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from eclipse.lab.drawing import draw
from eclipse.lab.shapes import BACKGROUND_RGB, SHAPES, TEXTURES, Scene, Thing, World

PAINT = (0.9, 0.1, 0.1)


def one(
    shape: str = "circle", texture: str = "solid", *, x: float = 32, radius: float = 13.0, angle: float = 0.0
) -> Scene:
    thing = Thing(shape, "red", texture, "large", "center", x, 32, radius, angle, PAINT)
    return Scene((thing,), "black", BACKGROUND_RGB["black"], (0.0, 0.0))


def painted(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] > 120


def test_pictures_are_bytes_and_depend_on_the_scene_alone() -> None:
    world = World(seed=1)
    scenes = [world.scene(i, "any") for i in range(40)]
    pictures = draw(scenes)
    assert pictures.shape == (40, 64, 64, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, draw(scenes))
    alone = np.concatenate([draw([scene]) for scene in scenes])
    assert np.array_equal(pictures, alone), "neighbours in a batch must not matter"
    assert len({hashlib.sha256(picture).digest() for picture in pictures}) == 40


def test_every_object_has_its_color_at_its_centre() -> None:
    world = World(seed=2)
    for scene in (world.scene(i, "any") for i in range(60)):
        picture = draw([scene])[0] / 255.0
        for thing in scene.things:
            if thing.texture == "solid":
                at = picture[int(thing.y), int(thing.x)]
                assert np.abs(at - thing.rgb).max() < 0.01, thing


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_scale_with_their_radius(shape: str) -> None:
    large, small = ((draw([one(shape, radius=r)])[0, ..., 0] - 18.0).sum() for r in (14.0, 7.0))
    assert 3.9 < large / small < 4.1
    others = [painted(draw([one(other)])[0]) for other in SHAPES if other != shape]
    own = painted(draw([one(shape)])[0])
    assert all((own & other).sum() / (own | other).sum() < 0.87 for other in others)


def test_angle_turns_and_position_moves() -> None:
    upright = painted(draw([one("square")])[0])
    turned = painted(draw([one("square", angle=np.deg2rad(15))])[0])
    assert (upright != turned).sum() > 40 and abs(int(upright.sum()) - int(turned.sum())) < 25
    assert np.array_equal(np.roll(upright, 5, axis=1), painted(draw([one("square", x=37)])[0]))


def test_textures_leave_about_a_third_white() -> None:
    white = {}
    for texture in TEXTURES:
        picture = draw([one("circle", texture)])[0]
        white[texture] = (picture[..., 1] > 140).sum() / painted(picture).sum()
    assert white["solid"] == 0
    assert 0.3 < white["striped"] < 0.5 and 0.2 < white["dotted"] < 0.4


def test_light_slopes_over_the_background() -> None:
    scene = Scene(one().things, "gray", BACKGROUND_RGB["gray"], (0.04, 0.0))
    row = draw([scene])[0][2, :, 0].astype(int)
    assert row[-1] - row[0] == pytest.approx(0.08 * 255, abs=2) and (np.diff(row) >= 0).all()
