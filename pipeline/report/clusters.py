"""Pictures like each other: k-means over a sample of rows, for the pages of embed and filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..cache.kmeans import kmeans, nearest
from ..cache.vectors import unit
from ..core.progress import Progress

if TYPE_CHECKING:
    from ..cache.store import Store

FEWEST = 3  # rows; smaller clusters show nothing


def clusters(store: Store, rows: np.ndarray, count: int) -> list[np.ndarray]:
    """At most `count` clusters of these rows by their pictures: the rows of each, those nearest its middle first.

    Empty where there are too few rows with finite embeddings. All rows are held at once as float32: pass a sample.
    """
    embedding = store.image_embeddings(rows).astype(np.float32)
    finite = np.isfinite(embedding).all(1)
    rows, embedding = rows[finite], unit(embedding[finite])
    if len(rows) < FEWEST * count:
        return []
    # What all pictures share says nothing about which are alike.
    points = torch.from_numpy(unit(embedding - embedding.mean(0)))
    centre = kmeans(lambda at: points[at], points.dtype, np.arange(len(rows)), count, Progress(quiet=True))
    label = nearest(points, centre)
    nearness = (points * centre[label]).sum(1).numpy()
    label = label.numpy()
    order = np.argsort(-nearness, kind="stable")
    found = [rows[order[label[order] == one]] for one in range(count)]
    return [members for members in found if len(members) >= FEWEST]
