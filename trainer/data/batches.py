"""An endless, seeded, exactly resumable stream of packed batches from the cache. Called by loop.py and the lab."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ...pipeline.cache.store import Store
from ...pipeline.core.errors import EclipseError, UsageError
from ..model.bins import SizeClasses
from .feeds import Batch, ResidentFeed, StatesFrom, StoreFeed
from .order import Order

__all__ = ["Batch", "Batches", "read_batch"]


class Batches:
    """Iterate it for `Batch`es; it never ends. Use as a context manager, or call `close`.

    rows: (n,) the selected rows of `store`. batch_size: the global one, of all ranks together.

    Every epoch is a fresh permutation of the rows (order.py), decided by `seed` and the position alone. `position`
    counts samples of all ranks: save it, pass it again, and the stream goes on with the very next sample, whatever
    the number of ranks or the batch size now is. There is no last, partial batch: a batch that an epoch cannot fill
    goes on into the next one, so that no row is left out.

    Within a global batch rows ascend (losses do not depend on the order, reading does), and rank r of w gets the r-th
    of w equal slices: the slices of any number of ranks, put together, are the same batch.

    Captions are packed, never padded. dtype: of the token states on the device; embeddings are float32 there, and
    everything is float16 until then. Threads gather up to `prefetch` batches ahead, into pinned memory on CUDA.

    states_from: rows (B,) → PackedText, where the cache has no token states (see live_text.py); used even if it has.
    bins_for: (special tokens after a caption, text positions, draws per caption) of the network, where batches shall
    come laid out in bins (model/bins.py), in few shapes and float16: for a captured step.
    resident: hold the selected cache on the device. block_rows: > 1 for the block shuffle; its price is in order.py.

    position: samples of all ranks handed out so far. wait_seconds: time spent in waiting for batches, conversion
    included. Raises UsageError for impossible settings, EclipseError from the first batch that cannot be read.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        position: int = 0,
        states_from: StatesFrom | None = None,
        resident: bool = False,
        block_rows: int = 1,
        threads: int = 2,
        prefetch: int = 4,
        bins_for: tuple[int, int, int] | None = None,
    ) -> None:
        self.rows = np.unique(np.asarray(rows, dtype=np.int64))
        self.batch_size = batch_size
        self.position = position
        self.wait_seconds = 0.0
        self._rank, self._world_size = rank, world_size
        _check(store, self.rows, batch_size, world_size, states_from, resident)
        self._order = Order(len(self.rows), seed, block_rows)
        self._requested = position
        self._window_end = position if block_rows > 1 else None
        device, classes = torch.device(device), None
        if bins_for is not None:
            counts, share = store.token_counts(self.rows), batch_size // world_size
            specials, positions, draws = bins_for
            classes = SizeClasses.of(counts, share, specials=specials, text_positions=positions, draws=draws)
        if resident:
            self._feed = ResidentFeed(store, self.rows, device, dtype, classes)
        else:
            self._feed = StoreFeed(
                store, device, dtype, threads=threads, depth=prefetch, states_from=states_from, classes=classes
            )

    @property
    def epoch(self) -> float:
        """Passes over the selected rows so far."""
        return self.position / len(self.rows)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        self._request()
        batch = self._feed.next()
        self._request()
        self.position += self.batch_size
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the threads. Batches handed out stay valid."""
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _request(self) -> None:
        while self._feed.wants_more():
            self._read_window_ahead()
            positions = np.arange(self._requested, self._requested + self.batch_size)
            index = np.sort(self._order.indices(positions))
            share = self.batch_size // self._world_size
            self._feed.request(self.rows[index[self._rank * share : (self._rank + 1) * share]])
            self._requested += self.batch_size

    def _read_window_ahead(self) -> None:
        """In a block shuffle, have blocks read as runs, at least one whole window before their rows are wanted."""
        while self._window_end is not None and self._window_end < self._requested + self._order.window_rows:
            first, end = self._order.window(self._window_end)
            self._feed.prefetch(self.rows[np.sort(self._order.indices(np.arange(first, end)))])
            self._window_end = end


def read_batch(
    store: Store,
    rows: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    states_from: StatesFrom | None = None,
) -> Batch:
    """The named rows as one batch, in their order: for evaluation."""
    feed = StoreFeed(store, torch.device(device), dtype, threads=1, depth=1, states_from=states_from)
    try:
        feed.request(np.asarray(rows, dtype=np.int64))
        return feed.next()
    finally:
        feed.close()


def _check(
    store: Store, rows: np.ndarray, batch_size: int, world_size: int, states_from: StatesFrom | None, resident: bool
) -> None:
    if len(rows) == 0:
        raise EclipseError("no rows to train on", hint="the filter kept none: see its report")
    if rows[0] < 0 or rows[-1] >= len(store):
        raise IndexError(f"rows {rows[0]}..{rows[-1]} are not all within 0..{len(store) - 1}")
    if batch_size < 1 or batch_size % world_size:
        raise UsageError(f"a batch of {batch_size} cannot be split evenly between {world_size} ranks")
    if states_from is None and not store.has_text_states:
        raise EclipseError("this cache has no token states", hint="they have to be made while training")
    if resident and states_from is not None:
        raise UsageError("a cache without token states cannot be held on the device")
