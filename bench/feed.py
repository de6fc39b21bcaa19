"""The feed alone: gathered and packed batches of COCO-like captions at D = 1280; warm at three sizes, then cold beside
the disk. And training from a cache larger than the memory that the process may use.

Run: python -m eclipse.bench.feed   (needs about 12 GB of disk; warm figures need as much free memory)
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..pipeline.cache.store import Store
from ..trainer.data.batches import Batches
from ..trainer.model.prior import PRESETS, Prior
from .made_cache import forget, make_cache, warm
from .results import arguments, hardware, record, table

DIM, BATCH, ROUNDS = 1280, 1024, 5
WARM_UP = 8  # batches: the threads start, and the memory that batches are delivered in is first touched
READS_AT_ONCE = 32  # of the disk's random reads
TRAIN_BATCH, TRAIN_STEPS, MEMORY = 32, 6, 2 << 30


def feed_rate(
    store: Store,
    batches: int,
    *,
    dtype: torch.dtype = torch.float32,
    block_rows: int = 1,
    seed: int = 0,
    drop: int = WARM_UP,
) -> tuple[float, float]:
    """Samples/s, and samples per second of processor time, over `batches` batches after `drop` that do not count.

    The second one stays true on a machine that is busy with other work.
    """
    with Batches(store, np.arange(len(store)), BATCH, seed=seed, block_rows=block_rows, dtype=dtype) as feed:
        for _ in itertools.islice(feed, drop):
            pass
        began, used = time.perf_counter(), time.process_time()
        for _ in itertools.islice(feed, batches):
            pass
        samples = batches * BATCH
        return samples / (time.perf_counter() - began), samples / (time.process_time() - used)


def bytes_a_sample(store: Store) -> float:
    return 2 * (2 * store.embedding_dim + float(store.token_counts().mean()) * store.text_width)


def gigabytes(store: Store) -> str:
    return f"{bytes_a_sample(store) * len(store) / 1e9:.2f} GB"


def scaling(stores: dict[str, tuple[Path, Store]], dtype: torch.dtype) -> str:
    """Warm samples/s with token states delivered as `dtype`; sizes take turns and the best of ROUNDS counts."""
    for directory, _ in stores.values():
        warm(directory)
    best = {name: np.zeros(2) for name in stores}
    for turn in range(ROUNDS):
        for name, (_, store) in stores.items():
            best[name] = np.maximum(best[name], feed_rate(store, 24, dtype=dtype, seed=turn))
    first = next(iter(best.values()))
    rows = []
    for name, (_, store) in stores.items():
        (wall, processor), (of_wall, of_processor) = best[name], best[name] / first
        rates = [f"{wall:,.0f}", f"{of_wall:.2f}", f"{processor:,.0f}", f"{of_processor:.2f}"]
        rows.append([f"{len(store):,} ({name})", gigabytes(store), *rates])
    columns = ["rows", "features", "warm samples/s", "× smallest", "samples per processor second", "× smallest"]
    return table(columns, rows)


def disk_rate(directory: Path, limit: int) -> float:
    """Bytes/s of reading cold files from beginning to end in large pieces."""
    forget(directory)
    buffer, done, began = bytearray(4 << 20), 0, time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while done < limit and (read := file.readinto(buffer)):
                done += read
    return done / (time.perf_counter() - began)


def random_rate(directory: Path, size: int, reads: int) -> float:
    """Bytes/s of reading `size` bytes at a time from random places of cold files, READS_AT_ONCE together."""
    forget(directory)
    rng = np.random.default_rng(0)
    files = [os.open(path, os.O_RDONLY) for path in sorted(directory.iterdir())]
    ends = [os.fstat(file).st_size - size for file in files]
    chosen = [(files[k], int(rng.integers(0, ends[k]))) for k in rng.integers(0, len(files), reads).tolist()]
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: these bytes and no others
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        began = time.perf_counter()
        done = sum(pool.map(lambda at: len(os.pread(at[0], size, at[1])), chosen))
        took = time.perf_counter() - began
    for file in files:
        os.close(file)
    return done / took


def cold(directory: Path) -> str:
    """Samples/s from files that are not in the page cache, beside what the disk gives to plain readers.

    Nothing may have the files mapped: the kernel does not forget those. So each turn opens them anew.
    """
    size = bytes_a_sample(Store.open(directory))
    disk = disk_rate(directory, 2 << 30) / size
    at_random = random_rate(directory, round(size), 4096) / size
    rows = [
        [f"the disk read in sequence, {disk * size / 1e6:,.0f} MB/s, ÷ bytes a sample", f"{disk:,.0f}", "1.00"],
        [
            f"one read a sample at random places, {READS_AT_ONCE} at once",
            f"{at_random:,.0f}",
            f"{at_random / disk:.2f}",
        ],
    ]
    for name, block_rows in (("plain permutation", 1), ("block shuffle, blocks of 256", 256)):
        forget(directory)
        rate, _ = feed_rate(Store.open(directory), 32, block_rows=block_rows, seed=block_rows, drop=0)
        rows.append([name, f"{rate:,.0f}", f"{rate / disk:.2f}"])
    return table(["cold cache", "samples/s", "share"], rows)


def train_briefly(directory: Path) -> None:
    """In a process of its own: the 34 M prior trained from `directory` with MEMORY of its own memory allowed."""
    # RLIMIT_DATA counts what the process allocates; mapped files, which are page cache, are not in it.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(2)
    prior = Prior(PRESETS["kandinsky22"])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-5)
    store = Store.open(directory)
    began = waited = 0.0
    with Batches(store, np.arange(len(store)), TRAIN_BATCH, seed=0) as batches:
        for step, batch in enumerate(itertools.islice(batches, TRAIN_STEPS + 2)):
            if step == 2:
                began, waited = time.perf_counter(), batches.wait_seconds
            noise = torch.randn_like(batch.image_embedding)
            loss = (prior(noise, batch.text_embedding, batch.text) - batch.image_embedding).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        took, waited = time.perf_counter() - began, batches.wait_seconds - waited
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    print(TRAIN_STEPS * TRAIN_BATCH / took, waited / took, int(own.split()[1]) / 2**20)


def limited(stores: dict[str, tuple[Path, Store]]) -> str:
    """Training from the smallest and the largest cache under the same limit."""
    rows = []
    for name in (next(iter(stores)), list(stores)[-1]):
        directory, store = stores[name]
        command = [sys.executable, "-m", "eclipse.bench.feed", "--train", str(directory)]
        # Arrow's own allocator reserves a GiB of addresses that it never fills, and RLIMIT_DATA counts addresses.
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        rate, wait, own = map(float, done.stdout.split())
        rows.append([gigabytes(store), f"{rate:.1f}", f"{wait:.2%}", f"{own:.2f} GiB"])
    columns = ["cache", "samples/s", "of it waiting for data", "process memory beside page cache"]
    return table(columns, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2_700, help="of the smallest cache; the others have 10× and 100×")
    parser.add_argument("--scratch", type=Path, default=None, help="where to make the caches; default: /tmp")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train_briefly(options.train)
    machine = hardware()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        stores = {}
        for name, rows in (("1×", options.rows), ("10×", 10 * options.rows), ("100×", 100 * options.rows)):
            directory = Path(scratch) / name
            stores[name] = directory, make_cache(directory, rows, DIM)
        limit = f"{MEMORY >> 30} GiB allowed to the process (RLIMIT_DATA)"
        training = f"Training the 34 M prior, batch {TRAIN_BATCH}, with {limit}:"
        parts = []
        for dtype in (torch.float16, torch.float32):
            parts += [f"Token states delivered as {str(dtype).removeprefix('torch.')}:", scaling(stores, dtype)]
        parts += [training, limited(stores)]
        largest, _ = stores["100×"]
        stores.clear()
        parts.append(cold(largest))
    settings = {"D": DIM, "batch": BATCH, "mean tokens": 13, "threads": 2}
    record("python -m eclipse.bench.feed", "Feed", "\n\n".join(parts), settings, machine, options.results)


if __name__ == "__main__":
    main()
