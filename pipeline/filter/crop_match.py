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
# Side, steps, how far below the limit a pair still goes on: two of three pairs that are no copies end at 16 pixels, and
# most others at 32, for about one in a hundred of the copies with 6 % cut off.
LEVELS = ((16, 3, 0.12), (32, 3, 0.08), (SIDE, 4, 0.0))
PAIRS = {"cpu": 128, "cuda": 8_192}  # at once: what fits a CPU's cache; on a GPU, each batch waits for the last
PIXELS = {"cpu": 1 << 16, "cuda": 1 << 24}  # of the pictures that are refined at once


def correlations(first: Tensor, second: Tensor, limit: float) -> Tensor:
    """Pearson correlation of each pair after the best crop of either: two (n,3,64,64) float → (n,) float32.

    Pairs that are clearly below `limit` are given up early and get −1.
    """
    step = PAIRS[first.device.type]
    parts = [_best_of(a, b, limit) for a, b in zip(first.split(step), second.split(step), strict=True)]
    return torch.cat(parts) if parts else torch.empty(0)


def _best_of(first: Tensor, second: Tensor, limit: float) -> Tensor:
    """The same of so many pairs as are held at once. Picture k may be a crop of k ± n, its partner: both are tried."""
    n, device = len(first), first.device
    pictures = torch.cat([first, second])
    scale, shift = pictures.new_full((2 * n, 2), 0.97), pictures.new_zeros(2 * n, 2)
    result = pictures.new_full((2 * n,), -1.0)
    left = torch.arange(2 * n, device=device)
    for side, steps, slack in LEVELS:
        # At the first size every picture is used twice, later few are left.
        small = _shrink(pictures, side) if side == LEVELS[0][0] else None
        found = []
        for some in left.split(PIXELS[device.type] // side**2):
            partner = (some + n) % (2 * n)
            whole, crop = (_shrink(pictures[x], side) if small is None else small[x] for x in (some, partner))
            scale[some], shift[some], match = _refine(whole, crop, scale[some], shift[some], steps)
            found.append(match)
        match = torch.cat(found) if found else result[:0]
        if side == SIDE:
            result[left] = match
        left = left[match >= limit - slack]
    return torch.maximum(result[:n], result[n:])


def _shrink(pictures: Tensor, side: int) -> Tensor:
    """Means of squares: (n,3,64,64) → (n,3,side,side). As two products, ten times as fast as torch's own pooling."""
    if side == SIDE:
        return pictures
    mean = torch.eye(side, device=pictures.device).repeat_interleave(SIDE // side, 0) * (side / SIDE)
    return ((pictures @ mean).transpose(2, 3) @ mean).transpose(2, 3).contiguous()


def _refine(whole: Tensor, crop: Tensor, scale: Tensor, shift: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some steps at one size (n,3,G,G) from windows (n,2), x and y in −1..1: the best window met, its correlation."""
    side, device = crop.shape[-1], crop.device
    axis = (torch.arange(side, device=device) + 0.5) * 2 / side - 1
    slopes, curvature = _slopes(crop, axis)
    damping = 0.01 * curvature.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
    inverse = torch.linalg.inv_ex(curvature + damping[:, None, None] * torch.eye(4, device=device)).inverse
    target, contrast = _normalise(crop)
    grid = crop.new_empty(len(crop), side, side, 2)
    best = scale, shift, crop.new_full((len(crop),), -2.0)
    for step in range(steps + 1):
        at = scale[:, :, None] * axis + shift[:, :, None]  # the window scale·x + shift, resampled to the crop's size
        grid[..., 0], grid[..., 1] = at[:, 0, None, :], at[:, 1, :, None]
        window = F.grid_sample(whole, grid, mode="bilinear", padding_mode="border", align_corners=False)
        seen, _ = _normalise(window)
        found = (seen * target).sum(1)
        better = found > best[2]
        now = (scale, shift, found)
        best = tuple(torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(now, best, strict=True))
        if step < steps:
            move = contrast * (inverse @ (slopes @ (seen - target)[:, :, None]))[:, :, 0]
            narrower = scale / (1 + move[:, :2])
            scale, shift = _inside(narrower, shift - scale * move[:, 2:] / (1 + move[:, :2]))
    return best[0], best[1], best[2]


def _inside(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest window that lies within the picture: that is what makes it a crop, and not a look-alike moved."""
    scale = scale.clamp(1 - LARGEST_CROP, 1)
    return scale, torch.maximum(torch.minimum(shift, 1 - scale), scale - 1)


def _slopes(picture: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """How the picture changes as its window's two scales and two shifts grow: (n, 4, 3·G·G), products (n, 4, 4).

    The products are of the slopes with each channel's mean taken out; what they are multiplied with later has none.
    """
    side = picture.shape[-1]
    around = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    slopes = picture.new_empty(len(picture), 4, 3, side, side)
    slopes[:, 2] = (around[:, :, 1:-1, 2:] - around[:, :, 1:-1, :-2]) * (side / 4)  # across
    slopes[:, 3] = (around[:, :, 2:, 1:-1] - around[:, :, :-2, 1:-1]) * (side / 4)  # down
    torch.mul(slopes[:, 2], axis, out=slopes[:, 0])
    torch.mul(slopes[:, 3], axis[:, None], out=slopes[:, 1])
    mean, flat = slopes.mean((-1, -2)), slopes.flatten(2)
    return flat, flat @ flat.transpose(1, 2) - side**2 * (mean @ mean.transpose(1, 2))


def _normalise(picture: Tensor) -> tuple[Tensor, Tensor]:
    """(n,3,G,G) → each channel's mean taken out and the length of the whole one, (n, 3·G·G); that length, (n, 1)."""
    flat = (picture - picture.mean((-1, -2), keepdim=True)).flatten(1)
    length = flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return flat / length, length
