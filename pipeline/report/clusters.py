"""Pictures like each other: k-means over a sample of rows, for the pages of embed and filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..cache.vectors import unit

if TYPE_CHECKING:
    from ..cache.store import Store

ROUNDS = 10
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
    embedding -= embedding.mean(0)  # what all pictures share says nothing about which are alike
    centre = embedding[np.random.default_rng(0).choice(len(rows), count, replace=False)]
    label = np.zeros(len(rows), np.int64)
    for _ in range(ROUNDS):
        label = (embedding @ unit(centre).T).argmax(1)
        member = (label[:, None] == np.arange(count)).astype(np.float32)
        total, filled = member.T @ embedding, member.any(0)
        centre[filled] = total[filled]
    nearness = np.einsum("nd,nd->n", embedding, unit(centre)[label])
    order = np.argsort(-nearness, kind="stable")
    found = [rows[order[label[order] == one]] for one in range(count)]
    return [members for members in found if len(members) >= FEWEST]
