"""Which captions do not belong to their picture: evidence from the data's own CLIP vectors; called by evidence.py.

An absolute CLIP score says little: a vague caption scores low with its own picture, a striking picture scores high with
any caption. So each pair is measured against what the same caption scores with other pictures:

1. Similarity with both means taken out, s(t, v) = (t − t̄)·(v − v̄), for unit text and image embeddings t and v. Taking
   out v̄ removes what all pictures share (the modality gap), taking out t̄ what a picture gives to every caption.
2. z = s(t, v) / √((t − t̄)ᵀ C (t − t̄)) with C the covariance of the image embeddings: by how many standard deviations
   the picture beats a random one for this caption, in closed form.
3. The null is known by shuffling: captions dealt to other pictures give z its density f₀ for wrong captions. The
   density f of the real pairs is the mixture π f₀ + (1 − π) f₁, so a pair's probability of being wrong is
   π f₀(z) / f(z), the local false discovery rate (Efron 2004). f₀/f must fall with z: isotonic regression of
   "shuffled or real" on z gives it without bandwidths.
4. π is the share of shuffled pairs that fits under the real ones. Below a cut that holds the share c of the null it is
   estimated by F(cut)/c: a small c is noisy, a large one counts right captions as wrong. The cut is the one with the
   least estimated mean squared error (Storey, Taylor and Siegmund 2004, in closed form as in Bioconductor's qvalue).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..cache.vectors import CHUNK, chunks
from ..core.progress import Progress


@dataclass(frozen=True)
class Evidence:
    """For each pair: z (n,) float32 and the probability that its caption is wrong (n,) float32; π over all pairs.

    separation: how often a real pair has a higher z than a caption dealt at random. 0.5 is an encoder at chance.
    """

    z: np.ndarray
    wrong: np.ndarray
    wrong_share: float
    separation: float

    @property
    def power(self) -> float:
        """The separation that remains for right captions once the wrong ones, at 0.5, are taken out of the mean."""
        return (self.separation - self.wrong_share / 2) / max(1 - self.wrong_share, 1e-6)


Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # positions → unit text, unit image, both (n, D) float32


def wrong_captions(size: int, read: Reader, group: np.ndarray, progress: Progress) -> Evidence:
    """Evidence for each of `size` pairs. `group` (size,) labels the picture: no caption is dealt to its own."""
    other = _deal(group)
    with progress.task("weighing captions", 2 * size, "pairs") as task:
        centre, covariance = _moments(size, read, task.advance)
        real, shuffled = np.empty(size, np.float32), np.empty(size, np.float32)
        for rows in chunks(size, CHUNK):
            text, image = read(rows)
            text = text - centre[0]
            spread = np.sqrt(np.maximum(np.einsum("nd,de,ne->n", text, covariance, text, optimize=True), 1e-12))
            real[rows] = np.einsum("nd,nd->n", text, image - centre[1]) / spread
            shuffled[rows] = np.einsum("nd,nd->n", text, read(other[rows])[1] - centre[1]) / spread
            task.advance(len(rows))
    share = _wrong_share(real, shuffled)
    wrong = np.minimum(share * _density_ratio(real, shuffled), 1).astype(np.float32)
    below = np.searchsorted(np.sort(shuffled), real)
    return Evidence(real, wrong, share, float(below.mean() / max(size, 1)) if size else 0.5)


def _deal(group: np.ndarray) -> np.ndarray:
    """A fixed permutation that gives each position another picture: sorted by picture, shifted by the largest group."""
    rng = np.random.default_rng(0)
    label = rng.permutation(int(group.max(initial=0)) + 1)[group]
    order = np.argsort(label, kind="stable")
    largest = int(np.bincount(group).max(initial=1)) if len(group) else 1
    other = np.empty(len(group), np.int64)
    other[order] = np.roll(order, largest)
    return other


def _moments(size: int, read: Reader, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """→ means (2, D) of text and image, covariance (D, D) of the image embeddings; one pass, summed in float64."""
    total, square = 0.0, 0.0
    for rows in chunks(size, CHUNK):
        text, image = read(rows)
        total = total + np.stack([text.sum(0, dtype=np.float64), image.sum(0, dtype=np.float64)])
        square = square + (image.T @ image).astype(np.float64)
        advance(len(rows))
    mean = np.asarray(total) / max(size, 1)
    covariance = np.asarray(square) / max(size, 1) - np.outer(mean[1], mean[1])
    return mean.astype(np.float32), covariance.astype(np.float32)


def _wrong_share(real: np.ndarray, shuffled: np.ndarray) -> float:
    """π, from cuts that hold 5 to 95 % of the null."""
    held = np.linspace(0.05, 0.95, 19)
    below = np.searchsorted(np.sort(real), np.quantile(shuffled, held), side="right") / len(real)
    share = below / held
    squared_error = below * (1 - below) / (len(real) * held**2) + (share - np.quantile(share, 0.1)) ** 2
    return float(min(1.0, share[squared_error.argmin()]))


def _density_ratio(real: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """f₀/f at each real pair, falling in z. p = P(shuffled | z) by isotonic regression; f₀/f = p / (1 − p)."""
    from scipy.optimize import isotonic_regression

    value = np.concatenate([real, shuffled])
    label = np.concatenate([np.zeros(len(real)), np.ones(len(shuffled))])
    order = np.argsort(value, kind="stable")
    fitted = np.empty(len(value))
    fitted[order] = isotonic_regression(label[order], increasing=False).x
    p = np.clip(fitted[: len(real)], 1e-6, 1 - 1e-6)
    return p / (1 - p)
