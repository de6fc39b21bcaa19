"""Wrong captions among real CLIP pairs: precision and recall as their share goes from 0 to 50 %, and whether the rule
holds back where the encoder knows little or nothing.

Run: python -m eclipse.bench.wrong_captions --features FILE.npy   (2, n, D): CLIP features of pictures and captions
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..pipeline.cache.vectors import unit
from ..pipeline.core.progress import Progress
from ..pipeline.filter.caption_mismatch import Evidence, wrong_captions
from ..pipeline.filter.rules import LEAST_POWER, MOST_WRONG
from .results import arguments, hardware, record, table

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
BLURS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)  # noise added to each dimension of the unit text embeddings, times √D / 10
LIMIT = 0.5
TRIALS = 10


def trial(
    image: np.ndarray, text: np.ndarray, share: float, blur: float, seed: int
) -> tuple[Evidence, np.ndarray, np.ndarray]:
    """Deal `share` of the captions among each other, blur all → evidence, which are wrong, cosine of each pair."""
    rng = np.random.default_rng(seed)
    n = len(image)
    wrong = rng.permutation(n)[: int(share * n)]
    said = np.arange(n)
    said[wrong] = np.roll(wrong, 1)
    heard = unit(text[said] + blur * rng.normal(size=text.shape).astype(np.float32))
    found = wrong_captions(n, lambda rows: (heard[rows], image[rows]), np.arange(n), Progress(quiet=True))
    return found, np.isin(np.arange(n), wrong), (heard * image).sum(1)


def figures(image: np.ndarray, text: np.ndarray, share: float, blur: float) -> dict[str, float]:
    """Means over TRIALS. A fixed cut on the cosine that drops as many rows is the peer (DataComp's CLIP score rule)."""
    told: dict[str, list[float]] = {}
    for seed in range(TRIALS):
        found, wrong, cosine = trial(image, text, share, blur, seed)
        holds_back = found.wrong_share > MOST_WRONG or found.power < LEAST_POWER
        dropped = (found.wrong >= LIMIT) & (not holds_back)
        lowest = np.zeros(len(wrong), bool)
        lowest[np.argsort(cosine)[: int(dropped.sum())]] = True
        values = {
            "held back": float(holds_back),
            "estimated share": found.wrong_share,
            "power": found.power,
            "dropped": float(dropped.mean()),
            "precision": float(wrong[dropped].mean()) if dropped.any() else np.nan,
            "recall": float(dropped[wrong].mean()) if wrong.any() else np.nan,
            "good rows dropped": float(dropped[~wrong].mean()),
            "cosine precision": float(wrong[lowest].mean()) if lowest.any() else np.nan,
            "cosine recall": float(lowest[wrong].mean()) if wrong.any() else np.nan,
        }
        for name, value in values.items():
            told.setdefault(name, []).append(value)
    return {name: float(np.nanmean(some)) if np.isfinite(some).any() else np.nan for name, some in told.items()}


def line(first: str, told: dict[str, float]) -> list[str]:
    return [first, *("" if np.isnan(value) else f"{value:.3f}" for value in told.values())]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--features", type=Path, required=True)
    options = parser.parse_args()
    machine = hardware()
    both = np.load(options.features, allow_pickle=False).astype(np.float32)
    image, text = unit(both[0]), unit(both[1])
    shares = {share: figures(image, text, share, 0.0) for share in SHARES}
    blurs = {blur: figures(image, text, 0.1, blur) for blur in BLURS}
    names = list(shares[0.0])
    body = table(["wrong captions", *names], [line(f"{share:.0%}", told) for share, told in shares.items()])
    body += "\n\n10 % wrong, and the captions' embeddings blurred until the encoder is at chance:\n\n"
    body += table(["noise per dimension", *names], [line(f"{blur:.2f}", told) for blur, told in blurs.items()])
    body += (
        "\n\nThe last two columns are of the peer: the same number of rows, those with the lowest cosine. It has to be "
        "told how many; the rule estimates it."
    )
    settings = {"pairs": len(image), "D": image.shape[1], "limit": LIMIT, "means over": f"{TRIALS} deals"}
    title = "Wrong captions among real pairs"
    record("python -m eclipse.bench.wrong_captions", title, body, settings, machine, options.results)


if __name__ == "__main__":
    main()
