"""Everything that only a GPU can show, in one command: parity, tests, the trainer's step in its variants, the feed.

Each section prints and saves at once to OUT/gpu.md; a failing one leaves its traceback there and the next begins. The
most valuable come first. Without a GPU the same sections run small on the CPU, as a rehearsal: such rates say nothing.
Run: python -m eclipse.bench.gpu --out OUT [--smoke] [--only parity,step]   (full: about four minutes)
On a machine without this project's packages: bench/gpu_wheels.sh collects them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trainer.data.batches import Batches
from ..trainer.device_step import DeviceStep, Inputs, rows_for
from ..trainer.loss import Draw, Objective
from ..trainer.model import bins as bins_module
from ..trainer.model.attention import Layout, attend
from ..trainer.model.bins import BIN, Bins, bin_attention
from ..trainer.model.prior import PRESETS, PackedText, Prior, PriorConfig
from .made_cache import caption_lengths, make_cache
from .results import hardware, table

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PEAK = 989e12  # FLOP/s, dense bfloat16 of an H100 or H200 by its data sheet: what utilisation is a share of
OBJECTIVE = Objective(0.2, 0.01, "mean")
TOKENS, SPECIALS = 77, 3


class Report:
    """OUT/gpu.md, written line by line."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "gpu.md").open("a", buffering=1)
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")

    def section(self, name: str, run: Callable[[], None], limit: int) -> None:
        """Run one section, for at most `limit` seconds."""
        self.say(f"\n## {name} (at {time.monotonic() - self.began:.0f} s)\n")

        def over(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"{name} took more than {limit} s")

        signal.signal(signal.SIGALRM, over)
        signal.alarm(limit)
        try:
            run()
        except BaseException as error:  # whatever one section does, the others are still worth their time
            self.say("".join(traceback.format_exception(error))[-4000:])
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.alarm(0)
            if CUDA:
                torch.cuda.empty_cache()


def seconds(run: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Seconds a call takes on the device: the median of `repeats`."""
    for _ in range(warm_up):
        run()
    if not CUDA:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def flops_a_sample(config: PriorConfig, tokens: float) -> float:
    """FLOPs of forward and backward for a caption of `tokens` text tokens: no padding, causal attention halved."""
    width, dim, length = config.width, config.embedding_dim, tokens + config.additional_embeddings
    block = length * (24 * width**2 + 2 * length * width)
    last = length * 6 * width**2 + 18 * width**2 + 4 * length * width
    features = (tokens + 2) * 2 * dim * width  # no gradient of these inputs is wanted
    return 3 * ((config.num_layers - 1) * block + last + 2 * width * dim) + 2 * features


def captions(lengths: np.ndarray, dim: int, seed: int = 0, device: Any = DEVICE) -> tuple[Tensor, Tensor, PackedText]:
    """Noise, text embeddings, packed states of random features."""
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(device)
    noise, text = (torch.randn(len(lengths), dim, generator=generator, device=device) for _ in range(2))
    states = torch.randn(int(lengths.sum()), dim, generator=generator, device=device)
    return noise, text, PackedText(states, offsets)


def binned(text: PackedText, lengths: np.ndarray) -> PackedText:
    bins = Bins.of(lengths, specials=SPECIALS, text_positions=TOKENS)
    return replace(text, bins=bins.to(text.states.device))


# ---- sections ------------------------------------------------------------------------------------------------------


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
        return bin_attention(x, bins.caption, heads)

    def dense_way(x: Tensor) -> Tensor:
        q, k, v, allowed = bins_module._dense(x, bins.caption, heads)
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
        layout = Layout.of(offsets, int(lengths.sum()), specials=SPECIALS, text_positions=TOKENS)
        x = torch.randn(len(layout.source), 3 * heads * dim, device=DEVICE, dtype=dtype, requires_grad=True)
        g = torch.randn(len(x), heads * dim, device=DEVICE, dtype=dtype)

        def varlen(y: Tensor) -> Tensor:
            q, k, v = (part.contiguous() for part in y.chunk(3, dim=1))
            return attend(q, k, v, layout, heads)

        forward, both = seconds(lambda: varlen(x)), seconds(lambda: torch.autograd.grad(varlen(x), x, g))
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


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30))


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


def network_loss(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What DeviceStep compiles: the objective on a whole batch."""
    draw = Draw(inputs.noise, inputs.noise[:, :2])
    return OBJECTIVE(network, inputs.image, inputs.text, inputs.packed(), draw, inputs.text, 0)


def show_ten_steps(report: Report, smoke: bool) -> None:
    """Ten AdamW steps of one small network: the CPU's plain loop beside this device's ways, losses compared."""
    batch, config = 64, PRESETS["small"]
    lengths = [caption_lengths(batch, np.random.default_rng(k)) for k in range(10)]
    data = [
        (*captions(n, 128, seed=k, device="cpu"), torch.randn(batch, 128, generator=torch.Generator().manual_seed(k)))
        for k, n in enumerate(lengths)
    ]
    torch.manual_seed(0)
    start = Prior(config)

    def adamw(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3, fused=True)

    prior = copy.deepcopy(start)
    optimizer, reference = adamw(prior), []
    for noise, pooled, text, image in data:
        terms = OBJECTIVE(prior, image, pooled, text, Draw(noise, noise), pooled, 0)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reference.append(terms["loss"].item())
    report.say(f"CPU, float32: {[round(x, 4) for x in reference]}")
    ways = [("float32, eager", False, False, False)]
    if CUDA:
        ways += [("float32, captured", False, False, True), ("bfloat16, captured", True, False, True)]
        ways += [] if smoke else [("bfloat16, compiled and captured", True, True, True)]
    for name, half, compiled, captured in ways:
        runs = []
        for _ in range(2):
            prior = copy.deepcopy(start).to(DEVICE)
            average = copy.deepcopy(prior).requires_grad_(False)
            texts = max(int(n.sum()) for n in lengths)
            inputs = Inputs.empty(
                batch,
                128,
                texts=texts,
                rows=rows_for(texts + SPECIALS * batch),
                specials=SPECIALS,
                positions=TOKENS,
                device=DEVICE,
                dtype=torch.bfloat16 if half else torch.float32,
            )
            step = DeviceStep(
                prior,
                average,
                adamw(prior),
                network_loss,
                inputs,
                clip=1.0,
                half=half,
                compiled=compiled,
                captured=captured,
            )
            losses = []
            for (noise, pooled, text, image), n in zip(data, lengths, strict=True):
                inputs.noise.copy_(noise)
                inputs.fill(image, pooled, text.states, in_bins(n, inputs))
                step(rate=1e-3, decay=0.9)
                losses.append(step.figures[0].item())
            runs.append((losses, [p.detach().clone() for p in prior.parameters()]))
        same = all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
        off = max(abs(a - b) for a, b in zip(runs[0][0], reference, strict=True))
        report.say(f"{DEVICE.type}, {name}: losses differ by at most {off:.1e}; twice the same weights: {same}")


def in_bins(lengths: np.ndarray, inputs: Inputs) -> Bins:
    rows = len(inputs.bins.source) // BIN
    bins = Bins.of(lengths, specials=SPECIALS, text_positions=TOKENS, n_text=len(inputs.states), rows=rows)
    if len(bins.source) != len(inputs.bins.source):
        raise RuntimeError(f"{len(bins.source) // BIN} bins where {rows} were made")
    return bins


class StepBench:
    """One variant of the step on synthetic batches that lie on the device, `rotate` of them."""

    def __init__(self, preset: str, batch: int, rotate: int = 4) -> None:
        self.config = PRESETS[preset] if CUDA else replace(PRESETS[preset], num_layers=2)
        self.batch, dim = batch, self.config.embedding_dim
        rng = np.random.default_rng(0)
        self.lengths = [caption_lengths(batch, rng) for _ in range(rotate)]
        self.data = [captions(n, dim, seed=k) for k, n in enumerate(self.lengths)]
        self.image = [torch.randn(batch, dim, device=DEVICE) for _ in range(rotate)]
        self.tokens = float(np.mean(self.lengths))
        torch.manual_seed(0)
        self.prior = Prior(self.config).to(DEVICE)
        self.average = copy.deepcopy(self.prior).requires_grad_(False)
        trained = [p for p in self.prior.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)

    def eager(self, network: nn.Module | None = None, padded: bool = False) -> Callable[[], None]:
        """The plain loop under autocast, as it stood before: one update."""
        from .padded import PaddedPrior, pad

        network = network or self.prior
        if padded:
            network = PaddedPrior.like(self.prior).to(DEVICE)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer, turn = torch.optim.AdamW(parameters, lr=5e-5, fused=True), itertools.count()

        def predict(noise: Tensor, pooled: Tensor, text: PackedText) -> Tensor:
            return network(noise, pooled, *pad(text)) if padded else network(noise, pooled, text)

        def run() -> None:
            k = next(turn) % len(self.data)
            noise, pooled, text = self.data[k]
            with torch.autocast(DEVICE.type, torch.bfloat16):
                terms = OBJECTIVE(predict, self.image[k], pooled, text, Draw(noise, noise), pooled, 0)
            terms["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    def device_step(self, *, compiled: bool, captured: bool, loss: Any = network_loss) -> Callable[[], None]:
        texts = max(int(n.sum()) for n in self.lengths)
        inputs = Inputs.empty(
            self.batch,
            self.config.embedding_dim,
            texts=texts,
            rows=rows_for(texts + SPECIALS * self.batch),
            specials=SPECIALS,
            positions=TOKENS,
            device=DEVICE,
            dtype=torch.bfloat16,
        )
        step = DeviceStep(
            self.prior,
            self.average,
            self.optimizer,
            loss,
            inputs,
            clip=1.0,
            half=True,
            compiled=compiled,
            captured=captured,
        )
        bins = [in_bins(n, inputs).to(DEVICE) for n in self.lengths]
        states = [text.states.half() for _, _, text in self.data]
        turn = itertools.count()

        def run() -> None:
            k = next(turn) % len(self.data)
            inputs.noise.normal_()
            inputs.fill(self.image[k], self.data[k][1], states[k], bins[k])
            step(rate=5e-5, decay=0.999)

        return run


def show_step(report: Report, smoke: bool) -> None:
    """Samples/s of one device in each variant, synthetic batches on the device."""
    sizes = (1024,) if smoke else (1024, 4096, 16384)
    if not CUDA:
        sizes = (16,)
    columns = ["batch", "variant", "ms a step", "samples/s", "tokens/s", "MFU", "GiB", "first calls s"]
    for batch in sizes:
        variants = ["bins, captured"] if smoke else []
        variants += ["bins, compiled and captured"] if CUDA else ["bins"]
        if batch <= 4096:
            variants = ["packed, autocast (before)", *variants]
            variants += [] if smoke else ["bins", "padded to 77, diffusers' blocks, autocast"]
        for name in variants:
            try:
                bench = StepBench("kandinsky22", batch)
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                if name.startswith("bins"):
                    run = bench.device_step(compiled="compiled" in name, captured="captured" in name)
                else:
                    run = bench.eager(padded=name.startswith("padded"))
                for _ in range(6 if CUDA else 1):
                    run()
                if CUDA:
                    torch.cuda.synchronize()
                first = time.perf_counter() - began
                took = wall(run, 20 if batch <= 4096 else 8)
                rate = batch / took
                share = flops_a_sample(bench.config, bench.tokens) * rate / PEAK
                memory = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
                numbers = [f"{took * 1e3:.2f}", f"{rate:,.0f}", f"{rate * (bench.tokens + SPECIALS):,.0f}"]
                cells = [batch, name, *numbers, f"{share:.1%}", f"{memory:.1f}", f"{first:.0f}"]
                report.say(table(columns, [cells]) if columns else "| " + " | ".join(map(str, cells)) + " |")
                columns = []
                if CUDA and "compiled" in name and batch == sizes[0]:
                    profile(report, run)
                    columns = ["batch", "variant", "ms a step", "samples/s", "tokens/s", "MFU", "GiB", "first calls s"]
            except TimeoutError:
                raise
            except Exception:
                report.say(f"{name}, batch {batch}:\n{traceback.format_exc()[-2500:]}")
            if CUDA:
                torch.cuda.empty_cache()


def wall(run: Callable[[], None], steps: int) -> float:
    """Seconds a step takes, the host's part included, when nothing waits between steps."""
    if not CUDA:
        steps = 1
    else:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


PARTS = (
    ("attention", ("_forward", "backward_kernel", "flash", "forward", "fmha")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "sm90")),
    ("optimizer, average, clipping", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("compiled elementwise", ("triton_",)),
    ("copies", ("memcpy", "memset", "copy")),
)


def profile(report: Report, run: Callable[[], None], steps: int = 3) -> None:
    """Device time a step by kind of kernel, and the ten longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in seen.events() or ():
        if str(event.device_type).endswith("CUDA"):
            times[event.name][0] += event.device_time / steps  # µs
            times[event.name][1] += 1 / steps
    parts: dict[str, float] = defaultdict(float)
    for name, (took, _) in times.items():
        kind = next((part for part, words in PARTS if any(w in name.lower() for w in words)), "other")
        parts[kind] += took
    report.say("\n" + table(["part of a step", "µs"], [[n, f"{t:.0f}"] for n, t in sorted(parts.items())]))
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:16]
    report.say(
        "\n" + table(["kernel", "µs a step", "calls"], [[n[:90], f"{t:.0f}", f"{c:.0f}"] for n, (t, c) in longest])
    )


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
    """Forward passes of the published image towers, random weights, bf16."""
    import open_clip

    rows = []
    for model, batch in (("ViT-L-14", 256),) if smoke else (("ViT-L-14", 256), ("ViT-bigG-14", 128)):
        with torch.device(DEVICE):
            clip: Any = open_clip.create_model(model, pretrained=None, precision="bf16")
        visual = clip.visual.eval()
        images = torch.randn(batch if CUDA else 1, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
        with torch.inference_mode():
            took = seconds(lambda visual=visual, images=images: visual(images), repeats=5, warm_up=2)
        rows.append([model, len(images), f"{len(images) / took:,.0f}"])
        del visual, clip
    report.say(table(["image tower, bf16, eager", "batch", "images/s"], rows))


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
    ("feed", show_feed, 60),
    ("encoder", show_encoder, 90),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write gpu.md to")
    parser.add_argument("--smoke", action="store_true", help="the shortest form of each section: about a minute")
    parser.add_argument("--only", default="", help="sections by name, separated by commas; default: all")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    report = Report(options.out)
    for name, run, limit in SECTIONS:
        if not wanted or name in wanted:
            report.section(name, lambda run=run: run(report, options.smoke), limit)
    report.say(f"\ndone in {time.monotonic() - report.began:.0f} s")


if __name__ == "__main__":
    main()
