"""The process that drives img2dataset, shard by shard. Started by fetchers.py; shards come in, events go out.

One process for all that img2dataset prints and imports: the stage's own standard output stays clean, and the process
ends at once when its parent does, since its standard input then does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

SHARDS_AT_A_TIME = 2  # while one waits for its slowest URLs, the other goes on
EVERY_S = 0.2
DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]  # of X-Robots-Tag; img2dataset's own defaults
TOKEN = "eclipse"
SHARD_DIGITS = 5


@dataclass(frozen=True)
class FetchSpec:
    """What is the same for every shard of a download."""

    images: str  # the directory of the finished shards
    log: str
    image_size: int
    resize_mode: str
    encode_format: str  # jpg or png: also the extension in the tars
    rows_per_shard: int
    timeout_s: float
    threads: int  # downloads at a time in one shard

    def to_json(self) -> str:
        return json.dumps(asdict(self))


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


def fetch_shard(
    spec: FetchSpec, shard: int, count: Callable[[int, int], None], fail: Callable[[Exception], None]
) -> None:
    """Download one shard, whose rows lie in its work folder as rows.arrow, and commit its files to spec.images.

    count(rows, failures) is told as rows are written; fail(error) at once when a write fails, which is final.
    """
    from img2dataset.downloader import Downloader
    from img2dataset.writer import WebDatasetSampleWriter

    images = Path(spec.images)
    folder = work_folder(images, shard)
    writers: list[CountingWriter] = []

    def open_writer(*args: Any) -> CountingWriter:
        writers.append(CountingWriter(WebDatasetSampleWriter(*args), count, fail))
        return writers[-1]

    downloader = Downloader(
        sample_writer_class=open_writer,
        resizer=Fitter(spec.image_size, spec.resize_mode, spec.encode_format),
        thread_count=spec.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["row", "caption", "url"],
        timeout=spec.timeout_s,
        number_sample_per_shard=spec.rows_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=spec.encode_format,
        retries=0,  # at once would be too early: download.py tries again in a later pass
        user_agent_token=TOKEN,
        disallowed_header_directives=DIRECTIVES,
    )
    downloader.download_shard((shard, str(folder / "rows.arrow")))
    _commit(folder, images, shard_name(shard), writers[0].spans)


def _commit(folder: Path, images: Path, name: str, spans: list[tuple[str, int, int]]) -> None:
    """Put samples in the order of the list, sync, and move the files; the stats come last and mark the shard as done.

    A shard in which nothing was downloaded gets metadata and stats, and no tar.
    """
    import pyarrow.parquet as pq

    ordered = folder / "ordered.parquet"
    pq.write_table(pq.read_table(folder / f"{name}.parquet").sort_by("key"), ordered, compression="zstd")
    finished = [(ordered, f"{name}.parquet"), (folder / f"{name}_stats.json", f"{name}_stats.json")]
    if spans:
        _sort_tar(folder / f"{name}.tar", folder / "ordered.tar", sorted(spans))
        finished.insert(0, (folder / "ordered.tar", f"{name}.tar"))
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


def _bounded_fetch(row: tuple[int, str], timeout: float, user_agent_token: str, **options: Any) -> tuple:
    """Stands in for img2dataset's `download_image_with_retry`: (key, stream or None, error message or None).

    It must never raise: img2dataset would wait forever for its own threads.
    """
    from img2dataset.downloader import is_disallowed

    from .http import FetchError, fetch_url

    key, url = row
    directives = options["disallowed_header_directives"]
    try:
        data = fetch_url(url, timeout, lambda headers: is_disallowed(headers, user_agent_token, directives))
        return key, io.BytesIO(data), None
    except FetchError as error:
        return key, None, str(error)


class _Events:
    """JSON lines to the parent; counts are gathered for a moment, to spare it a line a picture."""

    def __init__(self, descriptor: int) -> None:
        self._out = os.fdopen(descriptor, "w")
        self._lock = threading.Lock()
        self._counts: dict[int, list[int]] = {}
        self._sent_at = 0.0

    def count(self, shard: int, done: int, failed: int) -> None:
        with self._lock:
            counts = self._counts.setdefault(shard, [0, 0])
            counts[0] += done
            counts[1] += failed
            if time.monotonic() - self._sent_at > EVERY_S:
                self._flush()

    def send(self, **event: Any) -> None:
        with self._lock:
            self._flush()
            self._write(event)

    def fail(self, shard: int, error: Exception) -> None:
        number = error.errno if isinstance(error, OSError) else None
        self.send(event="fault", shard=shard, what=f"{type(error).__name__}: {error}", errno=number)
        with contextlib.suppress(OSError):  # the log may lie on the same full disk
            traceback.print_exception(error)

    def _flush(self) -> None:
        for shard, (done, failed) in self._counts.items():
            self._write({"event": "rows", "shard": shard, "done": done, "failed": failed})
        self._counts.clear()
        self._sent_at = time.monotonic()

    def _write(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()


def main() -> None:
    """Read the spec, then one shard number a line; end with standard input, whatever is under way."""
    spec = FetchSpec(**json.loads(sys.stdin.readline()))
    events = _Events(os.dup(1))
    log = os.open(spec.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # webdataset does without torch where there is none; importing it takes longer than img2dataset.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import img2dataset.downloader

    img2dataset.downloader.download_image_with_retry = _bounded_fetch

    def work(shard: int) -> None:
        try:
            fetch_shard(spec, shard, partial(events.count, shard), partial(events.fail, shard))
            events.send(event="done", shard=shard)
        except Exception as error:
            events.fail(shard, error)

    pool = ThreadPoolExecutor(SHARDS_AT_A_TIME)
    for line in sys.stdin:
        pool.submit(work, int(line))
    os._exit(0)


if __name__ == "__main__":
    main()
