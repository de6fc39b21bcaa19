"""Scenes → pictures, by anti-aliased signed distances. Called by the lab's server, scorer and model builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .shapes import IMAGE_SIZE, Scene, Thing

_PATCH = 36  # pixels: holds the largest object with its jitter
_PERIOD = {"small": 6.0, "large": 7.0}  # pixels between stripes, or dots
Field = np.ndarray  # (n, P, P) float32


def draw(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes as uint8 RGB (B, 64, 64, 3). A pure function of the scenes."""
    slope = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    light = np.array([s.light for s in scenes], dtype=np.float32).reshape(-1, 2)
    canvas = np.array([s.background_rgb for s in scenes], dtype=np.float32).reshape(-1, 1, 1, 3)
    shade = light[:, 0, None, None] * slope[None, None, :] + light[:, 1, None, None] * slope[None, :, None]
    canvas = canvas + shade[..., None]
    margin = _PATCH // 2
    canvas = np.pad(canvas, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    placed = [(row, thing) for row, scene in enumerate(scenes) for thing in scene.things]
    for shape in sorted({thing.shape for _, thing in placed}):
        chosen = [(row, thing) for row, thing in placed if thing.shape == shape]
        _draw_things(canvas, [row for row, _ in chosen], [thing for _, thing in chosen])
    picture = canvas[:, margin:-margin, margin:-margin]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_things(canvas: np.ndarray, rows: list[int], things: list[Thing]) -> None:
    """Blend objects of one shape into their pictures. Objects of a scene never overlap, so order does not matter."""
    x, y, radius, angle = (
        np.array([getattr(t, name) for t in things], dtype=np.float32)[:, None, None]
        for name in ("x", "y", "radius", "angle")
    )
    left, top = (np.floor(centre).astype(np.int64) for centre in (x, y))  # of the padded canvas: centre − P/2 + P/2
    span = np.arange(_PATCH)
    dx = (left - _PATCH // 2 + span[None, None, :] + 0.5 - x).astype(np.float32)
    dy = (top - _PATCH // 2 + span[None, :, None] + 0.5 - y).astype(np.float32)
    across = dx * np.cos(angle) + dy * np.sin(angle)
    down = -dx * np.sin(angle) + dy * np.cos(angle)
    cover = np.clip(0.5 - _DISTANCES[things[0].shape](across / radius, down / radius) * radius, 0, 1)[..., None]
    white = _texture(things, across, down)[..., None]
    rgb = np.array([t.rgb for t in things], dtype=np.float32)[:, None, None, :]
    paint = rgb + (1.0 - rgb) * white
    row, column = top + span[None, :, None], left + span[None, None, :]
    picture = np.array(rows)[:, None, None]
    # One object of a shape may stand in the same picture twice: patches are disjoint in covered pixels, not in extent.
    for chunk in _without_repeats(rows):
        at = (picture[chunk], row[chunk], column[chunk])
        canvas[at] = canvas[at] * (1 - cover[chunk]) + paint[chunk] * cover[chunk]


def _without_repeats(rows: list[int]) -> list[np.ndarray]:
    """Split positions into chunks in which no picture occurs twice."""
    seen: dict[int, int] = {}
    turn = np.array([seen.__setitem__(r, seen.get(r, -1) + 1) or seen[r] for r in rows])
    return [np.flatnonzero(turn == k) for k in range(int(turn.max()) + 1)]


def _texture(things: list[Thing], across: Field, down: Field) -> Field:
    """Share of white paint, 0..1: diagonal stripes or a grid of dots, in the object's own coordinates."""
    period = np.array([_PERIOD[t.size] for t in things], dtype=np.float32)[:, None, None]
    diagonal = (across + down) / np.float32(np.sqrt(2)) / period
    stripe = np.clip(0.5 + (0.2 - np.abs(diagonal - np.round(diagonal))) * period, 0, 1)
    off_across, off_down = (v / period - np.round(v / period) for v in (across, down))
    dot = np.clip(0.5 + (0.31 - np.hypot(off_across, off_down)) * period, 0, 1)
    kind = np.array([t.texture for t in things])[:, None, None]
    return np.where(kind == "striped", stripe, np.where(kind == "dotted", dot, np.float32(0)))


def _circle(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.95


def _square(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: Field, v: Field) -> Field:
    v = v - 0.18
    return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.54


def _star(u: Field, v: Field) -> Field:
    turn, outer, inner = 2 * np.pi / 5, 1.12, 0.52
    angle, length = np.arctan2(u, -v), np.hypot(u, v)
    folded = np.abs(angle - np.round(angle / turn) * turn)
    px, py = length * np.cos(folded), length * np.sin(folded)
    ax, ay, bx, by = outer, 0.0, inner * np.cos(turn / 2), inner * np.sin(turn / 2)
    return ((px - ax) * (by - ay) - (py - ay) * (bx - ax)) / np.hypot(bx - ax, by - ay)


def _heart(u: Field, v: Field) -> Field:
    u, v = np.abs(u) / 1.12, v / 1.12 - 0.03
    lobe = np.hypot(u - 0.354, v + 0.254) - 0.5
    body = np.abs(u) + np.abs(v - 0.1) - 0.707
    return np.minimum(lobe, body * 0.707) * 1.12


def _cross(u: Field, v: Field) -> Field:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1.0, v - 0.36), np.maximum(u - 0.36, v - 1.0))


_DISTANCES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart, "cross": _cross,
}  # fmt: skip
