"""One update from one batch, in the two ways there are: decided on the host, or on the device. Called by loop.py.

Both take a batch and hand back the figures of the steps that are known to be done by then: on the host that is this
step, on the device the one before, so that nobody waits for it. `settle` waits for what is still under way.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..pipeline.core.seeds import stream_seed
from .data.feeds import Batch
from .device_step import FIGURES, DeviceStep, Inputs
from .guard import Guard
from .loss import Draw, Objective
from .schedule import learning_rate
from .stopping import StopSignals

if TYPE_CHECKING:
    from .run import Run

COMPILED_FROM = 10_000  # steps of a run from which compiling, some ten seconds to a minute, is worth its time


@dataclass(frozen=True)
class Done:
    """A step that was made or skipped: its number from 1, and its figures."""

    step: int
    figures: dict[str, float]


class Steps(Protocol):
    """stopped: the signal that any process received before the last step, 0 if none."""

    stopped: int

    def take(self, batch: Batch) -> list[Done]: ...

    def settle(self) -> list[Done]: ...


def open_steps(run: Run, stop: StopSignals) -> Steps:
    return DeviceSteps(run, stop) if on_device(run) else HostSteps(run, stop)


def on_device(run: Run) -> bool:
    """Whether this run's steps are captured: on one GPU, for batches that fit whole and whose captions stay theirs.

    A CPU has nothing to capture, and computes captions of like lengths together at less cost than bins. Several GPUs
    exchange gradients through DistributedDataParallel, which decides on the host.
    """
    whole = run.world.size == 1 and run.job.options.microbatch is None
    unchanged = isinstance(run.objective, Objective) and not run.objective.caption_dropout
    return run.world.device.type == "cuda" and whole and unchanged


def rate_of(run: Run) -> float:
    """The learning rate of the step to come."""
    options = run.job.options
    return learning_rate(
        run.step,
        peak=options.learning_rate,
        warmup=options.warmup_steps,
        steps=options.steps,
        restarts=options.restarts,
    )


def decay_of(run: Run) -> float:
    """The moving average's decay at the step to come: it grows from 0.1, so that the start is soon forgotten."""
    return min(run.job.options.ema_decay, (1 + run.step) / (10 + run.step))


def generator_of(run: Run) -> torch.Generator:
    """The random numbers of this step's global batch: they follow from seed and step, however many processes share."""
    seed = stream_seed("training draw", run.job.options.seed, run.step)
    return torch.Generator(run.world.device).manual_seed(seed)


def noise_shape(run: Run, count: int, dim: int) -> tuple[int, ...]:
    """(B, D), or (B, K, D) with several draws per caption."""
    draws = run.job.options.draws
    return (count, dim) if draws == 1 else (count, draws, dim)


class HostSteps:
    """The host reads the figures of every step, the same on all processes, and decides whether to update."""

    def __init__(self, run: Run, stop: StopSignals) -> None:
        self.run, self.stop, self.stopped = run, stop, 0
        # Walking through all modules for them costs a small prior milliseconds a step.
        self._parameters = list(run.prior.parameters())
        self._weights, self._averaged = ([p.detach() for p in n.parameters()] for n in (run.prior, run.average))

    def take(self, batch: Batch) -> list[Done]:
        """One update from a global batch, of which `batch` is this process's share."""
        run, options = self.run, self.run.job.options
        terms = self.accumulate_gradient(batch)
        trained = [p for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        values = torch.stack([*terms.values(), norm])
        # Every process sees the same means, and so comes to the same decisions.
        shared = run.world.mean(torch.cat([values, values.new_tensor(self.stop.flags())])).tolist()
        self.stopped = self.stop.signal_of(shared[-2:])
        figures = dict(zip([*terms, "gradient_norm"], shared[:-2], strict=True))
        rate = rate_of(run)
        accepted = run.guard.accepts(figures["loss"], figures["gradient_norm"])
        if accepted:
            if figures["gradient_norm"] > options.grad_clip_norm:  # most are not: then nothing is multiplied by one
                torch.nn.utils.clip_grads_with_norm_(trained, options.grad_clip_norm, norm)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            get_ema_multi_avg_fn(decay_of(run))(self._averaged, self._weights, run.step)
        for parameter in self._parameters:
            parameter.grad = None
        run.step += 1
        run.guard.check(run.step, figures["loss"], figures["gradient_norm"])
        return [Done(run.step, {**figures, "learning_rate": rate, "skipped": float(not accepted)})]

    def settle(self) -> list[Done]:
        """Nothing is ever under way."""
        return []

    def accumulate_gradient(self, batch: Batch) -> dict[str, Tensor]:
        """Backward through the batch, in pieces of options.microbatch rows if that is set; the losses' means over it.

        Each piece is contrasted with the texts of the whole global batch, so pieces change nothing but rounding.
        """
        run = self.run
        size, texts = len(batch.rows), run.world.gather(batch.text_embedding)
        generator = generator_of(run)
        noise = torch.randn(noise_shape(run, *texts.shape), generator=generator, device=texts.device)
        draw = Draw(noise, torch.rand(len(texts), 2, generator=generator, device=texts.device))
        offset = run.world.rank * size
        means: dict[str, Tensor] = {}
        for start in range(0, size, piece_size := run.job.options.microbatch or size):
            end = min(start + piece_size, size)
            own = slice(offset + start, offset + end)
            with nullcontext() if end == size else self.gradients_kept():
                terms = run.objective(
                    run.predict,
                    batch.image_embedding[start:end],
                    batch.text_embedding[start:end],
                    batch.text if end - start == size else batch.text.take(start, end),
                    Draw(draw.noise[own], draw.uniform[own]),
                    texts,
                    first=offset + start,
                )
                share = (end - start) / size
                (terms["loss"] * share).backward()
            means = {name: means.get(name, 0) + share * term.detach() for name, term in terms.items()}
        return means

    def gradients_kept(self) -> Any:
        """Gradients stay on their process for now: they are exchanged with the last piece."""
        model = self.run.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


class DeviceSteps:
    """The device decides; the host hands over a batch and a learning rate, and reads what became of the step before.

    The run's guard is the device's as of the last step that was read; after `settle` it is up to date, and so are the
    weights and the optimizers, for a checkpoint.
    """

    def __init__(self, run: Run, stop: StopSignals) -> None:
        self.run, self.stop, self.stopped = run, stop, 0
        self._under_way: deque[tuple[int, float, Tensor, Any]] = deque()
        objective, options = run.objective, run.job.options
        on_gpu = run.world.device.type == "cuda"

        def loss(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
            draw = Draw(inputs.noise, inputs.text[:, :2])  # whose uniform numbers nobody wants here
            return objective(network, inputs.image, inputs.text, inputs.packed(), draw, inputs.text, first=0)

        self._step = DeviceStep(
            run.prior,
            run.average,
            run.optimizers,
            loss,
            run.guard,
            clip=options.grad_clip_norm,
            half=run.half,
            draws=options.draws,
            compiled=on_gpu and options.steps >= COMPILED_FROM,
        )

    def take(self, batch: Batch) -> list[Done]:
        """Have the device make one update, and read those before it."""
        run, rate, generator = self.run, rate_of(self.run), generator_of(self.run)
        self._step(
            batch.image_embedding,
            batch.text_embedding,
            batch.text.states,
            batch.text.bins,
            rate=rate,
            decay=decay_of(run),
            noise=lambda memory: memory.normal_(generator=generator),
        )
        run.step += 1
        figures, happened = self._step.figures, None
        if figures.is_cuda:
            figures = torch.empty(figures.shape, pin_memory=True).copy_(figures, non_blocking=True)
            happened = torch.cuda.Event()
            happened.record()
        else:
            figures = figures.clone()
        self._under_way.append((run.step, rate, figures, happened))
        flags = self.stop.flags()
        self.stopped = self.stop.signal_of(flags)
        return self._read(but=1)

    def settle(self) -> list[Done]:
        """Wait until nothing is under way."""
        return self._read(but=0)

    def _read(self, *, but: int) -> list[Done]:
        done = []
        while len(self._under_way) > but:
            step, rate, figures, happened = self._under_way.popleft()
            if happened is not None:
                happened.synchronize()
            values = figures.tolist()
            named = dict(zip(FIGURES, values, strict=False))
            mean, seen, skipped, in_a_row = values[len(FIGURES) :]
            self.run.guard = Guard(mean, int(seen), int(skipped), int(in_a_row))
            self.run.guard.check(step, named["loss"], named["gradient_norm"])
            accepted = named.pop("accepted")
            done.append(Done(step, {**named, "learning_rate": rate, "skipped": 1.0 - accepted}))
        return done
