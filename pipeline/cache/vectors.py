"""Two small things that stages and pages do with what the cache holds: unit vectors, and codes of equal values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) of any float type → float32 of length one; a zero vector stays zero."""
    wide = np.asarray(vectors, np.float32)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norm > 0, norm, 1)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Equal values → equal int64 codes, in order of first appearance."""
    encoded = column.dictionary_encode()
    return np.concatenate([np.asarray(chunk.indices, np.int64) for chunk in encoded.chunks] or [np.empty(0, np.int64)])
