"""A card for pictures that somebody has: looks at what lies there and says how it is read. Used by `eclipse init`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.card import Card
from ..core.errors import EclipseError, UsageError
from ..images.decode import EXTENSIONS
from ..images.folder import METADATA
from ..images.table import ENDINGS, table_files
from ..images.tar import is_remote
from .url_list import COMPRESSED, KINDS, column_names

URLS = ("url", "URL", "image_url", "link", "image_link", "photo_url")
CAPTIONS = ("caption", "captions", "text", "TEXT", "sentence", "sentences", "title", "alt_text", "prompt")
IMAGES = ("image", "img", "jpg", "png", "picture", "image_bytes", "bytes")
HASHES = ("sha256", "md5", "hash")
WILD = "*?[{"
LOOKED_AT = 10_000  # files of a folder until it is clear what it holds


def propose(place: str, like: str, name: str) -> Card:
    """A card whose source is `place` (a folder, a file, a URL or pattern of tars), and all else as in the card `like`.

    Raises UsageError where it cannot be told what lies there.
    """
    base = Card.load(like).model_dump(mode="json", by_alias=True)
    source = _source(place)
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "pictures"
    title = f"{source['kind']}: {place}"[:200]
    return Card.model_validate(
        {**base, "name": plain, "title": title, "description": "", "licence": "", "source": source}
    )


def _source(place: str) -> dict[str, Any]:
    if is_remote(place) or any(letter in place for letter in WILD):
        if is_remote(place) or ".tar" in place:
            return {"kind": "webdataset", "shards": place if is_remote(place) else str(Path(place).absolute())}
        pattern = Path(place).absolute()
        if place.endswith(ENDINGS):
            return _of_tables(str(pattern), table_files(pattern))
        if not (lists := sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())):
            raise UsageError("no files are there", where=str(pattern))
        return _of_list(lists[0], str(pattern))
    path = Path(place).absolute()
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise UsageError("neither a card nor a file or folder of that name", where=place, hint="see `eclipse cards`")
    if path.suffix == ".tar":
        return {"kind": "webdataset", "shards": str(path)}
    return _of_tables(str(path), [path]) if path.suffix.lstrip(".") in ENDINGS else _of_list(path)


def _of_folder(folder: Path) -> dict[str, Any]:
    """Tars and embeddings lie in the folder itself; pictures, tables and lists also deeper."""
    paired = [path for path in folder.glob("*.npz") if path.with_suffix(".parquet").is_file()]  # DataComp's
    if metadata := sorted((folder / "metadata").glob("*.parquet")) if (folder / "img_emb").is_dir() else paired:
        table = min(metadata).with_suffix(".parquet")
        caption = _first(CAPTIONS, column_names(table), table, "caption")
        return {"kind": "clip-retrieval", "folder": str(folder), "caption_column": caption}
    if any(folder.glob("*.tar")):
        return {"kind": "webdataset", "shards": str(folder)}
    pictures, tables = False, []
    for _, path in zip(range(LOOKED_AT), folder.rglob("*"), strict=False):
        ending = path.suffix.lstrip(".").lower()
        pictures |= ending in EXTENSIONS
        tables += [path] if ending in ENDINGS and path.name not in METADATA else []
    if pictures:
        return {"kind": "folder", "folder": str(folder), **_metadata_column(folder)}
    if tables:
        return _of_tables(str(folder), table_files(folder))
    raise UsageError(
        "no tars, pictures or tables are in this folder",
        where=str(folder),
        hint="name a folder that holds some, or a list of URLs (.parquet, .csv, .tsv, .jsonl)",
    )


def _metadata_column(folder: Path) -> dict[str, Any]:
    for name in METADATA:
        for path in folder.rglob(name):
            return {"caption_column": _first(CAPTIONS, column_names(path), path, "caption")}
    return {}


def _of_tables(place: str, files: list[Path]) -> dict[str, Any]:
    """Tables of pictures, or Parquet lists of their URLs."""
    if not files:
        raise UsageError("no tables are there", where=place)
    try:
        if files[0].suffix == ".parquet":
            schema = pq.read_schema(files[0])
        else:
            from ..images.table import read_arrow

            schema = read_arrow(files[0]).schema
    except (OSError, pa.ArrowException) as error:
        raise EclipseError(f"cannot read the table: {error}", where=str(files[0])) from error
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    if pictures:
        image = next((name for name in IMAGES if name in pictures), pictures[0])
        caption = _first(CAPTIONS, schema.names, files[0], "caption")
        return {"kind": "table", "table": place, "image_column": image, "caption_column": caption}
    return _of_list(files[0], place)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _of_list(path: Path, place: str | None = None) -> dict[str, Any]:
    plain = path.name.lower()
    for ending in COMPRESSED:
        plain = plain.removesuffix(ending)
    if plain.rpartition(".")[2] not in KINDS:
        raise UsageError("this is no card, tar, table or list", where=str(path), hint="see `eclipse init --help`")
    names = column_names(path)
    if plain.endswith(("csv", "tsv")) and any(name.startswith(("http://", "https://")) for name in names):
        hint = "put a line with the names of its columns in front of it, such as: url, caption"
        raise UsageError("the list has no header line", where=str(path), hint=hint)
    source: dict[str, Any] = {
        "kind": "urls",
        "urls": place or str(path),
        "url_column": _first(URLS, names, path, "URL"),
        "caption_column": _first(CAPTIONS, names, path, "caption"),
    }
    hashed = next((name for name in HASHES if name in names), None)
    return {**source, "hash_column": hashed} if hashed else source


def _first(known: tuple[str, ...], names: list[str], path: Path, what: str) -> str:
    """The column that holds a URL or a caption, by its name."""
    found = next((name for name in known if name in names), None)
    if found is None:
        raise UsageError(
            f"no column is recognised as the {what}; there are: {', '.join(names) or 'none'}",
            where=str(path),
            hint="write a card that names it: `eclipse cards coco` is one to start from",
        )
    return found
