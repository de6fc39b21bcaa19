"""Which shape a silhouette is: correlation with drawn templates at equal centre and area. Called by `reading`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from .drawing import draw
from .shapes import IMAGE_SIZE, SHAPES, Scene, Thing

_GRID = 28  # samples a side of a normalised silhouette
_REACH = 0.95  # half its side, in square roots of the silhouette's area: the farthest tip of a triangle is at 0.88
_DEGREES = tuple(range(-20, 21, 4))
_TEMPLATE_RADIUS = 13.0
_BLURS = (0.5, 1.5, 3.0)  # pixels, at that radius


@dataclass(frozen=True)
class Outline:
    """What N silhouettes are.

    shape (N,) index into SHAPES; fit (N,) correlation with it, -1..1; angle (N,) radians; x, y (N,) the object's own
    centre (not its centroid) in pixels of the window; radius (N,) pixels.
    """

    shape: np.ndarray
    fit: np.ndarray
    angle: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


@dataclass(frozen=True)
class _Templates:
    samples: np.ndarray  # (T, G·G) float32, zero mean and unit norm
    shape: np.ndarray  # (T,)
    angle: np.ndarray  # (T,) radians
    area: np.ndarray  # (T,) of radius 1
    offset: np.ndarray  # (T, 2) from the object's centre to its centroid (right, down), of radius 1


def classify(cover: np.ndarray) -> Outline:
    """The shape of soft silhouettes: cover (N, H, W) float32, the share of each pixel that the object fills."""
    templates = _templates()
    area, x, y = _moments(cover)
    scores = _unit(_normalised(cover, area, x, y)) @ templates.samples.T
    best = scores.argmax(axis=1)
    radius = np.sqrt(area / templates.area[best])
    shift = templates.offset[best] * radius[:, None]
    fit = scores[np.arange(len(best)), best]
    return Outline(templates.shape[best], fit, templates.angle[best], x - shift[:, 0], y - shift[:, 1], radius)


@cache
def _templates() -> _Templates:
    middle = IMAGE_SIZE / 2
    kinds = [(index, np.deg2rad(degrees)) for index in range(len(SHAPES)) for degrees in _DEGREES]
    white, black = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    scenes = [
        Scene(
            (Thing(SHAPES[i], "red", "solid", "large", "center", middle, middle, _TEMPLATE_RADIUS, angle, white),),
            "black", black, (0.0, 0.0),
        )
        for i, angle in kinds
    ]  # fmt: skip
    sharp = draw(scenes)[..., 0].astype(np.float32) / 255
    cover = np.concatenate([ndimage.gaussian_filter(sharp, (0, sigma, sigma)) for sigma in _BLURS])
    kinds = kinds * len(_BLURS)
    area, x, y = _moments(cover)
    return _Templates(
        _unit(_normalised(cover, area, x, y)),
        np.array([i for i, _ in kinds]),
        np.array([angle for _, angle in kinds]),
        area / _TEMPLATE_RADIUS**2,
        np.stack([x - middle, y - middle], axis=1) / _TEMPLATE_RADIUS,
    )


def _moments(cover: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area, and centroid x, y in pixels; the first pixel's centre lies at 0.5."""
    _, height, width = cover.shape
    area = np.maximum(cover.sum(axis=(1, 2)), 1e-3)
    x = cover.sum(axis=1) @ (np.arange(width, dtype=np.float32) + 0.5) / area
    y = cover.sum(axis=2) @ (np.arange(height, dtype=np.float32) + 0.5) / area
    return area, x, y


def _normalised(cover: np.ndarray, area: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Silhouettes resampled about their centroid at a scale of √area: (N, G·G). Separable bilinear, zero outside."""
    span = np.linspace(-_REACH, _REACH, _GRID, dtype=np.float32)[None, :] * np.sqrt(area)[:, None]
    across = _hats(x[:, None] + span - 0.5, cover.shape[2])
    down = _hats(y[:, None] + span - 0.5, cover.shape[1])
    return (down @ cover @ across.transpose(0, 2, 1)).reshape(len(cover), -1)


def _hats(at: np.ndarray, size: int) -> np.ndarray:
    """Bilinear weights (N, G, size) of reading pixels at fractional indices (N, G)."""
    return np.maximum(1 - np.abs(at[:, :, None] - np.arange(size, dtype=np.float32)), 0).astype(np.float32)


def _unit(samples: np.ndarray) -> np.ndarray:
    centred = samples - samples.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
