"""Training the embedded card's prior on this processor, and on it restricted to AVX2, which is what most machines have.

The restriction is first shown to bite: a product of bfloat16 must get slow under it. Beside ours stands the same run
with torch.optim.Muon, which multiplies in bfloat16. With --run, the whole `eclipse run` is measured both ways instead;
a digest of the trained weights says whether two runs of one machine ended in the same.
Run: python -m eclipse.bench.any_cpu   (about two minutes on two cores; --run: ten)
"""

from __future__ import annotations

import argparse
import hashlib
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

from ..pipeline.core.card import STAGES, Card
from ..trainer import run as trainer_run
from ..trainer.model.prior import WEIGHTS
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
    """Seconds, all told and by stage; GB of all its processes together, at most, shared pages counted once; a digest of
    the trained weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        began, peak = time.perf_counter(), 0.0
        command = [sys.executable, "-m", "eclipse.cli", "run", "--quiet", "-w", f"{scratch}/ws"]
        run = subprocess.Popen(command, cwd=scratch, stdout=subprocess.DEVNULL)
        while run.poll() is None:
            peak = max(peak, proportional_bytes(run.pid) / 1e9)
            time.sleep(0.5)
        seconds = time.perf_counter() - began
        if run.returncode:
            raise SystemExit(f"eclipse run: exit {run.returncode}")
        ws = Path(scratch) / "ws"
        states = {stage: json.loads((ws / "logs" / "state" / f"{stage}.json").read_text()) for stage in STAGES}
        stages = {stage: round(state["summary"]["seconds"]) for stage, state in states.items()}
        digest = hashlib.sha256((ws / "prior" / "final" / WEIGHTS).read_bytes()).hexdigest()[:12]
    return {"seconds": seconds, "peak": peak, "stages": stages, "digest": digest, **products()}


def proportional_bytes(root: int) -> int:
    """Memory of a process and all that descend from it, every shared page divided among those that share it."""
    parents, total = {}, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    family, more = set[int](), {root}
    while more:
        family |= more
        more = {child for child, parent in parents.items() if parent in more}
    for process in family:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


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
    machine = hardware()
    body = run_table() if options.run else training_table(options.steps)
    settings: dict[str, Any] = {"variables": " ".join(f"{k}={v}" for k, v in AVX2.items())}
    settings |= {} if options.run else {"pairs": PAIRS, "steps": options.steps}
    title = "The embedded run on any CPU" if options.run else "Training on any CPU"
    script = "python -m eclipse.bench.any_cpu" + (" --run" if options.run else "")
    record(script, title, body, settings, machine, options.results)


def run_table() -> str:
    rows = []
    for where, extra in (("as it is", {}), ("AVX2 alone", AVX2)):
        found = measured(extra, "--run")
        warn_if_no_restriction(extra, found)
        times = [f"{found['seconds']:.0f} s", f"{found['cpu']:.0f} s", *found["stages"].values()]
        products = [f"{found[dtype]:.1f}" for dtype in ("float32", "bfloat16")]
        rows.append([where, *times, f"{found['peak']:.2f} GB", found["digest"], *products])
        print(rows[-1], flush=True)
    columns = [
        "processor",
        "time",
        "processor time",
        *STAGES,
        "memory",
        "weights",
        "float32 GFLOP/s",
        "bfloat16 GFLOP/s",
    ]
    said = "Stages in seconds; memory of all processes together, at most; the first digits of the weights' SHA-256."
    return f"{table(columns, rows)}\n\n{said}"


def training_table(steps: int) -> str:
    rows, few = [], min(10, steps)  # steps of what may be fifty times slower
    for where, extra in (("as it is", {}), ("AVX2 alone", AVX2)):
        for name, more in (("eclipse", [f"{steps}"]), ("torch.optim.Muon", [f"{few}", "--theirs"])):
            found = measured(extra, "--steps", *more)
            warn_if_no_restriction(extra, found)
            products = [f"{found[dtype]:.1f}" for dtype in ("float32", "bfloat16")]
            rows.append([where, name, f"{1000 * found['step']:.1f} ms", *products])
            print(rows[-1], flush=True)
    return table(["processor", "", "processor time a step", "float32 GFLOP/s", "bfloat16 GFLOP/s"], rows)


def warn_if_no_restriction(extra: dict[str, str], found: dict[str, Any]) -> None:
    if extra and found["bfloat16"] > found["float32"] / 4:
        print("bfloat16 is not slow under the restriction: on this machine it shows nothing")


if __name__ == "__main__":
    main()
