"""Rows that somebody ran through CLIP before: the caches of clip-retrieval, DataComp's metadata. Used by sources.py.

clip-retrieval writes img_emb/img_emb_N.npy, text_emb/text_emb_N.npy (both (rows, D), lengths made 1) and
metadata/metadata_N.parquet; DataComp NAME.npz (arrays l14_img, l14_txt, b32_img, …) beside NAME.parquet. There are no
pictures: such rows have a thumbnail of zeros, the width and height of the metadata (0 where it has none), and the hash
of the metadata in place of the picture's (that of the embedding's bytes where it has none). So near copies, which
thumbnails confirm, cannot be told among them, and the filter says so; exact and semantic ones can.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from ..core.files import require_regular
from .decode import Embedded, Sample, with_captions
from .rejects import Reject
from .shards import TarShard
from .table import batches, mark_of

CHECKED = 8  # rows of a shard whose pictures are encoded again, where they are at hand
UNIT = 0.01  # so near to 1 a length was made 1
SIZES = ("width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class VectorShard:
    """Rows start to stop of one cache. image, text: an array's file, and its name in an .npz, else "".

    norm: what image embeddings of length 1 are multiplied by, None: they are CLIP's own. pictures: a folder or a tar
    with some of them.
    """

    image: tuple[Path, str]
    text: tuple[Path, str] | None
    metadata: Path
    start: int
    stop: int
    caption: str
    norm: float | None
    pictures: Path | None

    @property
    def name(self) -> str:
        return f"{self.metadata.stem}-{self.start}"

    def samples(self) -> Iterator[Sample | Reject]:
        arrays = [load(*array) for array in (self.image, self.text) if array is not None]
        rows = pq.read_metadata(self.metadata).num_rows
        if any(len(array) != rows for array in arrays):
            what = f"{rows:,} rows, but {' and '.join(f'{len(array):,}' for array in arrays)} embeddings"
            raise EclipseError(what, where=str(self.metadata), hint="are these files of one run?")
        image = arrays[0][self.start : self.stop].astype(np.float32)
        text = arrays[1][self.start : self.stop] if self.text is not None else None
        known = dict(islice(self.files({row["key"] for row in self._rows()}), CHECKED))
        length = float(np.median(np.linalg.norm(image, axis=1)))
        if abs(length - 1) > UNIT and self.norm is not None:
            what = f"these image embeddings have length {length:.3g}, not 1: CLIP's own, it seems"
            raise EclipseError(what, where=str(self.image[0]), hint="leave source.image_norm out")
        if abs(length - 1) < UNIT and self.norm is None and not known:
            raise EclipseError(
                "these image embeddings were made to have length 1, and priors and decoders want CLIP's own lengths",
                where=str(self.image[0]),
                hint="set source.image_norm to the mean length of this encoder's image embeddings, or source.pictures "
                "to a folder or tar with some of the pictures: it is measured on them, and named",
            )
        image *= self.norm or 1.0
        for index, row in enumerate(self._rows()):
            recorded = row.get("sha256")
            if not isinstance(recorded, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", recorded):
                recorded = hashlib.sha256(image[index].astype(np.float16).tobytes()).hexdigest()
            size = (
                _pixels(row.get("width"), row.get("original_width")),
                _pixels(row.get("height"), row.get("original_height")),
            )
            embedded = Embedded(image[index], None if text is None else text[index], size)
            where = str(row.get("url") or row.get("image_path") or "")
            caption, data = row.get(self.caption), known.get(row["key"], b"")
            captions = [str(caption)] if caption is not None else []
            for outcome in with_captions(self.name, row["key"], data, captions, where, bytes.fromhex(recorded)):
                yield replace(outcome, embedded=embedded) if isinstance(outcome, Sample) else outcome

    def files(self, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        """Pictures of these rows that lie in `pictures`, by image_path: its key in a tar, its name in a folder."""
        if self.pictures is None:
            return
        wanted: dict[str, list[str]] = defaultdict(list)  # a picture with several captions has several rows
        for row in self._rows():
            if row["key"] in keys and isinstance(path := row.get("image_path"), str):
                wanted[Path(path).name].append(row["key"])  # a name alone: no path of a table leads out of the folder
        if self.pictures.is_file():
            found = TarShard(self.pictures).files(set(wanted))
        else:
            paths = {name: self.pictures / name for name in wanted}
            found = ((name, path.read_bytes()) for name, path in paths.items() if path.is_file())
        for name, data in found:
            for key in wanted[name]:
                yield key, data

    def content(self) -> str:
        """Sizes of arrays and metadata, sixteen samples of each, and which rows these are."""
        arrays = [self.image[0], *([self.text[0]] if self.text else [])]
        return mark_of([*dict.fromkeys(arrays), self.metadata], f"{self.start} {self.stop}")

    def expected(self) -> int | None:
        return self.stop - self.start

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The metadata's columns that are wanted, and each row's number in its file as key."""
        try:
            present = set(pq.read_schema(self.metadata).names)
            wanted = [self.caption, "url", "image_path", "sha256", *SIZES]
            names = [name for name in dict.fromkeys(wanted) if name in present]
            number = self.start
            for batch in batches(self.metadata, names, self.start, self.stop):
                for row in batch.to_pylist():
                    yield {**row, "key": f"{number:09d}"}
                    number += 1
        except (OSError, pa.ArrowException) as error:
            raise EclipseError(f"cannot read the metadata: {error}", where=str(self.metadata)) from error


def _pixels(*values: Any) -> int:
    """The first that is a number, else 0."""
    return next((int(value) for value in values if isinstance(value, (int, float)) and 0 < value < 2**31), 0)


def load(path: Path, name: str) -> np.ndarray:
    """(rows, D) of an .npy, mapped, or of an array in an .npz. Raises EclipseError for anything else."""
    try:
        require_regular(path)
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        array = found[name] if name else found
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise EclipseError(f"no embeddings are in this file: {error}", where=f"{path} {name}".strip()) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise EclipseError("this file holds no table of numbers (rows, D)", where=f"{path} {name}".strip())
    return array


def find_vectors(folder: Path, prefix: str, caption: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The caches of a folder: (paths of an entry, rows), in order. prefix: of the arrays in .npz, l14 or b32.

    Raises UsageError where the metadata lack the caption; EclipseError for damage.
    """
    triples: list[tuple[Path, Path, Path]] = []
    for image in sorted((folder / "img_emb").glob("*.npy")):
        number = image.stem.removeprefix("img_emb_")
        text = folder / "text_emb" / f"text_emb_{number}.npy"
        triples.append((image, text, folder / "metadata" / f"metadata_{number}.parquet"))
    triples += [(path, path, path.with_suffix(".parquet")) for path in sorted(folder.glob("*.npz"))]
    for image, text, metadata in triples:
        try:
            require_regular(metadata)
            with pq.ParquetFile(metadata) as file:
                names, rows = file.schema_arrow.names, file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise EclipseError(f"cannot read the metadata of {image.name}: {error}", where=str(metadata)) from error
        if caption not in names:
            hint = "name it as caption_column in the card's source"
            raise UsageError(f"no column {caption}; there are: {', '.join(names)}", where=str(metadata), hint=hint)
        image_array, text_array = (f"{prefix}_img", f"{prefix}_txt") if image == text else ("", "")
        yield (
            {
                "image": [str(image), image_array],
                "text": [str(text), text_array] if text.is_file() else None,
                "metadata": str(metadata),
            },
            rows,
        )
