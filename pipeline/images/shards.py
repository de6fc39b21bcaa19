"""Where a workspace's pictures lie, shard by shard, and pictures found again in them. Used by embed, filter and report.

A shard is whatever has a fixed order of samples: a tar, a part of a folder, some rows of a table. Everything after the
download knows shards by their numbers, and reads them through `ImageShard` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..cache.part import LARGEST_NUMBER
from ..core.errors import EclipseError
from .decode import EXTENSIONS, BadPictureError, Sample, open_picture, read_shard
from .rejects import Reject
from .tar import is_remote, opened

if TYPE_CHECKING:
    from ..cache.store import Store
    from ..core.progress import Progress

SAMPLED_BLOCKS, BLOCK = 16, 4096


class ImageShard(Protocol):
    """One shard of pictures with their captions. Sent to worker processes and cluster nodes: small, and picklable."""

    @property
    def name(self) -> str:
        """What messages and accounts call it."""
        ...

    def samples(self) -> Iterator[Sample | Reject]:
        """What it holds, always in the same order; a Reject for everything else that is or should be there.

        Raises EclipseError if it cannot be read.
        """
        ...

    def files(self, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        """The picture files with these keys, as (key, bytes). What is not there or unreadable is left out."""
        ...

    def content(self) -> str:
        """A cheap mark of its content: survives copying, notices a change. Raises EclipseError."""
        ...

    def expected(self) -> int | None:
        """How many pictures it holds, if that is known without reading it."""
        ...


@dataclass(frozen=True)
class TarShard:
    """A WebDataset tar at a path, or at a URL that fsspec knows. caption_key: see read_shard."""

    address: Path | str
    caption_key: str | None = None

    @property
    def name(self) -> str:
        return str(self.address).rpartition("/")[2]

    def samples(self) -> Iterator[Sample | Reject]:
        return read_shard(self.address, self.caption_key)

    def files(self, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        left = set(keys)
        try:
            with opened(self.address) as (source, _), tarfile.open(fileobj=source) as tar:
                for member in tar if left else ():
                    key, extension = _split(member.name)
                    if key in left and extension in EXTENSIONS and (file := tar.extractfile(member)):
                        yield key, file.read()
                        left.remove(key)
                        if not left:
                            return
        except (OSError, tarfile.TarError):
            return

    def content(self) -> str:
        """Its size and sixteen samples of it; two over a network, where each costs a request."""
        blocks = 2 if is_remote(self.address) else SAMPLED_BLOCKS
        try:
            with opened(self.address) as (file, size):
                digest = hashlib.sha256(str(size).encode())
                for index in range(blocks):
                    file.seek(index * max(size - BLOCK, 0) // (blocks - 1))
                    digest.update(file.read(BLOCK))
        except OSError as error:
            raise EclipseError(
                f"cannot read the image shard: {error.strerror or error}", where=str(self.address)
            ) from error
        return digest.hexdigest()

    def expected(self) -> int | None:
        """By img2dataset's own count beside it."""
        if is_remote(self.address):
            return None
        path = Path(self.address)
        try:
            return int(json.loads(path.with_name(f"{path.stem}_stats.json").read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


def numbered_shards(images: Path) -> dict[int, Path]:
    """Number → tar of every shard: by name where all are numbers, else (tars from elsewhere) in the order of names.

    Raises EclipseError for a number that no part can have.
    """
    tars = sorted(images.glob("*.tar"))
    numbers = [int(tar.stem) if tar.stem.isdecimal() else -1 for tar in tars]
    if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
        numbers = list(range(len(tars)))
    if (largest := max(numbers, default=0)) > LARGEST_NUMBER:
        raise EclipseError(
            f"the number of this image shard is beyond {LARGEST_NUMBER:,}",
            where=str(tars[numbers.index(largest)]),
            hint="rename it, and the files beside it, to a smaller number",
        )
    return dict(zip(numbers, tars, strict=True))


def picture_files(
    shards: Mapping[int, ImageShard], wanted: Iterable[tuple[int, str]]
) -> Iterator[tuple[tuple[int, str], bytes]]:
    """The files with these (shard number, key), shard after shard. What is not there or unreadable is left out."""
    keys: dict[int, set[str]] = defaultdict(set)
    for shard, key in wanted:
        keys[shard].add(key)
    for shard in sorted(keys.keys() & shards.keys()):
        for key, data in shards[shard].files(keys[shard]):
            yield (shard, key), data


def _split(name: str) -> tuple[str, str]:
    """WebDataset's convention: the key ends at the first dot after the folder."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def small_pictures(
    shards: Mapping[int, ImageShard], store: Store, rows: np.ndarray, side: int, progress: Progress
) -> np.ndarray:
    """Pictures of these rows squeezed to squares: (n, side, side, 3) uint8, in a temporary file that is mapped.

    Raises EclipseError if any cannot be read.
    """
    from PIL import Image

    def shrunk(data: bytes) -> np.ndarray | None:
        try:
            picture = open_picture(data, at_least=2 * side)
        except BadPictureError:
            return None
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))

    numbers, _ = store.part_of(rows)
    where: dict[tuple[int, str], list[int]] = defaultdict(list)  # a picture with several captions has several rows
    for place, picture in enumerate(zip(numbers.tolist(), store.column("key", rows).to_pylist(), strict=True)):
        where[picture].append(place)
    with tempfile.TemporaryFile() as file:
        out = np.memmap(file, np.uint8, "w+", shape=(max(len(rows), 1), side, side, 3))[: len(rows)]
    cores = len(os.sched_getaffinity(0))
    with progress.task("reading pictures", len(rows), "pictures") as task, ThreadPoolExecutor(cores) as pool:
        files = picture_files(shards, list(where))
        while some := list(islice(files, 32 * cores)):  # read while nothing is decoded, decoded on all cores
            pictures = pool.map(shrunk, [data for _, data in some])
            for (place, _), picture in zip(some, pictures, strict=True):
                if picture is not None and place in where:
                    task.advance(len(where[place]))
                    out[where.pop(place)] = picture
    if where:
        shard, key = next(iter(where))
        raise EclipseError(
            f"{len(where):,} pictures that have to be compared cannot be read, {key} of shard {shard} among them",
            where=shards[shard].name if shard in shards else f"shard {shard}",
            hint="download them again, or set filter.near_copy_picture to null to let thumbnails decide alone",
        )
    return out
