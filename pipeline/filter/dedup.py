"""Who copies whom: exact, near and semantic copies as one keeper index for each item; called by rules.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .neighbours import MOST_OF_ONE, Pairs

DRIFT = 0.05  # how far below the thresholds a near copy of a near copy may lie from its keeper

Similar = Callable[[np.ndarray, np.ndarray], np.ndarray]  # pairs (i, j), both (n,) int64 → (n,) bool
Confirm = Callable[[np.ndarray], np.ndarray]  # numbers of pairs (n,) int64 → (n,) bool


def first_of(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """For each item the item of its group that has the lowest rank. All (n,) int64."""
    order = np.argsort(rank, kind="stable")
    label, where = np.unique(group[order], return_index=True)
    return order[where][np.searchsorted(label, group)]


def exact_copies(sha256: np.ndarray, uid: np.ndarray, url: np.ndarray, rank: np.ndarray, *, scope: str) -> np.ndarray:
    """Keeper of each row (itself if kept), from integer codes of image bytes, uid and URL, all (n,) int64.

    scope "image": the same bytes under another URL than the keeper's are a copy, whatever their caption; under the same
    URL they are one picture with several captions (as in COCO) and stay. scope "pair": only same bytes, same caption.
    """
    keeper = np.arange(len(rank))
    if scope == "image":
        first = first_of(sha256, rank)
        keeper = np.where(url != url[first], first, keeper)
    # Only what is left may remove: a pair must not lose its last row to one that is itself a copy.
    left = np.flatnonzero(keeper == np.arange(len(rank)))
    keeper[left] = left[first_of(uid[left], rank[left])]
    return keeper


def near_keepers(pairs: Pairs, rank: np.ndarray, similar: Similar, confirm: Confirm | None = None) -> np.ndarray:
    """Near copies: one keeper for each connected component of look-alikes → (size,) int64, itself where kept.

    The keeper is the member of lowest rank. A chain can join pictures that do not resemble each other; so a member
    that is not itself `similar(member, keeper)` leaves, and the leavers form components of their own. What is removed
    thus always resembles something that is kept.

    confirm: has the last word on a pair. It is asked about as few as decide who is connected: the likest pairs that
    join two components first, as in Borůvka's minimum spanning tree, and no pair within one. A crowd of n copies has
    n²/2 pairs and takes about n questions.
    """
    size = len(rank)
    i, j = pairs.i, pairs.j
    keeper, settled = np.arange(size), np.zeros(size, bool)
    good = np.full(len(pairs), confirm is None)  # what is known of each pair
    bad = np.zeros(len(pairs), bool)
    likest = np.argsort(-pairs.cosine, kind="stable")
    while True:
        live = ~(settled[i] | settled[j]) & ~bad
        if not live.any():
            return keeper
        asked = 1
        while confirm is not None:
            label = _components(size, i[live & good], j[live & good])
            new = likest[(live & ~good & ~bad & (label[i] != label[j]))[likest]]
            if not len(new):
                break
            # The likest pairs of each component; more of them every time, so that the rounds stay few.
            new = new[np.minimum(_place(label[i[new]]), _place(label[j[new]])) < asked]
            asked *= 2
            yes = confirm(new)
            good[new[yes]] = bad[new[~yes]] = True
        live &= good
        if not live.any():
            return keeper
        label = _components(size, i[live], j[live])
        member = np.unique(np.concatenate([i[live], j[live]]))
        first = member[first_of(label[member], rank[member])]
        joins = (member == first) | similar(member, first)
        keeper[member[joins]] = first[joins]
        settled[member[joins]] = True


def semantic_keepers(rank: np.ndarray, find: Callable[[np.ndarray], Pairs]) -> tuple[np.ndarray, np.ndarray]:
    """Semantic duplicates: who is dropped for whom → keeper (size,) int64, its cosine (size,) float32, NaN where kept.

    From the lowest rank on, an item is kept unless it forms a pair with one that is kept. So no two that stay form a
    pair, and nothing is dropped for the sake of what is itself dropped, as chains in SemDeDup (arXiv 2303.09540) do.

    find(positions) → the pairs among these items, numbered 0..len(positions). Items with more look-alikes than it
    lists are judged again among what is left, so that the result is the same as from all pairs.
    """
    keeper, similarity = np.arange(len(rank)), np.full(len(rank), np.nan, np.float32)
    open_, kept = np.ones(len(rank), bool), np.zeros(len(rank), bool)
    while open_.any():
        left = np.flatnonzero(open_ | kept)
        pairs = find(left)
        i, j = left[pairs.i], left[pairs.j]
        worse, better = np.where(rank[i] > rank[j], i, j), np.where(rank[i] > rank[j], j, i)
        # Lists hold the lowest ranks first: one that is cut short lacks better ones only if it is full of them.
        cut = np.zeros(len(rank), bool)
        cut[left] = pairs.full & (np.bincount(worse, minlength=len(rank))[left] >= MOST_OF_ONE)
        while True:
            out = np.zeros(len(rank), bool)
            out[worse[kept[better]]] = True
            out &= open_
            open_ &= ~out
            waits = cut.copy()
            waits[worse[open_[better]]] = True
            stays = open_ & ~waits
            kept |= stays
            open_ &= ~stays
            if not (out.any() or stays.any()):
                break
        # Of the kept ones that dropped it, each item names the likest.
        dropped = ~open_ & ~kept & (keeper == np.arange(len(rank)))
        names = dropped[worse] & kept[better]
        order = np.argsort(pairs.cosine[names], kind="stable")  # later writes win
        keeper[worse[names][order]] = better[names][order]
        similarity[worse[names][order]] = pairs.cosine[names][order]
    return keeper, similarity


def _components(size: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Connected component of each of `size` items."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def _place(label: np.ndarray) -> np.ndarray:
    """How many before it have the same label, for each of (n,)."""
    order = np.argsort(label, kind="stable")
    place = np.empty(len(label), np.int64)
    place[order] = np.arange(len(label)) - np.searchsorted(label[order], label[order])
    return place
