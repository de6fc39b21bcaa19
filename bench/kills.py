"""Downloads killed at random moments, again and again, beside one that is left alone: the same set, no row twice.

    python -m eclipse.bench.kills --kills 20

A server on the loopback address has good pictures, missing ones, and ones that come late: 503 until the first pass is
over, so that passes over failures have something to do. Kills fall while a download starts, in its first pass, in a
pass over failures, and in outages: the server goes away, the download waits, and is killed; the server comes back. A
download that ends in spite of its kills is compared and the next begins, until there were enough. Exits with 1 if the
pairs or the rejects of any differ from those of the undisturbed download.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

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

QUIET = Progress(quiet=True)
ROWS_PER_SHARD = 100
KINDS = ("good",) * 7 + ("late",) * 2 + ("missing",)
MOMENTS = ("start", "first pass", "failures", "outage")
OUTAGE_S = 1.5  # from the server's end to the kill


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers /WORKSPACE/KIND/NUMBER."""

    folder = Path()
    first_pass = 0  # shards of it

    def do_GET(self) -> None:
        _, workspace, kind, number = self.path.split("/")
        images = self.folder / workspace / "images"
        late = kind == "late" and len(list(images.glob("*_stats.json"))) < self.first_pass
        body = b"" if kind == "missing" or late else picture(int(number))
        self.send_response(503 if late else 404 if kind == "missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: str, first_pass: int, port: int) -> None:
    Handler.folder, Handler.first_pass = Path(folder), first_pass
    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def workspace(root: Path, rows: int, port: int) -> Workspace:
    source = {
        "kind": "urls", "urls": "list.parquet", "rows_per_shard": ROWS_PER_SHARD, "retries": 1, "timeout_s": 20,
        "allow_hosts": ["127.0.0.1"],
    }  # fmt: skip
    card = {"name": "kills", "source": source, "encoder": {"model": "none"}, "decoder": {"path": "none"}}
    ws = Workspace.create(root, Card.model_validate(card))
    urls = [f"http://127.0.0.1:{port}/{root.name}/{KINDS[n % len(KINDS)]}/{n}" for n in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [f"caption {n}" for n in range(rows)]}), root / "list.parquet")
    return ws


def outcome(ws: Workspace) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """(number, uid) of every pair and (number, reason) of every reject, with how often each stands there."""
    pairs: Counter[tuple[str, str]] = Counter()
    for tar in sorted(ws.images.glob("*.tar")):
        for item in read_shard(tar):
            if isinstance(item, Sample):
                pairs.update((item.url.rpartition("/")[2], uid) for uid in item.uids)
    rejects = ((reject["url"].rpartition("/")[2], reject["reason"]) for reject in read_rejected(ws).to_pylist())
    return pairs, Counter(rejects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    shards = -(-options.rows // ROWS_PER_SHARD)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as free:
        port = free.server_port

    def start_server() -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, shards, port), daemon=True)
        process.start()
        return process

    kills: Counter[str] = Counter()
    faults: list[str] = []
    downloads = 0
    with tempfile.TemporaryDirectory() as folder:
        server = start_server()
        calm = workspace(Path(folder) / "calm", options.rows, port)
        started = time.monotonic()
        download(calm, QUIET)
        whole = time.monotonic() - started
        expected = outcome(calm)
        while kills.total() < options.kills:
            downloads += 1
            shaken = workspace(Path(folder) / f"shaken-{downloads}", options.rows, port)
            done = False
            while not done and kills.total() < options.kills:
                moment = rng.choice(MOMENTS)
                command = [sys.executable, "-P", "-m", "eclipse.cli", "download", "-w", str(shaken.root), "--quiet"]
                process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
                at_least = shards if moment == "failures" else 0

                def under_way(least: int = at_least, images: Path = shaken.images) -> bool:
                    return any(int(path.name[-5:]) >= least for path in images.glob(".tmp-fetch-*"))

                while moment != "start" and process.poll() is None and not under_way():
                    time.sleep(0.01)
                if moment == "outage" and process.poll() is None:
                    time.sleep(rng.uniform(0, 0.3))
                    server.kill()
                    server.join()
                    time.sleep(OUTAGE_S)
                until = time.monotonic() + rng.uniform(0, 0.1 if moment == "failures" else 0.4) * whole
                while time.monotonic() < until and process.poll() is None:
                    time.sleep(0.01)
                done = process.poll() == 0
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    kills[moment] += 1
                    print(f"kill {kills.total()} of {options.kills}: {moment}", file=sys.stderr, flush=True)
                elif not done:
                    faults.append(f"exit code {process.poll()} at {moment}")
                if not server.is_alive():
                    server = start_server()
            download(Workspace.open(shaken.root), QUIET)
            found = outcome(Workspace.open(shaken.root))
            if found != expected:
                faults.append(f"download {downloads} differs from the undisturbed one")
            if max(found[0].values()) > 1:
                faults.append(f"download {downloads} has a pair twice")
            if litter := [path.name for path in shaken.images.iterdir() if path.name.startswith(".")]:
                faults.append(f"download {downloads} left {', '.join(litter)}")
        server.kill()
    print(f"{kills.total()} kills of {downloads} downloads: {dict(kills)}; undisturbed {whole:.1f} s")
    pairs, rejects = (sum(some.values()) for some in expected)
    print(f"{pairs:,} pairs and {rejects:,} rejects each, the same as undisturbed: {not faults}")
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
