"""Which pictures look alike: pairs above a cosine of embeddings and a concordance of thumbnails; called by rules.py.

Up to `EXACT_LIMIT` pictures every pair is compared. Beyond, pictures are dealt to k-means lists and compared within
their own list and the lists nearest to it. How many lists that takes is not guessed: a sample is compared with
everything first, as many lists are looked into as its pairs need, and a second sample measures the recall of the
result, which is widened until it reaches `RECALL`.

Products are made in half precision where the processor has it, which is up to ten times as fast. What comes within
the rounding error of the threshold is computed again in float32 from the embeddings as stored: for unit vectors a, b
rounded to â, b̂ the error |a·b − â·b̂| is at most |a − â| + |b − b̂| · |â|. So rounding loses no pair and adds none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cache.kmeans import depths, kmeans, nearest
from ..cache.vectors import CHUNK, chunks
from ..core.progress import Progress

EXACT_LIMIT = {"cpu": 65_536, "cuda": 1_000_000}  # pictures up to which every pair is compared
BLOCK = {"cpu": 2_048, "cuda": 16_384}  # side of one square of the similarity matrix
QUERIES = {"cpu": 262_144, "cuda": 4_194_304}  # pictures whose nearest lists are held at once
RECALL = 0.99  # of pairs; a search that finds fewer is widened
SAMPLE = 4_096  # pictures compared with everything: to set the number of lists, and again to measure the recall
POINTS_A_LIST = 64  # that k-means sees
FEWEST_LISTS = 4  # looked into beside a picture's own, even where the sample needs none
MOST_PAIRS = 4_000_000  # pairs held before they are thinned: about 100 MB
MOST_OF_ONE = 16  # a picture with more look-alikes keeps so many of the likest, and so many of the lowest rank
DENSE = 1 / 64  # share of hits from which a square is computed again as a whole, not pair by pair
MEMORY_SHARE = 0.4  # of the memory that is free; rounded embeddings that need more lie in a temporary file


@dataclass(frozen=True)
class Vectors:
    """`size` pictures, read by position (n,): raw embeddings (n, D), float16 or float32; grey levels (n, 256) uint8."""

    size: int
    embedding: Callable[[np.ndarray], np.ndarray]
    thumbnail: Callable[[np.ndarray], np.ndarray] | None = None

    def among(self, positions: np.ndarray) -> Vectors:
        """These pictures alone, numbered anew."""
        thumbnail = self.thumbnail
        return Vectors(
            len(positions),
            lambda rows: self.embedding(positions[rows]),
            None if thumbnail is None else lambda rows: thumbnail(positions[rows]),
        )

    def compare(self, i: np.ndarray, j: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """Cosine and thumbnail concordance of the pairs (i, j), both (n,) float32; NaN where there is no thumbnail."""
        near, alike = np.empty(len(i), np.float32), np.full(len(i), np.nan, np.float32)
        for rows in chunks(len(i)):
            a, b = (unit(self.embedding(which[rows]), device) for which in (i, j))
            near[rows] = (a * b).sum(1).cpu().numpy()
            if self.thumbnail is not None:
                a, b = (_levels(self.thumbnail(which[rows]), device) for which in (i, j))
                both = (a[0] * b[0]).sum(1)
                alike[rows] = _concordance(both, a[1], b[1], a[2] - b[2]).cpu().numpy()
        return near, alike


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs i < j, int64, in ascending order; cosine and concordance float32 (NaN: thumbnails did not count).

    full: (size,) bool, pictures with more look-alikes than are listed here (see MOST_OF_ONE). recall: share of the
    true pairs of `sampled` that was found; None where every pair was compared. lists: looked into beside a picture's
    own; 0 where every pair was compared.
    """

    i: np.ndarray
    j: np.ndarray
    cosine: np.ndarray
    concordance: np.ndarray
    full: np.ndarray
    recall: float | None = None
    sampled: int = 0
    lists: int = 0

    def __len__(self) -> int:
        return len(self.i)

    def at(self, chosen: np.ndarray) -> Pairs:
        """These pairs alone: their numbers, or a bool for each."""
        i, j, cosine, concordance = (x[chosen] for x in (self.i, self.j, self.cosine, self.concordance))
        return replace(self, i=i, j=j, cosine=cosine, concordance=concordance)


def find_pairs(
    vectors: Vectors,
    cosine: float,
    concordance: float | None,
    progress: Progress,
    *,
    rank: np.ndarray | None = None,
    device: str | None = None,
) -> Pairs:
    """All pairs with at least this cosine and (unless None) this concordance of their thumbnails.

    rank: (size,) int64, the look-alikes listed first where there are too many; by position if None. device: cpu or
    cuda; a GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = np.arange(vectors.size) if rank is None else rank
    found = _Found(vectors, cosine, concordance, rank, torch.device(device))
    if vectors.size > EXACT_LIMIT[device]:
        return _search_lists(found, progress)
    every = np.arange(vectors.size)
    coarse = found.coarse(every, progress)
    blocks = -(-vectors.size // found.block)
    with progress.task("comparing pictures", blocks * (blocks + 1) // 2, "blocks") as task:
        for _ in found.compare_all(coarse, every):
            task.advance()
    return found.pairs()


def find_across(
    vectors: Vectors, others: Vectors, cosine: float, concordance: float | None, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of one of `vectors` and one of the (few) `others` → positions in each, cosine; every pair is compared."""
    size = vectors.size

    def read(kind: str) -> Callable[[np.ndarray], np.ndarray]:
        mine, theirs = getattr(vectors, kind), getattr(others, kind)

        def rows_of(rows: np.ndarray) -> np.ndarray:
            inside = rows < size
            if inside.all() or not inside.any():
                return mine(rows) if inside.all() else theirs(rows - size)
            first, second = mine(rows[inside]), theirs(rows[~inside] - size)
            both = np.empty((len(rows), first.shape[1]), np.promote_types(first.dtype, second.dtype))
            both[inside], both[~inside] = first, second
            return both

        return rows_of

    joined = Vectors(size + others.size, read("embedding"), None if concordance is None else read("thumbnail"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _Found(joined, cosine, concordance, np.arange(joined.size), device)
    with progress.task("comparing with the evaluation sets", size, "vectors") as task:
        targets = [(rows + size, found.rounded(rows + size)) for rows in chunks(others.size, found.block)]
        for rows in chunks(size, found.block):
            mine = found.rounded(rows)
            for target, rounded in targets:
                found.compare(rows, mine, target, rounded)
            task.advance(len(rows))
    pairs = found.pairs()
    return pairs.i, pairs.j - size, pairs.cosine


class _Found:
    """Compares blocks of pictures, and holds the pairs found, thinned where they are too many."""

    def __init__(
        self, vectors: Vectors, cosine: float, concordance: float | None, rank: np.ndarray, device: torch.device
    ) -> None:
        self.vectors, self.rank, self.device = vectors, rank, device
        self.cosine, self.concordance = cosine, concordance
        self.block = BLOCK[device.type]
        # On a CPU bfloat16 or nothing: float16 products are no faster there than float32. On a GPU both are, and
        # float16 rounds less.
        halves = any(torch.cpu.get_capabilities().get(kind) for kind in ("amx_bf16", "avx512_bf16"))
        self.dtype = torch.float16 if device.type == "cuda" else torch.bfloat16 if halves else torch.float32
        self.lost = 0.0  # length of the longest part that rounding took from a unit vector
        self.anew()

    def anew(self) -> None:
        """Forget the pairs."""
        self.full = np.zeros(self.vectors.size, bool)
        self.most = MOST_PAIRS
        self._doubtful: list[np.ndarray] = []  # (2, n): within rounding error of the threshold
        self._pairs: list[tuple[np.ndarray, ...]] = []  # i, j, cosine, concordance
        self._held = self._doubts = 0

    def unit(self, rows: np.ndarray) -> Tensor:
        return unit(self.vectors.embedding(rows), self.device)

    def rounded(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings (n, D) in half precision; what that takes from them is kept in mind for `floor`."""
        exact = self.unit(rows)
        rounded = exact.to(self.dtype)
        self.lost = max(self.lost, float((exact - rounded.float()).norm(dim=1).max()))
        return rounded

    def coarse(self, place: np.ndarray, progress: Progress) -> Tensor:
        """(size, D) rounded embeddings, picture p at place[p]; read once, in the order of storage."""
        out = torch.empty((0, 1), dtype=self.dtype, device=self.device)
        with progress.task("reading embeddings", len(place), "pictures") as task:
            for rows in chunks(len(place)):
                rounded = self.rounded(rows)
                if not len(out):
                    out = _room(len(place), rounded.shape[1], self.dtype, self.device)
                out[torch.from_numpy(place[rows]).to(self.device)] = rounded
                task.advance(len(rows))
        return out

    def floor(self) -> float:
        """The least product of rounded vectors that may belong to a cosine of the threshold."""
        # Rounding the product itself may take half an eps of it; GPUs may add up partial sums in halves as well.
        product = torch.finfo(self.dtype).eps * (2 if self.device.type == "cuda" else 0.5)
        return (self.cosine - 2.01 * self.lost) * (1 - product) - 1e-5

    def compare_all(self, coarse: Tensor, order: np.ndarray) -> Iterator[None]:
        """Every two of the pictures order[k], whose rounded vectors are coarse[k]; yields after each block."""
        for top in range(0, len(order), self.block):
            rows = slice(top, top + self.block)
            for left in range(top, len(order), self.block):
                columns = slice(left, left + self.block)
                self.compare(order[rows], coarse[rows], order[columns], coarse[columns], same=top == left)
                yield

    def compare(self, i: np.ndarray, a: Tensor, j: np.ndarray, b: Tensor, *, same: bool = False) -> None:
        """Each of pictures i with each of j; a and b: their rounded vectors. same: i is j."""
        near, floor = _product(a, b), self.floor()
        if same:
            near.masked_fill_(torch.ones_like(near, dtype=torch.bool).tril_(), -2)
        busy = (near.amax(1) >= floor).nonzero().flatten()  # few rows have a hit: the others are not looked at again
        if not len(busy):
            return
        row, column = (near[busy] >= floor).nonzero(as_tuple=True)
        if len(row) > max(DENSE * near.numel(), MOST_OF_ONE * (len(i) + len(j))):
            self._compute_block(i, j, same)
            return
        self._doubtful.append(np.stack([i[busy[row].cpu().numpy()], j[column.cpu().numpy()]]))
        self._doubts += len(row)
        if self._doubts >= CHUNK:
            self._compute_doubtful()

    def _compute_doubtful(self) -> None:
        """In float32, pair by pair; thumbnails only of the pairs whose cosine passes."""
        i, j = np.concatenate([np.empty((2, 0), np.int64), *self._doubtful], axis=1)
        self._doubtful, self._doubts = [], 0
        i, j = np.minimum(i, j)[i != j], np.maximum(i, j)[i != j]
        near, alike = Vectors(self.vectors.size, self.vectors.embedding).compare(i, j, str(self.device))
        passed = near >= self.cosine
        i, j, near, alike = i[passed], j[passed], near[passed], alike[passed]
        if self.concordance is not None and len(i):
            _, alike = self.vectors.compare(i, j, str(self.device))
            passed = alike >= self.concordance
            i, j, near, alike = i[passed], j[passed], near[passed], alike[passed]
        self._add(i, j, near, alike)

    def _compute_block(self, i: np.ndarray, j: np.ndarray, same: bool) -> None:
        """In float32, all of the square: a crowd of copies would take forever pair by pair. Thinned on the spot."""
        near = self.unit(i) @ self.unit(j).T
        hit, alike = near >= self.cosine, torch.full_like(near, torch.nan)
        if self.concordance is not None:
            assert self.vectors.thumbnail is not None
            a, b = (_levels(self.vectors.thumbnail(rows), self.device) for rows in (i, j))
            alike = _concordance(a[0] @ b[0].T, a[1][:, None], b[1], a[2][:, None] - b[2])
            hit &= alike >= self.concordance
        hit &= torch.from_numpy(i[:, None] < j if same else i[:, None] != j).to(self.device)
        if int(hit.sum()) > MOST_OF_ONE * (len(i) + len(j)):
            keep = torch.zeros_like(hit)
            for dim, others in ((1, j), (0, i)):
                early = torch.from_numpy(-np.argsort(np.argsort(self.rank[others])).astype(np.float32)).to(self.device)
                for worth in (near, early[None, :] if dim == 1 else early[:, None]):
                    best = torch.where(hit, worth, -torch.inf).topk(min(MOST_OF_ONE, hit.shape[dim]), dim=dim).indices
                    keep.scatter_(dim, best, True)
            thinned = hit & ~keep
            self.full[i[thinned.any(1).cpu().numpy()]] = True
            self.full[j[thinned.any(0).cpu().numpy()]] = True
            hit &= keep
        row, column = hit.nonzero(as_tuple=True)
        first, second = i[row.cpu().numpy()], j[column.cpu().numpy()]
        values = (near[row, column].cpu().numpy(), alike[row, column].cpu().numpy())
        self._add(np.minimum(first, second), np.maximum(first, second), *values)

    def _add(self, *columns: np.ndarray) -> None:
        self._pairs.append(columns)
        self._held += len(columns[0])
        if self._held > self.most:
            self._thin()

    def _thin(self) -> None:
        """Drop pairs found twice, and of pictures with too many pairs all but MOST_OF_ONE likest and lowest in rank."""
        i, j, near, alike = (np.concatenate(column) for column in zip(*self._pairs, strict=True))
        _, once = np.unique(i * self.vectors.size + j, return_index=True)
        i, j, near, alike = i[once], j[once], near[once], alike[once]
        if len(i) > self.most // 2:
            end, other = np.concatenate([i, j]), np.concatenate([j, i])
            kept = np.zeros(len(i), bool)
            for worth in (-np.concatenate([near, near]), self.rank[other]):
                order = np.lexsort((worth, end))
                first = np.searchsorted(end[order], end[order])
                kept[order[np.arange(len(order)) - first < MOST_OF_ONE] % len(i)] = True
            self.full[i[~kept]] = self.full[j[~kept]] = True
            i, j, near, alike = i[kept], j[kept], near[kept], alike[kept]
        self._pairs, self._held = [(i, j, near, alike)], len(i)
        self.most = max(MOST_PAIRS, 2 * len(i))

    def pairs(self, **about: object) -> Pairs:
        """What was found so far, each pair once."""
        self._compute_doubtful()
        self._thin()
        return Pairs(*self._pairs[0], self.full, **about)  # type: ignore[arg-type]


def _search_lists(found: _Found, progress: Progress) -> Pairs:
    """Pairs of pictures whose k-means lists are near each other, of as many lists as samples show to be needed."""
    size = found.vectors.size
    rng = np.random.default_rng(0)
    lists = int(2 * np.sqrt(size))
    centre = kmeans(found.unit, found.dtype, np.sort(rng.permutation(size)[: POINTS_A_LIST * lists]), lists, progress)

    own = np.empty(size, np.int64)
    with progress.task("dealing pictures to lists", size, "pictures") as task:
        for rows in chunks(size):
            own[rows] = nearest(found.unit(rows).to(found.dtype), centre).cpu().numpy()
            task.advance(len(rows))
    order = np.lexsort((found.rank, own))
    place = np.empty(size, np.int64)
    place[order] = np.arange(size)
    own = own[order]  # from here on by place
    bounds = np.searchsorted(own, np.arange(lists + 1))
    coarse = found.coarse(place, progress)

    # How many lists beside its own must a picture look into?
    sample, again = np.array_split(rng.permutation(size)[: 2 * SAMPLE], 2)
    true = _pairs_of(found, sample, coarse, order, place, progress)
    depth = depths(place[true.i], place[true.j], coarse, own, centre)
    needed = int(np.quantile(depth, (1 + RECALL) / 2, method="higher")) if len(depth) else 0
    true = _pairs_of(found, again, coarse, order, place, progress)  # for the recall of what will be found
    depth = depths(place[true.i], place[true.j], coarse, own, centre)

    found.anew()
    with progress.task("comparing within lists", lists, "lists") as task:
        for one in range(lists):
            at = slice(bounds[one], bounds[one + 1])
            for _ in found.compare_all(coarse[at], order[at]):
                pass
            task.advance()
    done, wanted = 0, min(max(FEWEST_LISTS, 2 * needed), lists - 1)
    while True:
        _compare_lists(found, coarse, order, own, bounds, centre, done, wanted, progress)
        pairs = found.pairs(lists=wanted, sampled=len(true))
        # A crowd's pairs are not all listed; whether they were met follows from how deep they lie.
        listed = np.isin(true.i * size + true.j, pairs.i * size + pairs.j, assume_unique=True)
        met = listed | ((pairs.full[true.i] | pairs.full[true.j]) & (depth <= wanted))
        recall = float(met.mean()) if len(met) else None
        share = "no pair among the sampled pictures" if recall is None else f"recall {recall:.4f} of {len(met):,} pairs"
        progress.say(f"look-alikes: {len(pairs):,} pairs through {wanted + 1} of {lists:,} lists; {share}")
        if recall is None or recall >= RECALL or wanted == lists - 1:
            return found.pairs(lists=wanted, sampled=len(true), recall=recall)
        done, wanted = wanted, min(2 * wanted + 1, lists - 1)


def _pairs_of(
    found: _Found, sample: np.ndarray, coarse: Tensor, order: np.ndarray, place: np.ndarray, progress: Progress
) -> Pairs:
    """The pairs that the sampled pictures truly have, from comparing them with everything."""
    found.anew()
    with progress.task("comparing a sample with everything", len(order), "pictures") as task:
        for rows in chunks(len(sample), found.block):
            mine = coarse[torch.from_numpy(place[sample[rows]]).to(found.device)]
            for start in range(0, len(order), found.block):
                there = slice(start, start + found.block)
                found.compare(sample[rows], mine, order[there], coarse[there])
                task.advance(len(rows) * len(order[there]) // len(sample))
    return found.pairs()


def _compare_lists(
    found: _Found,
    coarse: Tensor,
    order: np.ndarray,
    own: np.ndarray,
    bounds: np.ndarray,
    centre: Tensor,
    done: int,
    wanted: int,
    progress: Progress,
) -> None:
    """Each picture with the pictures of its nearest lists beside its own, from the `done`-th nearest to `wanted`."""
    lists, queries, device = len(centre), QUERIES[found.device.type], found.device
    with progress.task(f"comparing with {wanted} nearest lists", len(order), "pictures") as task:
        for start in range(0, len(order), queries):
            closest = []
            for first in range(start, min(start + queries, len(order)), 8_192):
                rows = slice(first, min(first + 8_192, start + queries, len(order)))
                near = coarse[rows] @ centre.T
                near.scatter_(1, torch.from_numpy(own[rows]).to(device)[:, None], -3)
                closest.append(near.topk(wanted, dim=1).indices[:, done:].to(torch.int32))
            asked = torch.cat(closest)
            asked_list, by_list = asked.flatten().sort(stable=True)
            cuts = torch.searchsorted(asked_list, torch.arange(lists + 1, dtype=torch.int32, device=device)).tolist()
            for one in range(lists):
                askers = start + by_list[cuts[one] : cuts[one + 1]] // max(wanted - done, 1)
                for rows in askers.split(found.block):
                    mine, who = coarse[rows], order[rows.cpu().numpy()]
                    for left in range(bounds[one], bounds[one + 1], found.block):
                        columns = slice(left, min(left + found.block, bounds[one + 1]))
                        found.compare(who, mine, order[columns], coarse[columns])
            task.advance(len(asked))


def unit(vectors: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(n, D) of any float type → float32 of length one; a zero vector stays zero."""
    wide = torch.from_numpy(np.ascontiguousarray(vectors)).to(device).float()
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-20)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T. On a CPU torch keeps a bfloat16 kernel, about a megabyte, for each of the last 1,024 pairs of lengths,
    and lists hardly ever have the same length twice: lengths are padded, so that up to 2,048 there are 16 of them."""
    if a.dtype != torch.bfloat16:
        return a @ b.T
    wide = [torch.nn.functional.pad(x, (0, 0, 0, -len(x) % max(64, 2 ** (len(x).bit_length() - 3)))) for x in (a, b)]
    return (wide[0] @ wide[1].T)[: len(a), : len(b)]


def _levels(thumbnails: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Grey levels (n, 256) → around their mean, the sum of their squares (n,), the mean (n,); float32."""
    grey = torch.from_numpy(np.ascontiguousarray(thumbnails)).to(device).float()
    mean = grey.mean(1)
    grey = grey - mean[:, None]
    return grey, (grey * grey).sum(1), mean


def _concordance(both: Tensor, first: Tensor, second: Tensor, difference: Tensor) -> Tensor:
    """Lin's (1989) concordance of thumbnails: their correlation, lowered by a difference in brightness or contrast.

    2 s₁₂ / (s₁² + s₂² + (m₁ − m₂)²), with sums over the 256 levels for s. Flat thumbnails agree with nothing.
    """
    return 2 * both / (first + second + 256 * difference * difference).clamp_min(1e-6)


def _room(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty (rows, width), in a temporary file where it would take too much of the memory that is free."""
    size = rows * width * dtype.itemsize
    if device.type == "cpu" and size > MEMORY_SHARE * _free_memory():
        with tempfile.TemporaryFile() as file:
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(size,))).view(dtype).view(rows, width)
    return torch.empty((rows, width), dtype=dtype, device=device)


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
