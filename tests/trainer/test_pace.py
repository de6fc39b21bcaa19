"""Pace: a CPU that gets far less done than its own arithmetic allows is told so."""

from __future__ import annotations

import time
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


class _Clock:
    """A device that runs what is queued one after the other; `now` is the host's time."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def run(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def event(self, enable_timing: bool) -> Any:
        clock, happened = self, [0.0]

        def record() -> None:
            happened[0] = max(clock.now, clock.free)

        return SimpleNamespace(
            record=record,
            query=lambda: clock.now >= happened[0],
            elapsed_time=lambda later: 1000 * (later.happened[0] - happened[0]),
            happened=happened,
        )


def test_a_gpu_waits_for_data_only_while_it_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    clock = _Clock()
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(pace, "peak_flops", lambda device: 100e9)
    batch: Any = SimpleNamespace(rows=range(64), text=SimpleNamespace(states=range(64 * 18)))

    def share(host_seconds: float) -> float:
        """Of steps that take the device a second, with a host that takes so long for each batch, one step ahead."""
        counted, waited = pace.Pace(PRESETS["tiny"], DistEnv(0, 1, torch.device("cuda"))), 0.0
        for step in range(100):
            clock.now += host_seconds
            waited += host_seconds
            counted.begins()
            clock.run(1.0)
            counted.took(batch, waited)
            clock.now = max(clock.now, clock.free - 1.0)  # figures of the step before are read
            if step == 50:
                with counted.away():
                    clock.now = clock.free = clock.free + 30
        clock.now = clock.free
        return counted.summary()["data_wait_share"]

    assert share(0.4) == 0
    assert share(3.0) == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.cuda
def test_idleness_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def idle(host_seconds: float) -> float:
        gaps = pace.Idleness()
        for _ in range(5):
            time.sleep(host_seconds)
            gaps.begins()
            torch.cuda._sleep(50_000_000)  # cycles
            gaps.ends()
        torch.cuda.synchronize()
        return gaps.seconds()

    assert idle(0.3) > 2 * idle(0.0), "a host that comes late leaves the device idle"
