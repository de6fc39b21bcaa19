"""Picture files found again in the image shards by (shard number, key); called by rules.py, pages.py and embed.py."""

from __future__ import annotations

import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..cache.part import LARGEST_NUMBER
from ..core.errors import EclipseError
from .decode import EXTENSIONS, BadPictureError, open_picture
from .tar import require_regular

if TYPE_CHECKING:
    from ..cache.store import Store
    from ..core.progress import Progress


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


def picture_files(images: Path, wanted: Iterable[tuple[int, str]]) -> Iterator[tuple[tuple[int, str], bytes]]:
    """The files with these (shard number, key), shard after shard. What is not there or unreadable is left out."""
    keys: dict[int, set[str]] = defaultdict(set)
    for shard, key in wanted:
        keys[shard].add(key)
    paths = numbered_shards(images)
    for shard in sorted(keys):
        try:
            require_regular(paths[shard])
            with tarfile.open(paths[shard]) as tar:
                for member in tar:
                    key, extension = _split(member.name)
                    if key in keys[shard] and extension in EXTENSIONS and (file := tar.extractfile(member)):
                        yield (shard, key), file.read()
        except (OSError, KeyError, tarfile.TarError):
            continue


def _split(name: str) -> tuple[str, str]:
    """WebDataset's convention: the key ends at the first dot after the folder."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def small_pictures(images: Path, store: Store, rows: np.ndarray, side: int, progress: Progress) -> np.ndarray:
    """Pictures of these rows squeezed to squares: (n, side, side, 3) uint8, in a temporary file that is mapped.

    Raises EclipseError if any cannot be read.
    """
    from PIL import Image

    shards, _ = store.part_of(rows)
    where = dict(
        zip(zip(shards.tolist(), store.column("key", rows).to_pylist(), strict=True), range(len(rows)), strict=True)
    )
    with tempfile.TemporaryFile() as file:
        out = np.memmap(file, np.uint8, "w+", shape=(max(len(rows), 1), side, side, 3))[: len(rows)]
    with progress.task("reading pictures", len(rows), "pictures") as task:
        for place, data in picture_files(images, list(where)):
            try:
                picture = open_picture(data, at_least=2 * side)
            except BadPictureError:
                continue
            out[where.pop(place)] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
            task.advance()
    if where:
        shard, key = next(iter(where))
        raise EclipseError(
            f"{len(where):,} pictures that have to be compared cannot be read, {key} of shard {shard} among them",
            where=str(images),
            hint="download them again, or set filter.near_copy_picture to null to let thumbnails decide alone",
        )
    return out
