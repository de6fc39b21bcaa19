"""The page of `eclipse evaluate` on the shapes card: the table, and each arm's pictures side by side. For `score`."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.report.page import stage_links, write_page
from .shapes import CATEGORIES, Prompt

if TYPE_CHECKING:
    from ..pipeline.core.card import Card
    from .score import Shot

SHOWN_PER_GROUP = 3  # prompts per category and split
ARM_NAMES = {
    "prior": "trained prior",
    "reference": "reference prior",
    "oracle": "oracle",
    "text": "text embedding",
}


def write_score_page(
    path: Path, card: Card, summary: dict[str, Any], prompts: Sequence[Prompt], shots: dict[str, list[Shot]]
) -> None:
    """Write the page to `path`; pictures travel inside it."""
    accuracy = summary["accuracy"]
    arms = {arm: name for arm, name in ARM_NAMES.items() if arm in shots}
    lead = (
        f"{summary['prompts']} prompts in six categories, each made into pictures from {len(arms)} embeddings and read "
        "back by pixel. The oracle is the true embedding of one scene that fulfils the prompt."
    )
    if "reference" in arms:
        lead += " The reference prior comes with the card: it shows what training on gives."
    splits = [split for split in ("seen", "unseen") if f"prior_{split}" in accuracy["mean"]]
    write_page(
        path,
        "evaluate.html.j2",
        folders=[Path(__file__).parent / "templates"],
        title="Does the prior compose?",
        lead=lead,
        footer=f"card {card.name}: {summary['held_out_compositions']} compositions were never seen in training",
        links=stage_links("Evaluate"),
        arms=arms,
        splits=splits,
        accuracy=accuracy,
        embedding=summary["embedding"],
        embedded={**arms, "mean": "the best constant"},
        groups=[
            {"category": category, "split": split, "rows": _rows(category, split, prompts, shots)}
            for category in CATEGORIES
            for split in splits
        ],
    )


def _rows(category: str, split: str, prompts: Sequence[Prompt], shots: dict[str, list[Shot]]) -> list[dict[str, Any]]:
    chosen = [i for i, p in enumerate(prompts) if (p.category, p.split) == (category, split)][:SHOWN_PER_GROUP]
    return [
        {
            "prompt": prompts[i].text,
            "shots": [
                {
                    "arm": name,
                    "src": _data_uri(shots[arm][i].picture),
                    "right": shots[arm][i].verdict.all_right,
                    "facts": "\n".join(
                        f"{'✓' if fact.right else '✗'} {fact.asked}" + ("" if fact.right else f": {fact.seen}")
                        for fact in shots[arm][i].verdict.facts
                    ),
                }
                for arm, name in ARM_NAMES.items()
                if arm in shots
            ],
        }
        for i in chosen
    ]


def _data_uri(picture: np.ndarray) -> str:
    from PIL import Image

    Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
