"""Pictures on pages: those of a store's rows, read from the shards once for a page. Called by every stage's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from ..images.shards import picture_files
from ..images.sources import shards_of
from .page import data_uri

if TYPE_CHECKING:
    from ..cache.store import Store

SHOWN = 24  # pictures or groups in one section of a page


class Shots:
    """Pictures of a store's rows as the templates want them, read from the shards once for a whole page."""

    def __init__(self, ws: Workspace, store: Store, rows: Iterable[int]) -> None:
        self.rows = np.unique(np.asarray(list(rows), np.int64))
        part, _ = store.part_of(self.rows)
        keys = store.column("key", self.rows).to_pylist()
        captions = store.column("caption", self.rows).to_pylist()
        files = dict(picture_files(shards_of(ws), zip(part.tolist(), keys, strict=True)))
        self.any = bool(files)  # whether there is a picture of any row
        self._shots: dict[int, dict[str, Any]] = {}
        for row, shard, key, caption in zip(self.rows.tolist(), part.tolist(), keys, captions, strict=True):
            self._shots[row] = shot(files.get((shard, key)), caption)

    def __call__(self, row: int, tag: str = "", tone: str = "", lines: Sequence[str] = ()) -> dict[str, Any]:
        return {**self._shots[int(row)], "tag": tag, "tone": tone, "lines": [line for line in lines if line]}


def shot(picture: bytes | None, caption: str) -> dict[str, Any]:
    """One picture with its caption; without a readable picture an empty frame."""
    src, pixel = "", False
    if picture is not None:
        try:
            src, pixel = data_uri(picture)
        except OSError:
            caption = f"(unreadable) {caption}"
    return {"src": src, "pixel": pixel, "caption": caption, "tag": "", "tone": "", "lines": []}


def some_of(rows: np.ndarray, n: int = SHOWN) -> np.ndarray:
    """n of the rows at random, the same ones every time, in order."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])
