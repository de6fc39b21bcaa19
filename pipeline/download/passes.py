"""The passes of a download: over the list, and over what failed; what became of every picture. Used by stage.py.

Which pictures a pass holds follows from its entry in logs/download-passes.json and from the finished shards of those
before it, so that an interrupted download goes on with the same pictures in the same shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import EclipseError
from ..core.files import write_json
from ..images.rejects import Reject
from .http import is_transient
from .pictures import Picture, Target
from .worker import shard_name

ALL = "all"


@dataclass(frozen=True)
class Pass:
    """Shards from `first` on: of a target's pictures, or of those that failed so far for one of `reasons`.

    reasons: None in a pass over the list; empty: those that may pass by themselves; ALL: any.
    """

    first: int
    shards: int
    target: Target | None = None
    reasons: tuple[str, ...] | None = None

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.shards)

    def retries(self, reason: str) -> bool:
        """Whether what failed for `reason` is tried again."""
        assert self.reasons is not None
        return ALL in self.reasons or (reason in self.reasons if self.reasons else is_transient(reason))


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that is not there, by its last attempt."""

    shard: str
    key: str
    reason: str
    picture: Picture

    def rejects(self) -> Iterator[Reject]:
        """One for each of its captions: a row of the list is a pair."""
        for caption in self.picture.captions:
            yield Reject(self.shard, self.key, self.reason, self.picture.url, caption)


@dataclass
class Fates:
    """What became of the pictures of the passes taken in so far. failures: by the number of the picture's first row."""

    images: Path
    pictures: int = 0
    pairs: int = 0
    recovered: int = 0  # pictures that failed at first
    failures: dict[int, Failure] = field(default_factory=dict)
    _again: set[int] = field(default_factory=set)

    @property
    def tried_again(self) -> int:
        return len(self._again)

    def take_in(self, one: Pass) -> None:
        """Add a finished pass. Raises EclipseError for metadata that cannot be read."""
        for number in one.numbers:
            for entry in read_metadata(self.images, number):
                row, fine = entry["row"], entry["status"] == "success"
                rows, captions = entry.get("rows") or [row], entry.get("captions") or [entry["caption"]]
                if one.reasons is not None:
                    self._again.add(row)
                    self.recovered += fine
                if fine:
                    self.pictures += 1
                    self.pairs += len(captions)
                    self.failures.pop(row, None)
                else:
                    reason = entry["error_message"].partition(":")[0]
                    picture = Picture(entry["url"], "", entry.get("hash") or "", rows, captions)
                    self.failures[row] = Failure(shard_name(number), entry["key"], reason, picture)


def read_metadata(images: Path, shard: int) -> Iterator[dict[str, Any]]:
    """The rows of a finished shard's metadata, as written by img2dataset."""
    path = images / f"{shard_name(shard)}.parquet"
    wanted = ["row", "rows", "key", "url", "caption", "captions", "hash", "status", "error_message"]
    try:
        names = pq.read_schema(path).names
        yield from pq.read_table(
            path, columns=[name for name in wanted if name in names], page_checksum_verification=True
        ).to_pylist()
    except (OSError, pa.ArrowException) as error:
        hint = f"remove {shard_name(shard)}_stats.json there and run `eclipse download` again"
        raise EclipseError(
            f"cannot read the metadata of a finished shard: {error}", where=str(path), hint=hint
        ) from error


def read_stats(images: Path, shard: int) -> dict[str, Any] | None:
    """What img2dataset noted of a finished shard, or None if it is not finished, or its tar is gone since."""
    path = images / f"{shard_name(shard)}_stats.json"
    try:
        stats = json.loads(path.read_text())
        has_tar = int(stats["successes"]) == 0 or (images / f"{shard_name(shard)}.tar").is_file()
        return {**stats, "count": int(stats["count"])} if has_tar else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        hint = "remove the file and run `eclipse download` again"
        raise EclipseError("damaged record of a finished shard", where=str(path), hint=hint) from error


def read_passes(path: Path) -> list[Pass]:
    """The passes that began, in order; none where there is no record."""
    try:
        found = json.loads(path.read_text())["passes"]
        return [
            Pass(
                int(entry["first"]),
                int(entry["shards"]),
                Target(**entry["target"]) if entry["target"] is not None else None,
                tuple(entry["reasons"]) if entry["reasons"] is not None else None,
            )
            for entry in found
        ]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        hint = "begin anew with `eclipse download --overwrite`"
        raise EclipseError("damaged record of the download's passes", where=str(path), hint=hint) from error


def write_passes(path: Path, passes: list[Pass]) -> None:
    """Note the passes before the last of them begins."""
    write_json(path, {"passes": [asdict(one) for one in passes]})


def foreign_files(images: Path, *, all_of_it: bool = False) -> list[Path]:
    """Tars and metadata in `images` that no download of this project wrote: its metadata name the rows of a list.

    all_of_it: and everything else that has no name of ours.
    """

    def is_own(path: Path) -> bool:
        try:
            return "row" in pq.read_schema(path.with_suffix(".parquet")).names
        except FileNotFoundError:
            return False
        except (OSError, pa.ArrowException):  # damaged: the stats that are written last tell whose it was
            return path.with_name(f"{path.stem}_stats.json").exists()

    found = sorted(path for ending in ("tar", "parquet") for path in images.glob(f"*.{ending}"))
    foreign = [path for path in found if path.is_file() and not is_own(path)]
    if all_of_it and images.is_dir():
        names = re.compile(r"\d+\.tar|\d+\.parquet|\d+_stats\.json|\.tmp-.*")
        foreign += sorted(path for path in images.iterdir() if not names.fullmatch(path.name))
    return foreign
