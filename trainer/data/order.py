"""The order in which training sees rows: a seeded permutation of every epoch, computed at any position. Used by
batches.py.

A table of the permutation would cost 8 bytes per row on each rank and seconds at every epoch's start; a Feistel network
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) gives any stretch of it in constant memory, so that
resuming at position p costs what position 0 costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """Positions 0, 1, 2, … of an endless stream of samples → indices 0..n-1; every epoch of n has each index once.

    block_rows > 1 is the block shuffle, for caches far larger than memory on disks that are slow at random access:
    the epoch goes through blocks of that many neighbouring indices in a random order, and indices are shuffled only
    within windows of `window_blocks` of them. Reads become sequential runs of a block; the price is that samples of
    one window keep together for an epoch, so neighbours in the files are more likely to share a batch. Blocks begin
    elsewhere in every epoch.
    """

    n: int
    seed: int
    block_rows: int = 1
    window_blocks: int = 64

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """(k,) int64 positions → (k,) int64 indices."""
        out = np.empty(len(positions), np.int64)
        for epoch, here in _groups(positions, self.n):
            at = positions[here] - epoch * self.n
            out[here] = self._plain(epoch, at) if self.block_rows == 1 else self._blocked(epoch, at)
        return out

    def window(self, position: int) -> tuple[int, int]:
        """First position and end of the window that `position` lies in: what a block shuffle reads in one go."""
        begin = position - position % self.n
        first = begin + (position - begin) // self.window_rows * self.window_rows
        return first, min(first + self.window_rows, begin + self.n)

    @property
    def window_rows(self) -> int:
        """Indices that a block shuffle mixes with each other."""
        return self.block_rows * self.window_blocks

    def _plain(self, epoch: int, at: np.ndarray) -> np.ndarray:
        return permute(at, self.n, self._keys(epoch, 0))

    def _blocked(self, epoch: int, at: np.ndarray) -> np.ndarray:
        slot = np.empty(len(at), np.int64)
        for window, here in _groups(at, self.window_rows):
            first = window * self.window_rows
            size = min(self.window_rows, self.n - first)
            slot[here] = first + permute(at[here] - first, size, self._keys(epoch, 2 + window))
        block, within = np.divmod(slot, self.block_rows)
        whole = block < self.n // self.block_rows  # the short block stays at the end
        block[whole] = permute(block[whole], self.n // self.block_rows, self._keys(epoch, 0))
        shift = int(self._keys(epoch, 1)[0]) % self.n
        return (block * self.block_rows + within + shift) % self.n

    def _keys(self, epoch: int, purpose: int) -> np.ndarray:
        return np.random.SeedSequence([self.seed, epoch, purpose]).generate_state(ROUNDS, np.uint64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of (k,) indices 0..n-1 under the permutation of 0..n-1 that `keys` (rounds,) uint64 select.

    A Feistel network permutes the next power of four; walking its cycles until an image is below n permutes n.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    out = _feistel(index.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _groups(values: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each quotient values // size that occurs, and where."""
    quotient = values // size
    for q in np.unique(quotient).tolist():
        yield q, np.flatnonzero(quotient == q)
