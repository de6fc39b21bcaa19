"""Beside a textbook SemDeDup and DataComp's rules: what they miss and what they drop in vain.

Run: python -m eclipse.bench.selection_peers -w WORKSPACE   (of the shapes card, embedded and filtered)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ..lab.truth import planted, row_of
from ..pipeline.cache.kmeans import kmeans, nearest
from ..pipeline.cache.store import Store
from ..pipeline.cache.vectors import chunks
from ..pipeline.core.progress import Progress
from ..pipeline.core.source import ShapesSource
from ..pipeline.core.workspace import Workspace
from ..pipeline.filter.dedup import semantic_keepers
from ..pipeline.filter.neighbours import Vectors, find_pairs, unit
from .results import arguments, hardware, record, table

SIZE, DIM = 30_000, 256
COSINE = 0.9
CLUSTERS = 100
QUIET = Progress(quiet=True)


def crowds(seed: int = 0) -> np.ndarray:
    """(SIZE, DIM) float32: topics on a cone, and half of the rows in trails that drift off, link by link."""
    rng = np.random.default_rng(seed)
    topic = rng.normal(size=(300, DIM))
    x = 0.7 * rng.normal(size=DIM) + 0.6 * topic[rng.integers(0, 300, SIZE)] + 0.45 * rng.normal(size=(SIZE, DIM))
    order = rng.permutation(SIZE)[: SIZE // 2].reshape(-1, 6)
    for one in range(1, order.shape[1]):  # each link lies near the one before it, the ends do not lie near each other
        step = rng.uniform(0.3, 0.6, (len(order), 1))
        x[order[:, one]] = x[order[:, one - 1]] + step * rng.normal(size=(len(order), DIM))
    return x.astype(np.float32)


def textbook(x: np.ndarray) -> np.ndarray:
    """SemDeDup as published (arXiv 2303.09540, algorithm 1): which rows stay, (n,) bool.

    Within each k-means cluster, rows in the order of their distance from its centre; one goes if any row before it,
    kept or not, is nearer than the threshold.
    """
    unit_x = unit(x)
    centre = kmeans(lambda rows: unit_x[torch.from_numpy(rows)], torch.float32, np.arange(len(x)), CLUSTERS, QUIET)
    label = np.concatenate([nearest(unit_x[torch.from_numpy(rows)], centre).numpy() for rows in chunks(len(x))])
    kept = np.ones(len(x), bool)
    for one in range(CLUSTERS):
        inside = np.flatnonzero(label == one)
        if len(inside):
            near = unit_x[torch.from_numpy(inside)]
            inside = inside[np.argsort((near @ centre[one]).numpy())]  # the farthest first: the published choice, hard
            near = unit_x[torch.from_numpy(inside)]
            alike = (near @ near.T).triu(1).amax(0).numpy()
            kept[inside[alike >= COSINE]] = False
    return kept


def ours(x: np.ndarray) -> np.ndarray:
    vectors, rank = Vectors(len(x), x.__getitem__), np.arange(len(x))

    def find(some: np.ndarray):
        return find_pairs(vectors.among(some), COSINE, None, QUIET, rank=rank[some], device="cpu")

    return semantic_keepers(rank, find)[0] == rank


def judged(kept: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[str]:
    """Of all pairs (i, j) above the threshold: those of which both stay; dropped rows that no kept row resembles."""
    missed = kept[i] & kept[j]
    covered = kept.copy()
    covered[i[kept[j]]] = covered[j[kept[i]]] = True
    vain = ~kept & ~covered
    return [
        f"{kept.mean():.3f}",
        f"{int(missed.sum()):,} of {len(i):,}",
        f"{int(vain.sum()):,} of {int((~kept).sum()):,}",
    ]


def against_datacomp(ws: Workspace) -> list[list[str]]:
    """What is left of planted wrong captions and copies in the shapes card's rows, and what it cost."""
    source = ws.card.source
    assert isinstance(source, ShapesSource)
    store, plan = Store.open(ws.embeddings), planted(source.seed, source.rows)
    number = [row_of(url) for url in store.column("url").to_pylist()]
    wrong = np.array([plan[n].kind == "wrong_caption" for n in number])
    # An original and its copies are one picture: one of them is enough, and any more are left over.
    picture = np.array([n if plan[n].original is None else plan[n].original for n in number])
    picture = np.unique(np.where(wrong, -1 - np.array(number), picture), return_inverse=True)[1]
    copies = np.bincount(picture) - 1
    fine = np.bincount(picture, weights=~wrong) > 0
    score = np.asarray(store.column("clip_score").to_numpy(), np.float64)
    side = np.minimum(*(store.column(name).to_numpy() for name in ("width", "height")))
    words = np.array([len(text.split()) for text in store.column("caption").to_pylist()])
    lines = []
    for name, kept in (
        ("eclipse, the card's rules", pq.read_table(ws.selection, columns=["keep"])["keep"].to_numpy()),
        ("DataComp, CLIP score top 30 %", score >= np.quantile(score, 0.7)),
        ("DataComp, basic (without the size of pictures: all are 64 px)", (words > 2) & (side > 0)),
    ):
        stays = np.bincount(picture, weights=kept)
        lines.append(
            [
                name,
                f"{kept.mean():.3f}",
                f"{(wrong & kept).sum():,} of {wrong.sum():,}",
                f"{int(np.maximum(stays - 1, 0).sum()):,} of {int(copies.sum()):,}",
                f"{int((fine & (stays == 0)).sum()):,} of {int(fine.sum()):,}",
            ]
        )
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("-w", "--workspace", type=Path, required=True)
    options = parser.parse_args()
    machine, x = hardware(), crowds()
    pairs = find_pairs(Vectors(SIZE, x.__getitem__), COSINE, None, QUIET, device="cpu")
    i, j = pairs.i, pairs.j
    lines = [["SemDeDup, textbook", *judged(textbook(x), i, j)], ["eclipse, semantic_cosine", *judged(ours(x), i, j)]]
    columns = ["semantic duplicates", "kept", "pairs left above the threshold", "dropped, though nothing kept is near"]
    body = table(columns, lines) + "\n\nOn the shapes card:\n\n"
    body += table(
        ["rules", "kept", "wrong captions left", "copies left", "pictures with a right caption lost"],
        against_datacomp(Workspace.open(options.workspace)),
    )
    settings = {"generated rows": f"{SIZE:,} × {DIM}", "cosine": COSINE, "SemDeDup's clusters": CLUSTERS}
    record(
        "python -m eclipse.bench.selection_peers",
        "Selection beside its peers",
        body,
        settings,
        machine,
        options.results,
    )


if __name__ == "__main__":
    main()
