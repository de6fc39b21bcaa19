"""What becomes of a hostile list: thousands of URLs of a server that does whatever servers do, and a table of fates.

    python -m eclipse.bench.hostile --urls 5000

One process serves on the loopback address, one downloads with the card's own protections. Printed: what each kind of
URL became, how often the server was asked, the largest memory of all processes, the time. Exits with 1 if a good
picture is missing, stands there twice or has another's caption, if anything private was asked, or a URL outlived its
deadline.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..pipeline.core.card import Card
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..pipeline.download.stage import download
from ..pipeline.images.decode import Sample, read_shard
from ..pipeline.images.rejects import read_rejected

TIMEOUT_S = 3.0
SLACK_S = 1.5  # for a server's thread to notice on a busy machine that its client has left
SHARES = {  # of the distinct URLs, in percent; the rest is good
    "404": 6, "403": 2, "429 with Retry-After": 2, "5xx, then fine": 4, "503 for ever": 1, "drip": 1,
    "headers drip": 0.4,
    "endless body": 0.4, "endless headers": 0.4, "redirect, then fine": 3, "redirect loop": 1, "redirect to private": 4,
    "private in the list": 3, "HTML page": 3, "cut JPEG": 2, "cut body": 2, "pixel bomb": 1, "gzip bomb": 0.4,
    "gzip, fine": 2, "opt-out header": 2, "wrong hash": 2, "reset": 2, "no such host": 1, "closed port": 1, "empty": 1,
}  # fmt: skip
GOOD = ("good", "5xx, then fine", "429 with Retry-After", "redirect, then fine", "gzip, fine")
CAPTIONS = [
    "a cat {}", "emoji 👩🏽‍🚀🐈 {}", "right to left شجرة {}", "NUL \0 inside {}", "zero\u200bwidth {}",
    "long " + "x" * 10_000 + " {}",
    "quotes \" ' , \t {}", "combining é̂ {}",
]  # fmt: skip
PRIVATE = [
    "127.0.0.2", "127.1", "2130706434", "0x7f000002", "0177.0.0.2", "0x7f.0.0.2", "[::1]", "[::ffff:127.0.0.2]",
    "[::ffff:7f00:2]", "[64:ff9b::7f00:2]", "[2002:7f00:2::]", "localhost.", "0.0.0.0", "[::]", "10.0.0.1",
    "169.254.169.254", "192.168.0.1", "100.64.0.1", "224.0.0.1", "[fe80::1]",
]  # fmt: skip


def picture(seed: int) -> bytes:
    """A small JPEG, different for every seed."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (160, 120), Image.Resampling.BICUBIC
    )
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


@functools.cache
def pixel_bomb() -> bytes:
    """A PNG of 60,000 × 60,000 grey pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


class Handler(BaseHTTPRequestHandler):
    """Answers /KIND/NUMBER by the kind."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        _, kind, number = self.path.split("/")[:3]
        kind = kind.replace("_", " ").replace("%2C", ",")
        with self.server.lock:
            before = self.server.hits[self.path]
            self.server.hits[self.path] += 1
            self.server.addresses[self.request.getsockname()[0]] += 1
        asked_at = time.monotonic()
        try:
            self.answer(kind, int(number), before)
        except OSError:
            self.close_connection = True
        with self.server.lock:
            self.server.longest[kind] = max(self.server.longest[kind], time.monotonic() - asked_at)

    def answer(self, kind: str, number: int, before: int) -> None:
        port = self.server.server_port
        if kind in ("404", "403"):
            self.give(b"no", int(kind))
        elif kind == "429 with Retry-After" and not before:
            self.give(b"later", 429, Retry_After="1")
        elif kind == "503 for ever" or (kind == "5xx, then fine" and not before):
            self.give(b"busy", 500 + number % 4)
        elif kind in ("drip", "headers drip"):
            if kind == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
            for _ in range(600):
                self.wfile.write(b"x" if kind == "drip" else b"X-More: yes\r\n")
                self.wfile.flush()
                time.sleep(0.1)
        elif kind == "endless body":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(1 << 16))
        elif kind == "endless headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"X-More: yes\r\n" * 4096)
        elif kind == "redirect, then fine":
            self.give(b"", 302, Location=f"/good/{number}")
        elif kind == "redirect loop":
            self.give(b"", 301, Location=self.path)
        elif kind == "redirect to private":
            self.give(b"", 307, Location=f"http://{PRIVATE[number % len(PRIVATE)]}:{port}/private/{number}")
        elif kind == "HTML page":
            self.give(PAGE, Content_Type="text/html")
        elif kind == "cut JPEG":
            self.give(picture(number)[:-400])
        elif kind == "cut body":
            self.give(picture(number)[:-400], length=len(picture(number)))
        elif kind == "pixel bomb":
            self.give(pixel_bomb())
        elif kind == "gzip bomb":
            self.give(BOMB, Content_Encoding="gzip")
        elif kind == "gzip, fine":
            self.give(gzip.compress(picture(number)), Content_Encoding="gzip")
        elif kind == "opt-out header":
            self.give(picture(number), X_Robots_Tag="noai")
        elif kind == "empty":
            self.give(b"")
        elif kind == "reset":
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
            self.close_connection = True  # only then is the socket let go of
        else:
            self.give(picture(number))

    def give(self, body: bytes, status: int = 200, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def log_message(self, format: str, *args: object) -> None:
        pass


PAGE = b"<html>gone</html>"
BOMB = gzip.compress(bytes(200 << 20), 9)


class Server(ThreadingHTTPServer):
    """On every address of the machine, so that one which should not be asked could be."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), Handler)
        self.hits: Counter[str] = Counter()
        self.addresses: Counter[str] = Counter()
        self.longest: defaultdict[str, float] = defaultdict(float)  # seconds until a client left, by kind
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever leaves in the middle is no news."""


def serve(pipe: Any) -> None:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    pipe.recv()
    with server.lock:
        pipe.send((dict(server.hits), dict(server.addresses), dict(server.longest)))


def make_list(urls: int, port: int) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """(url, caption, hash) of every row, a fifth of the URLs several times, shuffled; and each URL's kind."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * urls / 100))]
    kinds += ["good"] * (urls - len(kinds))
    rng = random.Random(0)
    rng.shuffle(kinds)
    rows, kind_of = [], {}
    for number, kind in enumerate(kinds):
        place = f"127.0.0.1:{port}"
        if kind == "private in the list":
            place = f"{PRIVATE[number % len(PRIVATE)]}:{port}"
        elif kind == "no such host":
            place = f"host-{number}.invalid"
        elif kind == "closed port":
            place = "127.0.0.1:9"
        url = f"http://{place}/{kind.replace(' ', '_')}/{number}"
        kind_of[url] = kind
        whole = picture(number)
        bodies = {"HTML page": PAGE, "cut JPEG": whole[:-400], "pixel bomb": pixel_bomb()}
        right = hashlib.sha256(bodies.get(kind, whole)).hexdigest()
        digest = "f" * 64 if kind == "wrong hash" else right
        for again in range(1 + (rng.randrange(1, 4) if rng.random() < 0.2 else 0)):
            rows.append((url, CAPTIONS[(number + again) % len(CAPTIONS)].format(f"{number} {again}"), digest))
    rows += [
        (f"http://127.0.0.1:{port}/good/{n}x", caption, "0" * 64) for n in range(20) for caption in ("", " \u200b")
    ]
    rows += [("", "no url", "0" * 64), ("ftp://127.0.0.1/x", "another protocol", "0" * 64)]
    rng.shuffle(rows)
    return rows, kind_of


class Memory(threading.Thread):
    """The largest sum of resident memory of this process and its children, looked at four times a second."""

    def __init__(self, without: int) -> None:
        super().__init__(daemon=True)
        self.most, self.over, self.without = 0, threading.Event(), without

    def run(self) -> None:
        while not self.over.wait(0.25):
            self.most = max(self.most, sum(_resident(pid) for pid in _family(os.getpid()) if pid != self.without))


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [each for child in task.read_text().split() for each in _family(int(child))]
        except OSError:
            continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--urls", type=int, default=5000, help="distinct URLs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    rows, kind_of = make_list(options.urls, port)
    with tempfile.TemporaryDirectory() as folder:
        source = {
            "kind": "urls", "urls": "list.parquet", "hash_column": "sha256", "timeout_s": TIMEOUT_S, "retries": 2,
            "rows_per_shard": 1000, "allow_hosts": ["127.0.0.1"], "patience_s": 30,
        }  # fmt: skip
        card = {"name": "hostile", "source": source, "encoder": {"model": "none"}, "decoder": {"path": "none"}}
        ws = Workspace.create(Path(folder), Card.model_validate(card))
        table = dict(zip(("url", "caption", "sha256"), map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pa.table(table), ws.root / "list.parquet")
        memory = Memory(without=server.pid or 0)
        memory.start()
        started = time.monotonic()
        summary = download(ws, Progress(quiet=options.json))
        seconds = time.monotonic() - started
        memory.over.set()
        here.send("over")
        hits, addresses, longest = here.recv()
        found: dict[str, set[str]] = defaultdict(set)
        copies: Counter[tuple[str, str]] = Counter()
        for tar in sorted(ws.images.glob("*.tar")):
            for item in read_shard(tar):
                if isinstance(item, Sample):
                    found[item.url].update(item.captions)
                    copies.update((item.url, caption) for caption in item.captions)
        fates: dict[str, Counter[str]] = defaultdict(Counter)
        rejected = read_rejected(ws).to_pylist()
    wanted: dict[str, set[str]] = defaultdict(set)
    for url, caption, _ in rows:
        if kind_of.get(url) in GOOD:
            wanted[url].add(caption)
    refused = {reject["url"]: reject["reason"] for reject in rejected}
    for url, kind in kind_of.items():
        fates[kind]["picture" if url in found else refused.get(url, "NONE")] += 1
    for reject in rejected:
        if reject["url"] not in kind_of:
            fates["rows that name none"][reject["reason"]] += 1
    faults = []
    if {url: found[url] for url in wanted} != wanted or set(found) != set(wanted):
        lost = sum(found.get(url) != captions for url, captions in wanted.items())
        faults.append(
            f"{lost} good pictures are missing or have other captions; {len(set(found) - set(wanted))} came through"
        )
    if max(copies.values(), default=0) > 1:
        faults.append("a pair stands there twice")
    if any("/private/" in path or "private_in" in path for path in hits) or set(addresses) - {"127.0.0.1"}:
        faults.append(f"private addresses were asked: {addresses}")
    if max(longest.values()) > TIMEOUT_S + SLACK_S:
        late = {kind: round(held, 1) for kind, held in longest.items() if held > TIMEOUT_S + SLACK_S}
        faults.append(f"asked for longer than {TIMEOUT_S} s: {late}")
    if memory.most > 2e9:
        faults.append("more than 2 GB of memory")
    result = {
        "rows": len(rows),
        "urls": len(kind_of),
        "seconds": round(seconds, 1),
        "memory_gb": round(memory.most / 1e9, 2),
        "longest_s": round(max(longest.values()), 1),
        "asked": sum(hits.values()),
        "most_asked": max(hits.values()),
        **{name: summary[name] for name in ("images", "pairs", "recovered")},
        "fates": {kind: dict(counts) for kind, counts in sorted(fates.items())},
        "faults": faults,
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        width = max(map(len, fates))
        for kind, counts in sorted(fates.items()):
            print(f"{kind:<{width}}  " + ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()))
        print({name: value for name, value in result.items() if name != "fates"})
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
