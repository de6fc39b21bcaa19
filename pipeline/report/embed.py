"""reports/embed.html: scores, lengths, geometry, neighbours and clusters of the features; called by the embed stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from . import charts
from .clusters import clusters
from .page import chart, percent, shares, stage_page, tile
from .pictures import Shots, some_of
from .words import SCORES

if TYPE_CHECKING:
    from ..cache.store import Store

RETRIEVAL = 1_000  # pairs among which captions look for their picture
NEIGHBOURHOOD = 20_000  # rows among which pictures look for their neighbours
NEIGHBOURS = 3  # of each picture shown
QUERIES = 8
CLUSTERS, STRIP = 12, 9  # groups of pictures like each other, and how many of each are shown


def embed_page(ws: Workspace, store: Store, rejected: dict[str, int]) -> Path:
    """reports/embed.html: scores, token counts, norms and geometry of the embeddings, neighbours, best and worst pairs.

    rejected: reason → number of inputs that got no row.
    """
    every = np.arange(len(store))
    score = np.asarray(store.column("clip_score").to_numpy(), np.float32)
    sample = some_of(every, RETRIEVAL)
    recall, gap = _geometry(store, sample)
    order = np.argsort(score, kind="stable")
    best, worst = order[::-1][:12], order[:12]
    near, likeness = _neighbours(store, every)
    crowd = some_of(every, NEIGHBOURHOOD)
    alike = sorted(clusters(store, crowd, CLUSTERS), key=len, reverse=True)
    middles = [_pictures_of(store, members)[:STRIP] for members in alike]
    shots = Shots(ws, store, [*best, *worst, *(some := some_of(every)), *near.ravel(), *np.concatenate([[], *middles])])
    encoder = store.meta.encoder.replace("local-dir:{models}/", "the shipped ")

    def scored(rows: np.ndarray) -> list[dict[str, Any]]:
        return [shots(row, f"{score[row]:.3f}") for row in rows]

    return stage_page(
        ws,
        "embed",
        "embed.html.j2",
        title="What the encoder sees",
        lead=f"{len(store):,} picture–caption pairs embedded by {encoder}.",
        tiles=[
            tile(len(store), "rows embedded"),
            tile(sum(rejected.values()), "inputs set aside"),
            tile(f"{np.mean(score) if len(score) else 0:.3f}", "mean CLIP score"),
            tile(percent(recall), f"captions that find their picture among {len(sample):,}"),
            tile(f"{gap:.2f}", "modality gap (distance of the means)"),
        ],
        charts=[
            chart(*SCORES["clip_score"], charts.histogram({"rows": score}, label="cosine")),
            chart(
                "Length of captions",
                "tokens, start and end included; no padding is stored",
                charts.histogram({"rows": store.token_counts()}, label="tokens", integer=True),
            ),
            *_norm_charts(store, crowd),
            *(
                chart(*SCORES[name], charts.histogram({"rows": store.column(name).to_numpy()}, label="score"))
                for name in store.meta.head_scores
            ),
        ],
        neighbours=[
            [shots(own, "picture", "good"), *(shots(r, f"{c:.3f}") for r, c in zip(others, cosines, strict=True))]
            for (own, *others), (_, *cosines) in zip(near.tolist(), likeness.tolist(), strict=True)
        ],
        rejected=shares(rejected, len(store) + sum(rejected.values())),
        clusters=[
            {
                "title": percent(len(members) / len(crowd)),
                "note": f"of the rows; mean CLIP score {np.mean(score[members]):.3f}",
                "shots": [shots(row) for row in middle],
            }
            for members, middle in zip(alike, middles, strict=True)
        ],
        best=scored(best),
        worst=scored(worst),
        some=scored(some),
    )


def _norm_charts(store: Store, rows: np.ndarray) -> list[dict[str, str]]:
    """How long the raw embeddings of these rows are: a cluster away from the rest is worth a look."""
    vectors = {"pictures": store.image_embeddings(rows), "captions": store.text_embeddings(rows)}
    return [
        chart(
            f"Length of the embeddings of {name}",
            "norm of the raw vector",
            charts.histogram({name: np.linalg.norm(some.astype(np.float32), axis=1)}, label="norm"),
        )
        for name, some in vectors.items()
    ]


def _pictures_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """The first row of each picture among these, in their order: one with many captions shows once."""
    from ..cache.vectors import codes

    order = np.argsort(rows, kind="stable")
    picture = np.empty(len(rows), np.int64)
    picture[order] = codes(store.column("image_sha256", rows[order]))
    return rows[np.sort(np.unique(picture, return_index=True)[1])]


def _neighbours(store: Store, every: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some rows, each followed by those whose pictures' embeddings are nearest, and the cosines: two (Q, 1 + k) arrays.

    The same picture under another caption is no neighbour. Fewer columns where the cache is that small.
    """
    from ..cache.vectors import codes, unit

    pool = some_of(every, NEIGHBOURHOOD)
    queries = np.sort(np.random.default_rng(1).permutation(len(pool))[:QUERIES])
    vectors, picture = unit(store.image_embeddings(pool)), codes(store.column("image_sha256", pool))
    cosine = vectors[queries] @ vectors.T
    cosine[picture[queries][:, None] == picture] = -np.inf
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    found = np.isfinite(np.take_along_axis(cosine, nearest, axis=1)).all(axis=0)  # whole columns of real neighbours
    nearest = np.concatenate([queries[:, None], nearest[:, found]], axis=1)
    return pool[nearest], np.take_along_axis(cosine, nearest, axis=1)


def _geometry(store: Store, rows: np.ndarray) -> tuple[float, float]:
    """Caption → picture R@1 among these rows, and the distance of the two modalities' mean unit vectors."""
    from ..cache.vectors import unit

    if not len(rows):
        return 0.0, 0.0
    image, text = unit(store.image_embeddings(rows)), unit(store.text_embeddings(rows))
    found = np.argmax(text @ image.T, axis=1) == np.arange(len(rows))
    return float(found.mean()), float(np.linalg.norm(image.mean(0) - text.mean(0)))
