"""Keeps one bad step from ruining a run: skips it, counts, and ends a run that keeps failing. Used by steps.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..pipeline.core.errors import EclipseError

SPIKE = 3.0  # times the running mean of the loss
SETTLING = 50  # steps before the running mean means anything
MOST_IN_A_ROW = 25
MEMORY = 0.98


@dataclass
class Guard:
    """Its fields are its whole state, and are kept in checkpoints. device_step.py has the same rule on the device."""

    mean: float = 0.0
    seen: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        """Whether this step's update may be made."""
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite and (self.seen < SETTLING or loss <= SPIKE * self.mean):
            self.mean = loss if self.seen == 0 else MEMORY * self.mean + (1 - MEMORY) * loss
            self.seen += 1
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def check(self, step: int, loss: float, gradient_norm: float) -> None:
        """EclipseError once MOST_IN_A_ROW steps in a row were not made; the figures are those of the last."""
        if self.in_a_row < MOST_IN_A_ROW:
            return
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        kind = f"above {SPIKE:g} times its mean of {self.mean:.4g}" if finite else "or its gradient not finite"
        raise EclipseError(
            f"training diverged: {self.in_a_row} steps in a row were skipped, the loss {kind}",
            where=f"step {step}, loss {loss:.4g}, gradient norm {gradient_norm:.4g}",
            hint="lower train.learning_rate or raise train.warmup_steps, and run `eclipse train --overwrite`",
        )
