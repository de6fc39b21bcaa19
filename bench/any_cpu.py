"""Training the embedded card's prior on this processor, and on it restricted to AVX2, which is what most machines have.

The restriction is first shown to bite: a product of bfloat16 must get slow under it. Beside ours stands the same run
with torch.optim.Muon, which multiplies in bfloat16. With --run, the whole `eclipse run` is measured both ways instead.
Run: python -m eclipse.bench.any_cpu   (about two minutes on two cores)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..pipeline.core.card import Card
from ..trainer import run as trainer_run
from ..trainer.optim import make_optimizers
from ..trainer.stage import work
from ..trainer.steps import HostSteps
from .made_cache import made_job
from .results import arguments, hardware, record, table

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PAIRS = 12_600  # what the embedded run trained on when it was measured first


def products() -> dict[str, float]:
    """GFLOP of 256 × 256 products in a second of one core, by dtype; and the processor seconds of all so far."""
    used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {"cpu": used}
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x, calls, began = torch.randn(256, 256).to(dtype), 0, time.process_time()
        while time.process_time() - began < 0.5:
            torch.mm(x, x)
            calls += 1
        found[str(dtype).removeprefix("torch.")] = calls * 2 * 256**3 / (time.process_time() - began) / 1e9
    return found


def torch_muon(network: torch.nn.Module, kind: Any, *, learning_rate: float, weight_decay: float) -> Any:
    """The card's optimizers with PyTorch's own Muon in the place of ours."""
    ours, rest = make_optimizers(network, kind, learning_rate=learning_rate, weight_decay=weight_decay)
    matrices = ours.param_groups[0]["params"]
    return torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"), rest


def train(steps: int, theirs: bool) -> dict[str, Any]:
    """Train on generated features; in the process that main started."""
    card = Card.load("shapes")
    if theirs:
        trainer_run.make_optimizers = torch_muon
    with tempfile.TemporaryDirectory() as scratch:
        job = made_job(Path(scratch), PAIRS, 128, preset=card.prior.preset, card=card, steps=steps)
        took: list[float] = []
        real = HostSteps.take

        def take(self: HostSteps, batch: Any) -> Any:
            began = time.process_time()
            done = real(self, batch)
            took.append(time.process_time() - began)
            return done

        HostSteps.take = take
        work(job, True, True)
    return {"step": statistics.median(took), **products()}


def whole_run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        command = [sys.executable, "-m", "eclipse.cli", "run", "--quiet", "-w", f"{scratch}/ws"]
        subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB, of the largest process
    return {"seconds": seconds, "peak": peak, **products()}


def measured(extra: dict[str, str], *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "eclipse.bench.any_cpu", "--child", *options]
    done = subprocess.run(command, check=True, env={**os.environ, **extra}, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--run", action="store_true", help="the whole embedded run in place of its training")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(whole_run() if options.run else train(options.steps, options.theirs)))
        return
    machine, rows = hardware(), []
    few = min(10, options.steps)  # steps of what may be fifty times slower
    for where, extra in (("as it is", {}), ("AVX2 alone", AVX2)):
        for name, more in (
            (("eclipse run", ["--run"]),)
            if options.run
            else (
                ("eclipse", ["--steps", str(options.steps)]),
                ("torch.optim.Muon", ["--steps", str(few), "--theirs"]),
            )
        ):
            found = measured(extra, *more)
            if extra and found["bfloat16"] > found["float32"] / 4:
                print("bfloat16 is not slow under the restriction: on this machine it shows nothing")
            cells = [f"{found[dtype]:.1f}" for dtype in ("float32", "bfloat16")]
            if options.run:
                times = [f"{found['seconds']:.0f} s", f"{found['cpu']:.0f} s"]
            else:
                times = [f"{1000 * found['step']:.1f} ms"]
            rows.append([where, name, *times, *cells])
            if options.run:
                rows[-1].append(f"{found['peak']:.1f} GiB")
            print(rows[-1], flush=True)
    times = ["time", "processor time"] if options.run else ["processor time a step"]
    columns = ["processor", "", *times, "float32 GFLOP/s", "bfloat16 GFLOP/s"]
    columns += ["largest process"] if options.run else []
    title = "The embedded run on any CPU" if options.run else "Training on any CPU"
    settings: dict[str, Any] = {"variables": " ".join(f"{k}={v}" for k, v in AVX2.items())}
    settings |= {} if options.run else {"pairs": PAIRS, "steps": options.steps}
    script = "python -m eclipse.bench.any_cpu" + (" --run" if options.run else "")
    record(script, title, table(columns, rows), settings, machine, options.results)


if __name__ == "__main__":
    main()
