"""Crops are told from look-alikes: real scenes, cropped, recolored and compressed, against pictures merely moved."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from eclipse.lab.drawing import draw
from eclipse.lab.shapes import World
from eclipse.pipeline.filter.crop_match import SIDE, correlations
from PIL import Image

LIMIT = 0.95


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    return draw([World().scene(i) for i in range(60)])


def tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Any sizes → (n, 3, 64, 64) in 0..1."""
    squares = [np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


def reposted(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to two pixels cut from each side, other colors, JPEG."""
    left, top, right, bottom = rng.integers(0, 3, 4)
    cropped = picture[top : SIDE - bottom, left : SIDE - right] * rng.uniform(0.95, 1.05, 3) + rng.uniform(-5, 5)
    out = io.BytesIO()
    Image.fromarray(np.clip(cropped, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return np.asarray(Image.open(out))


def test_reposted_pictures_are_recognised_from_either_side(scenes: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    original, copy = tensor(list(scenes)), tensor([reposted(scene, rng) for scene in scenes])
    assert (correlations(original, copy, LIMIT) >= LIMIT).float().mean() >= 0.95
    assert (correlations(copy, original, LIMIT) >= LIMIT).float().mean() >= 0.95


def test_other_scenes_are_not(scenes: np.ndarray) -> None:
    pictures = tensor(list(scenes))
    assert (correlations(pictures, pictures.roll(1, dims=0), LIMIT) < LIMIT).all()


def test_what_has_moved_within_the_picture_is_no_crop(scenes: np.ndarray) -> None:
    """A crop moves things only as far as it enlarges them."""
    pictures = tensor(list(scenes))
    moved = pictures.roll((4, 4), dims=(2, 3))
    assert (correlations(pictures, moved, LIMIT) < LIMIT).float().mean() >= 0.9


def test_flat_pictures_resemble_nothing() -> None:
    flat = torch.full((2, 3, SIDE, SIDE), 0.5)
    assert (correlations(flat, flat, LIMIT) < LIMIT).all()
    assert len(correlations(flat[:0], flat[:0], LIMIT)) == 0
