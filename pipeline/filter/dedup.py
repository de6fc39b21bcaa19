"""Exact, near and semantic copies: who copies whom, as one keeper index for each item; called by pipeline.rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..core.progress import Progress

EXACT_LIMIT = 65_536  # items up to which every pair is compared; above, faiss proposes the pairs
BLOCK = 2_048  # side of one square of the similarity matrix: 16 MB in float32
CHUNK = 65_536  # items read, added or compared at once
FIRST_K, LAST_K = 32, 2_048  # neighbours asked of faiss; GPU indexes refuse more than 2,048
MOST_PAIRS = 4_000_000  # pairs held at once: 100 MB
DRIFT = 0.05  # how far below the thresholds a copy of a copy may lie from its keeper


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of look-alikes: i < j, int64; cosine of their embeddings, float32."""

    i: np.ndarray
    j: np.ndarray
    cosine: np.ndarray

    def __len__(self) -> int:
        return len(self.i)


@dataclass(frozen=True)
class Looks:
    """What n pictures are compared by, float32: unit embeddings (n, D); thumbnails (n, 256) around their own mean."""

    embedding: np.ndarray
    thumbnail: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray, thumbnails: np.ndarray) -> Looks:
        """From raw embeddings (n, D) and grey levels (n, 256) of any number type."""
        grey = np.asarray(thumbnails, np.float32)
        mean = grey.mean(axis=1)
        return cls(unit(embeddings), grey - mean[:, None], mean)

    def __getitem__(self, part: slice | np.ndarray) -> Looks:
        return Looks(self.embedding[part], self.thumbnail[part], self.mean[part])

    def joined(self) -> np.ndarray:
        """(n, D + 256): the inner product of two is the mean of their cosine and their thumbnails' correlation."""
        return np.concatenate([self.embedding, unit(self.thumbnail)], axis=1) * np.float32(np.sqrt(0.5))


@dataclass(frozen=True)
class Vectors:
    """`size` pictures to compare, read by position: in memory, or block by block from a memory-mapped store."""

    size: int
    read: Callable[[np.ndarray], Looks]

    def compare(self, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and thumbnail concordance of the pairs (i, j), float32, read CHUNK pairs at a time."""
        cosine, alike = np.empty(len(i), np.float32), np.empty(len(i), np.float32)
        for start in range(0, len(i), CHUNK):
            part = slice(start, start + CHUNK)
            a, b = self.read(i[part]), self.read(j[part])
            cosine[part] = np.einsum("nd,nd->n", a.embedding, b.embedding)
            both = np.einsum("nd,nd->n", a.thumbnail, b.thumbnail)
            alike[part] = _concordance(both, _power(a), _power(b), a.mean - b.mean)
        return cosine, alike


def _power(looks: Looks) -> np.ndarray:
    return np.einsum("nd,nd->n", looks.thumbnail, looks.thumbnail)


def _concordance(both: np.ndarray, first: np.ndarray, second: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Lin's (1989) concordance of thumbnails: their correlation, lowered by a difference in brightness or contrast.

    2 s₁₂ / (s₁² + s₂² + (m₁ − m₂)²), with sums over the 256 levels for s. Flat thumbnails agree with nothing.
    """
    return 2 * both / np.maximum(first + second + 256 * difference * difference, 1e-6)


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) of any float type → float32 of length one; a zero vector stays zero."""
    wide = np.asarray(vectors, np.float32)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norm > 0, norm, 1)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Equal values → equal int64 codes, in order of first appearance."""
    encoded = column.dictionary_encode()
    return np.concatenate([np.asarray(chunk.indices, np.int64) for chunk in encoded.chunks] or [np.empty(0, np.int64)])


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


def near_pairs(vectors: Vectors, cosine: float, concordance: float, progress: Progress) -> Pairs:
    """All pairs whose embeddings reach `cosine` and whose thumbnails reach `concordance`.

    Both are needed: CLIP alone cannot tell a copy from a look-alike, a thumbnail alone cannot tell red from green.
    Up to EXACT_LIMIT items every pair is compared; beyond, faiss proposes neighbours (see `neighbour_pairs`).
    """
    if vectors.size <= EXACT_LIMIT:
        return _collect(_triangle(vectors, cosine, concordance, progress), vectors.size)
    # Concordance never exceeds correlation, so what passes both thresholds has at least their mean.
    i, j = neighbour_pairs(vectors, (cosine + concordance) / 2, progress)
    near, alike = vectors.compare(i, j)
    keep = (near >= cosine) & (alike >= concordance)
    return Pairs(i[keep], j[keep], near[keep])


def _triangle(vectors: Vectors, cosine: float, concordance: float, progress: Progress) -> Iterator[Pairs]:
    """The upper triangle of both similarity matrices, one BLOCK × BLOCK square at a time."""
    looks = vectors.read(np.arange(vectors.size))
    starts = range(0, vectors.size, BLOCK)
    with progress.task("comparing pictures", len(starts) * (len(starts) + 1) // 2, "blocks") as task:
        for top in starts:
            for left in range(top, vectors.size, BLOCK):
                a, b = looks[top : top + BLOCK], looks[left : left + BLOCK]
                yield _square(a, b, top, left, cosine, concordance)
                task.advance()


def _square(a: Looks, b: Looks, top: int, left: int, cosine: float, concordance: float) -> Pairs:
    """The pairs of one square of the matrix; on the diagonal only those above it."""
    near = a.embedding @ b.embedding.T
    difference = a.mean[:, None] - b.mean
    alike = _concordance(a.thumbnail @ b.thumbnail.T, _power(a)[:, None], _power(b), difference)
    row, column = np.nonzero((near >= cosine) & (alike >= concordance))
    above = row + top < column + left
    row, column = row[above], column[above]
    return Pairs(row + top, column + left, near[row, column])


def _collect(parts: Iterable[Pairs], size: int) -> Pairs:
    """All pairs together; past MOST_PAIRS only a spanning forest of them, which joins the same items."""
    found, count = [], 0
    for part in parts:
        found.append(part)
        count += len(part)
        if count > MOST_PAIRS:
            found = [_forest(_join(found), size)]
            count = len(found[0])
    return _join(found)


def _join(found: list[Pairs]) -> Pairs:
    none = np.empty(0, np.int64)
    every = [Pairs(none, none, none.astype(np.float32)), *found]
    return Pairs(*(np.concatenate([getattr(pairs, name) for pairs in every]) for name in ("i", "j", "cosine")))


def _forest(pairs: Pairs, size: int) -> Pairs:
    """The pairs that join each item to the others by its strongest likenesses."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    weight = 2.0 - np.minimum(pairs.cosine, 1)  # zero would mean no pair
    number = coo_matrix((np.arange(1, len(pairs) + 1), (pairs.i, pairs.j)), shape=(size, size)).tocsr()
    tree = minimum_spanning_tree(coo_matrix((weight, (pairs.i, pairs.j)), shape=(size, size)).tocsr()).tocoo()
    left = np.asarray(number[tree.row, tree.col]).ravel() - 1
    return Pairs(pairs.i[left], pairs.j[left], pairs.cosine[left])


def neighbour_pairs(vectors: Vectors, threshold: float, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Candidate pairs i < j from a faiss index over embedding and thumbnail joined, on GPUs where there are any.

    `threshold` is on the mean of cosine and correlation (see Looks.joined). A row with more than FIRST_K such
    neighbours is asked again for LAST_K; one with more than that is compared with every other.
    """
    index = _index(vectors, progress)
    rows, found = np.arange(vectors.size), []
    for k in (FIRST_K, min(LAST_K, vectors.size)):
        rows, pairs = _search(index, vectors, rows, k, threshold, progress)
        found.append(pairs)
    found.append(_against_all(vectors, rows, threshold))
    i, j = np.concatenate(found, axis=1)
    low, high = np.minimum(i, j), np.maximum(i, j)
    code = np.unique((low * vectors.size + high)[low != high])
    return code // vectors.size, code % vectors.size


def _index(vectors: Vectors, progress: Progress):
    """An inverted-file index with float16 vectors: 10 M pictures at D = 1,280 are 31 GB."""
    import faiss

    lists = max(1, min(int(4 * np.sqrt(vectors.size)), vectors.size // 40))  # k-means wants 39 points a list
    sample = np.sort(np.random.default_rng(0).permutation(vectors.size)[: 64 * lists])
    first = vectors.read(sample).joined()
    index = faiss.index_factory(first.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", min(lists, 32))
    if faiss.get_num_gpus():
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        index = faiss.index_cpu_to_all_gpus(index, co=options)
    index.train(first)
    with progress.task("indexing pictures", vectors.size, "pictures") as task:
        for rows in _chunks(np.arange(vectors.size)):
            index.add(vectors.read(rows).joined())
            task.advance(len(rows))
    return index


def _search(index, vectors: Vectors, rows: np.ndarray, k: int, threshold: float, progress: Progress):
    """→ rows whose k-th neighbour still passes (their list may be cut short), pairs (2, n) of all the others' hits."""
    overflow, found = [], [np.empty((2, 0), np.int64)]
    step = max(1, CHUNK * FIRST_K // k)
    with progress.task(f"searching neighbours (k = {k})", len(rows), "pictures") as task:
        for some in _chunks(rows, step):
            score, neighbour = index.search(vectors.read(some).joined(), k)
            hit = (score >= threshold) & (neighbour >= 0)
            full = hit.all(axis=1)
            overflow.append(some[full])
            row, column = np.nonzero(hit & ~full[:, None])
            found.append(np.stack([some[row], neighbour[row, column]]))
            task.advance(len(some))
    return np.concatenate(overflow or [rows[:0]]), np.concatenate(found, axis=1)


def _against_all(vectors: Vectors, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs (2, n) of the few rows with more than LAST_K neighbours, by comparing them with everything."""
    found = [np.empty((2, 0), np.int64)]
    for some in _chunks(rows, BLOCK):
        query = vectors.read(some).joined()
        for others in _chunks(np.arange(vectors.size), BLOCK):
            row, column = np.nonzero(query @ vectors.read(others).joined().T >= threshold)
            found.append(np.stack([some[row], others[column]]))
    return np.concatenate(found, axis=1)


def _chunks(rows: np.ndarray, step: int = CHUNK) -> Iterator[np.ndarray]:
    return (rows[start : start + step] for start in range(0, len(rows), step))


def keepers(size: int, pairs: Pairs, rank: np.ndarray, similar: Callable[[np.ndarray, np.ndarray], np.ndarray]):
    """One keeper for each connected component of look-alikes → (size,) int64, itself where an item is kept.

    The keeper is the member of lowest rank. A chain can join pictures that do not resemble each other; so a member
    that is not itself `similar(member, keeper)` leaves, and the leavers form components of their own. What is removed
    thus always resembles something that is kept.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keeper, settled = np.arange(size), np.zeros(size, bool)
    i, j = pairs.i, pairs.j
    while len(i):
        graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(size, size))
        label = connected_components(graph, directed=False)[1]
        member = np.unique(np.concatenate([i, j]))
        first = member[first_of(label[member], rank[member])]
        joins = (member == first) | similar(member, first)
        keeper[member[joins]] = first[joins]
        settled[member[joins]] = True
        open_edge = ~(settled[i] | settled[j])
        i, j = i[open_edge], j[open_edge]
    return keeper


def near_keepers(
    vectors: Vectors,
    rank: np.ndarray,
    *,
    cosine: float,
    concordance: float,
    progress: Progress,
    confirm: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Near copies: the keeper of each item, (n,) int64, and how similar it is to it (cosine, NaN where kept).

    confirm: has the last word on proposed pairs (i, j), both (n,) → (n,) bool.
    """
    pairs = near_pairs(vectors, cosine, concordance, progress)
    if confirm is not None:
        yes = confirm(pairs.i, pairs.j)
        pairs = Pairs(pairs.i[yes], pairs.j[yes], pairs.cosine[yes])

    def similar(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        near, alike = vectors.compare(a, b)
        return (near >= cosine - DRIFT) & (alike >= concordance - DRIFT)

    keeper = keepers(vectors.size, pairs, rank, similar)
    return keeper, _similarity(vectors, keeper)


def semantic_keepers(vectors: Vectors, rank: np.ndarray, *, cosine: float, clusters: int, progress: Progress):
    """Semantic duplicates after SemDeDup (arXiv 2303.09540): pairs above `cosine` within spherical k-means clusters.

    Unlike it, one member of each group always stays. Returns what `near_keepers` returns.
    """
    label = _clusters(vectors, clusters)
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    found: list[Pairs] = []
    with progress.task("comparing clusters", len(groups), "clusters") as task:
        for members in groups:
            inside = Vectors(len(members), lambda rows, members=members: vectors.read(members[rows]))
            pairs = _collect(_triangle(inside, cosine, -np.inf, Progress(quiet=True)), inside.size)
            found.append(Pairs(members[pairs.i], members[pairs.j], pairs.cosine))
            task.advance()
    keeper = keepers(vectors.size, _join(found), rank, lambda a, b: vectors.compare(a, b)[0] >= cosine - DRIFT)
    return keeper, _similarity(vectors, keeper)


def _clusters(vectors: Vectors, clusters: int) -> np.ndarray:
    """Spherical k-means → cluster of each item (n,) int64. faiss would train on 256 points a centroid unless told."""
    import faiss

    clusters = max(1, min(clusters, vectors.size))
    points = 1_024
    sample = np.sort(np.random.default_rng(0).permutation(vectors.size)[: clusters * points])
    embedding = vectors.read(sample).embedding
    kmeans = faiss.Kmeans(
        embedding.shape[1],
        clusters,
        niter=20,
        seed=0,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=points,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(embedding)
    assigned = [kmeans.assign(vectors.read(rows).embedding)[1] for rows in _chunks(np.arange(vectors.size))]
    return np.concatenate(assigned).astype(np.int64)


def _similarity(vectors: Vectors, keeper: np.ndarray) -> np.ndarray:
    similarity = np.full(len(keeper), np.nan, np.float32)
    removed = np.flatnonzero(keeper != np.arange(len(keeper)))
    similarity[removed] = vectors.compare(removed, keeper[removed])[0]
    return similarity
