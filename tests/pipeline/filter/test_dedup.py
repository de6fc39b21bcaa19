"""Who copies whom: exact by bytes and address, near by components without drift, semantic without chains."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from eclipse.pipeline.cache.vectors import codes
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.filter import dedup, neighbours
from eclipse.pipeline.filter.neighbours import Pairs, Vectors, find_pairs

QUIET = Progress(quiet=True)


def crowd(sizes: list[int], seed: int = 0) -> tuple[Vectors, np.ndarray]:
    """Groups of near copies of these sizes, shuffled → vectors and the group of each item."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    embedding = (rng.normal(size=(len(sizes), 48))[group] + 0.02 * rng.normal(size=(len(group), 48))).astype(np.float32)
    grey = rng.integers(0, 256, (len(sizes), 256))[group] + rng.normal(0, 2, (len(group), 256))
    levels = np.clip(grey, 0, 255).astype(np.uint8)
    return Vectors(len(group), embedding.__getitem__, levels.__getitem__), group


def near(vectors: Vectors, rank: np.ndarray, cosine: float, concordance: float, confirm=None) -> np.ndarray:
    """The keepers that the rule near_copy finds."""
    pairs = find_pairs(vectors, cosine, concordance, QUIET, rank=rank)

    def similar(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        cosines, agree = vectors.compare(i, j)
        return (cosines >= cosine - dedup.DRIFT) & (agree >= concordance - dedup.DRIFT)

    return dedup.near_keepers(pairs, rank, similar, None if confirm is None else lambda which: confirm(pairs, which))


def first_of_each(group: np.ndarray) -> np.ndarray:
    return dedup.first_of(group, np.arange(len(group)))


def test_codes_are_equal_where_values_are() -> None:
    column = pa.chunked_array([["a", "b"], ["b", "c", "a"]])
    assert codes(column).tolist() == [0, 1, 1, 2, 0]


def test_exact_copies_by_picture_leave_captions_of_one_url_alone() -> None:
    bytes_of = np.array([0, 0, 0, 0, 1])
    url = np.array([0, 0, 1, 0, 2])
    uid = np.array([0, 1, 1, 0, 2])
    rank = np.arange(5)
    # Row 1: another caption at the same URL. Row 2: another URL. Row 3: the very pair of row 0.
    assert dedup.exact_copies(bytes_of, uid, url, rank, scope="image").tolist() == [0, 1, 0, 0, 4]
    assert dedup.exact_copies(bytes_of, uid, url, rank, scope="pair").tolist() == [0, 1, 1, 0, 4]


def test_a_copy_does_not_remove_the_pair_it_shares() -> None:
    # Row 1 goes as a copy of row 0; row 2 has the uid of row 1 but the URL of row 0, and must stay.
    keeper = dedup.exact_copies(np.zeros(3, int), np.array([0, 1, 1]), np.array([0, 1, 0]), np.arange(3), scope="image")
    assert keeper.tolist() == [0, 0, 2]


def test_rank_decides_who_stays() -> None:
    keeper = dedup.exact_copies(np.zeros(3, int), np.arange(3), np.arange(3), np.array([2, 0, 1]), scope="image")
    assert keeper.tolist() == [1, 1, 1]


@pytest.mark.parametrize("limit", [10**9, 0], ids=["every pair", "lists"])
def test_near_copies_keep_one_of_each_group(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setitem(neighbours.EXACT_LIMIT, "cpu", limit)
    monkeypatch.setitem(neighbours.BLOCK, "cpu", 300)
    items, group = crowd([1] * 900 + [2] * 150 + [5] * 20 + [90])
    assert near(items, np.arange(items.size), 0.95, 0.95).tolist() == first_of_each(group).tolist()


def test_the_rank_decides_which_near_copy_stays() -> None:
    items, group = crowd([3] * 30)
    rank = np.random.default_rng(1).permutation(items.size)
    assert near(items, rank, 0.95, 0.95).tolist() == dedup.first_of(group, rank).tolist()


def test_a_chain_is_cut_where_its_end_no_longer_resembles_the_keeper() -> None:
    angle = np.arange(6) * 0.2  # neighbours have a cosine of 0.98, the ends of 0.54
    embedding = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    thumbnail = np.tile(np.arange(256), (6, 1)).astype(np.uint8)
    items = Vectors(6, embedding.__getitem__, thumbnail.__getitem__)
    keeper = near(items, np.arange(6), 0.97, 0.9)
    removed = np.flatnonzero(keeper != np.arange(6))
    assert (keeper[keeper] == keeper).all() and len(removed) and len(np.unique(keeper)) >= 2
    assert (items.compare(removed, keeper[removed])[0] >= 0.97 - dedup.DRIFT).all()


@pytest.mark.parametrize(("things", "most"), [(1, 2_000), (2, 16_000)])
def test_pictures_have_the_last_word_and_are_asked_little(things: int, most: int) -> None:
    """A crowd of 400 has 80,000 pairs; its pictures show one thing, or half of them another."""
    items, _ = crowd([400])
    side = np.arange(400) % things
    asked: list[int] = []

    def confirm(pairs: Pairs, which: np.ndarray) -> np.ndarray:
        asked.extend(which.tolist())
        return side[pairs.i[which]] == side[pairs.j[which]]

    keeper = near(items, np.arange(400), 0.95, 0.95, confirm)
    assert keeper.tolist() == side.tolist()
    assert len(asked) == len(set(asked)) < most


def semantic(vectors: Vectors, rank: np.ndarray, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    return dedup.semantic_keepers(
        rank, lambda some: find_pairs(vectors.among(some), cosine, None, QUIET, rank=rank[some])
    )


@pytest.mark.parametrize("cap", [16, 3], ids=["lists long enough", "lists cut short"])
def test_semantic_duplicates_are_those_of_the_greedy_rule(monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    """Kept from the lowest rank on, unless a kept one is near: the same with lists that are cut short."""
    for module in (neighbours, dedup):
        monkeypatch.setattr(module, "MOST_OF_ONE", cap)
    if cap == 3:
        monkeypatch.setattr(neighbours, "MOST_PAIRS", 300)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 6)).astype(np.float32)  # so few dimensions that everything has neighbours
    rank = rng.permutation(600)
    wide = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = wide @ wide.T
    expected = np.zeros(600, bool)
    for item in np.argsort(rank):
        expected[item] = not (cosine[item][expected] >= 0.9).any()
    keeper, similarity = semantic(Vectors(600, x.__getitem__), rank, 0.9)
    kept = keeper == np.arange(600)
    assert kept.tolist() == expected.tolist() and 50 < kept.sum() < 500
    dropped = np.flatnonzero(~kept)
    assert expected[keeper[dropped]].all() and (rank[keeper[dropped]] < rank[dropped]).all()
    np.testing.assert_allclose(similarity[dropped], cosine[dropped, keeper[dropped]], atol=1e-5)
    assert np.isnan(similarity[kept]).all()


def test_a_dropped_picture_drops_no_other() -> None:
    angle = np.arange(3) * 0.25  # each is near the next, the ends are not near each other
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    assert semantic(Vectors(3, x.__getitem__), np.arange(3), 0.96)[0].tolist() == [0, 0, 2]
