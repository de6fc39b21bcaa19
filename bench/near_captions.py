"""How near reworded captions, captions that say another thing, and captions of other pictures are to those of an
evaluation set, by text embedding: what `filter.evaluation_caption_cosine` can tell apart.

Run: nice -n 10 python -m eclipse.bench.near_captions [--features FILE.npy of real CLIP text embeddings (n, D)]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..lab.shapes import COLORS, World
from ..lab.truth import evaluation_texts
from ..pipeline.cache.vectors import chunks, unit
from ..pipeline.core.card import Card
from ..pipeline.embed.clip import Encoder
from .results import arguments, hardware, record, table

CAPTIONS, ASKED = 4_000, 20  # of scenes that training sees; prompts per category and split
LIMITS = (0.95, 0.98, 0.99)


def reworded(text: str) -> dict[str, str]:
    """The same thing in other words, and one other thing, by what was done to the text."""
    told = {
        '"the" for "a"': text.replace("a ", "the "),
        '"a picture of" before it': f"a picture of {text}",
        "three words more": f"{text} on my table",
        "a letter lost": text[: len(text) // 2] + text[len(text) // 2 + 1 :],
    }
    if text.count(" and ") == 1:
        told['the two sides of "and" exchanged'] = " and ".join(reversed(text.split(" and ")))
    colors = [str(name) for name in COLORS]
    if color := next((name for name in colors if f" {name} " in text), None):
        other = colors[(colors.index(color) + 1) % len(colors)]
        told["another color: another thing"] = text.replace(f" {color} ", f" {other} ", 1)
    return told


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--features", type=Path, default=None, help=".npy: text embeddings (n, D) of real captions")
    options = parser.parse_args()
    machine = hardware()
    encoder = Encoder.load(Card.load("shapes").encoder.model, text_only=True)

    def embed(texts: list[str]) -> np.ndarray:
        batches = [texts[rows[0] : rows[-1] + 1] for rows in chunks(len(texts), 256)]
        return unit(np.concatenate([encoder.encode_text(*encoder.tokenize(some)).embedding for some in batches]))

    world, rng = World(), np.random.default_rng(0)
    asked = sorted(evaluation_texts(world, ASKED))
    theirs = embed(asked)
    lines: list[list[object]] = []

    def line(name: str, cosine: np.ndarray) -> None:
        spread = [f"{np.quantile(cosine, at):.3f}" for at in (0, 0.05, 0.5, 0.95, 1)]
        lines.append([name, f"{len(cosine):,}", *spread, *(f"{(cosine >= limit).mean():.3f}" for limit in LIMITS)])

    told = [reworded(text) for text in asked]
    for name in dict.fromkeys(name for one in told for name in one):
        at = [row for row, one in enumerate(told) if name in one]
        line(name, (theirs[at] * embed([told[row][name] for row in at])).sum(1))
    captions = [world.caption(world.scene(number), rng) for number in range(CAPTIONS)]
    mine = [caption for caption in captions if caption not in set(asked)]
    line("captions of training, the nearest of all", (embed(mine) @ theirs.T).max(1))
    if options.features is not None:
        real = unit(np.load(options.features))
        line("real captions, pairs", (real @ real.T)[np.triu_indices(len(real), 1)])
        near = real @ real.T
        np.fill_diagonal(near, -1)
        line("real captions, the nearest of all others", near.max(1))
    columns = ["beside a caption of the set", "captions", "least", "5 %", "median", "95 %", "most"]
    body = table([*columns, *(f"dropped at {limit}" for limit in LIMITS)], lines)
    settings = {"captions of the set": len(asked), "encoder": "the lab CLIP"}
    title = "Captions near those of an evaluation set"
    record("python -m eclipse.bench.near_captions", title, body, settings, machine, options.results)


if __name__ == "__main__":
    main()
