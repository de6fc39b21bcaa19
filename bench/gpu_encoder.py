"""The encoder on a GPU: each tower's forward pass alone, and `embed` from JPEG tars on disk to parts on disk.

Random weights in the published sizes, bfloat16: speed does not depend on what the weights are. Called by bench.gpu; on
a CPU it rehearses with small towers, and its rates say nothing.
Run: python -m eclipse.bench.gpu_encoder --out OUT [--seconds 60]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import open_clip
import torch

from ..pipeline.embed import clip
from ..pipeline.embed.clip import Encoder
from ..pipeline.embed.lane import MOST_DECODERS, Lane
from .embed_lane import THREADS, WORDS, Account, jpegs, lane_alone, lane_of, report, tasks_for, write_shards
from .results import hardware, table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PEAK = 989e12  # FLOP/s, dense bfloat16 of an H100 or H200 by its data sheet
MODELS = ("ViT-L-14", "ViT-bigG-14") if CUDA else ("ViT-S-32-alt",)
BATCH = 256 if CUDA else 8
DISTINCT = 256 if CUDA else 16
ROWS_PER_SHARD = 2048 if CUDA else 32
LEAST_SECONDS = 15.0 if CUDA else 0.1  # of a run end to end, whose start and end must not weigh
DECODERS = min(MOST_DECODERS, len(os.sched_getaffinity(0)))


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
    lane = lane_of(encoder, name, DECODERS)
    try:
        say(f"{name}: made in {time.perf_counter() - began:.1f} s")
        _measure(name, encoder, config, lane, shards, scratch, seconds, say)
    finally:
        lane.close()


def _measure(
    name: str,
    encoder: Encoder,
    config: dict[str, Any],
    lane: Lane,
    shards: list[Path],
    scratch: Path,
    seconds: float,
    say: Callable[[str], None],
) -> None:
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

    tasks = tasks_for(shards, scratch / name, BATCH)
    lane.run(tasks[:1], report)  # warms up
    wanted = max(1, min(len(tasks), round(both * max(seconds * 0.5, LEAST_SECONDS) / ROWS_PER_SHARD)))
    _wait()
    account = Account()
    with account.watch():
        lane.run(tasks[:wanted], report)
    pictures = wanted * ROWS_PER_SHARD
    end_to_end = pictures / account.seconds
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
    say(f"{pictures:,} pictures end to end in {account.seconds:.1f} s, peak memory of the device {peak}")
    waits = ", ".join(f"{what} {share:.0%}" for what, share in sorted(account.waited.items()))
    say(f"the encoding thread's time: {waits}")
    busy = account.others / account.seconds / max(DECODERS, 1)
    say(
        f"{DECODERS} decoding processes, busy for {busy:.0%} of it; processor ms per picture: theirs "
        f"{account.others / pictures * 1e3:.2f}, the lane's own {account.own / pictures * 1e3:.2f}, by thread:"
    )
    say(", ".join(f"{THREADS.get(n, n)} {used / pictures * 1e3:.3f}" for n, used in account.threads.items()) + "\n")


def decoding(shards: list[Path], scratch: Path, say: Callable[[str], None]) -> None:
    """What the processors alone can do: the lane as `embed` runs it, with an encoder that computes nothing."""
    account = lane_alone(shards, scratch / "none", DECODERS)
    pictures = len(shards) * ROWS_PER_SHARD
    size = np.mean([shard.stat().st_size for shard in shards]) / ROWS_PER_SHARD / 1000
    say(f"the lane without an encoder: {pictures / account.seconds:,.0f} pictures/s ({DECODERS} decoding processes, "
        f"{size:.0f} KB); processor ms per picture: the lane's own process {account.own / pictures * 1e3:.2f}, "
        f"the others {account.others / pictures * 1e3:.2f}\n")  # fmt: skip


def main(out: Path, seconds_budget: float) -> None:
    """Write OUT/gpu_encoder.md line by line, within about `seconds_budget`; a section that fails leaves the others."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (out / "gpu_encoder.md").open("a", buffering=1) as file, tempfile.TemporaryDirectory() as scratch:

        def say(text: str) -> None:
            print(text, flush=True)
            file.write(text + "\n")

        say(f"## Encoder\n\n{hardware()}\n")
        shards = write_shards(Path(scratch), jpegs(DISTINCT), 16 if CUDA else 2, ROWS_PER_SHARD)
        say(f"tars written after {time.perf_counter() - began:.1f} s")
        decoding(shards[:8], Path(scratch), say)
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
