"""Copies: exact by bytes and address, near by embedding and thumbnail; the faiss path against comparing every pair."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.filter import dedup

QUIET = Progress(quiet=True)


def vectors(embedding: np.ndarray, thumbnail: np.ndarray) -> dedup.Vectors:
    looks = dedup.Looks.of(embedding, thumbnail)
    return dedup.Vectors(len(embedding), lambda rows: looks[rows])


def crowd(sizes: list[int], seed: int = 0) -> tuple[dedup.Vectors, np.ndarray]:
    """Groups of near copies of these sizes, shuffled → vectors and the group of each item."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    embedding = rng.normal(size=(len(sizes), 48))[group] + 0.02 * rng.normal(size=(len(group), 48))
    thumbnail = rng.integers(0, 256, (len(sizes), 256))[group] + rng.normal(0, 2, (len(group), 256))
    return vectors(embedding, thumbnail), group


def first_of_each(group: np.ndarray) -> np.ndarray:
    return dedup.first_of(group, np.arange(len(group)))


def test_codes_are_equal_where_values_are() -> None:
    column = pa.chunked_array([["a", "b"], ["b", "c", "a"]])
    assert dedup.codes(column).tolist() == [0, 1, 1, 2, 0]


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


@pytest.mark.parametrize("limit", [10**9, 0], ids=["every pair", "faiss"])
def test_near_copies_keep_one_of_each_group(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(dedup, "EXACT_LIMIT", limit)
    monkeypatch.setattr(dedup, "BLOCK", 300)
    items, group = crowd([1] * 900 + [2] * 150 + [5] * 20)
    rank = np.arange(items.size)
    keeper, similarity = dedup.near_keepers(items, rank, cosine=0.95, concordance=0.95, progress=QUIET)
    assert keeper.tolist() == first_of_each(group).tolist()
    assert np.isnan(similarity[keeper == rank]).all() and (similarity[keeper != rank] > 0.95).all()


def test_faiss_finds_groups_larger_than_its_lists_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "EXACT_LIMIT", 0)
    monkeypatch.setattr(dedup, "FIRST_K", 4)
    monkeypatch.setattr(dedup, "LAST_K", 12)
    items, group = crowd([1] * 400 + [8] * 5 + [60])
    keeper, _ = dedup.near_keepers(items, np.arange(items.size), cosine=0.95, concordance=0.95, progress=QUIET)
    assert keeper.tolist() == first_of_each(group).tolist()


def test_embedding_and_thumbnail_must_both_agree() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 32))
    s, t = rng.integers(0, 256, (2, 256))
    keeper, _ = dedup.near_keepers(
        vectors(np.stack([a, a, b]), np.stack([s, t, s])), np.arange(3), cosine=0.9, concordance=0.9, progress=QUIET
    )
    assert keeper.tolist() == [0, 1, 2]


def test_flat_thumbnails_confirm_nothing() -> None:
    same = np.ones((2, 32))
    keeper, _ = dedup.near_keepers(
        vectors(same, np.full((2, 256), 9)), np.arange(2), cosine=0.9, concordance=0.5, progress=QUIET
    )
    assert keeper.tolist() == [0, 1]


def test_a_chain_is_cut_where_its_end_no_longer_resembles_the_keeper() -> None:
    angle = np.arange(6) * 0.2  # neighbours have a cosine of 0.98, the ends of 0.54
    embedding = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    thumbnail = np.tile(np.arange(256), (6, 1))
    items = vectors(embedding, thumbnail)
    keeper, similarity = dedup.near_keepers(items, np.arange(6), cosine=0.97, concordance=0.9, progress=QUIET)
    removed = keeper != np.arange(6)
    assert (keeper[keeper] == keeper).all() and removed.any()
    assert (similarity[removed] >= 0.97 - dedup.DRIFT).all() and not removed[5 if keeper[5] == 5 else 0]
    assert len(np.unique(keeper)) >= 2


def test_many_pairs_are_thinned_without_changing_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "MOST_PAIRS", 50)
    monkeypatch.setattr(dedup, "BLOCK", 64)
    items, group = crowd([1] * 50 + [80, 60])
    keeper, _ = dedup.near_keepers(items, np.arange(items.size), cosine=0.95, concordance=0.95, progress=QUIET)
    assert keeper.tolist() == first_of_each(group).tolist()


def test_semantic_duplicates_need_no_thumbnail() -> None:
    items, group = crowd([1] * 300 + [2] * 60)
    rng = np.random.default_rng(1)
    embedding = items.read(np.arange(items.size)).embedding
    unlike = vectors(embedding, rng.integers(0, 256, (items.size, 256)))
    keeper, _ = dedup.semantic_keepers(unlike, np.arange(items.size), cosine=0.95, clusters=8, progress=QUIET)
    assert (keeper == first_of_each(group)).mean() > 0.99
    assert dedup.near_keepers(unlike, np.arange(items.size), cosine=0.95, concordance=0.9, progress=QUIET)[
        0
    ].tolist() == [*range(items.size)]
