"""Kills stages, their workers, and interrupts them, at random moments; then runs them again and compares, as faults.py.

    python -m eclipse.bench.stops --trials 200

Each trial takes a stage of a small shapes workspace, afresh or as an overwrite, and one way to be stopped within the
time that the stage takes undisturbed. What a second run leaves must be, bit for bit, what an undisturbed one leaves.

Of a training's checkpoints the newest is compared: one that is asked to end saves where it is, so that which one is
left beside the newest depends on the moment.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..pipeline.core.card import STAGES
from .faults import Faults, contents, differences, small_workspace
from .results import arguments, hardware, record, table

# How a run is stopped, and how often in a row: Ctrl-C is often pressed more than once.
WAYS: dict[str, tuple[str, int, int]] = {
    "kill -9": ("main", signal.SIGKILL, 1),
    "kill -9 of a worker": ("worker", signal.SIGKILL, 1),
    "SIGTERM": ("main", signal.SIGTERM, 1),
    "Ctrl-C": ("main", signal.SIGINT, 1),
    "Ctrl-C, four times in half a second": ("main", signal.SIGINT, 4),
}
WORKERS = ("download",)  # on a CPU, the stages that have processes of their own


def compared(root: Path) -> dict[str, Any]:
    """The contents of a workspace without the checkpoints before the newest."""
    found = contents(root)
    checkpoints = sorted({name.split("/")[2] for name in found if name.startswith("prior/checkpoints/")})
    return {name: what for name, what in found.items() if not any(f"/{old}/" in name for old in checkpoints[:-1])}


def main() -> None:
    """Run the trials and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600, help="stop after so long, and say how many were run")
    chosen = parser.parse_args()
    rng, began, machine = random.Random(0), time.monotonic(), hardware()
    counted: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder)) as faults:
        bases, wanted, seconds = {}, {}, {}
        small_workspace(faults.folder)
        for stage in STAGES:
            bases[stage] = faults.folder / f"before-{stage}"
            shutil.copytree(faults.ws, bases[stage], symlinks=True)
            for _ in range(2):  # the first imports what the later ones find imported
                faults.restore(bases[stage])
                started = time.monotonic()
                assert (outcome := faults.run([stage, "--quiet"])).code == 0, outcome.said
                seconds[stage], wanted[stage] = time.monotonic() - started, compared(faults.ws)
            if stage == "download":  # its list names the port that was free when it was made: the same for every trial
                shutil.copy(faults.ws / "urls.parquet", bases[stage])
            bases[f"{stage} --overwrite"] = faults.folder / f"after-{stage}"
            shutil.copytree(faults.ws, bases[f"{stage} --overwrite"], symlinks=True)
        for trial in range(chosen.trials):
            if time.monotonic() - began > 60 * chosen.minutes:
                break
            stage = STAGES[trial % len(STAGES)]
            way = rng.choice([way for way in WAYS if stage in WORKERS or "worker" not in way])
            again = rng.random() < 0.3 and stage != "download"  # that one makes its list anew, on another port
            whom, number, times = WAYS[way]
            at = rng.uniform(0, seconds[stage])
            faults.restore(bases[f"{stage} --overwrite" if again else stage])
            signals = [(at + 0.15 * k, whom, number) for k in range(times)]
            command = [stage, "--quiet", *(["--overwrite"] if again else [])]
            stopped = faults.run(command, signals=signals)
            problem = ""
            if (
                stopped.code is None
                or "Traceback" in stopped.said
                or stopped.code in (-signal.SIGABRT, -signal.SIGSEGV)
            ):
                problem = f"hung, aborted or not understood ({stopped.code}): {stopped.said[-300:]}"
            elif (resumed := faults.run([stage, "--quiet"])).code != 0:
                problem = f"refused to go on: {resumed.said[-300:]}"
            else:
                problem = differences(wanted[stage], compared(faults.ws))
                if (kept := faults.ws / "logs" / "tracebacks.txt").exists():
                    problem += f"; its end: {kept.read_text()[-900:]}"
            counted[stage]["trials"] += 1
            counted[stage]["stopped"] += stopped.code != 0
            counted[stage]["equal"] += not problem
            if problem:
                wrong.append(f"trial {trial}: {' '.join(command)}, {way} after {at:.2f} s: {problem}")
                print(wrong[-1], flush=True)
    rows = [[stage, counts["trials"], counts["stopped"], counts["equal"]] for stage, counts in counted.items()]
    rows.append(["all", *(sum(counts[name] for counts in counted.values()) for name in ("trials", "stopped", "equal"))])
    shown = table(["stage", "trials", "stopped in mid-run", "equal after a second run"], rows)
    body = "\n".join([shown, "", *(f"- {each}" for each in wrong)]).rstrip()
    settings = {"trials": sum(counts["trials"] for counts in counted.values()), "of": chosen.trials}
    record(
        "python -m eclipse.bench.stops",
        "Stages killed and interrupted at random moments",
        body,
        settings,
        machine,
        chosen.results,
    )


if __name__ == "__main__":
    main()
