"""The trainer's step on a GPU, its variants beside a padded peer, and `eclipse train` whole. Called by bench/gpu.py."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.core.card import Card
from ..trainer import steps as steps_module
from ..trainer.device_step import DeviceStep
from ..trainer.guard import Guard
from ..trainer.loss import Draw
from ..trainer.model.prior import PRESETS, PackedText, Prior
from ..trainer.pace import flops_a_sample
from ..trainer.stage import work
from ..trainer.steps import COMPILED_FROM
from .gpu_tools import (
    CUDA,
    DEVICE,
    OBJECTIVE,
    PEAK,
    SPECIALS,
    Report,
    captions,
    classes_of,
    network_loss,
    wall,
)
from .made_cache import caption_lengths, made_job
from .results import table


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
            step = DeviceStep(
                prior,
                average,
                (adamw(prior),),
                network_loss,
                Guard(),
                clip=1.0,
                half=half,
                compiled=compiled,
                captured=captured,
            )
            losses = []
            for (noise, pooled, text, image), n in zip(data, lengths, strict=True):
                image, pooled, states = (x.to(DEVICE) for x in (image, pooled, text.states))
                bins = classes_of(lengths, batch).lay_out(n).to(DEVICE)
                step(
                    image,
                    pooled,
                    states,
                    bins,
                    rate=1e-3,
                    decay=0.9,
                    noise=lambda memory, noise=noise: memory.copy_(noise),
                )
                losses.append(step.figures[0].item())
            runs.append((losses, [p.detach().clone() for p in prior.parameters()]))
        same = all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
        off = max(abs(a - b) for a, b in zip(runs[0][0], reference, strict=True))
        report.say(f"{DEVICE.type}, {name}: losses differ by at most {off:.1e}; twice the same weights: {same}")


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
        step = DeviceStep(
            self.prior,
            self.average,
            (self.optimizer,),
            loss,
            Guard(),
            clip=1.0,
            half=True,
            compiled=compiled,
            captured=captured,
        )
        classes = classes_of(self.lengths, self.batch)
        bins = [classes.lay_out(n).to(DEVICE) for n in self.lengths]
        states = [text.states.half() for _, _, text in self.data]
        turn = itertools.count()

        def run() -> None:
            k = next(turn) % len(self.data)
            given = self.image[k], self.data[k][1], states[k], bins[k]
            step(*given, rate=5e-5, decay=0.999, noise=lambda memory: memory.normal_())

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


def show_training(report: Report, smoke: bool) -> None:
    """`eclipse train` itself on a made cache: rate, utilisation, and what waits for data."""
    rows, steps = ((8_192, 60) if smoke else (40_960, 800)) if CUDA else (256, 4)
    preset, card = "kandinsky22" if CUDA else "tiny", Card.load("coco")
    steps_module.COMPILED_FROM = 0 if CUDA else COMPILED_FROM
    sizes = (1024, 4096) if CUDA else (16,)
    columns = ["eclipse train", "batch", "samples/s", "tokens/s", "MFU", "waiting for data", "seconds, all told"]
    dim = PRESETS[preset].embedding_dim
    with tempfile.TemporaryDirectory() as scratch:
        for batch, (name, resident) in itertools.product(sizes, (("memory-mapped", False), ("resident", True))):
            count = max(4, steps * sizes[0] // batch)
            options = {"steps": count, "batch_size": batch, "validate_every": count, "checkpoint_every": count}
            job = made_job(Path(scratch), rows, dim, preset=preset, card=card, resident=resident, **options)
            found = work(replace(job, directory=Path(scratch) / f"{name}-{batch}"), not CUDA, True)
            used = found["model_flop_utilisation"]
            rates = [f"{found[key]:,.0f}" for key in ("samples_per_second", "tokens_per_second")]
            share = "" if used is None else f"{used:.1%}"
            cells = [name, batch, *rates, share, f"{found['data_wait_share']:.2%}", f"{found['seconds']:.0f}"]
            report.say(table(columns, [cells]) if columns else "| " + " | ".join(map(str, cells)) + " |")
            columns = []
