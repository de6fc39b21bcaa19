"""The same pictures through `urls`, `webdataset`, `folder` and `table`: equal uids, equal parts but for keys and URLs.

    python -m eclipse.bench.same_pictures --pictures 1000

Pictures with one to three captions each are served over HTTP on the loopback address, and lie in tars, in a folder with
captions beside them, and in a Parquet table; each is embedded with the CLIP that ships. Exits with 1 if any column of
any row differs, token states included.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..pipeline.cache.store import Store
from ..pipeline.core.card import Card
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..pipeline.download.stage import download
from ..pipeline.embed.stage import embed
from .hostile import picture

SHARD = 250
COLUMNS = ("uid", "caption", "image_sha256", "thumbnail", "width", "height", "n_tokens", "clip_score")


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def lay_out(root: Path, count: int) -> dict[str, dict[str, Any]]:
    """The pictures in a folder, in tars and in a table; the source section of a card for each."""
    rows: list[tuple[str, bytes, list[str]]] = [
        (f"{n:06d}", picture(n), [f"caption {k} of picture {n}" for k in range(1 + n % 3)]) for n in range(count)
    ]
    folder, tars = root / "folder", root / "tars"
    folder.mkdir()
    tars.mkdir()
    lines = [{"file_name": f"{key}.jpg", "text": text} for key, _, captions in rows for text in captions]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for start in range(0, count, SHARD):
        with tarfile.open(tars / f"{start // SHARD:05d}.tar", "w") as tar:
            for key, data, captions in rows[start : start + SHARD]:
                (folder / f"{key}.jpg").write_bytes(data)
                meta = json.dumps({"caption": captions[0], "captions": captions}).encode()
                for ending, content in (("jpg", data), ("json", meta)):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    images, texts = [{"bytes": data, "path": key} for key, data, _ in rows], [captions for _, _, captions in rows]
    pq.write_table(pa.table({"image": images, "text": texts}), root / "table.parquet")
    return {
        "webdataset": {"shards": str(tars)},
        "folder": {"folder": str(folder), "rows_per_shard": SHARD},
        "table": {"table": str(root / "table.parquet"), "rows_per_shard": SHARD},
    }


def workspace(root: Path, source: dict[str, Any]) -> Workspace:
    base = Card.load("shapes").model_dump(mode="json", by_alias=True)
    return Workspace.create(root, Card.model_validate({**base, "source": source}))


def rows_of(ws: Workspace) -> dict[str, list[Any]]:
    """Every column that does not say where a picture lay, in the order of the parts."""
    store = Store.open(ws.embeddings)
    every = np.arange(len(store))
    states, offsets = store.token_states(every)
    found: dict[str, list[Any]] = {name: store.column(name).to_pylist() for name in COLUMNS}
    found["image_embedding"] = [row.tobytes() for row in store.image_embeddings(every)]
    found["text_embedding"] = [row.tobytes() for row in store.text_embeddings(every)]
    found["text_states"] = [states[start:end].tobytes() for start, end in pairwise(offsets)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    options = parser.parse_args()
    quiet = Progress(quiet=True)
    differ = False
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources = lay_out(root, options.pictures)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=sources["folder"]["folder"]))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = [json.loads(line) for line in (root / "folder/metadata.jsonl").read_text().splitlines()]
        urls = [f"http://127.0.0.1:{server.server_port}/{line['file_name']}" for line in lines]
        pq.write_table(pa.table({"url": urls, "caption": [line["text"] for line in lines]}), root / "list.parquet")
        # A patient download: one that came late would lie in a further shard, and the rows in another order.
        listed = {
            "urls": str(root / "list.parquet"),
            "rows_per_shard": SHARD,
            "allow_hosts": ["127.0.0.1"],
            "timeout_s": 600,
        }
        expected: dict[str, list[Any]] = {}
        for kind, source in {"urls": listed, **sources}.items():
            started = time.monotonic()
            ws = workspace(root / f"ws-{kind}", {"kind": kind, **source})
            if kind == "urls":
                download(ws, quiet)
            embed(ws, quiet, gpus=0)
            found = rows_of(ws)
            expected = expected or found
            unlike = [column for column in found if found[column] != expected[column]]
            differ |= bool(unlike)
            said = f"differs in {', '.join(unlike)}" if unlike else "the same"
            print(f"{kind:<10} {len(found['uid']):,} rows, {time.monotonic() - started:.1f} s: {said}", flush=True)
        server.shutdown()
    sys.exit(differ)


if __name__ == "__main__":
    main()
