"""Reads pictures of the shapes world by pixel: what stands where, of which color and texture. Called by `checker`.

A picture is unmixed: each pixel near an object is background, the object's color and white, in shares found by least
squares. The first two shares give a soft silhouette, the third the texture. A reading never sees a caption or a prompt.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .cutouts import WINDOW, Cutouts, background_planes, cut_out, erode
from .shapes import BACKGROUND_RGB, BACKGROUNDS, COLORS, HSV, IMAGE_SIZE, RADIUS, SHAPES, SIZES
from .silhouettes import classify

UNCLEAR = "unclear"  # read where nothing in the world's vocabulary fits: never equal to what a prompt asks

_FIT = 0.85  # correlation below which a silhouette is no shape of this world
_LARGEST_RADIUS = 1.3 * RADIUS["large"]  # from here on a blob is no object of this world, whatever its outline
_CHROMA = 0.2  # max - min of RGB below which an object has no color
_BACKGROUND_REACH = 0.2  # distance in RGB within which a background has its name
_WAVE = 0.07  # amplitude of white along its expected wave from which an object is textured: solid ones stay under 0.045
_PERIODS = (6.0, 7.0)  # pixels between stripes or dots that are tried, whatever the object's size
_STRIPES = 1.5  # evens out the two amplitudes: dots add two waves up
_TILTS = (-16, -8, 0, 8, 16)  # degrees
_BATCH = 256
_RIDGE = 0.01
_WEIGHTED_YCC = np.array(  # RGB → 3·Y, Cb, Cr (ITU-R BT.601)
    [[0.897, -0.169, 0.5], [1.761, -0.331, -0.419], [0.342, 0.5, -0.081]], dtype=np.float32
)


@dataclass(frozen=True)
class Seen:
    """One object that was read. x, y: centre, radius: all in pixels; angle in radians; box: left, top, right, bottom in
    pixels; rgb: its paint; fit: correlation of its silhouette with the shape's. An attribute may be UNCLEAR."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    box: tuple[int, int, int, int]
    rgb: tuple[float, float, float]
    fit: float


@dataclass(frozen=True)
class Reading:
    """What a picture holds: its objects from top left to bottom right, and the name of its background."""

    things: tuple[Seen, ...]
    background: str


def read(picture: np.ndarray) -> Reading:
    """Read one picture, uint8 (64, 64, 3). Raises ValueError for any other array."""
    return read_all(np.asarray(picture)[None])[0]


def read_all(pictures: np.ndarray) -> list[Reading]:
    """Read pictures, uint8 (B, 64, 64, 3) RGB. Raises ValueError for any other array: sizes are judged in pixels."""
    pictures = np.asarray(pictures)
    if pictures.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or pictures.dtype != np.uint8:
        wanted = f"uint8 (B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
        raise ValueError(f"pictures must be {wanted}, not {pictures.dtype} {pictures.shape}")
    readings: list[Reading] = []
    for start in range(0, len(pictures), _BATCH):
        readings += _read_batch(pictures[start : start + _BATCH].astype(np.float32) / 255)
    return readings


def _read_batch(pictures: np.ndarray) -> list[Reading]:
    planes = background_planes(pictures)
    cutouts = cut_out(pictures, planes)
    things: list[list[Seen]] = [[] for _ in pictures]
    if len(cutouts):
        for row, seen in zip(cutouts.picture, _see(cutouts), strict=True):
            things[row].append(seen)
    names = [_background_name(rgb) for rgb in planes.mean(axis=(1, 2))]
    return [Reading(tuple(sorted(t, key=_reading_order)), name) for t, name in zip(things, names, strict=True)]


def _reading_order(seen: Seen) -> tuple[int, float]:
    return round(seen.y / 24), seen.x


def _see(cutouts: Cutouts) -> list[Seen]:
    paint = _paint(cutouts)
    color_share, white_share = _unmix(cutouts, paint)
    cover = np.clip(color_share + white_share, 0, 1) * cutouts.nearby
    cover[erode(cutouts.inside, 2)] = 1.0
    outline = classify(cover)
    textures = _textures(white_share, erode(cutouts.inside, 1))
    known = (outline.fit >= _FIT) & (outline.radius < _LARGEST_RADIUS)
    return [
        Seen(
            shape=SHAPES[outline.shape[i]] if known[i] else UNCLEAR,
            color=_color_name(paint[i]),
            texture=textures[i],
            size=_size_name(outline.radius[i]),
            x=float(cutouts.left[i] + outline.x[i]),
            y=float(cutouts.top[i] + outline.y[i]),
            radius=float(outline.radius[i]),
            angle=float(outline.angle[i]),
            box=_box(cutouts, i),
            rgb=(float(paint[i, 0]), float(paint[i, 1]), float(paint[i, 2])),
            fit=float(outline.fit[i]),
        )
        for i in range(len(cutouts))
    ]


def _paint(cutouts: Cutouts) -> np.ndarray:
    """The color under the texture, (N, 3): the mean over the most colorful fifth of the object's inner pixels."""
    inner = erode(cutouts.inside, 1)
    chroma = np.where(inner, cutouts.pixels.max(axis=-1) - cutouts.pixels.min(axis=-1), -1.0).reshape(len(cutouts), -1)
    rank = np.maximum((inner.sum(axis=(1, 2)) * 0.2).astype(np.int64), 1)
    ordered = np.sort(chroma, axis=1)[:, ::-1]
    floor = ordered[np.arange(len(cutouts)), rank - 1]
    chosen = (chroma >= floor[:, None]).astype(np.float32)
    flat = cutouts.pixels.reshape(len(cutouts), -1, 3)
    return (chosen[:, None, :] @ flat)[:, 0] / chosen.sum(axis=1, keepdims=True)


def _unmix(cutouts: Cutouts, paint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of paint and of white in each pixel, (N, W, W) each: non-negative least squares on pixel − background.

    Brightness weighs more than color: JPEG and decoders keep the one at full resolution and smear the other.
    """
    behind = cutouts.background[:, WINDOW // 2, WINDOW // 2]
    change = (cutouts.pixels - cutouts.background) @ _WEIGHTED_YCC
    to_paint, to_white = (paint - behind) @ _WEIGHTED_YCC, (1.0 - behind) @ _WEIGHTED_YCC
    along_paint = np.einsum("nijc,nc->nij", change, to_paint)
    along_white = np.einsum("nijc,nc->nij", change, to_white)
    paint_paint, white_white, both = (
        (first * second).sum(axis=1)[:, None, None] + ridge
        for first, second, ridge in (
            (to_paint, to_paint, _RIDGE),
            (to_white, to_white, _RIDGE),
            (to_paint, to_white, 0.0),
        )
    )
    determinant = paint_paint * white_white - both**2
    paint_share = (white_white * along_paint - both * along_white) / determinant
    white_share = (paint_paint * along_white - both * along_paint) / determinant
    without_white, without_paint = white_share < 0, paint_share < 0
    return (
        np.where(without_paint, 0, np.where(without_white, np.maximum(along_paint / paint_paint, 0), paint_share)),
        np.where(without_white, 0, np.where(without_paint, np.maximum(along_white / white_white, 0), white_share)),
    )


def _textures(white: np.ndarray, inner: np.ndarray) -> list[str]:
    """Stripes are one wave of white along the object's diagonal, dots two crossed upright ones, solid is none.

    Objects tilt by less than half the angle between the two, so no angle need be known: the best of each is compared.
    """
    white = np.clip(white, 0, 1)
    inside = inner / np.maximum(inner.sum(axis=(1, 2)), 1)[:, None, None]
    ripple = (white - (white * inside).sum(axis=(1, 2))[:, None, None]) * inside
    flat, (cosine, sine) = ripple.reshape(len(ripple), -1), _waves()
    amplitude = np.hypot(flat @ cosine, flat @ sine).reshape(len(flat), -1, 3)
    stripes, dots = amplitude[..., 0].max(axis=1), (amplitude[..., 1] + amplitude[..., 2]).max(axis=1)
    names = np.where(_STRIPES * stripes > dots, "striped", "dotted")
    return [str(name) for name in np.where(np.maximum(stripes, dots) < _WAVE, "solid", names)]


@cache
def _waves() -> tuple[np.ndarray, np.ndarray]:
    """Plane waves over a cutout, cosine and sine, (W·W, K·3) each: for each period and tilt a diagonal, two upright."""
    down, right = np.meshgrid(np.arange(WINDOW), np.arange(WINDOW), indexing="ij")
    phases = [
        (2 * np.pi / period * (right * np.cos(angle) + down * np.sin(angle))).ravel()
        for period in _PERIODS
        for tilt in np.deg2rad(_TILTS)
        for angle in (tilt + np.pi / 4, tilt, tilt + np.pi / 2)
    ]
    phase = np.stack(phases, axis=1)
    return np.cos(phase).astype(np.float32), np.sin(phase).astype(np.float32)


def _color_name(rgb: np.ndarray) -> str:
    if rgb.max() - rgb.min() < _CHROMA:
        return UNCLEAR
    hue, _, _ = colorsys.rgb_to_hsv(*(float(c) for c in rgb))
    return min(COLORS, key=lambda name: abs((hue - HSV[name][0] + 0.5) % 1.0 - 0.5))


def _size_name(radius: float) -> str:
    if radius >= _LARGEST_RADIUS:
        return UNCLEAR
    return min(SIZES, key=lambda name: abs(radius - RADIUS[name]))


def _background_name(rgb: Sequence[float] | np.ndarray) -> str:
    distances = {name: float(np.linalg.norm(np.subtract(rgb, BACKGROUND_RGB[name]))) for name in BACKGROUNDS}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < _BACKGROUND_REACH else UNCLEAR


def _box(cutouts: Cutouts, i: int) -> tuple[int, int, int, int]:
    down, right = np.nonzero(cutouts.inside[i])
    left, top = int(cutouts.left[i]), int(cutouts.top[i])
    return left + int(right.min()), top + int(down.min()), left + int(right.max()) + 1, top + int(down.max()) + 1
