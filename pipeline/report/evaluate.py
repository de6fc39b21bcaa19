"""reports/evaluate.html where no picture can be judged by pixel: figures, and what predictions find. For `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from .page import percent, stage_page, tile
from .pictures import Shots

if TYPE_CHECKING:
    from ..cache.store import Store

MEANINGS = {
    "cosine_image": "cosine of the prediction and the true image's embedding",
    "mean_cosine_image": "the same of the best constant: the mean of all these images",
    "similarity_own": "cosine of the prediction and its own caption's embedding",
    "similarity_true_image": "cosine of the true image and the caption: what similarity to the own caption should near",
    "similarity_shuffled": "cosine of predictions and others' captions: should be low",
    "recall_1": "how often the true image is the nearest of all to the prediction",
    "recall_5": "… among the five nearest",
    "recall_10": "… among the ten nearest",
    "text_recall_1": "how often the raw text embedding finds it first",
    "chance_recall_1": "how often a guess would",
    "norm_ratio": "length of predictions over that of true embeddings: near 1",
}


def evaluate_page(
    ws: Workspace, store: Store, summary: Mapping[str, Any], rows: np.ndarray, found: np.ndarray, cosine: np.ndarray
) -> Path:
    """Write the page. rows (n,): global rows of some captions; found (n, k): the rows whose pictures are nearest to
    what the prior predicts for them, cosine (n, k) how near.
    """
    shots = Shots(ws, store, [*rows.tolist(), *found.ravel().tolist()])
    groups = [
        [
            shots(own, "true picture", "good"),
            *(
                shots(row, f"{near:.3f}", "good" if row == own else "", ["the true picture"] if row == own else [])
                for row, near in zip(others, likeness, strict=True)
            ),
        ]
        for own, others, likeness in zip(rows.tolist(), found.tolist(), cosine.tolist(), strict=True)
    ]
    return stage_page(
        ws,
        "evaluate",
        "measure.html.j2",
        title="What the prior has learnt",
        lead=f"Measured in embedding space on {summary['rows']:,} rows that it was not trained on.",
        warnings=summary.get("warnings", []),
        tiles=[
            tile(f"{summary['cosine_image']:.3f}", "cosine to the true image", "good"),
            tile(f"{summary['mean_cosine_image']:.3f}", "that of a constant"),
            tile(percent(summary["recall_1"]), "true images found first"),
            tile(percent(summary["text_recall_1"]), "by the raw text embedding"),
            tile(percent(summary["chance_recall_1"]), "by chance"),
        ],
        figures=[
            (f"{summary[name]:.4f}", name.replace("_", " "), said) for name, said in MEANINGS.items() if name in summary
        ],
        groups=groups,
    )
