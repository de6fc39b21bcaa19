"""How fast training goes: samples, tokens and FLOPs a second, and the share of it spent waiting. Used by loop.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .data.feeds import Batch
from .distributed import DistEnv
from .model.transformer import PriorConfig

EVERY_S = 2.0  # between two remarks beside the progress bar
MEASURED = 512  # rows and columns of the product that says what a CPU can do
SLOW, SLOW_AFTER_S = 0.04, 20.0  # utilisation of a CPU that is far below what small products lose; when to judge it
# Dense bfloat16 products a second by the makers' data sheets, by what the card's name contains: the first that fits.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def flops_a_sample(config: PriorConfig, tokens: float) -> float:
    """FLOPs of forward and backward for a caption of `tokens` text tokens: no padding, causal attention halved."""
    width, dim, length = config.width, config.embedding_dim, tokens + config.additional_embeddings
    block = length * (24 * width**2 + 2 * length * width)
    last = length * 6 * width**2 + 18 * width**2 + 4 * length * width
    features = (tokens + 2) * 2 * dim * width  # no gradient of these inputs is wanted
    return 3 * ((config.num_layers - 1) * block + last + 2 * width * dim) + 2 * features


def peak_flops(device: torch.device) -> float | None:
    """What model-FLOP utilisation is a share of: a card's data sheet, None if it is not in the table; of a CPU what one
    large product in float32 reaches with the threads that this process has.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), None)
    square = torch.ones(MEASURED, MEASURED)
    best = float("inf")
    for _ in range(5):  # the first one prepares the product
        began = time.perf_counter()
        torch.mm(square, square)
        best = min(best, time.perf_counter() - began)
    return 2 * MEASURED**3 / best


class Idleness:
    """How long a GPU had nothing to do between one step and the next, by its own clock; nobody waits for it.

    The host of a GPU queues a step while the one before runs: what it spends on a batch says nothing about the device.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None  # the end of the step before
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # end of a step, start of the next
        self._seconds = 0.0

    def begins(self) -> None:
        """A step is about to be queued; what it has to wait for, its batch's copies, is queued already."""
        if self._last is not None:
            self._pairs.append((self._last, _mark()))

    def ends(self) -> None:
        """The step is queued."""
        self._last = _mark()

    def forget(self) -> None:
        """What comes before the next step is no gap between steps."""
        self._last = None

    def seconds(self) -> float:
        """Of all gaps that are over."""
        while self._pairs and self._pairs[0][1].query():
            end, start = self._pairs.popleft()
            self._seconds += end.elapsed_time(start) / 1000
        return self._seconds


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Pace:
    """Counts from the first batch on, and not while the loop is away to validate, verify or save.

    Rates are those of all processes together, by this process's share; utilisation is a device's own. Waiting for data
    is what the host waits on a CPU, and how long the device is idle between steps on a GPU.
    """

    def __init__(self, config: PriorConfig, world: DistEnv) -> None:
        self._config, self._world, self._peak = config, world, peak_flops(world.device)
        self._idle = Idleness() if world.device.type == "cuda" else None
        self._began = self._said = time.monotonic()
        self._first: tuple[float, float] | None = None  # when the first step was under way, and what it had waited
        self._waited = self._away = 0.0
        self._samples = self._tokens = 0

    def begins(self) -> None:
        """The next batch is here."""
        if self._idle is not None:
            self._idle.begins()

    def took(self, batch: Batch, wait_seconds: float) -> None:
        """A step on this batch is under way; wait_seconds: what was spent in waiting for batches so far."""
        if self._idle is not None:
            self._idle.ends()
            wait_seconds = self._idle.seconds()
        if self._first is None:
            self._first = time.monotonic(), wait_seconds
            return
        self._waited = wait_seconds - self._first[1]
        self._samples += len(batch.rows)
        self._tokens += len(batch.text.states)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around what is no training."""
        began = time.monotonic()
        yield
        if self._idle is not None:
            self._idle.forget()
        if self._first is not None:
            self._away += time.monotonic() - began

    def is_news(self) -> bool:
        """Whether something was said long enough ago."""
        if time.monotonic() - self._said < EVERY_S:
            return False
        self._said = time.monotonic()
        return True

    def summary(self) -> dict[str, Any]:
        """seconds: of everything; the other figures are of training alone."""
        now = time.monotonic()
        training = now - self._first[0] - self._away if self._first else 0.0
        rates: dict[str, Any] = dict.fromkeys(("samples_per_second", "tokens_per_second", "tflops_per_second"), 0.0)
        if self._samples:
            size, tokens = self._world.size, self._tokens / self._samples
            flops = flops_a_sample(self._config, tokens) * self._samples * size / training
            rates = {
                "samples_per_second": round(self._samples * size / training, 1),
                "tokens_per_second": round(self._tokens * size / training, 1),
                "tflops_per_second": round(flops / 1e12, 4),
            }
        utilisation = rates["tflops_per_second"] * 1e12 / self._world.size / self._peak if self._peak else None
        return {
            "seconds": round(now - self._began, 2),
            "training_seconds": round(training, 2),
            **rates,
            "model_flop_utilisation": None if utilisation is None else round(utilisation, 4),
            "data_wait_share": round(self._waited / training, 4) if training else 0.0,
        }

    def slowness(self) -> str:
        """What to say if a CPU gets far less done than its own arithmetic allows; empty otherwise."""
        now = self.summary()
        used = now["model_flop_utilisation"]
        if self._peak is None or self._world.device.type != "cpu" or now["training_seconds"] < SLOW_AFTER_S:
            return ""
        if used >= SLOW:
            return ""
        return (
            f"training is slower than expected: it does {used:.1%} of the {self._peak / 1e9:,.0f} GFLOP/s that this CPU"
            " multiplies, where an idle one does a quarter; is there other work on it, or memory that is swapped?"
        )

    def __str__(self) -> str:
        now = self.summary()
        used = now["model_flop_utilisation"]
        share = f"{now['tflops_per_second']:.3g} TFLOP/s" if used is None else f"MFU {used:.0%}"
        return f"{now['tokens_per_second']:,.0f} tokens/s, {share}"
