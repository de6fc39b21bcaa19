"""The first stage: the pictures of a URL list → WebDataset shards, through img2dataset. Called by stages.py.

Shards hold the list's pictures in order, `rows_per_shard` at a time; rows that cannot be fetched are set aside before.
When all are done, URLs that failed for a passing reason are tried again, into further shards, as often as the card
says. Shards are committed whole and finished ones never touched again: an interrupted download continues where it was.
Of sources that have their pictures already it only takes stock.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa

from ..core.errors import EclipseError, UsageError
from ..core.files import write_json
from ..core.registry import find
from ..core.source import FetchedSource, UrlSource, WebOptions
from ..images.rejects import Reject, write_rejected
from ..images.sources import forget, look, shards_of
from .http import ClientSpec
from .passes import Fates, Pass, foreign_files, read_metadata, read_passes, read_stats, write_passes
from .pictures import Picture, PictureList, Target
from .pool import Fetchers
from .url_list import UrlList
from .worker import SHARD_DIGITS, FetchSpec, Order, shard_name, work_folder

if TYPE_CHECKING:
    from ..core.progress import Progress, Task
    from ..core.stage import Stage
    from ..core.workspace import Workspace

CONCURRENCY = 128  # fetches at a time in one process
SHAPES_CONCURRENCY = 24  # where a busy machine serves itself, many at a time would only time each other out
RETRY_WAIT_S = 5.0  # before the first pass over failures; twice as long before each further one
LONGEST_RETRY_WAIT_S = 120.0
# What of X-Robots-Tag forbids the use; img2dataset's own defaults.
DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
KNOWN = 4  # URLs that answered in an earlier run, which are asked when nothing else answers
_ORDERS = pa.schema(
    [
        ("row", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("url", pa.string()),
    ]
)


def download(
    ws: Workspace,
    progress: Progress,
    *,
    overwrite: bool = False,
    cluster: str = "local",
    retry_failed: str | None = None,
    limit: int | None = None,
    sample: str | None = None,
) -> dict[str, Any]:
    """Fetch the card's pictures into ws.images; return the summary, counts of pairs by fate among it.

    retry_failed: fetch what failed for these reasons, `timed_out,http_503` or `all`, into further shards. limit,
    sample: fetch so many pictures, or such a share of them (`1%`) by a hash of their URLs; remembered until more is
    asked for. cluster: local, ray, ray://HOST:PORT or spark, by img2dataset's own distributors.

    Raises EclipseError if the list changed under a download that began, if nothing could be fetched or nothing answers
    any more, or if a pair has no fate; UsageError for a list that cannot be read, and where images/ holds what this
    project did not write.
    """
    source = ws.card.source
    if not isinstance(source, FetchedSource):
        if cluster != "local" or retry_failed is not None or limit or sample:
            what = "these pictures are read where they lie: there is nothing to fetch"
            raise UsageError(what, where=f"source.kind: {source.kind}", hint="leave the options out")
        return take_stock(ws, overwrite=overwrite)
    asked = Target(limit, share_of(sample)) if limit or sample else None
    reasons = None if retry_failed is None else tuple(reason.strip() for reason in retry_failed.split(","))
    with ws.stage("download", overwrite=overwrite, go_on=asked is not None or reasons is not None) as run:
        if run.complete:
            return run.summary
        if importlib.util.find_spec("img2dataset") is None:  # or every worker would die of it, with no word here
            hint = 'use Python 3.11 or 3.12, and pip install "eclipse-prior[data]"'
            raise UsageError("img2dataset is not installed, and downloads go through it", hint=hint)
        require_own(ws, all_of_it=overwrite)
        with (
            _swept(ws),
            Fetchers(_spec(ws, source), progress.say) as fetchers,
            _served(ws, source, anew=overwrite) as urls,
        ):
            work = _Run(ws, source, urls, progress, fetchers, run, cluster)
            work.survey(anew=overwrite)
            run.begin()  # the list is known to be readable: nothing old is removed before
            work.note_list()
            work.fetch(asked, reasons)
        summary = work.account()
        from ..report.download import download_page

        run.finish(summary, report=download_page(ws, summary["rejected"]))
    return run.summary


def share_of(text: str | None) -> float:
    """`1%` or `0.01` → 0.01; None → 1. Raises UsageError."""
    if text is None:
        return 1.0
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError("no share of a list", where=f"--sample {text[:40]}", hint="such as 1%, or 0.01")
    return share


def take_stock(ws: Workspace, *, overwrite: bool) -> dict[str, Any]:
    """The stage for pictures that are there already: number their shards. overwrite: number them anew."""
    # Never with `overwrite` itself, which would replace images/: for all that is known, the pictures lie there.
    with ws.stage("download", go_on=overwrite) as run:
        if run.complete:
            return run.summary
        run.begin()
        if overwrite:
            forget(ws)
        look(ws)
        shards = shards_of(ws)
        counts = [shard.expected() for shard in shards.values()]
        summary = {"source": ws.card.source.kind, "shards": len(shards), "read_where_they_lie": True}
        run.finish(summary if None in counts else {**summary, "pictures": sum(count or 0 for count in counts)})
    return run.summary


def require_own(ws: Workspace, *, all_of_it: bool) -> None:
    """Raise UsageError if images/ holds what this project did not write: nothing of that is ever replaced.

    all_of_it: the folder will go as a whole, so that any file counts.
    """
    if not (foreign := foreign_files(ws.images, all_of_it=all_of_it)):
        return
    raise UsageError(
        f"{len(foreign)} files here were not written by `eclipse download`, and fetching might replace them",
        where=", ".join(map(str, foreign[:3])) + (", …" if len(foreign) > 3 else ""),
        hint="to use these pictures, `eclipse embed` reads them as they are; to fetch others, move them away",
    )


@dataclass
class _Run:
    """One call of the stage."""

    ws: Workspace
    source: FetchedSource
    urls: UrlList
    progress: Progress
    fetchers: Fetchers
    run: Stage
    cluster: str
    passes: list[Pass] = field(default_factory=list)
    digest: str = ""

    def survey(self, *, anew: bool) -> None:
        """Read the list: what there is to fetch, what cannot be, and that it is the same list as before."""
        self.digest = self.urls.digest()
        began = not anew and any(self.ws.images.glob("*_stats.json"))
        listed = self._listed() if began else {}
        if listed.get("sha256", self.digest) != self.digest:
            raise EclipseError(
                "the URL list changed since this download began",
                where=", ".join(map(str, self.urls.paths)),
                hint="restore it, or begin anew with `eclipse download --overwrite`",
            )
        for remark in self.urls.remarks():
            self.progress.say(remark)
        self.list = PictureList(self.urls, grouped=not began or listed.get("grouped", False))
        self.list.survey(self.progress)
        self.fates = Fates(self.ws.images)
        self.passes = read_passes(self._passes_record) if began else []

    def note_list(self) -> None:
        """Record which list this download is of."""
        write_json(self._list_record, {"sha256": self.digest, "grouped": self.list.grouped})

    @property
    def _list_record(self) -> Path:
        return self.ws.logs / "download-list.json"

    @property
    def _passes_record(self) -> Path:
        return self.ws.logs / "download-passes.json"

    def _listed(self) -> dict[str, Any]:
        """What an earlier run noted of its list; empty if that is not known."""
        try:
            record = json.loads(self._list_record.read_text())
            return {"sha256": str(record["sha256"]), "grouped": bool(record.get("grouped", False))}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            hint = "remove it if the URL list is still the same, or run `eclipse download --overwrite`"
            raise EclipseError("damaged record of the URL list", where=str(self._list_record), hint=hint) from error

    def fetch(self, asked: Target | None, retry_failed: Sequence[str] | None) -> None:
        """The passes that began before, one for a new target, some over what may succeed now, and what is asked for."""
        self.ws.images.mkdir(parents=True, exist_ok=True)
        begun, self.passes = self.passes, []
        for one in begun:
            self._do(one)
        targets = [one.target for one in self.passes if one.target is not None]
        target = asked or (targets[-1] if targets else Target())
        new = int(self.list.chosen(target, beside=targets).sum())
        if new or not self.passes:
            self._do(Pass(self._next_shard(), self._shards_for(new), target))
        since = next(i for i, one in enumerate(reversed(self.passes)) if one.target is not None)
        for number in range(since, self.source.retries):
            again = Pass(self._next_shard(), 0, None, ())
            if not (count := len(self._failed(again))):
                break
            if read_stats(self.ws.images, again.first) is None:
                self._rest(number)
            self._do(Pass(again.first, self._shards_for(count), None, ()))
        if retry_failed is not None:
            again = Pass(self._next_shard(), 0, None, tuple(retry_failed))
            if not (count := len(self._failed(again))):
                known = ", ".join(sorted({failure.reason for failure in self.fates.failures.values()})) or "nothing"
                self.progress.say(f"nothing to try again; what failed: {known}")
                return
            self._do(Pass(again.first, self._shards_for(count), None, again.reasons))

    def _next_shard(self) -> int:
        return self.passes[-1].numbers.stop if self.passes else 0

    def _shards_for(self, pictures: int) -> int:
        return -(-pictures // self.source.rows_per_shard)

    def _failed(self, one: Pass) -> list[Picture]:
        """The pictures that a pass over failures tries again."""
        failures = self.fates.failures.items()
        return [failure.picture for _, failure in sorted(failures) if one.retries(failure.reason)]

    def _rest(self, number: int) -> None:
        """Give whatever failed time to recover: longer before each pass, and as long as a server asked for."""
        wait = 0.0
        if isinstance(self.source, WebOptions):  # this machine's own server needs no rest
            wait = min(RETRY_WAIT_S * 2**number * random.uniform(0.75, 1.5), LONGEST_RETRY_WAIT_S)
        wait = max(wait, self.fetchers.asked_wait_s)
        self.fetchers.asked_wait_s = 0.0
        if wait > 1:
            self.progress.say(f"waiting {wait:.0f} s before failures are tried again")
        time.sleep(wait)

    def _do(self, one: Pass) -> None:
        """Bring one pass to its end, and take in what became of its pictures."""
        if one.target is not None:
            earlier = [before.target for before in self.passes if before.target is not None]
            mask = self.list.chosen(one.target, beside=earlier)
            pictures, count = self.list.read(mask), int(mask.sum())
        else:
            failed = self._failed(one)
            pictures, count = iter(failed), len(failed)
        self.passes.append(one)
        write_passes(self._passes_record, self.passes)
        number = sum(1 for before in self.passes if before.target is None)
        title = "download" if one.target is not None else f"try again {number}" if number > 1 else "try again"
        with self.progress.task(title, count, "images") as task:
            self._fetch_shards(one, pictures, task)
        self.fates.take_in(one)

    def _fetch_shards(self, one: Pass, pictures: Iterator[Picture], task: Task) -> None:
        """Fetch every shard of a pass that is not finished."""
        missing = 0
        for shard in one.numbers:
            if (stats := read_stats(self.ws.images, shard)) is not None:
                task.advance(stats["count"], failures=stats["count"] - stats["successes"])
            else:
                missing += 1
        if not missing:
            return

        def advance(done: int, failed: int) -> None:
            task.advance(done, failures=failed)
            self.run.give_up_old()

        orders = self._ordered(one, pictures)
        if self.cluster != "local":
            from .cluster import fetch_on_cluster

            fetch_on_cluster(self.cluster, self.fetchers.spec, list(orders), advance)
            return
        workers = min(_cores(self.source), missing)
        self.fetchers.fetch(orders, workers=workers, advance=advance)

    def _ordered(self, one: Pass, pictures: Iterator[Picture]) -> Iterator[Order]:
        """Writes the pictures of each unfinished shard of a pass where its worker looks, shard by shard."""
        schema = _ORDERS.append(pa.field("hash", pa.string())) if self.urls.hash_column else _ORDERS
        for shard in one.numbers:
            block = list(islice(pictures, self.source.rows_per_shard))
            if read_stats(self.ws.images, shard) is not None:
                continue
            folder = work_folder(self.ws.images, shard)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            columns = {
                "row": [picture.rows[0] for picture in block],
                "rows": [picture.rows for picture in block],
                "caption": [picture.captions[0] for picture in block],
                "captions": [picture.captions for picture in block],
                "url": [picture.url for picture in block],
                "hash": [picture.digest for picture in block],
            }
            with pa.ipc.new_file(folder / "rows.arrow", schema) as writer:
                writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
            auths = self.list.auths
            yield Order(shard, {i: auths[row] for i, row in enumerate(columns["row"]) if row in auths})

    def account(self) -> dict[str, Any]:
        """Give every pair its fate and write the rejects. Raises EclipseError if the counts do not add up."""
        fates, targets = self.fates, [one.target for one in self.passes if one.target is not None]
        rejected = write_rejected(self.ws, "download", self._rejects())
        mask = self.list.chosen(targets[0], beside=[])
        for target in targets[1:]:
            mask |= self.list.chosen(target, beside=[])
        rows = self.list.pairs(mask) + len(self.list.unfit)
        stored = sum(
            (read_stats(self.ws.images, n) or {}).get("successes", 0) for one in self.passes for n in one.numbers
        )
        if rows != fates.pairs + sum(rejected.values()) or stored != fates.pictures:
            raise EclipseError(
                f"{rows:,} rows, but {fates.pairs:,} pairs ({stored:,} pictures), {sum(rejected.values()):,} rejects",
                where=str(self.ws.images),
                hint="files were removed or changed: run `eclipse download --overwrite`",
            )
        if not stored:
            most = ", ".join(f"{reason} {count:,}" for reason, count in list(rejected.items())[:3])
            raise EclipseError(
                f"no picture could be downloaded: {most}",
                where=", ".join(map(str, self.urls.paths)),
                hint="check the network and the list, then run `eclipse download --overwrite`",
            )
        numbers = [number for one in self.passes for number in one.numbers]
        summary = {
            "rows": rows,
            "images": stored,
            "pairs": fates.pairs,
            "rejected": rejected,
            "shards": sum(1 for number in numbers if (self.ws.images / f"{shard_name(number)}.tar").exists()),
            "tried_again": fates.tried_again,
            "recovered": fates.recovered,
            "folder": str(self.ws.images),
        }
        if not mask.all():
            summary["of_the_list"] = f"{int(mask.sum()):,} of {len(mask):,} pictures, as asked for"
        return summary

    def _rejects(self) -> Iterator[Reject]:
        """Rows set aside before fetching, and the failures of each picture's last attempt."""
        yield from self.list.unfit
        for _, failure in sorted(self.fates.failures.items()):
            yield from failure.rejects()


@contextmanager
def _swept(ws: Workspace) -> Iterator[None]:
    """Removes what unfinished shards left, once the workers are gone."""
    try:
        yield
    finally:
        for folder in ws.images.glob(f"{work_folder(ws.images, 0).name[:-SHARD_DIGITS]}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _spec(ws: Workspace, source: FetchedSource) -> FetchSpec:
    public = source if isinstance(source, WebOptions) else None  # the shapes world is served by this very machine
    ws.logs.mkdir(parents=True, exist_ok=True)
    return FetchSpec(
        images=str(ws.images),
        log=str(ws.logs / "download.log"),
        image_size=source.image_size,
        resize_mode=source.resize_mode,
        encode_format="jpg" if public else "png",  # 64 px of shapes are too few for JPEG's coarse colors
        rows_per_shard=source.rows_per_shard,
        client=ClientSpec(
            timeout_s=source.timeout_s,
            concurrency=CONCURRENCY if public else SHAPES_CONCURRENCY,
            per_host=max(1, public.per_host // _cores(source)) if public else SHAPES_CONCURRENCY,
            patience_s=source.patience_s,
            contact=public.contact if public else None,
            robots_txt=public is not None and public.robots_txt,
            allow_hosts=tuple(public.allow_hosts) if public else ("127.0.0.1",),
            known=_known_urls(ws.images),
            refused=DIRECTIVES,
        ),
    )


def _known_urls(images: Path) -> tuple[str, ...]:
    """URLs of different hosts that gave a picture in an earlier run."""
    known: dict[str, str] = {}
    for path in sorted(images.glob("*_stats.json"))[-KNOWN:]:
        for entry in read_metadata(images, int(path.name.partition("_")[0])):
            if entry["status"] == "success":
                known[urlsplit(entry["url"]).netloc] = entry["url"]
    return tuple(list(known.values())[-KNOWN:])


def _served(ws: Workspace, source: FetchedSource, *, anew: bool) -> AbstractContextManager[UrlList]:
    """The card's list; that of the shapes world is served by this machine for as long as the block runs.

    anew: the shapes world makes its list again.
    """
    if (served := find("list", source.kind)) is not None:
        return served(ws, anew=anew)
    assert isinstance(source, UrlSource)
    paths = tuple(source.paths(ws.root))
    names = (source.url_column, source.caption_column, source.hash_column)
    return nullcontext(UrlList(paths, *names, quoting=source.quoting, encoding=source.encoding))


def _cores(source: FetchedSource) -> int:
    """Processes to use: one a core, less one where this machine serves the pictures as well."""
    return max(1, len(os.sched_getaffinity(0)) - (not isinstance(source, WebOptions)))
