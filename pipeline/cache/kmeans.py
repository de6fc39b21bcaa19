"""Spherical k-means over embeddings: lists of rows, and which lie near which. Called by filter and by the pages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.progress import Progress
from .vectors import CHUNK, chunks

ROUNDS = 8


def kmeans(
    read: Callable[[np.ndarray], Tensor], dtype: torch.dtype, sample: np.ndarray, lists: int, progress: Progress
) -> Tensor:
    """Spherical k-means on the sampled rows, read as unit vectors (n, D) → unit centres (lists, D) of this dtype."""
    points = torch.cat([read(sample[rows]).to(dtype) for rows in chunks(len(sample))])
    pick = torch.from_numpy(np.random.default_rng(1).permutation(len(points))).to(points.device)
    centre = points[pick[:lists]]
    with progress.task("finding lists", ROUNDS, "rounds") as task:
        for turn in range(ROUNDS):
            total = torch.zeros(lists, points.shape[1], device=points.device)
            for some in points.split(CHUNK):
                total.index_add_(0, nearest(some, centre), some.float())
            length = total.norm(dim=1, keepdim=True)
            lonely = (length == 0).flatten()
            others = (turn * lists + torch.arange(int(lonely.sum()), device=pick.device)) % len(pick)
            total[lonely] = points[pick[others]].float()
            centre = (total / total.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(dtype)
            task.advance()
    return centre


def nearest(points: Tensor, centre: Tensor) -> Tensor:
    """List of each point, (n,) int64."""
    return torch.cat([(some @ centre.T).argmax(1) for some in points.split(8_192)])


def depths(i: np.ndarray, j: np.ndarray, coarse: Tensor, own: np.ndarray, centre: Tensor) -> np.ndarray:
    """Lists beside their own that the pictures at places i and j have to look into until one meets the other, (n,)."""
    depth = np.full(len(i), len(centre), np.int64)
    for first, second in ((i, j), (j, i)):
        for rows in chunks(len(i), 8_192):
            near = coarse[torch.from_numpy(first[rows]).to(coarse.device)] @ centre.T
            mine, other = (torch.from_numpy(own[at[rows]]).to(coarse.device)[:, None] for at in (first, second))
            closer = (near > near.gather(1, other)).scatter_(1, mine, False).sum(1)
            needed = torch.where((mine == other).flatten(), 0, closer + 1).cpu().numpy()
            depth[rows] = np.minimum(depth[rows], needed)
    return depth
