"""Pictures in a folder, their captions beside them or in Hugging Face's ImageFolder metadata. Used by sources.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from .decode import EXTENSIONS, TEXT_LIMIT, Sample, with_captions
from .rejects import Reject

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # ImageFolder's column
SAMPLED_FILES, BLOCK = 16, 4096


@dataclass(frozen=True)
class FolderShard:
    """Some pictures of a folder. listing: a Parquet file with columns path and captions (null: in a .txt beside)."""

    folder: Path
    listing: Path

    @property
    def name(self) -> str:
        return f"{self.folder.name}-{self.listing.stem}"

    def samples(self) -> Iterator[Sample | Reject]:
        for path, captions in self.entries():
            try:
                data = (self.folder / path).read_bytes()
            except OSError as error:
                reason = "no_picture" if isinstance(error, FileNotFoundError) else "unreadable"
                yield from (Reject(self.name, path, reason, "", caption) for caption in captions or [""])
                continue
            yield from with_captions(
                self.name, path, data, _beside(self.folder / path) if captions is None else captions
            )

    def files(self, keys: set[str]) -> Iterator[tuple[str, bytes]]:
        known = {path for path, _ in self.entries()}
        for key in sorted(keys & known):
            try:
                yield key, (self.folder / key).read_bytes()
            except OSError:
                continue

    def content(self) -> str:
        """Names and sizes of the files, and the beginnings of sixteen."""
        entries = self.entries()
        digest = hashlib.sha256()
        for path, captions in entries:
            try:
                size = (self.folder / path).stat().st_size
            except OSError:
                size = -1
            digest.update(json.dumps([path, size, captions]).encode())
        for path, _ in entries[:: max(1, len(entries) // SAMPLED_FILES)]:
            try:
                with (self.folder / path).open("rb") as file:
                    digest.update(file.read(BLOCK))
            except OSError:
                continue
        return digest.hexdigest()

    def expected(self) -> int | None:
        return pq.read_metadata(self.listing).num_rows

    def entries(self) -> list[tuple[str, list[str] | None]]:
        """Its pictures, by their paths below the folder, with their captions where metadata tell them."""
        try:
            table = pq.read_table(self.listing)
            return list(zip(table.column("path").to_pylist(), table.column("captions").to_pylist(), strict=True))
        except (OSError, pa.ArrowException, KeyError) as error:
            hint = "start over with `eclipse download --overwrite`"
            raise EclipseError(
                f"cannot read a list of pictures: {error}", where=str(self.listing), hint=hint
            ) from error


def write_listing(path: Path, entries: list[tuple[str, list[str] | None]]) -> None:
    """What a FolderShard reads: paths below the folder, with their captions where metadata tell them."""
    schema = pa.schema([("path", pa.string()), ("captions", pa.list_(pa.string()))])
    columns = [pa.array([path for path, _ in entries], pa.string()), pa.array([c for _, c in entries], schema.types[1])]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")


def list_folder(folder: Path, caption_column: str) -> list[tuple[str, list[str] | None]]:
    """Every picture below `folder` in the order of paths, with its captions if ImageFolder metadata name it.

    Raises UsageError for a folder that is not there, and for metadata without file_name or the caption column.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder), hint="the card's source.folder names it")
    told: dict[str, list[str]] = {}
    pictures: list[str] = []
    for place, folders, names in os.walk(folder):  # links to folders are not followed: they may lead in circles
        folders.sort()
        below = Path(place).relative_to(folder)
        for name in sorted(names):
            if name in METADATA:
                for file_name, caption in _metadata(Path(place) / name, caption_column):
                    told.setdefault(os.path.normpath(below / file_name), []).append(caption)
            elif name.rpartition(".")[2].lower() in EXTENSIONS:
                pictures.append(str(below / name))
    return [(path, told.get(path)) for path in sorted(pictures)]


def _beside(picture: Path) -> list[str]:
    """The caption in the .txt beside a picture; empty if there is none."""
    try:
        with picture.with_suffix(".txt").open("rb") as file:
            return [file.read(TEXT_LIMIT).decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")]
    except OSError:
        return []


def _metadata(path: Path, caption_column: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of each row of an ImageFolder metadata file; a list of captions gives several."""
    try:
        if path.suffix == ".jsonl":
            rows: list[Mapping[str, Any]] = [
                json.loads(line) for line in path.read_bytes().splitlines() if line.strip()
            ]
        elif path.suffix == ".csv":
            convert = pyarrow.csv.ConvertOptions(strings_can_be_null=False)
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            rows = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert).to_pylist()
        else:
            rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise EclipseError(f"cannot read the metadata of the pictures: {error}", where=str(path)) from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or FILE_NAME not in row or caption_column not in row:
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f"row {number} has no {FILE_NAME} or no {caption_column}; it has: {found}",
                where=str(path),
                hint="name the column of the captions as source.caption_column in the card",
            )
        captions = row[caption_column]
        for caption in captions if isinstance(captions, list) else [captions]:
            yield str(row[FILE_NAME]), "" if caption is None else str(caption)
