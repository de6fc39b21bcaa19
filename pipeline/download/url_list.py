"""A list of URLs and captions: its rows in order, what cannot be fetched set aside with a reason. Used by stage.py."""

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
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from ..core.files import require_regular
from ..images.rejects import Reject

BATCH = 65_536
KINDS = ("parquet", "csv", "tsv", "jsonl", "ndjson")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
SNIFFED = 1 << 16
GARBLED_ROWS, GARBLED_SHARE = 100, 0.001  # of rows that are not UTF-8: beyond, the whole list is in another encoding
HASH = r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{128}"  # MD5, SHA-1, SHA-256, SHA-512
BLANK = "\0\u200b\u200c\u200d\u2060\ufeff"  # a caption of nothing but blanks and these shows nothing
LINE_LIMIT = 1 << 24  # bytes of a JSON line; a file without line ends may be larger than the memory
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class UrlRow:
    """A pair that can be fetched. number: of its row, from 0 through all files, rows set aside included.

    auth: user:password that stood in the URL, which is without; digest: published hash of the picture, in hex.
    """

    number: int
    url: str
    caption: str
    auth: str = ""
    digest: str = ""


@dataclass(frozen=True)
class UrlList:
    """One or more Parquet, CSV, TSV or JSONL files (the last three also .gz, .bz2, .zst, .lz4) with the same columns.

    quoting: whether a field may stand in double quotes (None: in CSV, not in TSV). encoding: of text files (None:
    UTF-8, or what a byte order mark says). hash_column: published hashes, which fetched pictures must have.
    """

    paths: tuple[Path, ...]
    url_column: str = "url"
    caption_column: str = "caption"
    hash_column: str | None = None
    quoting: bool | None = None
    encoding: str | None = None

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
        """Every pair in list order, cleaned, or its Reject; a row with a list of captions is several pairs.

        Raises UsageError for a missing file or column and for text in another encoding, EclipseError for damage.
        """
        number = garbled = 0
        for path in self.paths:
            broken: list[Reject] = []
            is_text = _kind(path) != "parquet"
            try:
                for columns in self._columns(path, broken):
                    for url, captions, digest in zip(*columns, strict=True):
                        # An empty list of captions is a row without one, and none of its captions is lost in silence.
                        for caption in (captions or [None]) if isinstance(captions, list) else [captions]:
                            row = _row(number, url, caption, digest, self.hash_column is not None)
                            garbled += is_text and isinstance(row, Reject) and row.reason == "bad_encoding"
                            yield row
                        number += 1
                    if garbled > max(GARBLED_ROWS, GARBLED_SHARE * number):
                        raise self._garbled(path)
                if garbled > GARBLED_SHARE * number:
                    raise self._garbled(path)
            except OSError as error:
                raise UsageError(f"cannot read the URL list: {_why(error)}", where=str(path)) from error
            except (pa.ArrowException, ValueError, KeyError) as error:
                raise EclipseError(
                    f"cannot read the URL list: {error}",
                    where=f"{path}, near row {number}",
                    hint="repair the file, or take it out of the card's source.urls",
                ) from error
            yield from broken

    def remarks(self) -> Iterator[str]:
        """What people should know of the lists: TSV fields that look quoted while quotes mean nothing."""
        for path in self.paths:
            if _kind(path) != "tsv" or self.quoting:
                continue
            with _text(path, self.encoding) as file:
                lines = file.read(SNIFFED).split(b"\n")[1:-1]
            quoted = sum(any(len(f) > 1 and f[:1] == f[-1:] == b'"' for f in line.split(b"\t")) for line in lines)
            if quoted > max(2, len(lines) // 20):
                yield (
                    f"{path.name}: {quoted} of its first {len(lines)} rows have fields in double quotes, which will"
                    " stay in the captions; source.quoting: true takes them off"
                )

    def _garbled(self, path: Path) -> UsageError:
        from charset_normalizer import from_bytes

        with _text(path, self.encoding) as file:
            guess = from_bytes(file.read(SNIFFED)).best()
        name = guess.encoding if guess else "cp1252"
        return UsageError(
            "the URL list is not UTF-8, and reading it as such would lose characters",
            where=str(path),
            hint=f"name its encoding in the card: source.encoding: {name}{', which it looks like' if guess else ''}",
        )

    def _columns(self, path: Path, broken: list[Reject]) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
        """Blocks of URLs, captions and hashes, read as the kind of file that the name tells; adds to `broken`."""
        wanted = [self.url_column, self.caption_column, *([self.hash_column] if self.hash_column else [])]
        kind = _kind(path)
        require_regular(path)
        if kind in ("jsonl", "ndjson"):
            yield from _json_columns(path, wanted, broken, self.encoding)
            return
        if kind == "parquet":
            reader: Any = pq.ParquetFile(path)
            schema = reader.schema_arrow
        else:
            quoting = kind == "csv" if self.quoting is None else self.quoting
            reader = _open_csv(path, wanted, broken, tabs=kind == "tsv", quoting=quoting, encoding=self.encoding)
            schema = reader.schema
        with reader:
            _require_columns(path, wanted, schema.names)
            _require_text(path, wanted, schema, self.caption_column)
            batches = reader.iter_batches(BATCH, columns=wanted) if kind == "parquet" else reader
            for batch in batches:
                columns = [_values(batch.column(name)) for name in wanted]
                yield columns[0], columns[1], columns[2] if self.hash_column else [None] * len(columns[0])


def _kind(path: Path) -> str:
    """parquet, csv, tsv, jsonl or ndjson, by the file's name."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    kind = name.rpartition(".")[2]
    if kind not in KINDS or (kind == "parquet" and not path.name.lower().endswith("parquet")):
        hint = f"use .parquet, or .csv, .tsv or .jsonl, which may be compressed ({', '.join(COMPRESSED)})"
        raise UsageError("unknown kind of URL list", where=str(path), hint=hint)
    return kind


def _text(path: Path, encoding: str | None) -> Any:
    """A text file's bytes, unpacked by its name and brought to UTF-8 where another encoding is named or marked."""
    if encoding is None:
        with pa.input_stream(str(path)) as start:
            head = start.read(4)
        utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "utf-16" if utf16 and head != codecs.BOM_UTF32_LE else None
    stream = pa.input_stream(str(path))
    return stream if encoding is None else pa.transcoding_input_stream(stream, encoding, "utf-8")


def column_names(path: Path) -> list[str]:
    """The columns of a list; of JSON lines those of the first. Raises UsageError, EclipseError."""
    kind = _kind(path)
    try:
        if kind == "parquet":
            return pq.read_schema(path).names
        if kind in ("jsonl", "ndjson"):
            with io.BufferedReader(_text(path, None)) as file:  # type: ignore[arg-type]
                first = next((row for _, line in _lines(file) if (row := _json_row(line)) is not None), {})
            return [str(name) for name in first]
        with _open_csv(path, [], [], tabs=kind == "tsv", quoting=kind == "csv", encoding=None) as reader:
            return list(reader.schema.names)
    except OSError as error:
        raise UsageError(f"cannot read the list: {_why(error)}", where=str(path)) from error
    except (pa.ArrowException, ValueError) as error:
        raise EclipseError(f"cannot read the list: {error}", where=str(path)) from error


def _require_columns(path: Path, wanted: list[str], names: list[str]) -> None:
    hint = "set url_column and caption_column in the card's source"
    if missing := [name for name in wanted if name not in names]:
        what = f"the URL list has no column {' and no column '.join(missing)}; it has: {', '.join(names)}"
        raise UsageError(what, where=str(path), hint=hint)
    if several := [name for name in wanted if names.count(name) > 1]:
        what = f"the URL list has {names.count(several[0])} columns {several[0]}"
        raise UsageError(what, where=str(path), hint="rename the ones that are not meant")


def _require_text(path: Path, wanted: list[str], schema: pa.Schema, captions: str) -> None:
    """Text, bytes, numbers and nulls can be read as text, and lists of texts as captions; times and such cannot."""
    for name in wanted:
        kind = schema.field(name).type
        if name == captions and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            kind = (
                kind.value_type
                if pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
                else kind
            )
        if pa.types.is_nested(kind) or pa.types.is_temporal(kind):
            what = f"the URL list's column {name} holds {kind}, not text"
            raise UsageError(what, where=str(path), hint="set url_column and caption_column in the card's source")


def _values(column: pa.Array) -> list[Any]:
    """The values of a column, text as bytes: a Parquet file may hold any bytes as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = _values(column.flatten())
        ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy())
        return [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    return column.to_pylist()


def _json_columns(
    path: Path, wanted: list[str], broken: list[Reject], encoding: str | None
) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """Line by line: Arrow's reader gives up a whole file over one damaged line."""
    known = False
    with io.BufferedReader(_text(path, encoding)) as file:  # type: ignore[arg-type]
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
            columns = [[row.get(name) for row in rows] for name in wanted]
            yield columns[0], columns[1], columns[2] if len(wanted) > 2 else [None] * len(rows)


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
        row = json.loads(line.decode("utf-8", "surrogateescape"))  # stray bytes are for _row to find
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _open_csv(
    path: Path, wanted: list[str], broken: list[Reject], *, tabs: bool, quoting: bool, encoding: str | None
) -> Any:
    def set_aside(row: Any) -> str:
        broken.append(Reject("", f"line {row.number}", "malformed_row", caption=str(row.text)[:1000]))
        return "skip"

    # Quotes mean nothing in the TSV files of the field (CC3M, CC12M), whose captions hold single ones.
    parsing: dict[str, Any] = {"newlines_in_values": True} if quoting else {"quote_char": False}
    if tabs:
        parsing["delimiter"] = "\t"
    return pyarrow.csv.open_csv(
        _text(path, encoding),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=set_aside, **parsing),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.binary()), strings_can_be_null=False, check_utf8=False
        ),
    )


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _decoded(value: Any) -> str | None:
    """A value as text; None if it is not UTF-8, which nothing here replaces in silence."""
    if value is None:
        return ""
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        if text.isascii():
            return text
        # JSON may hold lone surrogates (\\ud800), which no file can; stray bytes come as \\udc80 to \\udcff.
        if any("\udc80" <= char <= "\udcff" for char in text):
            return None
        return text.encode("utf-8", "replace").decode()
    except UnicodeDecodeError:
        return None


def _row(number: int, raw_url: Any, raw_caption: Any, raw_digest: Any, hashed: bool) -> UrlRow | Reject:
    url, caption, digest = _decoded(raw_url), _decoded(raw_caption), (_decoded(raw_digest) or "").strip().lower()
    key = f"row {number}"
    if url is None or caption is None:
        shown = [
            raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw) for raw in (raw_url, raw_caption)
        ]
        return Reject("", key, "bad_encoding", *(text.encode("utf-8", "replace").decode() for text in shown))
    url, auth = _without_credentials(url.strip())
    fault = _fault(url, caption)
    if fault is None and hashed and not re.fullmatch(HASH, digest):
        fault = "no_hash"
    return UrlRow(number, url, caption, auth, digest) if fault is None else Reject("", key, fault, url, caption)


def _without_credentials(url: str) -> tuple[str, str]:
    """The URL without user:password@, and these, unquoted: they are for the server alone, and for no file or report."""
    scheme, slashes, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    if not slashes or "@" not in place:
        return url, ""
    auth, _, host = place.rpartition("@")
    return f"{scheme}://{host}{slash}{path}", unquote(auth)


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
    return "no_caption" if all(char.isspace() or char in BLANK for char in caption) else None
