"""reports/search.html: the pictures nearest to a text, of the last search; called by `eclipse search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from .page import stage_page
from .pictures import Shots
from .words import in_words

if TYPE_CHECKING:
    from ..cache.store import Store


def search_page(ws: Workspace, store: Store, text: str, rows: np.ndarray, found: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page. rows (n,): the nearest first; found: cosine, key and verdict of each."""
    shots = Shots(ws, store, rows.tolist())
    return stage_page(
        ws,
        "search",
        "search.html.j2",
        title=f"“{text}”",
        lead=f"The pictures nearest to this text among {len(store):,} rows, by the encoder that embedded them.",
        found=[
            shots(
                row,
                f"{one['cosine']:.3f}",
                "bad" if one["verdict"] not in ("", "kept") else "",
                [one["key"], in_words(one["verdict"]) if one["verdict"] else ""],
            )
            for row, one in zip(rows.tolist(), found, strict=True)
        ],
    )
