"""One embedding part, a standard Parquet file: its schema, its writer, its checked footer. Written by embed.py, read
through store.py.

Every column is required, PLAIN, uncompressed, and holds exactly one data page a row group, so that the values of fixed
width lie raw in the file. Every page carries the Parquet format's own CRC-32, which any reader may check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import EclipseError
from ..core.files import atomic_path, require_regular
from .parquet_map import Chunk, find_page, map_file

FORMAT_VERSION = 1
META_KEY = b"eclipse"
ACCOUNT_KEY = b"eclipse.account"
NAME = re.compile(r"part-(\d{5,})\.parquet")
ROW_GROUP_BYTES = 256 << 20  # the writer holds one row group in memory, and a page must stay under 2 GiB
THUMBNAIL_BYTES = 256  # 16×16 grey levels
PAGE_LIMIT = 2**31 - 1
LARGEST_NUMBER = 2**31 - 1  # of a part: selection.parquet addresses rows by int32
HEAD_SCORES = ("aesthetic_score", "safety_score")
REEMBED = "remove the file and run `eclipse embed` again"


@dataclass(frozen=True)
class PartMeta:
    """What must agree between all parts of a cache; stored as JSON under the key `eclipse` of the file's metadata."""

    encoder: str  # as people name it: model and pretrained tag
    encoder_fingerprint: str  # of the weights and everything else that changes an embedding
    preprocessing: str
    precision: str
    embedding_dim: int  # D
    text_width: int  # W
    card: str  # fingerprint of the card's sections that decide embeddings
    text_states: bool = True
    aesthetic_score: bool = False
    safety_score: bool = False

    @property
    def head_scores(self) -> tuple[str, ...]:
        """The columns that heads on the image embedding fill."""
        return tuple(name for name in HEAD_SCORES if getattr(self, name))


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The chunks of one row group by column name."""

    rows: int
    chunks: dict[str, Chunk]


@dataclass(frozen=True, slots=True)
class Part:
    """A part whose footer was read and found good. Its pages are looked at when they are first used."""

    path: Path
    number: int
    rows: int
    meta: PartMeta
    groups: tuple[RowGroup, ...]


def part_name(number: int) -> str:
    """The file name of part `number`, also the number of its image shard."""
    return f"part-{number:05d}.parquet"


def part_number(path: Path) -> int:
    """The number in a part's file name. Raises EclipseError for any other name."""
    match = NAME.fullmatch(Path(path).name)
    if match is None or int(match[1]) > LARGEST_NUMBER:
        hint = "move it away; parts are part-NNNNN.parquet"
        raise EclipseError("not the name of an embedding part", where=str(path), hint=hint)
    return int(match[1])


def part_schema(meta: PartMeta) -> pa.Schema:
    """The columns of a part, all required."""
    vector = pa.binary(2 * meta.embedding_dim)
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(("uid", "key", "url", "caption"), pa.string()),
        "image_sha256": pa.binary(32),
        "thumbnail": pa.binary(THUMBNAIL_BYTES),
        "width": pa.int32(),
        "height": pa.int32(),
        "image_embedding": vector,
        "text_embedding": vector,
        "n_tokens": pa.int16(),
    }
    if meta.text_states:
        columns["text_states"] = pa.list_(pa.field("element", pa.float16(), nullable=False))
    columns["clip_score"] = pa.float32()
    columns |= dict.fromkeys(meta.head_scores, pa.float32())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


class PartWriter:
    """Writes one part; the file appears, whole, when the block ends without an error.

    Columns of `write`, for n rows: uid, key, url, caption: n strings; image_sha256: n × 32 bytes; thumbnail (n,256)
    uint8; width, height: integers; image_embedding, text_embedding (n,D) float16; n_tokens (n,) integers ≥ 1;
    text_states (sum of n_tokens, W) float16, captions end to end; clip_score, aesthetic_score, safety_score (n,)
    float32. Token states and the last two exactly if `meta` says so. `write` raises EclipseError naming file and
    row key for anything else, numbers that are not finite included.

    account: JSON-ready, set before the block ends; goes into the footer for `read_account`, and for nobody else.
    """

    def __init__(self, path: Path, meta: PartMeta, *, row_group_bytes: int = ROW_GROUP_BYTES) -> None:
        self.path = Path(path)
        self.meta = meta
        self.rows = 0
        self.account: dict[str, Any] | None = None
        self._number = part_number(self.path)
        self._schema = part_schema(meta)
        self._row_group_bytes = row_group_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        self._temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
            write_page_checksum=True,
            data_page_size=PAGE_LIMIT,
            max_rows_per_page=PAGE_LIMIT,
        )
        return self

    def __exit__(self, *error: Any) -> bool | None:
        try:
            if error[0] is None:
                self._flush()
                record = {"format_version": FORMAT_VERSION, **asdict(self.meta)}
                record |= {"part": self._number, "rows": self.rows}
                texts = {META_KEY: json.dumps(record).encode()}
                if self.account is not None:
                    texts[ACCOUNT_KEY] = json.dumps(self.account).encode("ascii")  # names in tars may be no Unicode
                self._file.add_key_value_metadata(texts)
            self._file.close()
            if error[0] is None:
                _check_pages(read_part(self._temporary, number=self._number))
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._stack.__exit__(*error)

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append n rows (see the class). A batch larger than a row group becomes one row group of its own."""
        if unlike := set(columns) ^ set(self._schema.names):
            raise self._error(f"columns missing or too many: {', '.join(sorted(unlike))}")
        n = len(columns["uid"])
        counts = np.asarray(columns["n_tokens"])
        if n and counts.min() < 1:
            raise self._error("a caption without tokens", columns["key"][int(counts.argmin())])
        if n == 0:
            return
        arrays = [self._array(field, columns, n) for field in self._schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        if self._pending and self._pending_bytes + batch.nbytes > self._row_group_bytes:
            self._flush()
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        self.rows += n

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending)
            self._file.write_table(table, row_group_size=table.num_rows)
            self._pending, self._pending_bytes = [], 0

    def _array(self, field: pa.Field, columns: Mapping[str, Any], n: int) -> pa.Array:
        name, values = field.name, columns[field.name]
        if name == "text_states":
            counts = np.asarray(columns["n_tokens"], dtype=np.int64)
            shape = (int(counts.sum()), self.meta.text_width)
            states = self._numbers(name, values, shape, np.float16, np.repeat(np.arange(n), counts), columns["key"])
            offsets = np.concatenate([[0], np.cumsum(counts)]) * self.meta.text_width
            if offsets[-1] > PAGE_LIMIT // 2:
                raise self._error("more than 2 GiB of token states in one write")
            flat = pa.array(states.reshape(-1))
            return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=field.type)
        if name.endswith("_embedding"):
            shape = (n, self.meta.embedding_dim)
            return _binary(self._numbers(name, values, shape, np.float16, np.arange(n), columns["key"]), field.type)
        if name.endswith("_score"):
            return pa.array(self._numbers(name, values, (n,), np.float32, np.arange(n), columns["key"]))
        if name == "thumbnail":
            return _binary(self._shaped(name, np.array(values, dtype=np.uint8), (n, THUMBNAIL_BYTES)), field.type)
        try:
            array = pa.array(values, type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise self._error(f"column {name}: {error}") from error
        if len(array) != n:
            raise self._error(f"column {name} has {len(array)} rows, not {n}")
        if array.null_count:
            row = array.is_null().index(pa.scalar(True)).as_py()
            raise self._error(f"column {name} has no value", columns["key"][row])
        return array

    def _numbers(
        self, name: str, values: Any, shape: tuple[int, ...], dtype: type, row_of: np.ndarray, keys: Any
    ) -> np.ndarray:
        """`values` as a copy of the right dtype and shape, every number finite in it."""
        with np.errstate(over="ignore"):
            array = self._shaped(name, np.array(values, dtype=dtype, order="C"), shape)
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise self._error(f"{name} is not finite in {dtype.__name__}", keys[row_of[int(finite.argmin())]])
        return array

    def _shaped(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if array.shape != shape:
            raise self._error(f"column {name} has shape {array.shape}, not {shape}")
        return array

    def _error(self, what: str, key: str | None = None) -> EclipseError:
        return EclipseError(what, where=f"{self.path}" + (f", key {key}" if key is not None else ""))


def read_part(path: Path, *, number: int | None = None) -> Part:
    """Read and check a part's footer: format version, schema, lengths, and that the file is the part its name says.

    number: what the name should say, for a file under a temporary name. Raises EclipseError that names the file.
    """
    path = Path(path)
    number = part_number(path) if number is None else number
    try:
        require_regular(path)
        return _read_part(path, number, pq.read_metadata(path))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last for names in a damaged footer
        raise EclipseError(f"not a whole Parquet file: {error}", where=str(path), hint=REEMBED) from error


def read_account(path: Path) -> dict[str, Any] | None:
    """What the writer of this part noted about its inputs; None if it did not. Raises EclipseError, ValueError."""
    try:
        require_regular(path)
        text = (pq.read_metadata(path).metadata or {}).get(ACCOUNT_KEY)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise EclipseError(f"not a whole Parquet file: {error}", where=str(path), hint=REEMBED) from error
    return None if text is None else json.loads(text)


def _read_part(path: Path, number: int, footer: pq.FileMetaData) -> Part:
    meta, record = _parse_meta(path, footer)
    if record.get("part") != number:
        raise EclipseError(f"this file was written as part {record.get('part')}", where=str(path), hint=REEMBED)
    if footer.num_rows != record.get("rows"):
        problem = f"{footer.num_rows} rows instead of {record.get('rows')}"
        raise EclipseError(problem, where=str(path), hint=REEMBED)
    schema = part_schema(meta)
    if not footer.schema.to_arrow_schema().remove_metadata().equals(schema):
        raise EclipseError("its columns are not those of an embedding part", where=str(path), hint=REEMBED)
    groups = tuple(_read_group(path, footer.row_group(g), meta) for g in range(footer.num_row_groups))
    names = set(schema.names)
    if sum(group.rows for group in groups) != footer.num_rows or any(group.chunks.keys() != names for group in groups):
        raise EclipseError("its row groups are not those of an embedding part", where=str(path), hint=REEMBED)
    return Part(path, number, footer.num_rows, meta, groups)


def _parse_meta(path: Path, footer: pq.FileMetaData) -> tuple[PartMeta, dict[str, Any]]:
    try:
        record = json.loads((footer.metadata or {})[META_KEY])
        version = int(record["format_version"])
        if version != FORMAT_VERSION:
            hint = "update eclipse" if version > FORMAT_VERSION else REEMBED
            raise EclipseError(f"part format {version}, not {FORMAT_VERSION}", where=str(path), hint=hint)
        values = {f.name: record[f.name] for f in fields(PartMeta) if f.name in record}
        for f in fields(PartMeta):
            if f.name in values and type(values[f.name]).__name__ != f.type:
                raise TypeError(f"{f.name} is {values[f.name]!r}")
        if min(values["embedding_dim"], values["text_width"]) < 1:
            raise ValueError("vectors without dimensions")
        return PartMeta(**values), record
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EclipseError("not an embedding part of eclipse", where=str(path), hint=REEMBED) from error


def _read_group(path: Path, group: pq.RowGroupMetaData, meta: PartMeta) -> RowGroup:
    chunks: dict[str, Chunk] = {}
    size = path.stat().st_size
    for index in range(group.num_columns):
        column = group.column(index)
        chunk = Chunk(column.data_page_offset, column.total_compressed_size, column.num_values)
        name = column.path_in_schema.partition(".")[0]
        # Not by the codec's name: asked for one that does not exist, pyarrow ends the process.
        raw = column.total_compressed_size == column.total_uncompressed_size and not column.has_dictionary_page
        whole = chunk.values % meta.text_width == 0 if name == "text_states" else chunk.values == group.num_rows
        if not raw or not whole or min(chunk.offset, chunk.size) < 0 or chunk.offset + chunk.size > size:
            raise EclipseError(f"column {name} is not laid out as a part's", where=str(path), hint=REEMBED)
        chunks[name] = chunk
    return RowGroup(group.num_rows, chunks)


def _check_pages(part: Part) -> None:
    """Raise RuntimeError if the Parquet library did not lay out the pages as the reader needs them."""
    mapped = map_file(part.path)
    for group in part.groups:
        for name, chunk in group.chunks.items():
            try:
                find_page(mapped, chunk)
            except ValueError as error:
                raise RuntimeError(f"pyarrow {pa.__version__} laid out column {name} otherwise: {error}") from error


def _binary(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(n, k) numbers as n fixed binary values, without a copy."""
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])
