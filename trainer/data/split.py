"""Which selected rows train a prior, and which are held back to judge it. Called by run.py, evaluate.py, the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.cache.store import Store, read_selection
from ...pipeline.core.errors import EclipseError

WHOLE = np.iinfo(np.uint64).max


def split(store: Store, selection: Path, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Selected rows, (n,) and (m,) int64 ascending: for training and for validation.

    The split is by image, not by row: all captions of a picture fall on one side, so that no validation picture was
    trained on. An image's side follows from its SHA-256 alone, and so stays the same when a cache grows. Where the
    fraction leaves fewer than two pictures, the two nearest to it are held back.
    """
    rows = read_selection(selection, store)
    images = np.concatenate([_leading_bytes(chunk) for chunk in store.column("image_sha256", rows).chunks] or [rows])
    distinct = np.unique(images)
    if len(distinct) < 4:
        raise EclipseError(
            f"{len(distinct)} pictures are too few to train on and to validate with",
            where=str(selection),
            hint="loosen the filter's rules, or start from a longer list",
        )
    limit = max(int(fraction * float(WHOLE)), int(distinct[1]))
    held_back = images <= np.uint64(min(limit, int(distinct[-2])))
    return rows[~held_back], rows[held_back]


def _leading_bytes(chunk: Any) -> np.ndarray:
    """The first 8 bytes of each value of an Arrow array of fixed binary 32, as numbers: (n,) uint64."""
    data = np.frombuffer(chunk.buffers()[1], np.uint8)
    bytes_ = data[32 * chunk.offset : 32 * (chunk.offset + len(chunk))].reshape(-1, 32)
    return np.ascontiguousarray(bytes_[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
