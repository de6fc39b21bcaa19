"""Pace: a CPU that gets far less done than its own arithmetic allows is told so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eclipse.trainer import pace
from eclipse.trainer.distributed import DistEnv
from eclipse.trainer.model.prior import PRESETS


@pytest.mark.parametrize(("seconds_a_step", "slow"), [(0.05, False), (2.0, True)])
def test_a_slow_run_on_a_cpu_says_so(seconds_a_step: float, slow: bool, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(pace, "peak_flops", lambda device: 100e9)
    counted = pace.Pace(PRESETS["tiny"], DistEnv(0, 1, torch.device("cpu")))
    batch: Any = SimpleNamespace(rows=range(64), text=SimpleNamespace(states=range(64 * 18)))
    for _ in range(1000):
        counted.took(batch, 0.0)
        now[0] += seconds_a_step
    said = counted.slowness()
    assert bool(said) == slow
    assert not slow or "slower than expected" in said


def test_the_peak_of_this_cpu_is_measured():
    assert 1e8 < (pace.peak_flops(torch.device("cpu")) or 0) < 1e14
