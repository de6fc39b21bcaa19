"""What `embed` costs the processors beside the encoder: a lane whose encoder computes nothing, fed as a GPU's is.

The lane's own process cannot be spread over cores: it reads tars, gathers batches and writes parts, under one lock. Its
processor time a picture bounds what any machine can do, however many cores decode beside it.
Run: python -m eclipse.bench.embed_lane [--photos DIR] [--pictures 8192] [--decoders N]
     --photos: JPEG files searched to any depth; without, drawn pictures of 341 × 256 as bench.gpu_encoder has them.
     --decoders 0: decode in threads of the lane's process, as a CPU's lane does
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.cache.part import PartMeta, part_name
from ..pipeline.embed.clip import Encoder
from ..pipeline.embed.lane import MOST_DECODERS, Lane
from ..pipeline.embed.preprocess import Preprocessing
from ..pipeline.embed.tasks import Event, ShardFailed, ShardTask
from ..pipeline.embed.tokens import CaptionTokenizer
from ..pipeline.images.shards import TarShard
from .results import arguments, hardware, record, table

BATCH = 256
SIDE = 256  # pixels of the shorter side, as img2dataset's usual setting stores pictures
ROWS_PER_SHARD = 2048
WORDS = "a red cube left of two small striped spheres on grey sand under the last light of an evening"
TICK = os.sysconf("SC_CLK_TCK")
THREADS = {
    "read": "taking files from the reader",
    "decode": "files to the decoders, pictures back",
    "pool": "gathering batches",
    "MainThread": "the encoding thread",
    "finish": "gathering chunks",
    "write": "writing parts",
}
WAITS = {"__next__": "pictures", "result": "pictures", "synchronize": "the device", "put": "the writer"}  # by function


class NoEncoder:
    """An Encoder's face, of ViT-L-14's sizes; its features are zeros."""

    device, embedding_dim, text_width = torch.device("cpu"), 768, 768

    def __init__(self) -> None:
        tokenizer = CaptionTokenizer.wrap(SimpleTokenizer(), 77)
        assert tokenizer is not None
        self.preprocess, self.tokenize_captions = Preprocessing(PreprocessCfg()), tokenizer

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), self.embedding_dim)

    def encode_text(self, tokens: Tensor, n_tokens: Tensor) -> TextFeatures:
        states = torch.zeros(int(n_tokens.sum()), self.text_width)
        pooled = torch.zeros(len(tokens), self.embedding_dim)
        return TextFeatures(states, torch.zeros(len(tokens) + 1).long(), embedding=pooled)


class Account:
    """Where a lane's time goes while `watch` lasts: seen twenty times a second, from outside.

    seconds: it lasted; own, others: processor seconds of this process and of those that it started; threads: of its
    threads by name; waited: share of the time that the encoding thread waited, by what it waited for.
    """

    def __init__(self) -> None:
        self.seconds = self.own = self.others = 0.0
        self.threads: dict[str, float] = {}
        self.waited: dict[str, float] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        over, main, seen = threading.Event(), threading.get_ident(), Counter[str]()
        first: dict[tuple[str, int], float] = {}
        last: dict[tuple[str, int], float] = {}

        def look() -> None:
            while not over.wait(0.05):
                for thread in threading.enumerate():
                    if thread.native_id is not None:
                        key = thread.name, thread.native_id
                        last[key] = _used(f"self/task/{thread.native_id}")[1] or last.get(key, 0.0)
                        first.setdefault(key, last[key])
                frame = sys._current_frames()[main]
                while frame is not None and frame.f_code.co_name not in WAITS:
                    frame = frame.f_back
                seen["its own work" if frame is None else WAITS[frame.f_code.co_name]] += 1

        looking = threading.Thread(target=look, daemon=True, name="look")
        others, own, began = _descendants(), time.process_time(), time.perf_counter()
        looking.start()
        try:
            yield
        finally:
            self.seconds, self.own = time.perf_counter() - began, time.process_time() - own
            self.others = _descendants() - others
            over.set()
            looking.join()
            for name, number in last:
                kind = name.partition("_")[0].partition("-")[0]
                self.threads[kind] = self.threads.get(kind, 0.0) + last[name, number] - first[name, number]
            self.own -= self.threads.pop("look", 0.0)
            self.waited = {what: count / seen.total() for what, count in seen.items()}


def _used(process: str) -> tuple[int, float]:
    """Parent and processor seconds of a process, or of a thread of one; zeros if it is no more."""
    try:
        fields = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK


def _descendants() -> float:
    """Processor seconds of all processes that this one started, and that they did."""
    known = {int(path.name): _used(path.name) for path in Path("/proc").glob("[0-9]*")}
    family, total = {os.getpid()}, 0.0
    while some := {pid for pid, (parent, _) in known.items() if parent in family} - family:
        family |= some
        total += sum(known[pid][1] for pid in some)
    return total


def jpegs(count: int) -> list[bytes]:
    """Different pictures with detail at every scale, SIDE × SIDE·4/3, quality 95: about the bytes of photographs.

    One is drawn; the others are windows of it, whose making is the encoder's time alone: two milliseconds a picture.
    """
    rng, (height, width) = np.random.default_rng(0), (SIDE, SIDE * 4 // 3)
    large = np.zeros((2 * height, 2 * width, 3), np.float32)
    for cells, weight in ((8, 90.0), (32, 50.0), (128, 22.0)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        size = (2 * width, 2 * height)
        large += weight / 128 * (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) - 128)
    drawn = Image.fromarray(np.clip(large + 128, 0, 255).astype(np.uint8))
    made = []
    for left, top in rng.integers(0, (width, height), (count, 2)).tolist():
        out = io.BytesIO()
        drawn.crop((left, top, left + width, top + height)).save(out, "JPEG", quality=95)
        made.append(out.getvalue())
    return made


def write_shards(folder: Path, pictures: Sequence[bytes], shards: int, rows: int = ROWS_PER_SHARD) -> list[Path]:
    """WebDataset tars of `rows` pictures, each with a caption of its own of 3 to 19 words."""
    rng, words = np.random.default_rng(0), WORDS.split()
    paths = []
    for shard in range(shards):
        paths.append(folder / f"{shard:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(rows):
                key = f"{shard:05d}{row:04d}"
                caption = " ".join(rng.choice(words, int(rng.integers(3, len(words)))))
                meta = json.dumps({"url": f"http://localhost/{key}", "caption": caption})
                data = pictures[(shard * rows + row) % len(pictures)]
                for name, content in (("jpg", data), ("txt", caption.encode()), ("json", meta.encode())):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return paths


def tasks_for(shards: Sequence[Path], parts: Path, batch: int) -> list[ShardTask]:
    return [
        ShardTask(i, TarShard(tar), parts / part_name(i), parts / f"{i:05d}.json", batch)
        for i, tar in enumerate(shards)
    ]


def report(event: Event) -> None:
    if isinstance(event, ShardFailed):
        raise RuntimeError(f"shard {event.number}: {event.error}")


def lane_of(encoder: Encoder, name: str, decoders: int) -> Lane:
    meta = PartMeta(name, "0" * 64, "{}", "fp32", encoder.embedding_dim, encoder.text_width, card="")
    return Lane(encoder, {}, meta, decoders=decoders)


def lane_alone(shards: Sequence[Path], parts: Path, decoders: int) -> Account:
    """All of the shards through a lane without an encoder, after one that warms it up."""
    account, lane = Account(), lane_of(cast(Encoder, NoEncoder()), "none", decoders)
    threads = torch.get_num_threads()
    try:
        if decoders:
            torch.set_num_threads(1)  # one thread feeds a GPU
        tasks = tasks_for(shards, parts, BATCH)
        lane.run(tasks[:1], report)
        with account.watch():
            lane.run(tasks, report)
    finally:
        lane.close()
        torch.set_num_threads(threads)
    return account


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--pictures", type=int, default=8192)
    parser.add_argument("--decoders", type=int, default=min(MOST_DECODERS, len(os.sched_getaffinity(0))))
    options = parser.parse_args()
    machine = hardware()
    data = jpegs(256)
    if options.photos:
        data = [path.read_bytes() for path in sorted(options.photos.rglob("*.jpg"))[:1024]]
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_shards(Path(scratch), data, -(-options.pictures // ROWS_PER_SHARD))
        pictures = len(shards) * ROWS_PER_SHARD
        account = lane_alone(shards, Path(scratch), options.decoders)
    rows = [(THREADS.get(name, name), f"{used / pictures * 1e3:.3f}") for name, used in account.threads.items()]
    rows += [
        ("the lane's process", f"{account.own / pictures * 1e3:.3f}"),
        ("all of it, decoding processes included", f"{(account.own + account.others) / pictures * 1e3:.3f}"),
    ]
    waits = ", ".join(f"{what} {share:.0%}" for what, share in sorted(account.waited.items()))
    record(
        "python -m eclipse.bench.embed_lane",
        f"A lane without its encoder, {'photographs' if options.photos else 'drawn pictures'}",
        table(["", "processor ms per picture"], rows)
        + f"\n\n{pictures / account.seconds:,.0f} pictures a second. The main thread: {waits}.",
        {"pictures": pictures, "KB": f"{np.mean([len(d) for d in data]) / 1e3:.0f}", "decoders": options.decoders},
        machine,
        options.results,
    )


if __name__ == "__main__":
    main()
