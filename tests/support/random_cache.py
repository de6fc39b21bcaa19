"""A small cache of random features, and the same rows as plain arrays: what a store's answers are compared with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from eclipse.pipeline.cache.store import PartMeta, PartWriter, part_name

DIM, WIDTH = 24, 12
META = PartMeta("random", "f" * 16, "none", "fp32", DIM, WIDTH, "c" * 16)


@dataclass
class Rows:
    """Columns of some rows, as PartWriter takes them."""

    columns: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]


def random_rows(n: int, rng: np.random.Generator, meta: PartMeta = META) -> Rows:
    counts = rng.integers(2, 20, n)
    digests = [hashlib.sha256(rng.bytes(8)).digest() for _ in range(n)]
    columns = {
        "uid": [digest.hex() for digest in digests],
        "key": [f"{i:09d}" for i in range(n)],
        "url": [f"http://127.0.0.1/{i}.jpg" for i in range(n)],
        "caption": [f"caption {i} – ünïcode" for i in range(n)],
        "image_sha256": digests,
        "thumbnail": rng.integers(0, 256, (n, 256), dtype=np.uint8),
        "width": rng.integers(64, 512, n),
        "height": rng.integers(64, 512, n),
        "image_embedding": rng.standard_normal((n, meta.embedding_dim)).astype(np.float16),
        "text_embedding": rng.standard_normal((n, meta.embedding_dim)).astype(np.float16),
        "n_tokens": counts,
        "clip_score": rng.random(n, dtype=np.float32),
    }
    if meta.text_states:
        columns["text_states"] = rng.standard_normal((int(counts.sum()), meta.text_width)).astype(np.float16)
    for name in meta.head_scores:
        columns[name] = rng.random(n, dtype=np.float32)
    return Rows(columns)


def joined(pieces: list[Rows]) -> Rows:
    """Rows end to end; strings stay lists."""
    names = pieces[0].columns
    return Rows(
        {
            name: np.concatenate([piece[name] for piece in pieces])
            if isinstance(pieces[0][name], np.ndarray)
            else [value for piece in pieces for value in piece[name]]
            for name in names
        }
    )


def write_cache(
    directory: Path, sizes: dict[int, int], *, seed: int = 0, meta: PartMeta = META, row_group_bytes: int = 40_000
) -> Rows:
    """Parts of the given numbers and sizes, written in pieces of up to 37 rows, several row groups a part."""
    rng = np.random.default_rng(seed)
    everything = []
    for number, size in sizes.items():
        with PartWriter(directory / part_name(number), meta, row_group_bytes=row_group_bytes) as writer:
            for start in range(0, size, 37):
                everything.append(random_rows(min(37, size - start), rng, meta))
                writer.write(everything[-1].columns)
    return joined(everything)


def states_of(rows: Rows, index: np.ndarray) -> list[np.ndarray]:
    """The token states of each named row."""
    bounds = np.concatenate([[0], np.cumsum(rows["n_tokens"])])
    return [rows["text_states"][bounds[i] : bounds[i + 1]] for i in index]
