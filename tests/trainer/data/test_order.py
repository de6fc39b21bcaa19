"""The permutation: every index once an epoch, at any position, differently every epoch, and evenly."""

from __future__ import annotations

import numpy as np
import pytest
from eclipse.trainer.data.order import Order

BLOCKS = [1, 10]


@pytest.mark.parametrize("block_rows", BLOCKS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 999, 4097])
def test_every_epoch_has_every_index_once(n: int, block_rows: int) -> None:
    order = Order(n, seed=1, block_rows=block_rows, window_blocks=4)
    epochs = order.indices(np.arange(3 * n)).reshape(3, n)
    for epoch in epochs:
        assert (np.sort(epoch) == np.arange(n)).all()
    if n > 60:
        assert all((epochs[a] == epochs[b]).mean() < 0.1 for a, b in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_any_stretch_is_the_same_as_within_the_whole(block_rows: int) -> None:
    order = Order(1000, seed=2, block_rows=block_rows, window_blocks=7)
    whole = order.indices(np.arange(2500))
    positions = np.array([0, 999, 1000, 1, 2499, 1500, 37])
    assert (order.indices(positions) == whole[positions]).all()
    assert (Order(1000, seed=3, block_rows=block_rows).indices(np.arange(2500)) != whole).any()


def test_places_are_even() -> None:
    # 2,000 epochs of 50 indices: each index at each place about 40 times. chi² with 2,401 degrees of freedom, 5 sigma.
    places = Order(50, seed=0).indices(np.arange(2000 * 50)).reshape(2000, 50)
    counts = np.stack([np.bincount(places[:, place], minlength=50) for place in range(50)])
    chi2 = ((counts - 40) ** 2 / 40).sum()
    assert abs(chi2 - 49**2) < 5 * np.sqrt(2 * 49**2)


def test_neighbours_part() -> None:
    index = Order(100_000, seed=0).indices(np.arange(100_000))
    steps = np.abs(np.diff(index))
    assert abs(steps.mean() / (100_000 / 3) - 1) < 0.02  # mean distance of two random points
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 0.02


def test_block_shuffle_reads_whole_blocks_of_one_window_at_a_time() -> None:
    order = Order(10_000, seed=5, block_rows=100, window_blocks=8)
    first, end = order.window(10_000 + 1234)
    assert (first, end) == (10_800, 11_600)
    inside = order.indices(np.arange(first, end))
    runs = np.flatnonzero(np.diff(np.sort(inside)) != 1)
    assert len(runs) <= 8  # 800 indices in at most 9 runs of neighbours
    assert (np.diff(inside) == 1).mean() < 0.05  # but not in that order
    assert order.window(9_999) == (9_600, 10_000)  # a window ends with its epoch
