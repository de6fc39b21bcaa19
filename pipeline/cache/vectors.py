"""Small things that stages and pages do with what the cache holds: unit vectors, codes of equal values, pieces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

CHUNK = 65_536  # rows read, or pairs computed again, at once


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) of any float type → float32 of length one; a zero vector stays zero."""
    wide = np.asarray(vectors, np.float32)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norm > 0, norm, 1)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Equal values → equal int64 codes, in order of first appearance."""
    encoded = column.dictionary_encode()
    return np.concatenate([np.asarray(chunk.indices, np.int64) for chunk in encoded.chunks] or [np.empty(0, np.int64)])


def chunks(size: int, step: int = CHUNK) -> Iterator[np.ndarray]:
    """0..size in pieces: (≤ step,) int64."""
    return (np.arange(start, min(start + step, size)) for start in range(0, size, step))
