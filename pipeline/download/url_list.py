"""A list of URLs and captions: its rows in order, what cannot be fetched set aside with a reason. For download.py."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from ..images.rejects import Reject
from ..images.tar import require_regular

BATCH = 65_536
LINE_LIMIT = 1 << 24  # bytes of a JSON line; a file without line ends may be larger than the memory
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class UrlRow:
    """A row that can be fetched; number counts from 0 through all files, rows set aside included."""

    number: int
    url: str
    caption: str


@dataclass(frozen=True)
class UrlList:
    """One or more Parquet, CSV, TSV or JSONL files (the last three also gzipped) with the same columns."""

    paths: tuple[Path, ...]
    url_column: str = "url"
    caption_column: str = "caption"

    def digest(self) -> str:
        """SHA-256 over the files' bytes, in order. Raises UsageError if one cannot be read."""
        total = hashlib.sha256()
        for path in self.paths:
            try:
                require_regular(path)
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                hint = "the card's source.urls names it; a relative path starts at the workspace's own card"
                raise UsageError(f"cannot read the URL list: {_why(error)}", where=str(path), hint=hint) from error
        return total.hexdigest()

    def rows(self) -> Iterator[UrlRow | Reject]:
        """Every row in list order, cleaned, or its Reject.

        Raises UsageError for a missing file or column, EclipseError for a file that is damaged.
        """
        number = 0
        for path in self.paths:
            broken: list[Reject] = []
            try:
                for urls, captions in self._columns(path, broken):
                    for url, caption in zip(urls, captions, strict=True):
                        yield _row(number, _text(url), _text(caption))
                        number += 1
            except OSError as error:
                raise UsageError(f"cannot read the URL list: {_why(error)}", where=str(path)) from error
            except (pa.ArrowException, ValueError, KeyError) as error:
                raise EclipseError(
                    f"cannot read the URL list: {error}",
                    where=f"{path}, near row {number}",
                    hint="repair the file, or take it out of the card's source.urls",
                ) from error
            yield from broken

    def _columns(self, path: Path, broken: list[Reject]) -> Iterator[tuple[list[Any], list[Any]]]:
        """Blocks of URLs and captions, read as the kind of file that the name tells; adds to `broken`."""
        wanted = [self.url_column, self.caption_column]
        kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
        if kind not in ("parquet", "csv", "tsv", "jsonl", "ndjson"):
            raise UsageError("unknown kind of URL list", where=str(path), hint="use .parquet, .csv, .tsv or .jsonl")
        require_regular(path)
        if kind in ("jsonl", "ndjson"):
            yield from _json_columns(path, wanted, broken)
            return
        if kind == "parquet":
            reader: Any = pq.ParquetFile(path)
            schema = reader.schema_arrow
        else:
            reader = _open_csv(path, wanted, broken, tabs=kind == "tsv")
            schema = reader.schema
        with reader:
            _require_columns(path, wanted, schema.names)
            _require_text(path, wanted, schema)
            batches = reader.iter_batches(BATCH, columns=wanted) if kind == "parquet" else reader
            for batch in batches:
                yield _values(batch.column(wanted[0])), _values(batch.column(wanted[1]))


def _require_columns(path: Path, wanted: list[str], names: list[str]) -> None:
    hint = "set url_column and caption_column in the card's source"
    if missing := [name for name in wanted if name not in names]:
        what = f"the URL list has no column {' and no column '.join(missing)}; it has: {', '.join(names)}"
        raise UsageError(what, where=str(path), hint=hint)
    if several := [name for name in wanted if names.count(name) > 1]:
        what = f"the URL list has {names.count(several[0])} columns {several[0]}"
        raise UsageError(what, where=str(path), hint="rename the ones that are not meant")


def _require_text(path: Path, wanted: list[str], schema: pa.Schema) -> None:
    """Text, bytes, numbers and nulls can be read as text; times, lists and the like are never URLs or captions."""
    for name in wanted:
        kind = schema.field(name).type
        if pa.types.is_nested(kind) or pa.types.is_temporal(kind):
            what = f"the URL list's column {name} holds {kind}, not text"
            raise UsageError(what, where=str(path), hint="set url_column and caption_column in the card's source")


def _values(column: pa.Array) -> list[Any]:
    """The values of a column, text as bytes: a Parquet file may hold any bytes as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    return column.to_pylist()


def _json_columns(path: Path, wanted: list[str], broken: list[Reject]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Line by line: Arrow's reader gives up a whole file over one damaged line."""
    known = False
    with io.BufferedReader(pa.input_stream(str(path))) as file:  # type: ignore[arg-type]  # unpacks .gz
        numbered = _lines(file)
        while block := list(islice(numbered, BATCH)):
            rows = []
            for number, line in block:
                if (row := _json_row(line)) is not None:
                    rows.append(row)
                elif line.strip():
                    text = line[:1000].decode("utf-8", "replace")
                    broken.append(Reject("", f"line {number}", "malformed_row", caption=text))
            if rows and not known:
                _require_columns(path, wanted, list(dict.fromkeys(name for row in rows for name in row)))
                known = True
            yield [row.get(wanted[0]) for row in rows], [row.get(wanted[1]) for row in rows]


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1. Of one beyond the limit only the start is kept, which is no JSON object."""
    number = 0
    while line := file.readline(LINE_LIMIT):
        number += 1
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        while len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            line = file.readline(LINE_LIMIT)


def _json_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _open_csv(path: Path, wanted: list[str], broken: list[Reject], *, tabs: bool) -> Any:
    def set_aside(row: Any) -> str:
        broken.append(Reject("", f"line {row.number}", "malformed_row", caption=str(row.text)[:1000]))
        return "skip"

    # Quotes mean nothing in the TSV files of the field (CC3M, CC12M): captions hold single ones.
    parsing: dict[str, Any] = {"delimiter": "\t", "quote_char": False} if tabs else {"newlines_in_values": True}
    return pyarrow.csv.open_csv(
        pa.input_stream(str(path)),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=set_aside, **parsing),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.binary()), strings_can_be_null=False, check_utf8=False
        ),
    )


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value).encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which no file can


def _row(number: int, url: str, caption: str) -> UrlRow | Reject:
    url = url.strip()
    fault = _fault(url, caption)
    return UrlRow(number, url, caption) if fault is None else Reject("", f"row {number}", fault, url, caption)


def _fault(url: str, caption: str) -> str | None:
    if not url:
        return "empty_url"
    if not url[:8].lower().startswith(("http://", "https://")):
        return "not_http"
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or _CONTROL.search(url):
        return "malformed_url"
    return None if caption.strip() else "no_caption"
