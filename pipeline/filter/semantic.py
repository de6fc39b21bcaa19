"""At which cosine a wanted share of pictures survives the removal of semantic duplicates; called by rules.py."""

from __future__ import annotations

import numpy as np

from ..cache.vectors import chunks
from . import dedup
from .evidence import Evidence
from .neighbours import Pairs, unit

SAMPLE = 2_048  # pictures whose nearest better one is looked for, to know how low to search
STEPS = 12  # of the bisection: the cosine to 1/4,096 of the range searched
SLACK = 0.02


def cosine_that_keeps(
    share: float, evidence: Evidence, pictures: np.ndarray, rank: np.ndarray, best_first: bool
) -> float:
    """The cosine above which duplicates have to go so that about `share` of the (m,) pictures stay.

    rank: (m,) which of two stays. Pairs down to the lowest cosine that comes into question are found once (and kept,
    see evidence.py); each step of the bisection then costs a pass over them.
    """
    vectors = evidence.vectors(pictures)
    sample = np.sort(np.random.default_rng(0).permutation(len(pictures))[:SAMPLE])
    mine, likest = unit(vectors.embedding(sample)), np.full(len(sample), -1.0, np.float32)
    with evidence.progress.task("looking for the nearest pictures", len(pictures), "pictures") as task:
        for rows in chunks(len(pictures), 16_384):
            near = (mine @ unit(vectors.embedding(rows)).T).numpy()
            near[rank[sample][:, None] <= rank[rows][None, :]] = -1  # only a better one drops a picture
            likest = np.maximum(likest, near.max(1))
            task.advance(len(rows))
    # A picture goes if a better one is nearer than the cosine and stays itself; so fewer go than this says.
    low = float(np.quantile(likest, share)) - SLACK
    while True:
        low = min(max(low, 0.01), 0.999)
        pairs = evidence.similar(low, best_first)
        place = np.full(len(pairs.full), -1, np.int64)
        place[pictures] = np.arange(len(pictures))
        here = (place[pairs.i] >= 0) & (place[pairs.j] >= 0)
        found = pairs.at(here)
        none_full = np.zeros(len(pictures), bool)
        found = Pairs(place[found.i], place[found.j], found.cosine, found.concordance, none_full)

        def kept(threshold: float, found: Pairs = found) -> float:
            chosen = found.at(found.cosine >= threshold)
            keeper, _ = dedup.semantic_keepers(rank, lambda _: chosen)
            return float((keeper == np.arange(len(rank))).mean())

        if kept(low) <= share or low <= 0.01:
            break
        low -= 2 * SLACK
    high = 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) <= share else (low, middle)
    return high
