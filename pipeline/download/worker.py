"""What drives img2dataset, shard by shard, in a process of its own. Built there by core/pool.py; orders in, events out.

A process for all that img2dataset prints and imports: the stage's own standard output stays clean.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import EclipseError
from .http import Client, ClientSpec, FetchError
from .outage import OutageError

SHARDS_AT_A_TIME = 2  # while one waits for its slowest URLs, the other goes on
EVERY_S = 0.2
SHARD_DIGITS = 5
_current = threading.local()  # the pool of the shard that a thread works on


@dataclass(frozen=True)
class FetchSpec:
    """What is the same for every shard of a download."""

    images: str  # the directory of the finished shards
    log: str
    image_size: int
    resize_mode: str
    encode_format: str  # jpg or png: also the extension in the tars
    rows_per_shard: int
    client: ClientSpec

    def build(self, device: str, sharing: int) -> FetchService:
        """Import what takes seconds. Called once in a worker's process; both are of no matter to a download."""
        # webdataset does without torch where there is none; importing it takes longer than img2dataset.
        sys.modules["torch"] = None  # type: ignore[assignment]
        import img2dataset.downloader  # noqa: F401

        return FetchService(self)


@dataclass(frozen=True)
class Order:
    """A shard to fetch. auths: user:password of its URLs that have one, by their place in it; they lie in no file."""

    shard: int
    auths: dict[int, str]


@dataclass(frozen=True)
class Rows:
    """Rows of a shard were tried."""

    shard: int
    done: int
    failed: int


@dataclass(frozen=True)
class Outage:
    """Nothing answers any more, or (not `waiting`) something does again."""

    waiting: bool


@dataclass(frozen=True)
class Done:
    """The shard's files are in place. asked_wait_s: the longest rest that a server has asked for so far."""

    shard: int
    asked_wait_s: float


Event = Rows | Outage | Done | EclipseError  # an error is final: no other shard could be made either


def shard_name(shard: int) -> str:
    """`00003`: the stem of a shard's tar, metadata and stats."""
    return f"{shard:0{SHARD_DIGITS}d}"


def work_folder(images: Path, shard: int) -> Path:
    """Where a shard is made before its files appear in `images`; swept with the workspace's other temporary files."""
    return images / f".tmp-fetch-{shard_name(shard)}"


class CountingWriter:
    """img2dataset's tar writer, which also counts, remembers where each sample lies, and reports a failed write.

    Left alone, img2dataset goes on after such an error, one row short, and may then wait forever for its own threads.
    """

    def __init__(self, inner: Any, count: Callable[[int, int], None], fail: Callable[[Exception], None]) -> None:
        self._inner = inner
        self._inner.tarwriter.mtime = 0  # the same pictures give the same bytes
        self._count = count
        self._fail = fail
        self.spans: list[tuple[str, int, int]] = []

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        stream = self._inner.tarwriter.tarstream
        start = stream.offset
        try:
            self._inner.write(image, key, caption, meta)
        except Exception as error:
            self._fail(error)
            raise
        if image is not None:
            self.spans.append((key, start, stream.offset))
        self._count(1, int(image is None))

    def close(self) -> None:
        try:
            self._inner.close()
        except Exception as error:
            self._fail(error)
            raise


class Fitter:
    """Stands in for img2dataset's resizer, which ignores EXIF orientation and passes pictures that end early.

    Pictures are never enlarged; a picture that needs no change keeps its bytes.
    """

    def __init__(self, size: int, mode: str, encode_format: str) -> None:
        self.size, self.mode, self.encode_format = size, mode, encode_format

    def __call__(self, stream: BinaryIO, _boxes: object = None) -> tuple[Any, ...]:
        """img2dataset's contract: (bytes, width, height, original width, original height, error message)."""
        from ..images.decode import BadPictureError, fit_picture

        try:
            return (*fit_picture(stream.read(), self.size, self.mode, self.encode_format), None)
        except BadPictureError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:  # a row without a fate would fail the whole download
            return None, None, None, None, None, f"unreadable: {error}"


class FetchPool:
    """Stands in for img2dataset's pool of threads: the same calls, answered by the process's one client.

    auths: user:password of the URLs that have one, by their place in the shard. hashes: what pictures must have, or "".
    """

    def __init__(self, client: Client, auths: Mapping[int, str], hashes: list[str]) -> None:
        self._client, self._auths, self._hashes = client, auths, hashes

    def __enter__(self) -> FetchPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap_unordered(self, _fetch: object, rows: Iterable[tuple[int, str]]) -> Iterator[tuple]:
        """(place, stream or None, error message or None) of every row, as they come; `rows` blocks when many wait."""
        answers: queue.SimpleQueue[tuple[int, bytes | BaseException] | int] = queue.SimpleQueue()

        def feed() -> None:
            started = 0
            for place, url in rows:
                self._client.start(url, self._auths.get(place, ""), lambda result, at=place: answers.put((at, result)))
                started += 1
            answers.put(started)

        threading.Thread(target=feed, daemon=True, name="feed").start()
        expected, answered = -1, 0
        while answered != expected:
            answer = answers.get()
            if isinstance(answer, int):
                expected = answer
                continue
            answered += 1
            place, result = answer
            if isinstance(result, FetchError):
                yield place, None, str(result)
            elif isinstance(result, BaseException):
                raise result
            elif fault := _hash_fault(result, self._hashes[place]):
                self._client.stored(len(result))
                yield place, None, fault
            else:
                yield place, io.BytesIO(result), None
                self._client.stored(len(result))

    def terminate(self) -> None:
        """There is nothing left to end."""

    join = terminate


def _hash_fault(data: bytes, expected: str) -> str | None:
    """Published lists can be poisoned: the picture behind a URL may have been exchanged since its hash was taken."""
    if not expected:
        return None
    kind = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}[len(expected)]
    found = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
    return None if found == expected else f"wrong_hash: {kind} {found}"


def fetch_shard(
    spec: FetchSpec,
    shard: int,
    client: Client,
    auths: Mapping[int, str],
    count: Callable[[int, int], None],
    fail: Callable[[Exception], None],
) -> None:
    """Download one shard, whose rows lie in its work folder as rows.arrow, and commit its files to spec.images.

    count(rows, failures) is told as rows are written; fail(error) at once when a write fails, which is final. Raises
    OutageError when nothing answers any more.
    """
    import img2dataset.downloader as module
    import pyarrow as pa
    from img2dataset.writer import WebDatasetSampleWriter

    images = Path(spec.images)
    if (images / f"{shard_name(shard)}_stats.json").exists():
        return  # whoever had it before died between its last file and the news of it
    module.ThreadPool = lambda threads: _current.pool
    folder = work_folder(images, shard)
    orders = folder / "rows.arrow"
    with pa.ipc.open_file(orders) as file:
        table = file.read_all()
    hashes = table.column("hash").to_pylist() if "hash" in table.column_names else [""] * len(table)
    _current.pool = FetchPool(client, auths, hashes)
    writers: list[CountingWriter] = []

    def open_writer(*args: Any) -> CountingWriter:
        writers.append(CountingWriter(WebDatasetSampleWriter(*args), count, fail))
        return writers[-1]

    downloader = module.Downloader(
        sample_writer_class=open_writer,
        resizer=Fitter(spec.image_size, spec.resize_mode, spec.encode_format),
        thread_count=spec.client.concurrency,  # twice so many wait or are under way
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=table.column_names,
        timeout=spec.client.timeout_s,
        number_sample_per_shard=spec.rows_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=spec.encode_format,
        retries=0,  # at once would be too early: stage.py tries again in a later pass
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    downloader.download_shard((shard, str(orders)))
    _commit(folder, images, shard_name(shard), writers[0].spans)


def _commit(folder: Path, images: Path, name: str, spans: list[tuple[str, int, int]]) -> None:
    """Put samples in the order of the list, sync, and move the files; the stats come last and mark the shard as done.

    The metadata come first: a tar beside such is this project's, any other is left alone. A shard in which nothing was
    downloaded gets metadata and stats, and no tar.
    """
    import pyarrow.parquet as pq

    ordered = folder / "ordered.parquet"
    pq.write_table(
        pq.read_table(folder / f"{name}.parquet").sort_by("key"), ordered, compression="zstd", write_page_checksum=True
    )
    finished = [(ordered, f"{name}.parquet"), (folder / f"{name}_stats.json", f"{name}_stats.json")]
    if spans:
        _sort_tar(folder / f"{name}.tar", folder / "ordered.tar", sorted(spans))
        finished.insert(1, (folder / "ordered.tar", f"{name}.tar"))
    for path, _ in finished:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path, target in finished:
        path.replace(images / target)
    shutil.rmtree(folder)


def _sort_tar(source: Path, target: Path, spans: list[tuple[str, int, int]]) -> None:
    """Copy a tar's samples, (key, start, end) in bytes, in the given order."""
    with source.open("rb") as file, target.open("wb") as out:
        for _, start, end in spans:
            file.seek(start)
            out.write(file.read(end - start))
        out.write(bytes(-out.tell() % 10_240 or 10_240))  # a tar ends with zeros, in records of 20 blocks


class FetchService:
    """Fetches shards as they are handed out, SHARDS_AT_A_TIME in threads that share one client."""

    meta = None

    def __init__(self, spec: FetchSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._counts: dict[int, list[int]] = {}  # gathered for a moment, to spare the parent a message per picture
        self._sent_at = 0.0

    def run(self, tasks: Iterable[Order], report: Callable[[Event], None]) -> None:
        """Fetch every order of `tasks`; `report` is called from several threads."""
        self._report = report
        self._client = Client(self._spec.client, lambda waiting: self._send(Outage(waiting)))
        free = threading.Semaphore(SHARDS_AT_A_TIME)
        orders = iter(tasks)
        with ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool:
            while free.acquire() and (order := next(orders, None)) is not None:
                pool.submit(self._work, order).add_done_callback(lambda _: free.release())

    def _work(self, order: Order) -> None:
        where = f"shard {shard_name(order.shard)}, in {self._spec.images}"

        def fail(error: Exception) -> None:
            with contextlib.suppress(OSError):  # the log may lie on the same full disk
                traceback.print_exception(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room, and run `eclipse download` again"
                self._send(EclipseError("the disk is full", where=where, hint=hint))
            else:
                what = f"img2dataset failed: {type(error).__name__}: {error}"
                self._send(EclipseError(what, where=where, hint=f"see {self._spec.log}"))

        try:
            fetch_shard(self._spec, order.shard, self._client, order.auths, partial(self._count, order.shard), fail)
            self._send(Done(order.shard, self._client.longest_wait_s))
        except OutageError:
            what = f"nothing has answered for {self._spec.client.patience_s:g} s: the network or the servers are out"
            hint = "finished shards are kept; `eclipse download` goes on when they are back"
            self._send(EclipseError(what, where=where, hint=hint))
        except Exception as error:
            fail(error)

    def _count(self, shard: int, done: int, failed: int) -> None:
        with self._lock:
            counts = self._counts.setdefault(shard, [0, 0])
            counts[0] += done
            counts[1] += failed
            if time.monotonic() - self._sent_at > EVERY_S:
                self._flush()

    def _send(self, event: Event) -> None:
        with self._lock:
            self._flush()
            self._report(event)

    def _flush(self) -> None:
        for shard, (done, failed) in self._counts.items():
            self._report(Rows(shard, done, failed))
        self._counts.clear()
        self._sent_at = time.monotonic()


class ShardFetcher:
    """What img2dataset's own distributors call on a cluster's nodes: (shard, path of its rows) → (fine, the same).

    Every node sees the images' directory. Failures come back as exceptions: the distributors would not tell of them.
    """

    def __init__(self, spec: FetchSpec, auths: Mapping[int, Mapping[int, str]]) -> None:
        self.spec, self.auths = spec, auths

    def __call__(self, task: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        shard, _ = task
        client = _client_of(self.spec)
        broken: list[Exception] = []
        try:
            fetch_shard(self.spec, shard, client, self.auths.get(shard, {}), lambda *_: None, broken.append)
        except OutageError:
            raise OSError(f"nothing answered for {self.spec.client.patience_s:g} s") from None
        if broken:
            raise broken[0]
        return True, task


@functools.cache
def _client_of(spec: FetchSpec) -> Client:
    return Client(spec.client)
