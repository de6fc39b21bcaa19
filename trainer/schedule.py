"""The learning rate of every step. Called by steps.py."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, restarts: int = 0) -> float:
    """Linear warm-up over `warmup` steps, then restarts + 1 equal cosines from `peak` towards 0 (SGDR, 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cycle = max(1.0, (steps - warmup) / (restarts + 1))
    return peak * 0.5 * (1 + math.cos(math.pi * ((step - warmup) % cycle) / cycle))
