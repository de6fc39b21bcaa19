"""Which shards a workspace's pictures lie in, by the kind of its source. Used by every stage that reads pictures.

What `download` fetched lies in images/. Other sources are read where they are, and never changed: logs/shards.json
numbers their shards, so that a part keeps its shard when more of them appear.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import EclipseError, UsageError
from ..core.files import atomic_path, write_json
from ..core.source import PLACES, ClipRetrievalSource, FetchedSource, FolderSource, TableSource, WebdatasetSource
from .folder import FolderShard, list_folder, write_listing
from .shards import ImageShard, TarShard, numbered_shards
from .table import TableShard, table_files, table_rows
from .tar import is_remote
from .vectors import VectorShard, find_vectors

if TYPE_CHECKING:
    from ..core.source import Source
    from ..core.workspace import Workspace

MOST_SHARDS = 1_000_000
Entry = dict[str, Any]  # of logs/shards.json: what identifies a shard of its kind


def shards_of(ws: Workspace) -> dict[int, ImageShard]:
    """Number → shard, in order. Raises EclipseError; UsageError if the source was never looked at."""
    source = ws.card.source
    if isinstance(source, FetchedSource):
        return {number: TarShard(path) for number, path in numbered_shards(ws.images).items()}
    entries = _noted(ws)
    return {number: _shard(ws, source, entry) for number, entry in enumerate(entries)}


def look(ws: Workspace) -> int:
    """Look through a source that is not fetched, and number the shards that are new; returns how many these are.

    Raises UsageError where nothing is found, or what the card names is not there.
    """
    source = ws.card.source
    if isinstance(source, FetchedSource):
        return 0
    known = _noted(ws)
    new = list(LISTERS[source.kind](ws, source, known))
    if not known and not new:
        raise UsageError("no pictures were found", where=_place(source), hint="see the card's source section")
    if new:
        write_json(_manifest(ws), {"kind": source.kind, "shards": [*known, *new]})
    return len(new)


def forget(ws: Workspace) -> None:
    """Number everything anew at the next look."""
    _manifest(ws).unlink(missing_ok=True)


def _manifest(ws: Workspace) -> Path:
    return ws.logs / "shards.json"


def _noted(ws: Workspace) -> list[Entry]:
    try:
        record = json.loads(_manifest(ws).read_text())
        if record["kind"] != ws.card.source.kind:
            return []
        return [dict(entry) for entry in record["shards"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "remove it: the next `eclipse embed --overwrite` makes it anew"
        raise EclipseError("unreadable record of the shards", where=str(_manifest(ws)), hint=hint) from error


def _shard(ws: Workspace, source: Source, entry: Entry) -> ImageShard:
    if isinstance(source, WebdatasetSource):
        return TarShard(entry["address"], source.caption_key)
    if isinstance(source, FolderSource):
        return FolderShard(source.path(ws.root), ws.root / entry["listing"])
    if isinstance(source, ClipRetrievalSource):
        image, text = ((Path(a[0]), a[1]) if (a := entry[name]) else None for name in ("image", "text"))
        assert image is not None
        rows = (Path(entry["metadata"]), entry["start"], entry["stop"])
        return VectorShard(image, text, *rows, source.caption_column, source.image_norm, source.pictures_path(ws.root))
    assert isinstance(source, TableSource)
    columns = (source.image_column, source.caption_column)
    return TableShard(ws.root / entry["path"], entry["start"], entry["stop"], *columns)


def _place(source: Source) -> str:
    named = next(getattr(source, place) for place in PLACES if hasattr(source, place))
    return ", ".join([named] if isinstance(named, str) else named)


def _new_tars(ws: Workspace, source: WebdatasetSource, known: list[Entry]) -> Iterator[Entry]:
    """Tars that are not numbered yet, in the order of the card and of their names."""
    addresses = {entry["address"] for entry in known}
    for named in source.addresses(ws.root):
        for address in _expanded(named):
            if address not in addresses:
                addresses.add(address)
                yield {"address": address}


def _expanded(named: str) -> list[str]:
    """The tars behind a path or URL with braces ({00000..01242}), wildcards, or of a folder."""
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        plain = list(islice(braceexpand(named), MOST_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise UsageError(f"braces that do not match: {error}", where=named) from None
    if len(plain) > MOST_SHARDS:
        raise UsageError(f"more than {MOST_SHARDS:,} shards", where=named, hint="name fewer in source.shards")
    found: list[str] = []
    for address in plain:
        if not is_remote(address) and Path(address).is_dir():
            found += sorted(map(str, Path(address).glob("*.tar")))
        elif any(letter in address for letter in "*?["):
            found += _globbed(address)
        elif is_remote(address) or Path(address).is_file():
            found.append(address)
        elif len(plain) == 1:
            raise UsageError("no such file or folder", where=address, hint="the card's source.shards names it")
    return found


def _globbed(address: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        found = sorted(str(name) for name in system.glob(path))
        return [system.unstrip_protocol(name) if is_remote(address) else name for name in found]
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"cannot look for shards: {error}", where=address) from error


def _new_files(ws: Workspace, source: FolderSource, known: list[Entry]) -> Iterator[Entry]:
    """Pictures that are in no shard yet, `rows_per_shard` at a time, each shard's listed in a file of its own."""
    folder = source.path(ws.root)
    listed = {path for entry in known for path, _ in FolderShard(folder, ws.root / entry["listing"]).entries()}
    fresh = iter([entry for entry in list_folder(folder, source.caption_column) if entry[0] not in listed])
    number = len(known)
    while block := list(islice(fresh, source.rows_per_shard)):
        listing = ws.logs / "folder" / f"{number:05d}.parquet"
        with atomic_path(listing) as temporary:
            write_listing(temporary, block)
        yield {"listing": str(listing.relative_to(ws.root))}
        number += 1


def _new_rows(ws: Workspace, source: TableSource, known: list[Entry]) -> Iterator[Entry]:
    """Rows of tables that are in no shard yet, `rows_per_shard` at a time."""
    ends: dict[str, int] = {}
    for entry in known:
        ends[entry["path"]] = max(ends.get(entry["path"], 0), entry["stop"])
    for place in source.paths(ws.root):
        for path in table_files(place):
            rows = table_rows(path, source.image_column, source.caption_column)
            for start in range(ends.get(str(path), 0), rows, source.rows_per_shard):
                yield {"path": str(path), "start": start, "stop": min(start + source.rows_per_shard, rows)}


def _new_vectors(ws: Workspace, source: ClipRetrievalSource, known: list[Entry]) -> Iterator[Entry]:
    """Rows of embeddings that are in no shard yet, `rows_per_shard` at a time."""
    ends: dict[str, int] = {}
    for entry in known:
        ends[entry["metadata"]] = max(ends.get(entry["metadata"], 0), entry["stop"])
    for cache, rows in find_vectors(source.path(ws.root), source.arrays, source.caption_column):
        for start in range(ends.get(cache["metadata"], 0), rows, source.rows_per_shard):
            yield {**cache, "start": start, "stop": min(start + source.rows_per_shard, rows)}


LISTERS: dict[str, Callable[[Workspace, Any, list[Entry]], Iterator[Entry]]] = {
    "webdataset": _new_tars,
    "folder": _new_files,
    "table": _new_rows,
    "clip-retrieval": _new_vectors,
}
