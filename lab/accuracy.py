"""How well the checker reads: confusion matrices against what was drawn, clean and spoiled. Called by `page`, tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from .drawing import draw
from .reading import UNCLEAR, Reading, Seen, read_all
from .shapes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, Scene, Thing, World

MISSING = "missing"  # the column of objects that were drawn but not found
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "size": SIZES}
COUNTS = ("0", "1", "2", "3", "4", "more")
_NEAR = 8.0  # pixels from the drawn centre within which an object counts as found
_BATCH = 250


@dataclass(frozen=True)
class Confusion:
    """counts (rows, columns) int64: how often what was drawn (a row) was read as what (a column)."""

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of readings that are right, 0..1."""
        right = sum(self.counts[i, self.columns.index(row)] for i, row in enumerate(self.rows))
        return float(right / max(self.total, 1))


def blur_and_jpeg(pictures: np.ndarray, sigma: float = 0.7, quality: int = 75) -> np.ndarray:
    """uint8 (B, H, W, 3) pictures after a Gaussian blur of so many pixels and a JPEG file of this quality."""
    soft = ndimage.gaussian_filter(pictures.astype(np.float32), (0, sigma, sigma, 0)).round().clip(0, 255)
    spoiled = []
    for picture in soft.astype(np.uint8):
        Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=quality)
        spoiled.append(np.asarray(Image.open(file)))
    return np.stack(spoiled)


def measure(
    world: World,
    indices: Sequence[int],
    spoil: Callable[[np.ndarray], np.ndarray] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Confusion]:
    """Read the world's scenes of the `any` split with these numbers: one matrix an attribute, background and count."""
    pairs: dict[str, list[tuple[str, str]]] = {name: [] for name in (*ATTRIBUTES, "background", "count")}
    for start in range(0, len(indices), _BATCH):
        scenes = [world.scene(i, "any") for i in indices[start : start + _BATCH]]
        pictures = draw(scenes)
        for scene, reading in zip(scenes, read_all(spoil(pictures) if spoil else pictures), strict=True):
            for name, drawn, seen in _compare(scene, reading):
                pairs[name].append((drawn, seen))
        advance(len(scenes))
    matrices = [_matrix(name, values, (*values, UNCLEAR, MISSING), pairs[name]) for name, values in ATTRIBUTES.items()]
    matrices.append(_matrix("background", BACKGROUNDS, (*BACKGROUNDS, UNCLEAR), pairs["background"]))
    return [*matrices, _matrix("count", COUNTS[1:5], COUNTS, pairs["count"])]


def nearest(thing: Thing, seen: Iterable[Seen]) -> Seen | None:
    """The object read nearest to where `thing` was drawn; None if none is within 8 pixels."""
    distances = [(float(np.hypot(s.x - thing.x, s.y - thing.y)), i, s) for i, s in enumerate(seen)]
    distance, _, found = min(distances, default=(np.inf, 0, None))
    return found if distance < _NEAR else None


def _compare(scene: Scene, reading: Reading) -> Iterator[tuple[str, str, str]]:
    for thing in scene.things:
        found = nearest(thing, reading.things)
        for name in ATTRIBUTES:
            yield name, getattr(thing, name), getattr(found, name) if found else MISSING
    yield "background", scene.background, reading.background
    yield "count", str(len(scene.things)), COUNTS[min(len(reading.things), 5)]


def _matrix(name: str, rows: tuple[str, ...], columns: tuple[str, ...], pairs: list[tuple[str, str]]) -> Confusion:
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for drawn, seen in pairs:
        counts[rows.index(drawn), columns.index(seen)] += 1
    return Confusion(name, rows, columns, counts)
