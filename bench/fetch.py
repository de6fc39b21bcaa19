"""Pictures a second through `eclipse download`, with all its protections, beside plain img2dataset.

    python -m eclipse.bench.fetch --pictures 4000

One process serves JPEG files on the loopback address; each contender downloads the same list into WebDataset shards,
with as many processes as there are cores, in turn, several times. Seconds are from the start of the first shard to the
end of the last, by the stats that img2dataset writes for both, so that neither's imports count; those of the whole call
stand beside. Ratios are of medians, in one run: the server and whatever else runs take from both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PLAIN = """
import sys, time
from img2dataset import download
if __name__ == "__main__":
    started = time.monotonic()
    download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", url_col="url",
        caption_col="caption", output_format="webdataset", image_size=256, resize_mode="keep_ratio",
        resize_only_if_bigger=True, processes_count=int(sys.argv[3]), thread_count=64, timeout=10, retries=0,
        number_sample_per_shard=1000)
    print("SECONDS", time.monotonic() - started)
"""
OURS = """
import sys, time
from pathlib import Path
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.download.stage import download
if __name__ == "__main__":
    ws = Workspace.open(Path(sys.argv[1]))
    import img2dataset
    started = time.monotonic()
    download(ws, Progress(quiet=True))
    print("SECONDS", time.monotonic() - started)
"""


def pictures(count: int) -> list[bytes]:
    """JPEG files of 256 pixels, 15 to 25 KB each, as resized photographs are."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files


def serve(pipe: Any, files: list[bytes]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                number = int(request.split(b" ", 2)[1].strip(b"/.jpg"))
                keep = b"close" if b"onnection: close" in request else b"keep-alive"
                body = files[number % len(files)]
                head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nConnection: %s\r\nContent-Length: %d\r\n\r\n"
                writer.write(head % (keep, len(body)) + body)
                await writer.drain()
                if keep == b"close":
                    break
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def seconds_of(code: str, *arguments: str) -> float:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # a file: img2dataset's processes import it again
        script.write(code)
        script.flush()
        run = subprocess.run([sys.executable, script.name, *arguments], capture_output=True, text=True, env=environment)
    found = [line for line in run.stdout.splitlines() if line.startswith("SECONDS")]
    if run.returncode or not found:
        raise SystemExit(f"{arguments}: {run.stderr[-2000:]}")
    return float(found[0].split()[1])


def fetching(images: Path) -> tuple[int, float]:
    """Pictures stored, and seconds from the first shard's start to the last one's end."""
    stats = [json.loads(path.read_text()) for path in images.glob("*_stats.json")]
    span = max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)
    return sum(shard["successes"] for shard in stats), span


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, pictures(200)), daemon=True)
    server.start()
    port = here.recv()
    seconds: dict[str, list[float]] = {"img2dataset": [], "eclipse": []}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "list.parquet"
        numbers = range(options.pictures)
        urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in numbers]
        pq.write_table(pa.table({"url": urls, "caption": [f"caption {number}" for number in numbers]}), listed)
        for turn in range(options.rounds):
            plain = Path(folder) / f"plain-{turn}"
            whole = [seconds_of(PLAIN, str(listed), str(plain), str(cores))]
            stored, span = fetching(plain)
            seconds["img2dataset"].append(span)
            ws = Path(folder) / f"ours-{turn}"
            ws.mkdir()
            card = {
                "name": "bench",
                "source": {
                    "kind": "urls", "urls": str(listed), "rows_per_shard": 1000, "allow_hosts": ["127.0.0.1"],
                    "retries": 0,
                },
                "encoder": {"model": "none"},
                "decoder": {"path": "none"},
            }  # fmt: skip
            (ws / "eclipse.yaml").write_text(json.dumps(card))
            whole.append(seconds_of(OURS, str(ws)))
            ours, span = fetching(ws / "images")
            seconds["eclipse"].append(span)
            plain_s, ours_s = seconds["img2dataset"][-1], seconds["eclipse"][-1]
            print(f"round {turn + 1}: img2dataset {stored:,} in {plain_s:.1f} s of {whole[0]:.1f}, ", end="")
            print(f"eclipse {ours:,} in {ours_s:.1f} s of {whole[1]:.1f}", flush=True)
    server.kill()
    rates = {name: options.pictures / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        spread = ", ".join(f"{options.pictures / value:,.0f}" for value in sorted(seconds[name]))
        print(f"{name:<12} {rate:8,.0f} pictures/s   (rounds: {spread})")
    print(f"eclipse / img2dataset: {rates['eclipse'] / rates['img2dataset']:.2f}, {cores} cores, server included")


if __name__ == "__main__":
    main()
