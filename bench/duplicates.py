"""Look-alikes: every pair beside faiss's exact search; the whole `eclipse filter` at a hundred thousand and a million
rows, with copies planted within ±0.01 of the threshold on both sides; a crowd of near-identical pictures.

Run: nice -n 10 python -m eclipse.bench.duplicates [--part exact|filter|crowd] [--rows 100000 1000000]
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ..pipeline.cache.store import PartMeta, PartWriter, part_name
from ..pipeline.core.card import Card
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..pipeline.filter.dedup import DRIFT, near_keepers
from ..pipeline.filter.neighbours import Vectors, find_pairs, unit
from .gpu_duplicates import COSINE, DIM, clustered, reader
from .results import arguments, hardware, record, table

PART_ROWS = 50_000
WRONG_SHARE = 0.04
ROUNDS = 2  # the contenders take turns, so that other work on the machine meets both; the best counts


def exact(size: int) -> list[list[object]]:
    """Ours and faiss's IndexFlat.range_search over the same rows → a table's lines. SystemExit if pairs differ."""
    import faiss

    rows, *_ = clustered(size, "cpu")
    index = faiss.IndexFlatIP(DIM)
    wide = unit(rows).numpy()
    index.add(wide)  # pyright: ignore[reportCallIssue]
    # By the clock, and of processor time, which stays nearly true on a machine that is busy with other work.
    ours, theirs = np.full(2, np.inf), np.full(2, np.inf)
    pairs, limits, other = None, np.empty(0), np.empty(0)
    for _ in range(ROUNDS):
        began = np.array([time.perf_counter(), time.process_time()])
        pairs = find_pairs(reader(rows), COSINE, None, Progress(quiet=True), device="cpu")
        ours = np.minimum(ours, np.array([time.perf_counter(), time.process_time()]) - began)
        began = np.array([time.perf_counter(), time.process_time()])
        limits, _, other = index.range_search(wide, COSINE)  # pyright: ignore[reportCallIssue]
        theirs = np.minimum(theirs, np.array([time.perf_counter(), time.process_time()]) - began)
    assert pairs is not None
    one = np.repeat(np.arange(size), np.diff(limits).astype(np.int64))
    once = one < other
    mine, faiss_pairs = pairs.i * size + pairs.j, one[once] * size + other[once]
    differ = np.setxor1d(mine, faiss_pairs)
    near, _ = reader(rows).compare(differ // size, differ % size)
    if (abs(near - COSINE) > 1e-6).any():
        raise SystemExit("the two do not find the same pairs")
    same = f"{len(mine):,}" + (f" ({len(differ)} differ within 1e-6 of the threshold)" if len(differ) else "")
    lines = []
    for name, took, count in (
        ("faiss IndexFlatIP.range_search", theirs, f"{len(faiss_pairs):,}"),
        ("eclipse, every pair", ours, same),
    ):
        clock, processor = theirs / took
        lines.append([name, f"{took[0]:.1f} s", f"{clock:.1f}", f"{took[1]:.1f} s", f"{processor:.1f}", count])
    return lines


def crowd(size: int, copies: int) -> list[object]:
    """`copies` near-identical pictures among `size`, more than are compared exactly → a table's line."""
    rows, *_ = clustered(size, "cpu")
    rng = np.random.default_rng(0)
    at = np.sort(rng.permutation(size)[:copies])
    one = rows[at[0]].astype(np.float32)
    rows[at] = (one + 0.03 * np.abs(one).mean() * rng.standard_normal((copies, DIM))).astype(np.float16)
    thumbnails = rng.integers(0, 256, (size, 256), dtype=np.uint8)
    thumbnails[at] = np.clip(thumbnails[at[0]].astype(int) + rng.integers(-4, 5, (copies, 256)), 0, 255)
    vectors = Vectors(size, rows.__getitem__, thumbnails.__getitem__)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    began = np.array([time.perf_counter(), time.process_time()])
    pairs = find_pairs(vectors, COSINE, 0.8, Progress(), device="cpu")
    keeper = near_keepers(pairs, np.arange(size), lambda i, j: vectors.compare(i, j)[0] >= COSINE - DRIFT)
    clock, processor = np.array([time.perf_counter(), time.process_time()]) - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    kept = int((keeper[at] == at).sum())
    return [
        f"{copies:,} of {size:,}",
        f"{copies * (copies - 1) // 2:,}",
        f"{len(pairs):,}",
        kept,
        f"{clock:.0f} s",
        f"{processor:.0f} s",
        f"{peak - before:.2f} GB",
    ]


def make_workspace(root: Path, size: int) -> tuple[Workspace, np.ndarray, np.ndarray, np.ndarray]:
    """A workspace with embeddings of `size` rows and no pictures → it, the planted copies' rows, originals, cosines.

    A copy has its original's thumbnail, slightly changed; every other thumbnail is of its own.
    """
    card = Card.load("coco")
    rules = {"near_copy_picture": None, "wrong_caption": 0.5, "min_side": 64, "keep": "first", "exact_copies": "image"}
    ws = Workspace.create(root, card.model_copy(update={"filter": card.filter.model_copy(update=rules)}))
    image, original, copy, cosine = clustered(size, "cpu")
    rng = np.random.default_rng(1)
    thumbnails = rng.integers(0, 256, (size, 256), dtype=np.uint8)
    changed = thumbnails[original].astype(np.int16) + rng.integers(-6, 7, (len(copy), 256))
    thumbnails[copy] = np.clip(changed, 0, 255).astype(np.uint8)
    wrong = rng.permutation(size)[: int(WRONG_SHARE * size)]
    said = np.arange(size)
    said[wrong] = np.roll(wrong, 1)
    cone = rng.standard_normal(DIM).astype(np.float32)
    meta = PartMeta("generated", "generated", "none", "none", DIM, DIM, "generated", text_states=False)
    for number, start in enumerate(range(0, size, PART_ROWS)):
        at = np.arange(start, min(start + PART_ROWS, size))
        noise = rng.standard_normal((len(at), DIM), dtype=np.float32)
        text = (cone + 0.5 * image[said[at]].astype(np.float32) + 0.6 * noise).astype(np.float16)
        score = np.einsum("nd,nd->n", unit(image[at]).numpy(), unit(text).numpy())
        digest = [hashlib.sha256(b"%d" % row).digest() for row in at.tolist()]
        with PartWriter(ws.embeddings / part_name(number), meta) as writer:
            writer.write(
                {
                    "uid": [one.hex() for one in digest],
                    "key": [f"{row:09d}" for row in at.tolist()],
                    "url": [f"http://127.0.0.1/{row}.jpg" for row in at.tolist()],
                    "caption": [f"what picture {row} shows, in about ten words or so" for row in at.tolist()],
                    "image_sha256": digest,
                    "thumbnail": thumbnails[at],
                    "width": np.full(len(at), 256),
                    "height": np.full(len(at), 256),
                    "image_embedding": image[at],
                    "text_embedding": text,
                    "n_tokens": np.full(len(at), 13),
                    "clip_score": score,
                }
            )
    with ws.stage("embed") as run:  # as if `eclipse embed` had made the parts
        run.begin()
        run.finish({"rows": size})
    return ws, copy, original, cosine


def run_filter(ws: Workspace, *options: str) -> tuple[float, float, dict[str, float], dict]:
    """`eclipse filter` in a process of its own → seconds by the clock and of processors, memory in GB, summary."""
    command = [sys.executable, "-m", "eclipse.cli", "filter", "-w", str(ws.root), "--json", *options]
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    largest: dict[str, float] = {}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=sys.stderr)
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            for kind in ("VmRSS", "RssAnon"):
                found = [int(line.split()[1]) for line in lines if line.startswith(kind + ":")]
                largest[kind] = max(largest.get(kind, 0.0), *(kb * 1024 / 1e9 for kb in found), 0.0)
            time.sleep(0.2)
        code = process.wait()
        out.seek(0)
        text = out.read()
    if code:
        raise SystemExit(f"eclipse filter failed with {code}: {text.decode()[-500:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
    return time.perf_counter() - began, processor, largest, json.loads(text)


def whole_filter(size: int, scratch: Path) -> tuple[list[object], float, float]:
    """The whole stage on `size` rows → a table's line, and seconds by the clock and of processors."""
    import pyarrow.parquet as pq

    ws, copy, original, cosine = make_workspace(scratch / f"rows-{size}", size)
    seconds, processor, largest, summary = run_filter(ws)
    reason = np.asarray(pq.read_table(ws.selection, columns=["reason"])["reason"].to_pylist(), dtype=object)
    dropped = np.flatnonzero(reason == "near_copy")
    # Which of the two is dropped follows from their order; rows that an earlier rule dropped are no longer copies.
    pair = np.stack([original, copy])
    judged = ~np.isin(reason[pair], ["wrong_caption", "small_picture"]).any(0)
    gone = (reason[pair] == "near_copy").any(0)
    above, below = judged & (cosine >= COSINE + 1e-6), judged & (cosine < COSINE - 1e-6)
    planted = np.unique(pair[:, cosine >= COSINE - 1e-6])
    precision = float(np.isin(dropped, planted).mean()) if len(dropped) else 1.0
    again, again_processor, _, _ = run_filter(ws, "--overwrite")
    search = summary.get("near_copy_search") or {"recall": None, "lists": None}
    line = [
        f"{size:,}",
        f"{seconds:.0f} s",
        f"{processor:.0f} s",
        f"{again:.0f} s ({again_processor:.0f} s)",
        f"{largest['RssAnon']:.2f} GB",
        f"{largest['VmRSS']:.2f} GB",
        f"{gone[above].mean():.5f} of {int(above.sum()):,}",
        f"{precision:.5f}",
        int(gone[below].sum()),
        search["recall"],
        search["lists"],
        f"{summary['wrong_caption_share']:.3f}",
    ]
    print(line, file=sys.stderr, flush=True)  # a run that is cut short has said so much
    return line, seconds, processor


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("exact", "filter", "crowd"), default=None, help="one of them; default: all")
    parser.add_argument("--exact-rows", type=int, default=50_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--crowd", type=int, nargs=2, default=[66_000, 20_000], metavar=("ROWS", "COPIES"))
    parser.add_argument("--scratch", type=Path, default=None, help="where to make files (4 GB a million rows)")
    options = parser.parse_args()
    machine = hardware()
    cpu = torch.cpu.get_capabilities()
    kinds = ", ".join(name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if cpu.get(name))
    settings = {"D": DIM, "cosine": COSINE, "the processor has": kinds}
    if options.part in (None, "exact"):
        body = table(
            ["pairs of one set", "time", "× faiss", "processor time", "× faiss", "pairs"], exact(options.exact_rows)
        )
        title = "Every pair of look-alikes"
        settings_exact = {"rows": f"{options.exact_rows:,}", **settings, "best of": ROUNDS}
        record("python -m eclipse.bench.duplicates --part exact", title, body, settings_exact, machine, options.results)
    if options.part in (None, "crowd"):
        columns = ["near-identical pictures", "pairs there are", "pairs held", "kept of the crowd", "time",
                   "processor time", "memory beyond the embeddings"]  # fmt: skip
        title = "A crowd of near-identical pictures"
        body = table(columns, [crowd(*options.crowd)])
        record("python -m eclipse.bench.duplicates --part crowd", title, body, settings, machine, options.results)
    if options.part in (None, "filter"):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            found = [whole_filter(size, Path(scratch)) for size in options.rows]
        columns = [
            "rows",
            "eclipse filter",
            "processor seconds",
            "again, evidence kept (processor)",
            "memory, anonymous",
            "memory, with mapped files",
            "planted copies found",
            "precision",
            "planted below, yet dropped",
            "recall it measured",
            "lists",
            "wrong captions, share found",
        ]
        body = table(columns, [line for line, *_ in found])
        if len(found) > 1:
            grown = np.log(options.rows[-1] / options.rows[0])
            (_, first, first_used), (_, last, last_used) = found[0], found[-1]
            clock, processor = np.log(last / first) / grown, np.log(last_used / first_used) / grown
            body += f"\n\nTime grows with rows to the power of {clock:.2f}, processor time of {processor:.2f}."
        settings_filter = {**settings, "wrong captions planted": f"{WRONG_SHARE:.0%}", "copies": "5 %, within ±0.01"}
        title = "The whole filter"
        record(
            "python -m eclipse.bench.duplicates --part filter", title, body, settings_filter, machine, options.results
        )


if __name__ == "__main__":
    main()
