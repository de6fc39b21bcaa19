"""Is one picture a slightly cropped copy of the other? Lays them over each other and correlates; called by rules.py.

16×16 thumbnails propose copies, but cannot decide: two squares on the same background look alike at that size, and
cropping 3 % away moves every edge by half a thumbnail pixel. So what they propose is compared here at 64×64 in color.
One picture must be a window of the other: the window is found by Gauss–Newton steps from coarse to fine (the inverse
compositional form of Lucas and Kanade, Baker and Matthews 2004), for brightness and contrast that may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels a side at which pictures are compared
LARGEST_CROP = 0.16  # of width or height
LEVELS = ((16, 3, 0.12), (32, 3, 0.12), (SIDE, 4, 0.0))  # side, steps, how far below the limit a pair still goes on
BATCH = {"cpu": 32, "cuda": 8_192}  # pairs at once: what fits a CPU's cache; on a GPU, each batch waits for the last


def correlations(first: Tensor, second: Tensor, limit: float) -> Tensor:
    """Pearson correlation of each pair after the best crop of either: two (n,3,64,64) float → (n,) float32.

    Pairs that are clearly below `limit` are given up early and get −1.
    """
    parts = [
        torch.maximum(_crop_of(a, b, limit), _crop_of(b, a, limit))
        for a, b in zip(*(pictures.split(BATCH[first.device.type]) for pictures in (first, second)), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def _crop_of(whole: Tensor, crop: Tensor, limit: float) -> Tensor:
    """Correlation of `crop` with the window of `whole` that resembles it most."""
    n = len(whole)
    scale, shift = whole.new_full((n, 2), 0.97), whole.new_zeros(n, 2)
    result = whole.new_full((n,), -1.0)
    left = torch.arange(n, device=whole.device)
    for side, steps, slack in LEVELS:
        a, b = (F.adaptive_avg_pool2d(x[left], side) for x in (whole, crop))
        scale[left], shift[left], found = _refine(a, b, scale[left], shift[left], steps)
        if side == SIDE:
            result[left] = found
        left = left[found >= limit - slack]
    return result


def _refine(whole: Tensor, crop: Tensor, scale: Tensor, shift: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some steps at one size (n,3,G,G) from windows (n,2), x and y in −1..1: the best window met, its correlation."""
    slopes = _slopes(crop)
    curvature = slopes @ slopes.transpose(1, 2)
    damping = 0.01 * curvature.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
    curvature = curvature + damping[:, None, None] * torch.eye(4, device=crop.device)
    solver = torch.linalg.solve(curvature, slopes)
    target, contrast = _normalise(crop)
    best = scale, shift, crop.new_full((len(crop),), -2.0)
    for step in range(steps + 1):
        seen, _ = _normalise(_window(whole, scale, shift))
        found = (seen * target).sum(1)
        better = found > best[2]
        now = (scale, shift, found)
        best = tuple(torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(now, best, strict=True))
        if step < steps:
            move = (solver @ ((seen - target) * contrast)[:, :, None])[:, :, 0]
            narrower = scale / (1 + move[:, :2])
            scale, shift = _inside(narrower, shift - scale * move[:, 2:] / (1 + move[:, :2]))
    return best[0], best[1], best[2]


def _inside(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest window that lies within the picture: that is what makes it a crop, and not a look-alike moved."""
    scale = scale.clamp(1 - LARGEST_CROP, 1)
    return scale, torch.maximum(torch.minimum(shift, 1 - scale), scale - 1)


def _axis(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) + 0.5) * 2 / side - 1


def _window(picture: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The window scale·x + shift of each picture, resampled to its size."""
    side = picture.shape[-1]
    at = scale[:, :, None] * _axis(side, picture.device) + shift[:, :, None]
    across, down = at[:, 0, None, :].expand(-1, side, -1), at[:, 1, :, None].expand(-1, -1, side)
    grid = torch.stack([across, down], dim=-1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _slopes(picture: Tensor) -> Tensor:
    """How the picture changes as its window's two scales and two shifts grow: (n, 4, 3·G·G), brightness taken out."""
    side = picture.shape[-1]
    around = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    across = (around[:, :, 1:-1, 2:] - around[:, :, 1:-1, :-2]) * (side / 4)
    down = (around[:, :, 2:, 1:-1] - around[:, :, :-2, 1:-1]) * (side / 4)
    axis = _axis(side, picture.device)
    slopes = torch.stack([across * axis, down * axis[:, None], across, down], dim=1)
    return (slopes - slopes.mean((-1, -2), keepdim=True)).flatten(2)


def _normalise(picture: Tensor) -> tuple[Tensor, Tensor]:
    """(n,3,G,G) → each channel's mean taken out and the length of the whole one, (n, 3·G·G); that length, (n, 1)."""
    flat = (picture - picture.mean((-1, -2), keepdim=True)).flatten(1)
    length = flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return flat / length, length
