"""Everything that only a GPU can show, in one command: parity, tests, the trainer's step in its variants, the feed.

Each section prints and saves at once to OUT/gpu.md; a failing one leaves its traceback there and the next begins. The
most valuable come first. Without a GPU the same sections run small on the CPU, as a rehearsal: such rates say nothing.
Run: python -m eclipse.bench.gpu --out OUT [--smoke] [--only parity,step]   (full: about eight minutes)
On a machine without this project's packages: bench/gpu_wheels.sh collects them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trainer.data.batches import Batches
from ..trainer.model import bins as bins_module
from ..trainer.model.attention import Layout
from ..trainer.model.bins import BIN, Bins, bin_attention
from ..trainer.model.prior import PRESETS, Prior
from .gpu_step import show_step, show_ten_steps, show_training
from .gpu_tools import (
    CUDA,
    DEVICE,
    PEAK,
    SPECIALS,
    TOKENS,
    Report,
    binned,
    captions,
    relative,
    seconds,
    wall,
)
from .made_cache import caption_lengths, make_cache
from .results import hardware, record, table


def show_device(report: Report, smoke: bool) -> None:
    report.say(hardware())
    if not CUDA:
        return
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    report.say(f"{driver.stdout.strip()}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    size = 1 << 30
    a, b = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    report.say(f"copy {2 * size / seconds(lambda: b.copy_(a)) / 1e12:.2f} TB/s, read and written")
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    report.say(f"from pinned memory {len(host) / seconds(lambda: b[: len(host)].copy_(host)) / 1e9:.1f} GB/s")
    rows = []
    for m in (16_896,) if smoke else (16_896, 135_168):
        for k, n in ((8192, 8192), (512, 1536), (512, 512), (512, 2048), (2048, 512), (1280, 512)):
            x, w = (torch.randn(*s, device=DEVICE, dtype=torch.bfloat16) for s in ((m, k), (n, k)))
            took = seconds(lambda x=x, w=w: F.linear(x, w))
            rows.append([m, f"{k}→{n}", f"{took * 1e6:.0f}", f"{2 * m * k * n / took / 1e12:.0f}"])
    report.say(table(["rows", "product, bf16", "µs", "TFLOP/s"], rows))


def show_attention(report: Report, smoke: bool) -> None:
    """Attention alone, forward and backward: the kernel for bins beside PyTorch's."""
    heads, dim, batch = 16, 32, 1024 if CUDA else 16
    lengths = caption_lengths(batch, np.random.default_rng(0))
    bins = Bins.of(lengths, specials=SPECIALS, text_positions=TOKENS).to(DEVICE)
    places = len(bins.source)
    dtype = torch.bfloat16
    qkv = torch.randn(places, 3 * heads * dim, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.randn(places, heads * dim, device=DEVICE, dtype=dtype)

    def bins_way(x: Tensor) -> Tensor:
        return bin_attention(x, bins.caption, bins.draw, heads)

    def dense_way(x: Tensor) -> Tensor:
        q, k, v, allowed = bins_module._dense(x, bins.caption, bins.draw, heads)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(places, -1)

    exact = qkv.detach().float().requires_grad_()
    dense_way(exact).backward(gradient.float())
    assert exact.grad is not None
    ways: dict[str, Callable[[Tensor], Tensor]] = {"bins, own kernel": bins_way, "bins, SDPA with a mask": dense_way}
    if CUDA:
        ways["bins, FlexAttention"] = flex_way(bins, heads)
    rows = []
    for name, way in ways.items():
        try:
            out = way(qkv)
            (grad,) = torch.autograd.grad(out, qkv, gradient, retain_graph=True)
            off, off_grad = relative(out, dense_way(exact)), relative(grad, exact.grad)
            forward = seconds(lambda way=way: way(qkv))
            both = seconds(lambda way=way: torch.autograd.grad(way(qkv), qkv, gradient))
            rows.append([name, f"{forward * 1e6:.0f}", f"{both * 1e6:.0f}", f"{off:.1e}", f"{off_grad:.1e}"])
        except Exception as error:
            report.say(f"{name}: {type(error).__name__}: {str(error)[:1500]}")
    if CUDA:
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(DEVICE)
        layout = Layout.of(offsets, int(lengths.sum()), specials=SPECIALS, text_positions=TOKENS, heads=heads)
        x = torch.randn(len(layout.source), 3 * heads * dim, device=DEVICE, dtype=dtype, requires_grad=True)
        g = torch.randn(len(x), heads * dim, device=DEVICE, dtype=dtype)

        forward, both = seconds(lambda: layout.attend(x)), seconds(lambda: torch.autograd.grad(layout.attend(x), x, g))
        rows.append(["packed, varlen_attn", f"{forward * 1e6:.0f}", f"{both * 1e6:.0f}", "", ""])
    report.say(
        f"{batch} captions, {places // BIN} bins, {heads} heads of {dim}, bf16; error beside float32 (‖a−b‖/‖b‖)"
    )
    report.say(table(["attention", "forward µs", "both µs", "error", "error of gradient"], rows))


def flex_way(bins: Bins, heads: int) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    caption = bins.caption.view(-1, BIN)
    count = len(caption)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (caption[b, q] == caption[b, k]) & (q >= k)

    one = torch.ones(count, 1, 1, dtype=torch.int32, device=DEVICE)
    blocks = BlockMask.from_kv_blocks(one, torch.zeros(count, 1, 1, 1, dtype=torch.int32, device=DEVICE), mask_mod=mask)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def way(x: Tensor) -> Tensor:
        q, k, v = x.view(count, BIN, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2).reshape(len(x), -1)

    return way


def show_parity(report: Report, smoke: bool) -> None:
    """The packed prior beside diffusers' padded blocks in float32: outputs and gradients, each ‖a−b‖/‖b‖."""
    from .padded import PaddedPrior, pad

    torch.backends.cuda.matmul.allow_tf32 = False
    lengths = np.array([2, 77, 3, 40, 12, 7, 25, 13, 13, 64])
    rows = []
    for preset in ("karlo", "kandinsky22"):
        config = PRESETS[preset] if CUDA else replace(PRESETS[preset], num_layers=2)
        torch.manual_seed(1)
        prior = Prior(config).to(DEVICE)
        padded = PaddedPrior.like(prior).to(DEVICE)
        noise, pooled, text = captions(lengths, config.embedding_dim)
        target = torch.randn(len(lengths), config.embedding_dim, device=DEVICE)
        theirs = padded(noise, pooled, *pad(text))
        (theirs - target).square().sum(1).mean().backward()
        expected = {name: p.grad for name, p in padded.named_parameters() if p.grad is not None}
        for precision, way in itertools.product(("float32", "bfloat16"), ("packed", "bins", "padded")):
            prior.zero_grad()
            padded.zero_grad()
            network: nn.Module = padded if way == "padded" else prior
            if precision == "bfloat16":
                network = copy.deepcopy(network)
            given = binned(text, lengths) if way == "bins" else text
            arguments = (noise, pooled, *pad(text)) if way == "padded" else (noise, pooled, given)
            if way == "padded" and precision == "float32":
                continue
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
                ours = network(*arguments)
            (ours.float() - target).square().sum(1).mean().backward()
            worst = max(
                (relative(p.grad, expected[name]), name)
                for name, p in network.named_parameters()
                if p.grad is not None and "to_k.bias" not in name  # which has no gradient but rounding
            )
            rows.append([preset, precision, way, f"{relative(ours, theirs):.1e}", f"{worst[0]:.1e} ({worst[1]})"])
    report.say(table(["prior", "precision", "way", "output", "worst gradient"], rows))


def show_feed(report: Report, smoke: bool) -> None:
    """The feed alone, memory-mapped and resident, on this device."""
    rows, batch = ((8_192 if smoke else 40_960), 1024) if CUDA else (256, 32)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        store = make_cache(Path(scratch) / "cache", rows, 1280)
        report.say(f"{rows:,} rows made in {time.perf_counter() - began:.0f} s")
        cells = []
        for name, resident in (("memory-mapped", False), ("resident", True)):
            with Batches(store, np.arange(rows), batch, seed=0, device=DEVICE, resident=resident) as batches:

                def run(batches: Batches = batches) -> None:
                    next(batches)

                for _ in range(8):
                    run()
                cells.append([name, f"{batch / wall(run, 40):,.0f}"])
        lengths = caption_lengths(batch, np.random.default_rng(0))
        began = time.perf_counter()
        for _ in range(10):
            Bins.of(lengths, specials=SPECIALS, text_positions=TOKENS)
        laid_out = (time.perf_counter() - began) / 10
        report.say(table(["feed", "samples/s"], cells))
        report.say(f"bins of a batch of {batch} on the host: {laid_out * 1e3:.2f} ms")


def show_encoder(report: Report, smoke: bool) -> None:
    from . import gpu_encoder

    gpu_encoder.main(report.out, 20.0 if smoke else 75.0)
    report.say((report.out / "gpu_encoder.md").read_text())


def show_decoders(report: Report, smoke: bool) -> None:
    from . import gpu_decoders

    gpu_decoders.main(report.out, 20.0 if smoke else 50.0)
    report.say((report.out / "gpu_decoders.md").read_text())


def show_duplicates(report: Report, smoke: bool) -> None:
    from . import gpu_duplicates

    found = gpu_duplicates.main(report.out, 20.0 if smoke else 75.0)
    columns = list(dict.fromkeys(name for case in found["cases"] for name in case))
    report.say(table(columns, [[case.get(name, "") for name in columns] for case in found["cases"]]))


def show_tests(report: Report, smoke: bool) -> None:
    """`pytest -m cuda` of every room that has such tests."""
    root = Path(__file__).parents[1]
    files = [str(p) for p in sorted((root / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "--tb=short", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=100)
    report.say((done.stdout + done.stderr)[-6000:])


SECTIONS: Sequence[tuple[str, Callable[[Report, bool], None], int]] = (
    ("device", show_device, 30),
    ("attention", show_attention, 60),
    ("parity", show_parity, 60),
    ("ten steps", show_ten_steps, 60),
    ("step", show_step, 180),
    ("tests", show_tests, 110),
    ("training", show_training, 170),
    ("feed", show_feed, 60),
    ("encoder", show_encoder, 100),
    ("decoders", show_decoders, 80),
    ("duplicates", show_duplicates, 100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write gpu.md to")
    parser.add_argument("--smoke", action="store_true", help="the shortest form of each section: about a minute")
    parser.add_argument("--only", default="", help="sections by name, separated by commas; default: all")
    parser.add_argument(
        "--results", type=Path, help="also write OUT/gpu.md to this RESULTS.md; --only none: that alone"
    )
    parser.add_argument(
        "--note", default="", help="a sentence for RESULTS.md: what a reader of these figures must know"
    )
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    report = Report(options.out)
    for name, run, limit in SECTIONS:
        if not wanted or name in wanted:
            report.section(name, lambda run=run: run(report, options.smoke), limit)
    if wanted != ["none"]:
        report.say(f"\ndone in {time.monotonic() - report.began:.0f} s")
    if options.results is not None:
        publish((options.out / "gpu.md").read_text(), options.results, options.note)


def publish(text: str, results: Path, note: str) -> None:
    """Write what OUT/gpu.md holds, and the note, as the section of its card to `results`."""
    machine = next(line for line in text.partition("## device")[2].splitlines()[1:] if line.strip())
    card = next((part.strip() for part in machine.split(",") if part.strip().startswith("NVIDIA")), "no GPU").split(
        ";"
    )[0]
    # Deeper headings: a section of RESULTS.md is what begins with two signs.
    body = re.sub(r"^## (.*?)( \(at \d+ s\))?$", r"### \1", text, flags=re.MULTILINE).partition("\ndone in")[0].strip()
    missing = [name for name, _, _ in SECTIONS if f"## {name}" not in text]
    if missing:
        body += f"\n\nNot measured here: {', '.join(missing)}."
    body += f"\n\n{note}" if note else ""
    settings = {"peak": f"{PEAK / 1e12:.0f} TFLOP/s, dense bfloat16"}
    record("python -m eclipse.bench.gpu", f"GPU, one {card.removeprefix('NVIDIA ')}", body, settings, machine, results)


if __name__ == "__main__":
    main()
