"""Finds the objects of pictures: background, foreground, one cutout an object. Called by `reading`.

Everything works on a batch at once. Nothing here knows what can be drawn: thresholds are of contrast and size alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

WINDOW = 44  # pixels: a cutout's side; holds the largest object with a margin
_BACKGROUND_REACH = (0.25, 0.12)  # a pixel this near to the estimate is background: first look, second look
_CONTRAST = 0.17  # distance in RGB (0..1) from which a pixel is foreground
_CORE_PIXELS = 10  # an object's core (eroded twice) is at least this large
_OBJECT_PIXELS = 60  # and the object itself; the smallest object drawn covers 135
_LARGEST_PIXELS = 640  # what is larger is several: the largest object drawn covers 560
_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours within one picture of the batch
_PLANE[1] = ndimage.generate_binary_structure(2, 1)
_SQUARE = np.zeros((3, 3, 3), dtype=bool)
_SQUARE[1] = True


@dataclass(frozen=True)
class Cutouts:
    """N windows of W×W pixels, one around each object found.

    picture (N,) int64: the batch row; left, top (N,) int64: the window's corner in that picture, in pixels, may be
    negative; pixels, background (N, W, W, 3) float32 in 0..1; inside (N, W, W) bool: the object's own pixels; nearby
    (N, W, W) bool: these and the fringe around them that no other object claims.
    """

    picture: np.ndarray
    left: np.ndarray
    top: np.ndarray
    pixels: np.ndarray
    background: np.ndarray
    inside: np.ndarray
    nearby: np.ndarray

    def __len__(self) -> int:
        return len(self.picture)


def background_planes(pictures: np.ndarray) -> np.ndarray:
    """The background of pictures (B, H, W, 3) float32 as if nothing stood on it: a linear slope a channel, same shape.

    Starts from the border's median, then fits a plane through all pixels near it, twice.
    """
    batch, height, width, _ = pictures.shape
    edge = np.zeros((height, width), dtype=bool)
    edge[:2], edge[-2:], edge[:, :2], edge[:, -2:] = True, True, True, True
    estimate = np.broadcast_to(np.median(pictures[:, edge], axis=1)[:, None, None, :], pictures.shape)
    down, right = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis = np.stack([np.ones_like(down), right, down], axis=-1).reshape(-1, 3).astype(np.float32)
    flat = pictures.reshape(batch, -1, 3)
    for reach in _BACKGROUND_REACH:
        near = (_distance(pictures, estimate) < reach).reshape(batch, -1).astype(np.float32)
        outer = (basis[:, :, None] * basis[:, None, :]).reshape(-1, 9)
        normal = (near @ outer).reshape(batch, 3, 3) + 1e-2 * np.eye(3, dtype=np.float32)
        target = basis.T @ (near[..., None] * flat)
        estimate = (basis @ np.linalg.solve(normal, target)).reshape(pictures.shape).astype(np.float32)
    return estimate


def cut_out(pictures: np.ndarray, background: np.ndarray) -> Cutouts:
    """Every object of pictures (B, H, W, 3) float32. Specks are dropped; touching objects are parted at their cores."""
    foreground = _distance(pictures, background) > _CONTRAST
    foreground = ndimage.binary_fill_holes(foreground, _PLANE)
    owner = _owners(np.asarray(foreground, dtype=bool))
    boxes = [
        (label, box)
        for label, box in enumerate(ndimage.find_objects(owner), start=1)
        if box is not None and np.count_nonzero(owner[box] == label) >= _OBJECT_PIXELS
    ]
    labels = np.array([label for label, _ in boxes], dtype=np.int32)
    row = np.array([box[0].start for _, box in boxes], dtype=np.int64)
    top = np.array([(box[1].start + box[1].stop - WINDOW) // 2 for _, box in boxes], dtype=np.int64)
    left = np.array([(box[2].start + box[2].stop - WINDOW) // 2 for _, box in boxes], dtype=np.int64)
    own = _windows(owner, row, top, left, "constant")
    inside = own == labels[:, None, None]
    fringe = ndimage.binary_dilation(inside, _SQUARE, iterations=3) & (own == 0)
    return Cutouts(
        row, left, top,
        _windows(pictures, row, top, left, "edge"), _windows(background, row, top, left, "edge"),
        inside, inside | fringe,
    )  # fmt: skip


def erode(masks: np.ndarray, times: int) -> np.ndarray:
    """Masks (N, H, W) bool, each shrunk by so many pixels."""
    return ndimage.binary_erosion(masks, _PLANE, iterations=times)


def _owners(foreground: np.ndarray) -> np.ndarray:
    """(B, H, W) int32: the number of the object that owns each pixel, counted over the whole batch; 0 for none."""
    pieces, count = _label(foreground, _PLANE)
    several = (np.bincount(pieces.ravel(), minlength=count + 1) > _LARGEST_PIXELS)[pieces]
    cores, count = _label(np.where(several, erode(foreground, 5), erode(foreground, 2)), _SQUARE)
    sizes = np.bincount(cores.ravel(), minlength=count + 1)
    cores[(sizes < _CORE_PIXELS)[cores]] = 0
    owner = np.zeros_like(cores)
    for row in range(len(cores)):
        if cores[row].any():
            nearest = ndimage.distance_transform_edt(cores[row] == 0, return_distances=False, return_indices=True)
            down, right = np.asarray(nearest)
            same_piece = pieces[row] == pieces[row, down, right]
            owner[row] = np.where(foreground[row] & same_piece, cores[row, down, right], 0)
    return owner


def _label(masks: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, int]:
    labels = np.empty(masks.shape, dtype=np.int32)
    return labels, int(ndimage.label(masks, neighbours, output=labels))  # pyright: ignore[reportArgumentType]


def _windows(stack: np.ndarray, row: np.ndarray, top: np.ndarray, left: np.ndarray, mode: str) -> np.ndarray:
    """Windows of (B, H, W, ...) at each (row, top, left); outside: zeros ('constant') or its edge ('edge')."""
    span = np.arange(WINDOW)
    down, right = top[:, None, None] + span[None, :, None], left[:, None, None] + span[None, None, :]
    height, width = stack.shape[1:3]
    cut = stack[row[:, None, None], down.clip(0, height - 1), right.clip(0, width - 1)]
    if mode == "constant":
        cut[(down < 0) | (down >= height) | (right < 0) | (right >= width)] = 0
    return cut


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    difference = first - second
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))
