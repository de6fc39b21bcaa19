"""A list of URLs and captions: its rows in order, what cannot be fetched set aside with a reason. For download.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ..errors import EclipseError, UsageError
from .rejected import Reject

BATCH = 65_536
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
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                hint = "the card's source.urls names it, relative to the workspace"
                raise UsageError(f"cannot read the URL list: {error.strerror}", where=str(path), hint=hint) from error
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
            except pa.ArrowInvalid as error:
                raise EclipseError(f"cannot read the URL list: {error}", where=f"{path}, near row {number}") from error
            except OSError as error:
                raise UsageError(f"cannot read the URL list: {error.strerror or error}", where=str(path)) from error
            yield from broken

    def _columns(self, path: Path, broken: list[Reject]) -> Iterator[tuple[list[Any], list[Any]]]:
        wanted = [self.url_column, self.caption_column]
        reader = _open(path, wanted, broken)
        names = reader.schema_arrow.names if isinstance(reader, pq.ParquetFile) else reader.schema.names
        if missing := [name for name in wanted if name not in names]:
            raise UsageError(
                f"the URL list has no column {' and no column '.join(missing)}; it has: {', '.join(names)}",
                where=str(path),
                hint="set url_column and caption_column in the card's source",
            )
        with reader:
            batches = reader.iter_batches(BATCH, columns=wanted) if isinstance(reader, pq.ParquetFile) else reader
            for batch in batches:
                yield batch.column(wanted[0]).to_pylist(), batch.column(wanted[1]).to_pylist()


def _open(path: Path, wanted: list[str], broken: list[Reject]) -> Any:
    """A reader of record batches for the kind of file that the name tells."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        return pq.ParquetFile(path)
    if kind in ("csv", "tsv"):
        return _open_csv(path, wanted, broken, tabs=kind == "tsv")
    if kind in ("jsonl", "ndjson"):
        return pyarrow.json.open_json(pa.input_stream(str(path)))
    raise UsageError("unknown kind of URL list", where=str(path), hint="use .parquet, .csv, .tsv or .jsonl")


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


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


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
