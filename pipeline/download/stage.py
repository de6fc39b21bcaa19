"""The first stage: a URL list → WebDataset shards, through img2dataset. Called by stages.py.

Shards hold the list's rows in order, `rows_per_shard` at a time; rows that cannot be fetched are set aside before. When
all are done, URLs that failed for a passing reason are tried again, into further shards; so often as the card says.
Shards are committed whole and finished ones never touched again, so an interrupted download continues where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import EclipseError, UsageError
from ..core.files import write_json
from ..core.progress import Progress, Task
from ..core.stage import Stage
from ..core.workspace import Workspace
from ..images.rejects import Reject, write_rejected
from .http import is_transient
from .pool import Fetchers
from .url_list import UrlList, UrlRow
from .worker import SHARD_DIGITS, SHARDS_AT_A_TIME, FetchSpec, shard_name, work_folder

ENCODE_FORMAT = {"shapes": "png", "urls": "jpg"}  # 64 px of shapes are too few for JPEG's coarse colors
# Downloads at a time in one shard. Where a busy machine serves itself, many at a time would only time each other out.
THREADS = {"shapes": 16, "urls": 64}
_ORDERS = pa.schema([("row", pa.int64()), ("caption", pa.string()), ("url", pa.string())])


def download(ws: Workspace, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """Fetch the card's pictures into ws.images; return the summary, counts of rows by fate among it.

    Raises EclipseError if the list changed under a download that began, if nothing could be fetched, or if a row has
    no fate; UsageError for a list that cannot be read.
    """
    with ws.stage("download", overwrite=overwrite) as run:
        if run.complete:
            return run.summary
        with _swept(ws), Fetchers(_spec(ws)) as fetchers, _served(ws, anew=overwrite) as urls:
            work = _Run(ws, urls, progress, fetchers, run)
            work.survey(anew=overwrite)
            run.begin()  # the list is known to be readable: nothing old is removed before
            work.note_list()
            work.fetch()
        summary = work.account()
        from ..report.stages import download_page

        run.finish(summary, report=download_page(ws, summary["rejected"]))
    return run.summary


@dataclass
class _Run:
    """One call of the stage. `attempts` holds, by row number, the last shard that tried a row again."""

    ws: Workspace
    urls: UrlList
    progress: Progress
    fetchers: Fetchers
    run: Stage
    clean: int = 0
    unfit: list[Reject] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    shards: int = 0
    digest: str = ""

    def survey(self, *, anew: bool) -> None:
        """Read the list once: how many rows there are to fetch, which ones cannot be, and that it is the same list."""
        self.digest = self.urls.digest()
        if not anew and any(self.ws.images.glob("*_stats.json")) and self._listed() not in (None, self.digest):
            raise EclipseError(
                "the URL list changed since this download began",
                where=", ".join(map(str, self.urls.paths)),
                hint="restore it, or begin anew with `eclipse download --overwrite`",
            )
        for row in self.urls.rows():
            if isinstance(row, Reject):
                self.unfit.append(row)
            else:
                self.clean += 1
        if not self.clean:
            reasons = ", ".join(sorted({reject.reason for reject in self.unfit})) or "it is empty"
            raise UsageError(f"the URL list holds nothing to fetch: {reasons}", where=str(self.urls.paths[0]))

    def note_list(self) -> None:
        """Record which list this download is of."""
        write_json(self._list_record, {"sha256": self.digest, "rows": self.clean + len(self.unfit)})

    @property
    def _list_record(self) -> Path:
        return self.ws.logs / "download-list.json"

    def _listed(self) -> str | None:
        """The digest of the list that an earlier run began with, or None if that is not known."""
        try:
            return str(json.loads(self._list_record.read_text())["sha256"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            hint = "remove it if the URL list is still the same, or run `eclipse download --overwrite`"
            raise EclipseError("damaged record of the URL list", where=str(self._list_record), hint=hint) from error

    def fetch(self) -> None:
        """The first pass over all rows, then the passes over what may succeed now."""
        source = self.ws.card.source
        self.ws.images.mkdir(parents=True, exist_ok=True)
        first = range(-(-self.clean // source.rows_per_shard))
        with self.progress.task("download", self.clean, "images") as task:
            self._pass(first, (row for row in self.urls.rows() if isinstance(row, UrlRow)), task)
        shards = first
        for number in range(1, source.retries + 1):
            rows = list(self._passing_failures(shards))
            if not rows:
                break
            shards = range(shards.stop, shards.stop - (-len(rows) // source.rows_per_shard))
            self.attempts.update((row.number, shards[i // source.rows_per_shard]) for i, row in enumerate(rows))
            title = "try again" if source.retries == 1 else f"try again {number}"
            with self.progress.task(title, len(rows), "images") as task:
                self._pass(shards, iter(rows), task)
        self.shards = shards.stop

    def _pass(self, shards: range, rows: Iterator[UrlRow], task: Task) -> None:
        """Bring every shard of a pass to its end; finished ones are counted and left alone."""
        missing = 0
        for shard in shards:
            if (stats := _stats(self.ws, shard)) is not None:
                task.advance(stats["count"], failures=stats["count"] - stats["successes"])
            else:
                missing += 1
        if not missing:
            return
        workers = max(1, min(_cores(self.ws), -(-missing // SHARDS_AT_A_TIME)))

        def advance(done: int, failed: int) -> None:
            task.advance(done, failures=failed)
            self.run.give_up_old()

        self.fetchers.fetch(self._prepared(shards, rows), workers=workers, advance=advance)

    def _prepared(self, shards: range, rows: Iterator[UrlRow]) -> Iterator[int]:
        """Write the rows of each shard that is to be fetched where its worker looks for them."""
        for shard in shards:
            block = list(islice(rows, self.ws.card.source.rows_per_shard))
            if _stats(self.ws, shard) is not None:
                continue
            folder = work_folder(self.ws.images, shard)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            columns = {
                "row": [row.number for row in block],
                "caption": [row.caption for row in block],
                "url": [row.url for row in block],
            }
            table = pa.table(columns, _ORDERS)
            with pa.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
                writer.write_table(table)
            yield shard

    def _passing_failures(self, shards: range) -> Iterator[UrlRow]:
        for shard in shards:
            for row, _, url, caption, reason in _failures(self.ws, shard):
                if is_transient(reason):
                    yield UrlRow(row, url, caption)

    def account(self) -> dict[str, Any]:
        """Give every row its fate and write the rejects. Raises EclipseError if the counts do not add up."""
        stats = [_stats(self.ws, shard) or {} for shard in range(self.shards)]
        images = sum(shard.get("successes", 0) for shard in stats)
        rejected = write_rejected(self.ws, "download", self._rejects())
        rows = self.clean + len(self.unfit)
        if rows != images + sum(rejected.values()):
            raise EclipseError(
                f"{rows:,} rows, but {images:,} pictures and {sum(rejected.values()):,} rejects",
                where=str(self.ws.images),
                hint="files were removed or changed: run `eclipse download --overwrite`",
            )
        if not images:
            most = ", ".join(f"{reason} {count:,}" for reason, count in list(rejected.items())[:3])
            raise EclipseError(
                f"no picture could be downloaded: {most}",
                where=", ".join(map(str, self.urls.paths)),
                hint="check the network and the list, then run `eclipse download --overwrite`",
            )
        first = -(-self.clean // self.ws.card.source.rows_per_shard)
        return {
            "rows": rows,
            "images": images,
            "rejected": rejected,
            "shards": sum(1 for shard in stats if shard.get("successes")),
            "tried_again": len(self.attempts),
            "recovered": sum(shard.get("successes", 0) for shard in stats[first:]),
            "folder": str(self.ws.images),
        }

    def _rejects(self) -> Iterator[Reject]:
        """Rows set aside before fetching, and the failures of each row's last attempt."""
        yield from self.unfit
        for shard in range(self.shards):
            for row, key, url, caption, reason in _failures(self.ws, shard):
                if self.attempts.get(row, shard) == shard:
                    yield Reject(shard_name(shard), key, reason, url, caption)


@contextmanager
def _swept(ws: Workspace) -> Iterator[None]:
    """Removes what unfinished shards left, once the workers are gone."""
    try:
        yield
    finally:
        for folder in ws.images.glob(f"{work_folder(ws.images, 0).name[:-SHARD_DIGITS]}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _spec(ws: Workspace) -> FetchSpec:
    source = ws.card.source
    ws.logs.mkdir(parents=True, exist_ok=True)
    return FetchSpec(
        images=str(ws.images),
        log=str(ws.logs / "download.log"),
        image_size=source.image_size,
        resize_mode=source.resize_mode,
        encode_format=ENCODE_FORMAT[source.kind],
        rows_per_shard=source.rows_per_shard,
        timeout_s=source.timeout_s,
        threads=THREADS[source.kind],
    )


def _stats(ws: Workspace, shard: int) -> dict[str, Any] | None:
    """What img2dataset noted of a finished shard, or None if it is not finished, or its tar is gone since."""
    path = ws.images / f"{shard_name(shard)}_stats.json"
    try:
        stats = json.loads(path.read_text())
        has_tar = int(stats["successes"]) == 0 or (ws.images / f"{shard_name(shard)}.tar").is_file()
        return {**stats, "count": int(stats["count"])} if has_tar else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        hint = "remove the file and run `eclipse download` again"
        raise EclipseError("damaged record of a finished shard", where=str(path), hint=hint) from error


def _failures(ws: Workspace, shard: int) -> Iterator[tuple[int, str, str, str, str]]:
    """(row number, key, url, caption, reason) of the rows of a finished shard that gave no picture."""
    path = ws.images / f"{shard_name(shard)}.parquet"
    columns = ["row", "key", "url", "caption", "error_message"]
    try:
        table = pq.read_table(path, columns=columns, filters=[("status", "!=", "success")])
    except (OSError, pa.ArrowException) as error:
        hint = f"remove {shard_name(shard)}_stats.json there and run `eclipse download` again"
        raise EclipseError(
            f"cannot read the metadata of a finished shard: {error}", where=str(path), hint=hint
        ) from error
    for row, key, url, caption, message in zip(*table.to_pydict().values(), strict=True):
        yield row, key, url, caption, message.partition(":")[0]


def _served(ws: Workspace, *, anew: bool) -> AbstractContextManager[UrlList]:
    """The card's list; that of the shapes world is served by this machine for as long as the block runs.

    anew: the shapes world makes its list again.
    """
    source = ws.card.source
    if source.kind == "shapes":
        from ...lab.server import list_path, serve

        if anew:
            list_path(ws).unlink(missing_ok=True)
        return serve(ws)
    return nullcontext(UrlList(tuple(source.paths(ws.root)), source.url_column, source.caption_column))


def _cores(ws: Workspace) -> int:
    """Processes to use: one a core, less one where this machine serves the pictures as well."""
    return len(os.sched_getaffinity(0)) - (ws.card.source.kind == "shapes")
