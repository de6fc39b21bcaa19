"""Pictures that lie in tables: Parquet and Arrow files whose rows hold the bytes. Used by sources.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from ..core.files import require_regular
from .decode import Sample, with_captions
from .rejects import Reject

ENDINGS = ("parquet", "arrow", "feather")
BATCH = 256  # rows with their pictures that are held at a time
SAMPLED_BLOCKS, BLOCK = 16, 4096


@dataclass(frozen=True)
class TableShard:
    """Rows start to stop of a table. image: bytes, or Hugging Face's {bytes, path}; caption: text, or a list of it."""

    path: Path
    start: int
    stop: int
    image: str
    caption: str

    @property
    def name(self) -> str:
        return f"{self.path.stem}-{self.start}"

    def samples(self) -> Iterator[Sample | Reject]:
        for number, image, captions in self._rows([self.image, self.caption]):
            key = f"{number:09d}"
            texts = [str(text) for text in (captions if isinstance(captions, list) else [captions]) if text is not None]
            if (data := _bytes(image, self.path)) is None:
                yield Reject(self.name, key, "no_picture", "", texts[0] if texts else "")
            else:
                yield from with_captions(self.name, key, data, texts)

    def files(self, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        wanted = {int(key) for key in keys if key.isdecimal()}
        try:
            for number, image in self._rows([self.image]):
                if number in wanted and (data := _bytes(image, self.path)) is not None:
                    yield f"{number:09d}", data
        except EclipseError:
            return

    def content(self) -> str:
        """The table's size, sixteen samples of it, and which rows these are."""
        return mark_of([self.path], f"{self.start} {self.stop}")

    def expected(self) -> int | None:
        return self.stop - self.start

    def _rows(self, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """(row number, value of each column) of the shard's rows."""
        try:
            number = self.start
            for batch in batches(self.path, columns, self.start, self.stop):
                for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    yield number, *values
                    number += 1
        except (OSError, pa.ArrowException, KeyError) as error:
            raise EclipseError(f"cannot read the table: {error}", where=str(self.path)) from error


def mark_of(paths: Sequence[Path], more: str) -> str:
    """A cheap mark of files: their sizes, sixteen samples of each, and `more`. Raises EclipseError."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            require_regular(path)
            size = path.stat().st_size
            digest.update(f"{size} {more}".encode())
            with path.open("rb") as file:
                for index in range(SAMPLED_BLOCKS):
                    file.seek(index * max(size - BLOCK, 0) // (SAMPLED_BLOCKS - 1))
                    digest.update(file.read(BLOCK))
        except OSError as error:
            raise EclipseError(f"cannot read it: {error.strerror or error}", where=str(path)) from error
    return digest.hexdigest()


def table_files(place: Path) -> list[Path]:
    """The tables behind a path: a file, those in a folder (of a Hugging Face dataset, say), or those of a glob."""
    if place.is_dir():
        found = [path for path in place.rglob("*") if path.suffix.lstrip(".") in ENDINGS and path.is_file()]
    elif any(letter in place.name for letter in "*?["):
        found = [path for path in place.parent.glob(place.name) if path.is_file()]
    else:
        found = [place] if place.is_file() else []
    # A dataset's own index files (state.json, indices.arrow of a selection) hold no pictures.
    return sorted(path for path in found if not path.name.startswith((".", "cache-", "indices")))


def table_rows(path: Path, image: str, caption: str) -> int:
    """Rows of a table. Raises UsageError if it lacks a column, or its pictures are none; EclipseError for damage."""
    try:
        require_regular(path)
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        else:
            table = read_arrow(path)
            schema, rows = table.schema, len(table)
    except (OSError, pa.ArrowException) as error:
        raise EclipseError(f"cannot read the table: {error}", where=str(path)) from error
    if missing := [name for name in (image, caption) if name not in schema.names]:
        raise UsageError(
            f"the table has no column {' and no column '.join(missing)}; it has: {', '.join(schema.names)}",
            where=str(path),
            hint="name them as image_column and caption_column in the card's source",
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
        kind = kind.field(place).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        hint = "the column must hold the files' bytes, or {bytes, path}"
        raise UsageError(f"column {image} holds {kind}, not pictures", where=str(path), hint=hint)
    return rows


def batches(path: Path, columns: list[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows start to stop, a few at a time."""
    if path.suffix != ".parquet":
        yield from read_arrow(path).select(columns).slice(start, stop - start).to_batches(max_chunksize=BATCH)
        return
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < stop and last > start:
                at = first
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    if low < high:
                        yield batch.slice(low, high - low)
                    at += len(batch)
            first = last


def read_arrow(path: Path) -> pa.Table:
    """An Arrow file, mapped; Hugging Face writes streams, others files."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _bytes(image: Any, table: Path) -> bytes | None:
    """A picture's file: of its bytes, or else of the path beside the table that stands for them."""
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        if data is None and isinstance(path, str) and not Path(path).is_absolute() and ".." not in Path(path).parts:
            try:
                data = (table.parent / path).read_bytes()
            except OSError:
                data = None
        return data
    return image
