"""Caches of generated features for benchmarks: right in layout and lengths, meaningless in content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..pipeline.cache.store import PartMeta, PartWriter, Store, part_name
from ..pipeline.core.card import Card
from ..trainer.run import TrainJob

POOL_ROWS = 2048  # rows are cut from a pool at changing places: drawing every number would take longer than writing it
MEAN_TOKENS = 13.0  # COCO's captions under CLIP's tokenizer, start and end included


def make_cache(directory: Path, rows: int, dim: int, *, part_rows: int = 10_000, states: bool = True) -> Store:
    """Write `rows` rows of D = W = `dim` to parts in `directory`, unless it holds them already, and open them."""
    meta = PartMeta("generated", "generated", "none", "none", dim, dim, "generated", text_states=states)
    parts = -(-rows // part_rows)
    if len(list(directory.glob("part-*.parquet"))) != parts:
        rng = np.random.default_rng(0)
        pool = rng.standard_normal((POOL_ROWS * 16, dim), dtype=np.float32).astype(np.float16)
        for number in range(parts):
            n = min(part_rows, rows - number * part_rows)
            with PartWriter(directory / part_name(number), meta) as writer:
                for start in range(0, n, 1000):
                    writer.write(_columns(min(1000, n - start), pool, rng, states))
    return Store.open(directory)


def made_job(folder: Path, rows: int, dim: int, *, preset: str, card: Card, **train: Any) -> TrainJob:
    """A training on such a cache, all of it selected; train: what differs from the card's train section."""
    store = make_cache(folder / "cache", rows, dim)
    parts, within = store.part_of(np.arange(rows))
    pq.write_table(pa.table({"part": parts, "row": within, "keep": np.ones(rows, bool)}), folder / "selection.parquet")
    return TrainJob(
        directory=folder / "prior",
        embeddings=folder / "cache",
        selection=folder / "selection.parquet",
        report=folder / "train.png",
        preset=preset,
        options=card.train.model_copy(update=train),
        encoder=card.encoder,
        fingerprint="bench",
        validation_rows=500,
    )


def caption_lengths(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) token counts like COCO's: a shifted Poisson of mean 13 between 7 and 77, start and end included."""
    return np.minimum(7 + rng.poisson(MEAN_TOKENS - 7, n), 77)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(directory: Path) -> None:
    """Read a directory's files once."""
    buffer = bytearray(8 << 20)
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _columns(n: int, pool: np.ndarray, rng: np.random.Generator, states: bool) -> dict:
    counts = caption_lengths(n, rng)

    def cut(rows: int) -> np.ndarray:
        start = int(rng.integers(0, len(pool) - rows))
        return pool[start : start + rows]

    columns = {name: [f"{i}" for i in range(n)] for name in ("uid", "key", "url", "caption")}
    columns |= {"image_sha256": [rng.bytes(32) for _ in range(n)], "thumbnail": np.zeros((n, 256), np.uint8)}
    columns |= {"width": np.ones(n), "height": np.ones(n), "clip_score": np.zeros(n), "n_tokens": counts}
    columns |= {"image_embedding": cut(n), "text_embedding": cut(n)}
    return columns | ({"text_states": cut(int(counts.sum()))} if states else {})
