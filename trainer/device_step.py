"""One training step that never waits for the device: compiled, captured as a CUDA graph. Used by bench/gpu.py.

What decides on the host elsewhere is decided on the device here: whether a step is skipped (guard.py's rule), and the
learning rate is a tensor that the host fills. The masters are float32; with half, forward and backward run on a copy of
the network in bfloat16 that is made anew after every update, so that no product casts its weights.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .guard import MEMORY, SETTLING, SPIKE
from .model.bins import BIN, Bins
from .model.transformer import PackedText

FIGURES = ("loss", "projection", "contrastive", "gradient_norm", "accepted")
WARM_UP = 3  # steps before capturing: kernels compile, libraries allocate


@dataclass
class Inputs:
    """A batch in memory that stays where it is: image and text embedding, noise (B, D) float32; states (N, W); bins."""

    image: Tensor
    text: Tensor
    noise: Tensor
    states: Tensor
    bins: Bins

    @classmethod
    def empty(
        cls, batch: int, dim: int, *, texts: int, rows: int, specials: int, positions: int, device: Any, dtype: Any
    ) -> Inputs:
        """For batches of at most `texts` text tokens, in at most `rows` bins."""
        image, text, noise = torch.zeros(3, batch, dim, device=device).unbind()
        none = Bins.of(np.ones(batch, np.int64), specials=specials, text_positions=positions, n_text=texts, rows=rows)
        return cls(image, text, noise, torch.zeros(texts, dim, dtype=dtype, device=device), none.to(device))

    def fill(self, image: Tensor, text: Tensor, states: Tensor, bins: Bins) -> None:
        """Copy a batch here; bins may still lie in pinned host memory."""
        self.image.copy_(image, non_blocking=True)
        self.text.copy_(text, non_blocking=True)
        self.states[: len(states)].copy_(states, non_blocking=True)
        self.states[len(states) :].zero_()  # nobody's, but a NaN left there would reach the gradient as 0 · NaN
        for name in ("source", "place", "positions", "caption", "last", "ends"):
            getattr(self.bins, name).copy_(getattr(bins, name), non_blocking=True)

    def packed(self) -> PackedText:
        return PackedText(self.states, self.bins.last, self.bins)


def rows_for(tokens: int) -> int:
    """Bins that hold captions of so many tokens in all, with some to spare: first-fit fills about 96 %."""
    return -(-int(tokens * 1.05) // BIN) + 4


@dataclass
class DeviceGuard:
    """guard.Guard's fields as tensors."""

    device: Any
    mean: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    skipped: Tensor = field(init=False)
    in_a_row: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.seen, self.skipped, self.in_a_row = torch.zeros(4, device=self.device).unbind()

    def accepts(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """() bool: whether this step's update may be made."""
        finite = loss.isfinite() & gradient_norm.isfinite()
        ok = finite & ((self.seen < SETTLING) | (loss <= SPIKE * self.mean))
        new = torch.where(self.seen == 0, loss, MEMORY * self.mean + (1 - MEMORY) * loss)
        self.mean.copy_(torch.where(ok, new, self.mean))
        self.seen.add_(ok)
        self.skipped.add_(~ok)
        self.in_a_row.copy_(torch.where(ok, torch.zeros_like(self.in_a_row), self.in_a_row + 1))
        return ok


class DeviceStep:
    """Call it once a batch was filled in; figures (5,) on the device are those of FIGURES.

    loss: (network, inputs) → terms, "loss" first. average: the moving average's network, decay its tensor ().
    """

    def __init__(
        self,
        prior: nn.Module,
        average: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Inputs], dict[str, Tensor]],
        inputs: Inputs,
        *,
        clip: float,
        half: bool,
        compiled: bool = True,
        captured: bool = True,
    ) -> None:
        self.inputs, self.optimizer, self.clip, self.half = inputs, optimizer, clip, half
        self.working = copy.deepcopy(prior).bfloat16() if half else prior
        device = inputs.image.device
        self.rate, self.decay = torch.zeros((), device=device), torch.zeros((), device=device)
        self.guard = DeviceGuard(device)
        self.figures = torch.zeros(len(FIGURES), device=device)
        self._masters: list[Tensor] = [p for p in prior.parameters() if p.requires_grad]
        self._weights: list[Tensor] = [p for p in self.working.parameters() if p.requires_grad]
        self._averaged: list[Tensor] = [
            a for a, p in zip(average.parameters(), prior.parameters(), strict=True) if p.requires_grad
        ]
        self._loss = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss
        for group in optimizer.param_groups:
            group["lr"] = self.rate
            group["capturable"] = device.type == "cuda"
        self._graph = None
        # Of its own: what autograd did on the default stream would bind the capture to it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._captured = captured and device.type == "cuda"
        self._steps = 0

    def __call__(self, *, rate: float, decay: float) -> None:
        self.rate.fill_(rate)
        self.decay.fill_(decay)
        if self._graph is not None:
            self._graph.replay()
        elif self._captured and self._steps >= WARM_UP:
            self._capture()
            assert self._graph is not None
            self._graph.replay()
        elif self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            self._run()
        self._steps += 1

    def _capture(self) -> None:
        for parameter in self._weights:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._run()

    def _run(self) -> None:
        for parameter in self._weights:
            parameter.grad = None
        terms = self._loss(self.working, self.inputs)
        terms["loss"].backward()
        if self.half:
            for master in self._masters:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
            of_masters, of_weights = (
                [x.grad for x in parameters if x.grad is not None] for parameters in (self._masters, self._weights)
            )
            torch._foreach_copy_(of_masters, of_weights)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self.clip)
        ok = self.guard.accepts(terms["loss"].detach(), norm)
        self.optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]  # the seam that GradScaler uses: no update
        self.optimizer.step()
        share = (1 - self.decay) * ok
        with torch.no_grad():
            away = torch._foreach_sub(self._masters, self._averaged)
            torch._foreach_mul_(away, share)
            torch._foreach_add_(self._averaged, away)
            if self.half:
                torch._foreach_copy_(self._weights, self._masters)
        self.figures.copy_(torch.stack([*(t.detach() for t in terms.values()), norm, ok.float()]))
