"""One training step that never waits for the device: compiled, captured as a CUDA graph. Used by steps.py.

What is decided on the host elsewhere is decided on the device here: whether a step is skipped (guard.py's rule), and
the learning rate is a tensor that the host fills. The masters are float32; with half, forward and backward run on a
copy of the network in bfloat16 that is made anew after every update, so that no product casts its weights.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .guard import MEMORY, SETTLING, SPIKE, Guard
from .model.bins import Bins
from .model.transformer import PackedText

FIGURES = ("loss", "projection", "contrastive", "gradient_norm", "accepted")
WARM_UP = 3  # calls before capturing: kernels compile, libraries and optimizers allocate


@dataclass
class Inputs:
    """A batch in memory that stays where it is: image and text embedding (B, D), noise (B, D) or (B, K, D), all
    float32; states (N, W); bins.
    """

    image: Tensor
    text: Tensor
    noise: Tensor
    states: Tensor
    bins: Bins

    @classmethod
    def like(cls, image: Tensor, states: Tensor, bins: Bins, *, draws: int, dtype: torch.dtype) -> Inputs:
        """For batches of the shapes of this one: image (B, D), states (≤ N, W). dtype: of the states here."""
        device = image.device
        embedding, text = torch.zeros(2, *image.shape, device=device).unbind()
        count, dim = image.shape
        noise = torch.zeros((count, dim) if draws == 1 else (count, draws, dim), device=device)
        room = torch.zeros(bins.texts, states.shape[1], dtype=dtype, device=device)
        # Clones: bins that lie on the device already are the caller's, and shall not change under it.
        own = Bins(*(x.to(device).clone() for x in bins.tensors()), texts=bins.texts)
        return cls(embedding, text, noise, room, own)

    def fill(self, image: Tensor, text: Tensor, states: Tensor, bins: Bins) -> None:
        """Copy a batch here, whatever its float dtype; bins may still lie in pinned host memory."""
        self.image.copy_(image, non_blocking=True)
        self.text.copy_(text, non_blocking=True)
        self.states[: len(states)].copy_(states, non_blocking=True)
        self.states[len(states) :].zero_()  # nobody's, but a NaN left there would reach the gradient as 0 · NaN
        for mine, given in zip(self.bins.tensors(), bins.tensors(), strict=True):
            mine.copy_(given, non_blocking=True)

    def packed(self) -> PackedText:
        return PackedText(self.states, self.bins.last, self.bins)


class DeviceGuard:
    """guard.Guard as four numbers on the device: mean, seen, skipped, in a row."""

    def __init__(self, device: torch.device, guard: Guard) -> None:
        values = (guard.mean, guard.seen, guard.skipped, guard.in_a_row)
        self.state = torch.tensor(values, dtype=torch.float32, device=device)

    def accepts(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """() bool: whether this step's update may be made."""
        mean, seen, skipped, in_a_row = self.state.unbind()
        finite = loss.isfinite() & gradient_norm.isfinite()
        ok = finite & ((seen < SETTLING) | (loss <= SPIKE * mean))
        new = torch.where(seen == 0, loss, MEMORY * mean + (1 - MEMORY) * loss)
        none = torch.zeros_like(seen)
        after = (torch.where(ok, new, mean), seen + ok, skipped + ~ok, torch.where(ok, none, in_a_row + 1))
        self.state.copy_(torch.stack(after))
        return ok


class DeviceStep:
    """Call it with a batch: `figures` then holds FIGURES and the guard's state, (9,) on the device, as soon as the
    device gets there.

    loss: (network, inputs) → terms, "loss" first. Batches of another size class (model/bins.py) get memory and a graph
    of their own; all share weights, optimizers and guard.
    """

    def __init__(
        self,
        prior: nn.Module,
        average: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[nn.Module, Inputs], dict[str, Tensor]],
        guard: Guard,
        *,
        clip: float,
        half: bool,
        draws: int = 1,
        compiled: bool = True,
        captured: bool = True,
    ) -> None:
        self.optimizers, self.clip, self.half, self.draws = optimizers, clip, half, draws
        self.working = copy.deepcopy(prior).bfloat16() if half else prior
        device = next(prior.parameters()).device
        self.rate, self.decay, self._dry = torch.zeros(3, device=device).unbind()
        self.guard = DeviceGuard(device, guard)
        self.figures = torch.zeros(len(FIGURES) + 4, device=device)
        self._masters: list[Tensor] = [p for p in prior.parameters() if p.requires_grad]
        self._weights: list[Tensor] = [p for p in self.working.parameters() if p.requires_grad]
        self._averaged: list[Tensor] = [
            a for a, p in zip(average.parameters(), prior.parameters(), strict=True) if p.requires_grad
        ]
        self._plain = loss
        self._loss = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss
        on_gpu = device.type == "cuda"
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate
                if "capturable" in group:
                    group["capturable"] = on_gpu
        # Of its own: what autograd did on the default stream would bind the capture to it.
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._captured = captured and on_gpu
        self._known: dict[tuple[int, ...], tuple[Inputs, Any]] = {}

    def __call__(
        self, image: Tensor, text: Tensor, states: Tensor, bins: Bins, *, rate: float, decay: float, noise: Any
    ) -> None:
        """noise: fills a tensor (B, D) given to it, in place."""
        size = (len(image), bins.texts, len(bins.source))
        fresh = size not in self._known
        if fresh:
            dtype = torch.bfloat16 if self.half else torch.float32
            self._known[size] = (Inputs.like(image, states, bins, draws=self.draws, dtype=dtype), None)
        inputs, graph = self._known[size]
        self.rate.fill_(rate)
        self.decay.fill_(decay)
        noise(inputs.noise)
        inputs.fill(image, text, states, bins)
        if fresh:
            graph = self._prepare(inputs)
            self._known[size] = (inputs, graph)
        if graph is not None:
            graph.replay()
        else:
            self._beside(lambda: self._run(inputs))

    def _beside(self, run: Callable[[], None]) -> None:
        """On the stream that captures, where there is one."""
        if self._stream is None:
            return run()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _prepare(self, inputs: Inputs) -> Any:
        """Warm up without leaving a trace, then capture: every step that counts is a replay, after a resume too."""
        before = self.guard.state.clone()
        self._dry.fill_(1)
        try:
            self._beside(lambda: self._run(inputs))
        except Exception as error:
            if self._loss is self._plain:
                raise
            # Above all where there is no C compiler. What was not the compiler's fault fails again at once.
            warnings.warn(f"training goes on without compiling, which failed: {str(error)[:300]}", stacklevel=2)
            self._loss = self._plain
        for _ in range(WARM_UP - 1):
            self._beside(lambda: self._run(inputs))
        self._dry.zero_()
        self.guard.state.copy_(before)
        if not self._captured:
            return None
        for parameter in self._weights:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        # thread_local: the feed's threads allocate and copy meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._run(inputs)
        return graph

    def _run(self, inputs: Inputs) -> None:
        for parameter in self._weights:
            parameter.grad = None
        terms = self._loss(self.working, inputs)
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
        counts = ok & (self._dry == 0)
        for optimizer in self.optimizers:
            optimizer.found_inf = (~counts).float()  # type: ignore[attr-defined]  # the seam that GradScaler uses
            optimizer.step()
        share = (1 - self.decay) * counts
        with torch.no_grad():
            away = torch._foreach_sub(self._masters, self._averaged)
            torch._foreach_mul_(away, share)
            torch._foreach_add_(self._averaged, away)
            if self.half:
                torch._foreach_copy_(self._weights, self._masters)
        scalars = torch.stack([*(t.detach() for t in terms.values()), norm, ok.float()])
        self.figures.copy_(torch.cat([scalars, self.guard.state]))
