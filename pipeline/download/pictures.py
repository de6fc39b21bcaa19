"""The pictures that a URL list names: rows with one URL are one picture with several captions. Used by stage.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import UsageError
from ..images.rejects import Reject
from .url_list import UrlList, UrlRow

if TYPE_CHECKING:
    from ..core.progress import Progress


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to fetch. rows: of the list, one for each caption; the first one's number names the picture."""

    url: str
    auth: str
    digest: str
    rows: list[int]
    captions: list[str]


@dataclass(frozen=True)
class Target:
    """Which pictures of the list are wanted: a share of them by a hash of the URL, and of these the first `limit`."""

    limit: int | None = None
    sample: float = 1.0


@dataclass
class PictureList:
    """A URL list, surveyed. grouped: rows with one URL are one picture (downloads begun before this was so: False).

    Holds 40 bytes per row, and the captions of pictures that have several.
    """

    urls: UrlList
    grouped: bool = True
    unfit: list[Reject] = field(default_factory=list)

    def survey(self, progress: Progress) -> None:
        """Read the list once, and again where a URL stands in it twice. Raises what UrlList.rows raises; UsageError if
        there is nothing to fetch."""
        digests = bytearray()
        auths: dict[int, str] = {}
        with progress.task("read the list", None, "rows") as task:
            for row in self.urls.rows():
                if isinstance(row, Reject):
                    self.unfit.append(row)
                    continue
                digests += hashlib.blake2b(row.url.encode(), digest_size=16).digest()
                if row.auth:
                    auths[row.number] = row.auth
                if len(digests) % (1 << 14) == 0:
                    task.advance(1 << 10)
        self.auths = auths
        hashes = np.frombuffer(digests, "<u8").reshape(-1, 2)
        if not len(hashes):
            reasons = ", ".join(sorted({reject.reason for reject in self.unfit})) or "it is empty"
            raise UsageError(f"the URL list holds nothing to fetch: {reasons}", where=str(self.urls.paths[0]))
        first = _first_of_each(hashes) if self.grouped else np.arange(len(hashes))
        self._is_first = first == np.arange(len(hashes))
        self._shares = hashes[self._is_first, 0] / 2.0**64
        self._several = self._gather(first)
        self._pairs = np.ones(len(self._shares), np.int64)
        numbers = np.cumsum(self._is_first) - 1
        for place, group in self._several.items():
            self._pairs[numbers[place]] = len(group)

    def __len__(self) -> int:
        """Pictures in the whole list."""
        return len(self._shares)

    def chosen(self, target: Target, *, beside: list[Target]) -> np.ndarray:
        """Mask (len(self),) of the pictures that `target` adds to those of the targets before."""
        return self._within(target) & ~np.logical_or.reduce([self._within(other) for other in beside] or [False])

    def _within(self, target: Target) -> np.ndarray:
        sampled = self._shares < target.sample
        return sampled if target.limit is None else sampled & (np.cumsum(sampled) <= target.limit)

    def pairs(self, mask: np.ndarray) -> int:
        """How many captions the pictures of a mask have."""
        return int(self._pairs[mask].sum())

    def read(self, mask: np.ndarray) -> Iterator[Picture]:
        """The pictures of a mask, in the order in which the list first names them."""
        place = number = -1
        for row in self.urls.rows():
            if isinstance(row, Reject):
                continue
            place += 1
            if not self._is_first[place]:
                continue
            number += 1
            if mask[number]:
                group = self._several.get(place, [row])
                rows, captions = [row.number for row in group], [row.caption for row in group]
                yield Picture(row.url, row.auth, row.digest, rows, captions)

    def _gather(self, first: np.ndarray) -> dict[int, list[UrlRow]]:
        """The rows of every picture named several times; pairs that stand there again are set aside: repeated_pair."""
        several = np.bincount(first) > 1
        if not several.any():
            return {}
        groups: dict[int, list[UrlRow]] = {}
        rows = (row for row in self.urls.rows() if isinstance(row, UrlRow))
        for place, row in enumerate(rows):
            if several[first[place]]:
                group = groups.setdefault(int(first[place]), [])
                if any(row.caption == other.caption for other in group):
                    self.unfit.append(Reject("", f"row {row.number}", "repeated_pair", row.url, row.caption))
                else:
                    group.append(row)
        return groups


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """(n, 2) hashes → (n,) for every row the number of the first row with the same hash."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first comes first
    ordered = hashes[order]
    begins = np.append(True, (ordered[1:] != ordered[:-1]).any(1))
    first = np.empty(len(hashes), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first
