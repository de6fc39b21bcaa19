"""The encoder on a GPU: each tower's forward pass alone, and `embed` from JPEG tars on disk to parts on disk.

Random weights in the published sizes, bfloat16: speed does not depend on what the weights are. Called by bench.gpu; on
a CPU it rehearses with small towers, and its rates say nothing.
Run: python -m eclipse.bench.gpu_encoder --out OUT [--seconds 60]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from PIL import Image

from ..pipeline.cache.part import PartMeta, part_name
from ..pipeline.embed import clip
from ..pipeline.embed.clip import Encoder
from ..pipeline.embed.lane import Lane
from ..pipeline.embed.tasks import Event, ShardFailed, ShardTask
from ..pipeline.images.shards import TarShard
from .results import hardware, table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PEAK = 989e12  # FLOP/s, dense bfloat16 of an H100 or H200 by its data sheet
MODELS = ("ViT-L-14", "ViT-bigG-14") if CUDA else ("ViT-S-32-alt",)
BATCH = 256 if CUDA else 8
SIDE = 256  # pixels of the shorter side, as img2dataset's usual setting stores pictures
DISTINCT = 256 if CUDA else 16
ROWS_PER_SHARD = 2048 if CUDA else 32
WORDS = "a red cube left of two small striped spheres on grey sand under the last light of an evening"


def random_encoder(name: str) -> tuple[Encoder, dict[str, Any]]:
    """The named architecture with random weights, made on the device, and its config."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = open_clip.create_model(name, device=DEVICE)
    # The fingerprint reads every weight back to the host and hashes it: ten seconds of nothing to measure at bigG.
    with patch.object(clip, "_fingerprint", return_value="0" * 64):
        encoder = Encoder(model, open_clip.get_tokenizer(name), precision="bf16" if CUDA else "fp32", device=DEVICE)
    config: Any = open_clip.get_model_config(name)
    return encoder, config


def tower_flop(width: int, layers: int, tokens: int, mlp_ratio: float = 4.0) -> float:
    """Multiplications and additions of a transformer's forward pass on one sequence: products of weights, attention."""
    return layers * (2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width)


def image_flop(config: dict[str, Any]) -> float:
    vision = config["vision_cfg"]
    grid = vision.get("image_size", 224) // vision["patch_size"]
    patches = 2 * grid**2 * vision["width"] * 3 * vision["patch_size"] ** 2
    return patches + tower_flop(vision["width"], vision["layers"], grid**2 + 1, vision.get("mlp_ratio", 4.0))


def text_flop(config: dict[str, Any], tokens: float) -> float:
    text = config["text_cfg"]
    return tower_flop(text["width"], text["layers"], round(tokens), text.get("mlp_ratio", 4.0))


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


def write_shards(folder: Path, pictures: list[bytes], shards: int) -> list[Path]:
    """WebDataset tars of ROWS_PER_SHARD pictures, each with a caption of its own of 3 to 19 words."""
    rng, words = np.random.default_rng(0), WORDS.split()
    paths = []
    for shard in range(shards):
        paths.append(folder / f"{shard:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(ROWS_PER_SHARD):
                key = f"{shard:05d}{row:04d}"
                caption = " ".join(rng.choice(words, int(rng.integers(3, len(words)))))
                meta = json.dumps({"url": f"http://localhost/{key}", "caption": caption})
                data = pictures[(shard * ROWS_PER_SHARD + row) % len(pictures)]
                for name, content in (("jpg", data), ("txt", caption.encode()), ("json", meta.encode())):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return paths


def rate(work: Callable[[], int], seconds: float) -> float:
    """Items a second: `work` returns how many it did, is run once to warm up, and then for `seconds` at least once."""
    work()
    _wait()
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds:
        done += work()
    _wait()
    return done / (time.perf_counter() - began)


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(name: str, shards: list[Path], scratch: Path, seconds: float, say: Callable[[str], None]) -> None:
    """One model: image tower, text tower, both together as `embed` needs them, decoding alone, and end to end."""
    began = time.perf_counter()
    encoder, config = random_encoder(name)
    threads = min(16, len(os.sched_getaffinity(0)))
    meta = PartMeta(name, encoder.fingerprint, encoder.preprocessing, encoder.precision, encoder.embedding_dim,
                    encoder.text_width, card="")  # fmt: skip
    lane = Lane(encoder, {}, meta, decode_threads=threads)
    say(f"{name}: made in {time.perf_counter() - began:.1f} s")
    side = encoder.image_size
    pixels = torch.randint(0, 256, (BATCH, side, side, 3), dtype=torch.uint8, device=DEVICE)
    words = WORDS.split()
    captions = [" ".join(words[: 3 + i % (len(words) - 2)]) for i in range(BATCH)]
    ids, n_tokens = encoder.tokenize(captions)
    order = n_tokens.argsort(stable=True)
    ids, n_tokens = ids[order], n_tokens[order]

    def image_tower() -> int:
        encoder.encode_images(pixels)
        return BATCH

    def text_tower() -> int:
        for part in range(0, BATCH, BATCH // 4):
            encoder.encode_text(ids[part : part + BATCH // 4], n_tokens[part : part + BATCH // 4])
        return BATCH

    images, texts = rate(image_tower, seconds * 0.12), rate(text_tower, seconds * 0.06)
    say(f"image tower {images:,.0f}, text tower {texts:,.0f} a second")  # a cut run keeps what it has
    both = 1 / (1 / images + 1 / texts)
    flop_image, flop_text = image_flop(config), text_flop(config, float(n_tokens.float().mean()))

    tasks = [
        ShardTask(i, TarShard(tar), scratch / name / part_name(i), scratch / name / f"{i:05d}.json", BATCH)
        for i, tar in enumerate(shards)
    ]

    def report(event: Event) -> None:
        if isinstance(event, ShardFailed):
            raise RuntimeError(f"shard {event.number}: {event.error}")

    lane.run(tasks[:1], report)  # warms up
    wanted = max(1, min(len(tasks), round(both * seconds * 0.4 / ROWS_PER_SHARD)))
    _wait()
    start = time.perf_counter()
    lane.run(tasks[:wanted], report)
    end_to_end = wanted * ROWS_PER_SHARD / (time.perf_counter() - start)
    rows = [
        ("image tower", images, flop_image * images),
        ("text tower", texts, flop_text * texts),
        ("both towers, one after the other", both, (flop_image + flop_text) * both),
        ("embed, JPEG tars to parts", end_to_end, (flop_image + flop_text) * end_to_end),
    ]
    say(table(
        [f"{name}, {encoder.precision}, batch {BATCH}", "pictures/s", "TFLOP/s", "of peak", "× both towers"],
        [(what, f"{r:,.0f}", f"{f / 1e12:.0f}", f"{f / PEAK:.0%}" if CUDA else "–", f"{r / both:.2f}")
         for what, r, f in rows],
    ))  # fmt: skip
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else "–"
    say(f"{wanted * ROWS_PER_SHARD:,} pictures end to end, {threads} decoding threads, peak memory {peak}\n")


def decoding(shards: list[Path], seconds: float, say: Callable[[str], None]) -> None:
    """What the processors alone can do: read, decode, resize, thumbnail, tokenize, without any encoder behind."""
    from ..pipeline.images.decode import Sample, open_picture, read_shard, thumbnail

    transform: Any = open_clip.image_transform(224, is_train=False)
    to_rgb = transform.transforms[:2]

    def one(sample: Sample) -> None:
        image = open_picture(sample.data)
        thumbnail(image)
        for step in to_rgb:
            image = step(image)
        np.asarray(image)

    samples = [item for item in read_shard(shards[0]) if isinstance(item, Sample)]
    threads = min(16, len(os.sched_getaffinity(0)))

    def work() -> int:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, samples))
        return len(samples)

    size = np.mean([len(sample.data) for sample in samples]) / 1000
    say(f"decode, resize, thumbnail alone: {rate(work, seconds):,.0f} pictures/s ({threads} threads, {size:.0f} KB)\n")


def main(out: Path, seconds_budget: float) -> None:
    """Write OUT/gpu_encoder.md line by line, within about `seconds_budget`; a section that fails leaves the others."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (out / "gpu_encoder.md").open("a", buffering=1) as file, tempfile.TemporaryDirectory() as scratch:

        def say(text: str) -> None:
            print(text, flush=True)
            file.write(text + "\n")

        say(f"## Encoder\n\n{hardware()}\n")
        shards = write_shards(Path(scratch), jpegs(DISTINCT), 12 if CUDA else 2)
        say(f"tars written after {time.perf_counter() - began:.1f} s")
        decoding(shards, 2 if CUDA else 0.1, say)
        for index, name in enumerate(MODELS):
            left = seconds_budget - (time.perf_counter() - began)
            try:
                measure(name, shards, Path(scratch), left / (len(MODELS) - index), say)
            except Exception as error:  # out of memory at one size says nothing of the other
                say(f"{name}: {type(error).__name__}: {error}\n")
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        say(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0 if CUDA else 10.0)
    options = parser.parse_args()
    main(options.out, options.seconds)
