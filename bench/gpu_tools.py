"""What the sections of bench/gpu.py share: the report, clocks, made batches."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..trainer.device_step import Inputs
from ..trainer.loss import Draw, Objective
from ..trainer.model.bins import Bins, SizeClasses
from ..trainer.model.prior import PackedText

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PEAK = 989e12  # FLOP/s, dense bfloat16 of an H100 or H200 by its data sheet: what utilisation is a share of
OBJECTIVE = Objective(0.2, 0.01, "mean")
TOKENS, SPECIALS = 77, 3


class Report:
    """OUT/gpu.md, written line by line."""

    def __init__(self, out: Path) -> None:
        self.out = out
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


def classes_of(lengths: Sequence[np.ndarray], batch: int) -> SizeClasses:
    return SizeClasses.of(np.concatenate(lengths), batch, specials=SPECIALS, text_positions=TOKENS)


def network_loss(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What DeviceStep compiles: the objective on a whole batch."""
    draw = Draw(inputs.noise, inputs.noise[:, :2])
    return OBJECTIVE(network, inputs.image, inputs.text, inputs.packed(), draw, inputs.text, 0)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30))
