"""The embedding cache as every other stage reads it: all parts as one table of rows, memory-mapped and never copied.

Rows are numbered through all parts in the order of their part numbers. Arrays of rows go in, arrays of values come
out; nothing is read from disk but the rows asked for. Safe to use from several threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..core.errors import EclipseError
from ..core.files import require_regular
from .parquet_map import find_page, map_file, page_is_intact, page_values, will_need
from .part import REEMBED, THUMBNAIL_BYTES, Part, PartMeta, PartWriter, part_name, part_schema, read_part

if TYPE_CHECKING:
    import polars

    from ..core.progress import Progress

__all__ = ["PartMeta", "PartWriter", "Store", "part_name", "read_selection", "scan"]

REFILTER = "run `eclipse filter --overwrite`"
COMPARED_GROUPS = 8  # row groups of a selection whose uids are compared: all, up to some eight million rows


class Store:
    """All parts of one cache. Made by `Store.open`.

    meta: what all parts agree on; parts: in row order; offsets: (parts + 1,) int64, the first row of each part.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.meta = self.parts[0].meta
        self.offsets = np.cumsum([0, *(part.rows for part in self.parts)], dtype=np.int64)
        # A segment is one row group: the unit in which values lie next to each other.
        self._segments = [(p, group) for p, part in enumerate(self.parts) for group in part.groups]
        self._first = np.cumsum([0, *(group.rows for _, group in self._segments)], dtype=np.int64)
        self._mapped: list[np.ndarray | None] = [None] * len(self.parts)
        self._views: dict[tuple[str, int], np.ndarray] = {}
        self._token_bounds: np.ndarray | None = None

    @classmethod
    def open(cls, paths: Path | str | Sequence[Path], *, encoder: str | None = None) -> Store:
        """Open the parts of a directory, or the named files. Reads footers only; maps nothing yet.

        encoder: the fingerprint that every part must have. Raises EclipseError, naming the file, if there is no part,
        or one is truncated, foreign, misnamed, or from another encoder or card than the others.
        """
        if isinstance(paths, (str, Path)):
            named = Path(paths)
            paths = [named] if named.exists() and not named.is_dir() else sorted(named.glob("part-*.parquet"))
            if not paths:
                raise EclipseError("no embedding parts", where=str(named), hint="run `eclipse embed` first")
        parts = sorted((read_part(path) for path in paths), key=lambda part: part.number)
        _require_agreement(parts, encoder)
        return cls(parts)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def embedding_dim(self) -> int:
        """D, the width of image and text embeddings."""
        return self.meta.embedding_dim

    @property
    def text_width(self) -> int:
        """W, the width of token states."""
        return self.meta.text_width

    @property
    def has_text_states(self) -> bool:
        """Whether token states were stored; if not, they have to be recomputed from the captions."""
        return self.meta.text_states

    def part_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) rows → (n,) part numbers and (n,) rows within those parts, as selection.parquet addresses them."""
        rows = self._checked(rows)
        index = np.searchsorted(self.offsets, rows, side="right") - 1
        numbers = np.array([part.number for part in self.parts])
        return numbers[index], rows - self.offsets[index]

    def rows_of(self, part_numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The inverse of `part_of`: (n,) int64 rows. Raises EclipseError for a part or a row that does not exist."""
        part_numbers, rows = np.asarray(part_numbers), np.asarray(rows, dtype=np.int64)
        numbers = np.array([part.number for part in self.parts])
        index = np.minimum(np.searchsorted(numbers, part_numbers), len(numbers) - 1)
        if (missing := numbers[index] != part_numbers).any():
            name = part_name(int(part_numbers[missing][0]))
            raise EclipseError(f"there is no {name}", where=str(self.parts[0].path.parent))
        if (outside := (rows < 0) | (rows >= np.diff(self.offsets)[index])).any():
            part = self.parts[int(index[outside][0])]
            raise EclipseError(f"{part.rows} rows, but row {int(rows[outside][0])} is asked for", where=str(part.path))
        return self.offsets[index] + rows

    def image_embeddings(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n,) rows → (n, D) float16, raw CLIP outputs; written to `out` if given, which must be contiguous."""
        return self._gather("image_embedding", rows, self.embedding_dim, np.float16, out)

    def text_embeddings(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n,) rows → (n, D) float16, raw CLIP outputs; written to `out` if given, which must be contiguous."""
        return self._gather("text_embedding", rows, self.embedding_dim, np.float16, out)

    def thumbnails(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows → (n, 256) uint8, 16×16 grey levels."""
        return self._gather("thumbnail", rows, THUMBNAIL_BYTES, np.uint8, None)

    def token_counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Real tokens of each caption, start and end included: (n,) int32; all rows if none are named."""
        if rows is None:
            rows = np.arange(len(self))
        return self._gather("n_tokens", rows, 1, np.int32, None).reshape(-1)

    def token_states(self, rows: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(n,) rows → states (N, W) float16, captions end to end, and offsets (n + 1,) int64 into them.

        out: contiguous (≥ N, W) float16 to write to; the states returned are its first N rows.
        """
        rows = self._checked(rows)
        if not self.has_text_states:
            raise EclipseError("this cache has no token states", where=str(self.parts[0].path))
        starts, counts = self._token_spans(rows)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        total, width = int(offsets[-1]), self.text_width
        out = np.empty((total, width), np.float16) if out is None else out[:total]
        if out.shape != (total, width) or out.dtype != np.float16 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous float16 with at least {total} rows of {width}")
        tokens = np.repeat(starts - offsets[:-1], counts) + np.arange(total)
        target = out.view(np.uint8)
        order = _ascending_order(rows)
        if order is None:
            self._take_tokens(rows, offsets, tokens, target)
        else:  # gather in file order, then put captions where they belong
            sorted_offsets = np.concatenate([[0], np.cumsum(counts[order])])
            to_sorted = np.repeat(offsets[:-1][order] - sorted_offsets[:-1], counts[order]) + np.arange(total)
            gathered = np.empty_like(target)
            self._take_tokens(rows[order], sorted_offsets, tokens[to_sorted], gathered)
            back = np.empty(total, np.int64)
            back[to_sorted] = np.arange(total)
            gathered.take(back, axis=0, out=target, mode="clip")
        return out, offsets

    def column(self, name: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
        """Any column as Arrow values, all rows or the (n,) named ones in their order. Reads the column of each part."""
        if name not in part_schema(self.meta).names:
            raise EclipseError(f"no column {name}", where=str(self.parts[0].path))
        kind = part_schema(self.meta).field(name).type
        if rows is None:
            chunks = [chunk for part in self.parts for chunk in _read_column(part, name).chunks]
            return pa.chunked_array(chunks, type=kind)
        rows = self._checked(rows)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], self.offsets)
        chunks = [
            _read_column(self.parts[p], name).take(pa.array(rows[order][cuts[p] : cuts[p + 1]] - self.offsets[p]))
            for p in np.flatnonzero(np.diff(cuts)).tolist()
        ]
        gathered = pa.chunked_array([chunk for part in chunks for chunk in part.chunks], type=kind)
        return gathered.take(pa.array(np.argsort(order)))

    def will_need(self, rows: np.ndarray) -> None:
        """Have the kernel read embeddings and token states of (n,) rows ahead; returns before they are read.

        A disk serves many requests at once far faster than one after the other, which is how gathering would ask.
        """
        rows = np.unique(self._checked(rows))
        for segment, a, b in self._runs(rows):
            local = rows[a:b] - self._first[segment]
            breaks = np.flatnonzero(np.diff(local) > 1)
            first, end = local[np.r_[0, breaks + 1]], local[np.r_[breaks, -1]] + 1
            for name in ("image_embedding", "text_embedding"):
                will_need(self._view(name, segment), first, end)
            if self.has_text_states:
                bounds = self._bounds()[self._first[segment] + segment :]
                will_need(self._view("text_states", segment), *(bounds[i].astype(np.int64) for i in (first, end)))

    def verify(
        self,
        progress: Progress | None = None,
        *,
        columns: Collection[str] | None = None,
        share: tuple[int, int] = (0, 1),
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Recompute the checksum of every page. Raises EclipseError that names each damaged file, column and its rows.

        columns: of these alone. share: (r, w) takes the r-th of w shares of the parts, so that w processes share the
        work. stopped: asked between pages; once true, the rest is left.
        """
        from ..core.progress import Progress

        parts, damaged = self.parts[share[0] :: share[1]], []
        with (progress or Progress(quiet=True)).task("verify", len(parts), "parts") as task:
            for part in parts:
                found = list(_damaged_pages(part, columns, stopped))
                damaged += [f"{part.path} ({'; '.join(found)})"] if found else []
                task.advance(failures=bool(found))
        if damaged:
            raise EclipseError("checksums do not match", where="\n  ".join(damaged), hint=REEMBED)

    def page_bytes(self, columns: Collection[str]) -> int:
        """How many bytes the pages of these columns take."""
        return sum(group.chunks[name].size for _, group in self._segments for name in columns if name in group.chunks)

    # What follows works on segments: row groups, numbered through all parts.

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        """`rows` as int64. Raises IndexError for rows that do not exist: taking with mode="clip" would hide them."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1:
            raise IndexError(f"rows must have one dimension, not {rows.ndim}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} are not all within 0..{len(self) - 1}")
        return rows

    def _gather(self, name: str, rows: np.ndarray, width: int, dtype: type, out: np.ndarray | None) -> np.ndarray:
        """Rows of a column of fixed width, copied as bytes: in the file they start at any, even odd, address."""
        rows = self._checked(rows)
        out = np.empty((len(rows), width), dtype) if out is None else out
        if out.shape != (len(rows), width) or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous {np.dtype(dtype)} of shape {(len(rows), width)}")
        target = out.view(np.uint8)
        order = _ascending_order(rows) if len(self._segments) > 1 else None
        if order is None:
            self._take(name, rows, target)
        else:  # gather in file order, then put rows where they belong
            gathered = np.empty_like(target)
            self._take(name, rows[order], gathered)
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            gathered.take(back, axis=0, out=target, mode="clip")
        return out

    def _take(self, name: str, rows: np.ndarray, target: np.ndarray) -> None:
        for segment, a, b in self._runs(rows):
            local = rows[a:b] - self._first[segment]
            self._view(name, segment).take(local, axis=0, out=target[a:b], mode="clip")

    def _take_tokens(self, rows: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, target: np.ndarray) -> None:
        for segment, a, b in self._runs(rows):
            span = slice(int(offsets[a]), int(offsets[b]))
            self._view("text_states", segment).take(tokens[span], axis=0, out=target[span], mode="clip")

    def _runs(self, rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Rows within one segment: (segment, a, b) for rows[a:b]. One segment, or ascending rows."""
        if len(self._segments) == 1:
            yield 0, 0, len(rows)
            return
        cuts = np.searchsorted(rows, self._first)
        filled = np.flatnonzero(np.diff(cuts))
        yield from zip(filled.tolist(), cuts[filled].tolist(), cuts[filled + 1].tolist(), strict=True)

    def _view(self, name: str, segment: int) -> np.ndarray:
        """A column of a segment as (rows, bytes per row) uint8; of text_states (tokens, bytes per token)."""
        view = self._views.get((name, segment))
        return self._make_view(name, segment) if view is None else view

    def _make_view(self, name: str, segment: int) -> np.ndarray:
        index, group = self._segments[segment]
        chunk = group.chunks[name]
        # Parquet stores an int16 in four bytes.
        widths = {"thumbnail": THUMBNAIL_BYTES, "n_tokens": 4, "text_states": 2 * self.text_width}
        rows = chunk.values // self.text_width if name == "text_states" else group.rows
        try:
            view = page_values(self._map(index), chunk, rows, widths.get(name, 2 * self.embedding_dim))
        except ValueError as error:
            raise EclipseError(f"column {name}: {error}", where=str(self.parts[index].path), hint=REEMBED) from error
        self._views[name, segment] = view
        return view

    def _map(self, index: int) -> np.ndarray:
        mapped = self._mapped[index]
        if mapped is None:
            path = self.parts[index].path
            try:
                mapped = self._mapped[index] = map_file(path)
            except OSError as error:
                raise EclipseError(f"cannot map this part: {error.strerror}", where=str(path)) from error
        return mapped

    def _token_spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token within its segment, and number of tokens, of each row: both (n,) int64."""
        bounds = self._bounds()
        at = rows + np.searchsorted(self._first, rows, side="right") - 1
        starts = bounds[at].astype(np.int64)
        return starts, bounds[at + 1] - starts

    def _bounds(self) -> np.ndarray:
        """Where captions begin and end in their segment's tokens: uint32, one more entry than rows in each segment.

        Read once, when first used: 4 bytes per row.
        """
        if self._token_bounds is None:
            bounds = map(self._segment_bounds, range(len(self._segments)))
            self._token_bounds = np.concatenate([np.zeros(0, np.uint32), *bounds])
        return self._token_bounds

    def _segment_bounds(self, segment: int) -> np.ndarray:
        index, group = self._segments[segment]
        counts = np.ascontiguousarray(self._view("n_tokens", segment)).view(np.int32).reshape(-1)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
        if int(bounds[-1]) * self.text_width != group.chunks["text_states"].values:
            where = str(self.parts[index].path)
            raise EclipseError("n_tokens and text_states do not agree", where=where, hint=REEMBED)
        return bounds


def scan(path: Path | str) -> polars.LazyFrame:
    """The parts of a directory, or one part, as a polars LazyFrame: embeddings as Array(Float16, D), lazily read."""
    import polars as pl

    path = Path(path)
    meta = Store.open(path).meta
    vector = pl.Array(pl.Float16, meta.embedding_dim)
    columns = pl.col("image_embedding", "text_embedding").bin.reinterpret(dtype=vector)
    return pl.scan_parquet(path / "part-*.parquet" if path.is_dir() else path).with_columns(
        columns, pl.col("thumbnail").bin.reinterpret(dtype=pl.Array(pl.UInt8, THUMBNAIL_BYTES))
    )


def read_selection(path: Path | str, store: Store) -> np.ndarray:
    """The rows of `store` that selection.parquet keeps, ascending: (n,) int64.

    Reads its columns part (number), row and keep; uid too, if it has one. Raises EclipseError if it does not judge
    every row of this very cache exactly once.
    """
    try:
        require_regular(Path(path))
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = _verdicts(file, path)
            rows = _rows_judged(table, path, store)
            _require_same_pairs(file, rows, path, store)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise EclipseError(f"no readable selection: {error}", where=str(path), hint=REFILTER) from error
    return np.sort(rows[table["keep"].to_numpy()])


def _verdicts(file: pq.ParquetFile, path: Path | str) -> pa.Table:
    """Columns part, row and keep of a selection, of their types and without nulls."""
    names = file.schema_arrow.names
    if missing := [name for name in ("part", "row", "keep") if names.count(name) != 1]:
        raise EclipseError(f"a selection needs one column {missing[0]}", where=str(path), hint=REFILTER)
    table = file.read(columns=["part", "row", "keep"])
    for name in ("part", "row", "keep"):
        column = table[name]
        fits = pa.types.is_boolean if name == "keep" else pa.types.is_integer
        if not fits(column.type) or column.null_count:
            found = f"{column.null_count} nulls" if fits(column.type) else str(column.type)
            wanted = "true or false" if name == "keep" else "a number"
            raise EclipseError(
                f"column {name} of the selection holds {found}: every row needs {wanted}",
                where=str(path),
                hint=REFILTER,
            )
    return table


def _rows_judged(table: pa.Table, path: Path | str, store: Store) -> np.ndarray:
    """The rows of `store` that a selection names, in its order: each once."""
    try:
        rows = store.rows_of(table["part"].to_numpy(), table["row"].to_numpy())
    except EclipseError as error:
        raise EclipseError(
            f"this selection is not of these embeddings: {error.what}", where=f"{path}; {error.where}", hint=REFILTER
        ) from error
    judged = np.bincount(rows, minlength=len(store))
    if (judged != 1).any():
        part, row = store.part_of(np.flatnonzero(judged != 1)[:1])
        times = int(judged[judged != 1][0])
        where = f"{path}, {part_name(int(part[0]))} row {int(row[0])}"
        raise EclipseError(f"a row is judged {times} times", where=where, hint=REFILTER)
    return rows


def _require_same_pairs(file: pq.ParquetFile, rows: np.ndarray, path: Path | str, store: Store) -> None:
    """Raise EclipseError if the selection's uids are not those of the rows; `COMPARED_GROUPS` of a large one."""
    if "uid" not in file.schema_arrow.names:
        return
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
    some = np.linspace(0, file.num_row_groups - 1, min(file.num_row_groups, COMPARED_GROUPS)).round().astype(int)
    for group in some.tolist():
        uids = file.read_row_group(group, columns=["uid"])["uid"].cast(pa.string())
        own = rows[starts[group] : starts[group + 1]]
        same = pc.call_function("equal", [uids, store.column("uid", own)]).fill_null(False).to_numpy()
        if not same.all():
            part, row = store.part_of(own[~same][:1])
            raise EclipseError(
                "this selection is not of these embeddings: it names other pairs",
                where=f"{path}, {part_name(int(part[0]))} row {int(row[0])}",
                hint=REFILTER,
            )


def _require_agreement(parts: Sequence[Part], encoder: str | None) -> None:
    """Name the part that differs from the encoder asked for, from most others, or repeats a number."""
    usual = asdict(Counter(part.meta for part in parts).most_common(1)[0][0])
    wanted = usual if encoder is None else {**usual, "encoder_fingerprint": encoder}
    for part in parts:
        if unlike := {k: v for k, v in asdict(part.meta).items() if v != wanted[k]}:
            differences = ", ".join(f"{key} {value!r} instead of {wanted[key]!r}" for key, value in unlike.items())
            raise EclipseError(f"this part does not belong here: {differences}", where=str(part.path), hint=REEMBED)
    for before, part in pairwise(parts):
        if before.number == part.number:
            raise EclipseError("the same part twice", where=f"{before.path}; {part.path}")


def _ascending_order(rows: np.ndarray) -> np.ndarray | None:
    """An order that sorts `rows`; None if they ascend already."""
    return None if bool((rows[1:] >= rows[:-1]).all()) else np.argsort(rows)


def _read_column(part: Part, name: str) -> pa.ChunkedArray:
    try:
        return pq.read_table(part.path, columns=[name], page_checksum_verification=True).column(0)
    except (OSError, pa.ArrowException) as error:
        raise EclipseError(f"column {name}: {error}", where=str(part.path), hint=REEMBED) from error


def _damaged_pages(part: Part, columns: Collection[str] | None, stopped: Callable[[], bool]) -> Iterator[str]:
    """`image_embedding, rows 0 to 499` for each page whose checksum, or header, is wrong."""
    try:
        mapped = map_file(part.path)
    except OSError as error:
        raise EclipseError(f"cannot map this part: {error.strerror}", where=str(part.path)) from error
    first = 0
    for group in part.groups:
        for name, chunk in group.chunks.items():
            if stopped():
                return
            if columns is not None and name not in columns:
                continue
            try:
                intact = page_is_intact(mapped, find_page(mapped, chunk))
            except ValueError:
                intact = False
            if not intact:
                yield f"{name}, rows {first} to {first + group.rows - 1}"
        first += group.rows
