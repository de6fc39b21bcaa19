"""Look-alikes: the same pairs by every way of finding them; crowds stay bounded; recall is measured and mended."""

from __future__ import annotations

import numpy as np
import pytest
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.filter import neighbours
from eclipse.pipeline.filter.neighbours import Vectors, find_pairs

QUIET = Progress(quiet=True)


def cloud(size: int, planted: int, cosine: float, *, dim: int = 96, seed: int = 0) -> np.ndarray:
    """Clustered embeddings (size, dim) float16; the last `planted` lie within ±0.01 of `cosine` to as many others."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(max(size // 60, 1), dim))
    x = 1.0 + 0.9 * centre[rng.integers(0, len(centre), size)] + 0.8 * rng.normal(size=(size, dim))
    unit = x[:planted] / np.linalg.norm(x[:planted], axis=1, keepdims=True)
    aside = rng.normal(size=unit.shape)
    aside -= (aside * unit).sum(1, keepdims=True) * unit
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    target = rng.uniform(cosine - 0.01, cosine + 0.01, (planted, 1))
    x[-planted:] = 7 * (target * unit + np.sqrt(1 - target**2) * aside)
    return x.astype(np.float16)


def by_hand(x: np.ndarray, cosine: float) -> set[tuple[int, int]]:
    wide = x.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return {(int(i), int(j)) for i, j in np.argwhere(np.triu(wide @ wide.T >= cosine, 1))}


def ends(pairs: neighbours.Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists also for few pictures."""
    monkeypatch.setitem(neighbours.EXACT_LIMIT, "cpu", 0)


def test_every_pair_near_the_threshold_is_found_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(neighbours.BLOCK, "cpu", 256)
    x = cloud(1500, 300, 0.92)
    true = by_hand(x, 0.92)
    pairs = find_pairs(Vectors(len(x), x.__getitem__), 0.92, None, QUIET)
    assert ends(pairs) == true and 100 < len(true) < 1000
    assert pairs.recall is None and (pairs.cosine >= 0.92).all() and not pairs.full.any()


def test_products_of_halves_come_in_few_shapes() -> None:
    """Lists of any length: what a product of two shapes keeps in memory is kept for few of them."""
    torch, shapes = neighbours.torch, set()
    with torch.autograd.profiler.profile(record_shapes=True) as seen:
        for n in (1, 3, 65, 100, 127, 600, 2_047):
            a, b = (torch.randn(rows, 8, generator=torch.manual_seed(n)).bfloat16() for rows in (n, n + 1))
            product = neighbours._product(a, b)
            torch.testing.assert_close(product, a @ b.T)
            assert product.shape == (n, n + 1)
    for event in seen.function_events or []:
        if event.name == "aten::mm":
            shapes.add(event.input_shapes[0][0])
    assert {64, 128, 640, 2_048} <= shapes


def test_rounding_is_bounded_from_the_vectors_themselves() -> None:
    """Without the bound, products of halves would lose pairs just above the threshold."""
    x = cloud(1500, 300, 0.92)
    found = neighbours._Found(
        Vectors(len(x), x.__getitem__), 0.92, None, np.arange(len(x)), neighbours.torch.device("cpu")
    )
    for dtype in (neighbours.torch.bfloat16, neighbours.torch.float16, neighbours.torch.float32):
        found.dtype, found.lost = dtype, 0.0
        coarse = found.coarse(np.arange(len(x)), QUIET)
        near = (coarse @ coarse.T).float().numpy()
        i, j = np.array(sorted(by_hand(x, 0.92))).T
        assert (near[i, j] >= found.floor()).all()


@pytest.mark.usefixtures("lists")
def test_lists_find_the_pairs_and_say_which_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SAMPLE", 1000)
    monkeypatch.setitem(neighbours.QUERIES, "cpu", 1111)
    x = cloud(4000, 800, 0.92)
    true = by_hand(x, 0.92)
    pairs = find_pairs(Vectors(len(x), x.__getitem__), 0.92, None, QUIET)
    assert ends(pairs) <= true and len(ends(pairs)) >= 0.985 * len(true)
    assert pairs.recall is not None and pairs.recall >= 0.99 and pairs.sampled > 100
    assert 0 < pairs.lists < int(2 * np.sqrt(len(x))) - 1, "not merely by looking everywhere"


@pytest.mark.usefixtures("lists")
def test_a_search_that_finds_too_little_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample that sets the number of lists is blinded; the one that measures is not."""
    monkeypatch.setattr(neighbours, "SAMPLE", 1000)
    monkeypatch.setattr(neighbours, "FEWEST_LISTS", 0)
    x = cloud(4000, 800, 0.8)
    real, calls = neighbours.depths, []

    def blinded(*args):
        calls.append(1)
        return real(*args) if len(calls) != 1 else np.zeros(0, np.int64)

    monkeypatch.setattr(neighbours, "depths", blinded)
    pairs = find_pairs(Vectors(len(x), x.__getitem__), 0.8, None, QUIET)
    assert pairs.lists > 0 and pairs.recall is not None and pairs.recall >= 0.99
    assert len(ends(pairs) & by_hand(x, 0.8)) >= 0.985 * len(by_hand(x, 0.8))


@pytest.mark.parametrize("limit", [10**9, 0], ids=["every pair", "lists"])
def test_a_crowd_is_thinned_but_stays_joined(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    monkeypatch.setitem(neighbours.EXACT_LIMIT, "cpu", limit)
    monkeypatch.setitem(neighbours.BLOCK, "cpu", 512)
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 30_000)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 64))
    x[500:2500] = x[0] + 0.02 * rng.normal(size=(2000, 64))  # two million pairs
    x[0] = x[1]
    grey = rng.integers(0, 256, (3000, 256))
    grey[500:2500] = grey[2] + rng.normal(0, 2, (2000, 256))
    levels = np.clip(grey, 0, 255).astype(np.uint8)
    vectors = Vectors(len(x), x.astype(np.float32).__getitem__, levels.__getitem__)
    pairs = find_pairs(vectors, 0.95, 0.9, QUIET)
    assert len(pairs) < 80_000 and ends(pairs) >= {(500, 501), (500, 2499)}, "each keeps the lowest ranks"
    assert pairs.full[520:2500].all() and not pairs.full[2500:].any()
    label = connected_components(coo_matrix((np.ones(len(pairs)), (pairs.i, pairs.j)), shape=(3000, 3000)))[1]
    assert len(np.unique(label[500:2500])) == 1 and (np.bincount(label)[label[2:500]] == 1).all()


def test_thumbnails_decide_only_where_embeddings_agree() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 32)), 2, axis=0).astype(np.float32)
    grey = rng.integers(0, 256, (80, 256)).astype(np.uint8)
    grey[1:40:2] = grey[0:40:2]
    asked: list[int] = []

    def thumbnail(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return grey[rows]

    pairs = find_pairs(Vectors(80, x.__getitem__, thumbnail), 0.95, 0.9, QUIET)
    assert ends(pairs) == {(i, i + 1) for i in range(0, 40, 2)}
    assert len(asked) == 80, "one pair of thumbnails for each of the 40 pairs of embeddings"


def test_flat_thumbnails_confirm_nothing() -> None:
    same = np.ones((2, 32), np.float32)
    flat = np.full((2, 256), 9, np.uint8)
    assert len(find_pairs(Vectors(2, same.__getitem__, flat.__getitem__), 0.9, 0.5, QUIET)) == 0


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_to_compare(size: int) -> None:
    x = np.ones((size, 8), np.float16)
    assert len(find_pairs(Vectors(size, x.__getitem__), 0.9, None, QUIET)) == 0


def test_what_does_not_fit_the_memory_lies_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MEMORY_SHARE", 0)
    x = cloud(600, 100, 0.92)
    assert ends(find_pairs(Vectors(len(x), x.__getitem__), 0.92, None, QUIET)) == by_hand(x, 0.92)
