"""rejected.parquet: every input that got no row, with its reason. Written by download.py and embed.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..core.card import STAGES
from ..core.errors import EclipseError
from ..core.files import atomic_path, require_regular

if TYPE_CHECKING:
    from ..core.workspace import Workspace

BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Reject:
    """One input set aside. reason is a code that can be counted (`http_404`, `unreadable`, …), without particulars.

    shard: name of the image shard (`00003`), empty if the input never reached one; key: the sample's key, or
    `row 17` of the URL list where there is no key yet.
    """

    shard: str
    key: str
    reason: str
    url: str = ""
    caption: str = ""


_COLUMNS = tuple(field.name for field in fields(Reject))
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("stage", *_COLUMNS)])


def write_rejected(ws: Workspace, stage: str, rows: Iterable[Reject]) -> dict[str, int]:
    """Replace the rows of `stage` in rejected.parquet, whole or not at all; return the number of rows by reason.

    Rows of later stages go too: what they were computed from has changed.
    """
    counts: dict[str, int] = {}
    if ws.rejected.is_dir():
        raise _unreadable(ws, IsADirectoryError("it is a directory"))
    with atomic_path(ws.rejected) as temporary, _writer(temporary) as writer:
        for batch in rejected_of(ws, STAGES[: STAGES.index(stage)]):
            writer.write_table(batch)
        iterator = iter(rows)
        while block := list(islice(iterator, BATCH)):
            arrays = [pa.array([_text(getattr(reject, name)) for reject in block], pa.string()) for name in _COLUMNS]
            writer.write_table(pa.table([pa.array([stage] * len(block)), *arrays], SCHEMA))
            for reject in block:
                counts[reject.reason] = counts.get(reject.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_rejected(ws: Workspace, stage: str | None = None) -> pa.Table:
    """The rows of rejected.parquet (of one stage); an empty table if there is no such file yet."""
    if not ws.rejected.exists():
        return SCHEMA.empty_table()
    try:
        require_regular(ws.rejected)
        table = pq.read_table(ws.rejected, columns=SCHEMA.names, page_checksum_verification=True).cast(SCHEMA)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise _unreadable(ws, error) from error
    return table if stage is None else table.filter(pc.field("stage") == stage)


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True)


def rejected_of(ws: Workspace, stages: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of these stages in rejected.parquet, in blocks; none if there is no such file yet."""
    if not stages or not ws.rejected.exists():
        return
    try:
        require_regular(ws.rejected)
        with pq.ParquetFile(ws.rejected, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH, columns=SCHEMA.names):
                table = pa.Table.from_batches([batch])
                table = table.filter(pc.field("stage").isin(pa.array(stages)))
                if len(table):
                    yield table.cast(SCHEMA)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise _unreadable(ws, error) from error


def _unreadable(ws: Workspace, error: Exception) -> EclipseError:
    return EclipseError(
        f"the list of rejects is unreadable: {error}",
        where=str(ws.rejected),
        hint="move it away, and run `eclipse download --overwrite` if you need the rejects of the download again",
    )


def _text(value: str) -> str:
    """Names and captions from elsewhere may hold lone surrogates, which no UTF-8 file can."""
    return value.encode("utf-8", "replace").decode()
