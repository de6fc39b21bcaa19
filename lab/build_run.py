"""What the model builders share: the drawn pictures, and a training loop that logs, checkpoints and resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.core.files import atomic_path
from .drawing import draw
from .shapes import IMAGE_SIZE, Scene, World

_BLOCK = 500


@dataclass
class Pictures:
    """Scenes of one split with their pictures, drawn once and memory-mapped; uint8 (N, 64, 64, 3)."""

    world: World
    count: int
    pixels: np.ndarray

    @classmethod
    def drawn(cls, folder: Path, count: int, world: World | None = None) -> Pictures:
        """Draw scenes 0..count−1 of the `any` split into `folder`, or map the file an earlier run left there."""
        world = world or World()
        path = folder / f"pictures-{world.seed}-{count}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as beside:
                out = np.lib.format.open_memmap(beside, "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
                for start in range(0, count, _BLOCK):
                    stop = min(start + _BLOCK, count)
                    out[start:stop] = draw([world.scene(i, "any") for i in range(start, stop)])
                    print(f"drawing {stop}/{count}", end="\r", flush=True)
                out.flush()
        return cls(world, count, np.load(path, mmap_mode="r"))

    def scene(self, index: int) -> Scene:
        return self.world.scene(index, "any")

    def tensor(self, rows: np.ndarray) -> Tensor:
        """float32 (B, 3, 64, 64) in 0..1, channels last in memory."""
        return as_floats(self.pixels[rows])


def as_floats(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in 0..1, channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


@dataclass
class Trainer:
    """Runs `loss_of(step) -> (loss, figures)` for `steps` steps; an interrupted run goes on from its checkpoint."""

    name: str
    folder: Path
    model: nn.Module
    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    save_every: int = 200
    figures: list[dict[str, float]] = field(default_factory=list)

    def run(self, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]]) -> nn.Module:
        """Train and return the model, with the averaged weights where an EMA decay is set."""
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            self.learning_rate,
            (0.9, 0.98),
            weight_decay=self.weight_decay,
        )
        average = {k: v.detach().clone() for k, v in self.model.state_dict().items()} if self.ema_decay else {}
        first, seconds = self._resume(optimizer, average)
        began = time.monotonic()
        self.model.train()
        for step in range(first, self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * cosine(step, self.steps, self.warmup)
            torch.manual_seed(step)  # a resumed run draws what an undisturbed one would
            loss, figures = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            self._average(average, step)
            elapsed = seconds + time.monotonic() - began
            if step % 20 == 0 or step == self.steps - 1:
                self._log({"step": step, "loss": float(loss.detach()), **figures, "seconds": round(elapsed, 1)})
            if (step + 1) % self.save_every == 0 or step == self.steps - 1:
                self._save(optimizer, average, step + 1, elapsed)
        if average:
            self.model.load_state_dict(average)
        return self.model.eval()

    def _average(self, average: dict[str, Tensor], step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        for name, value in self.model.state_dict().items():
            if name in average:
                average[name].lerp_(value, 1 - decay) if value.is_floating_point() else average[name].copy_(value)

    def _checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    def _save(self, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int, seconds: float) -> None:
        state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        with atomic_path(self._checkpoint()) as beside:
            torch.save({**state, "step": step, "seconds": seconds}, beside)

    def _resume(self, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> tuple[int, float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._checkpoint().exists():
            return 0, 0.0
        state = torch.load(self._checkpoint(), weights_only=True)
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.update(state["average"])
        print(f"{self.name}: going on from step {state['step']}", flush=True)
        return int(state["step"]), float(state["seconds"])

    def _log(self, row: dict[str, float]) -> None:
        print(self.name, " ".join(f"{k} {v:.4g}" for k, v in row.items()), f"of {self.steps}", flush=True)
        with (self.folder / f"{self.name}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
