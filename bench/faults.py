"""Kills a stage, or fills its disk, at every file operation it makes; then runs it again and compares with an
undisturbed run: bit for bit, nothing twice, nothing left over, nothing refused.

    python -m eclipse.bench.faults                  # every stage of a small shapes workspace: hours
    python -m eclipse.bench.faults filter train     # these alone
    python -m eclipse.bench.faults --every 7        # each seventh point

faults.c, preloaded into every process, numbers the operations that change files below the workspace: whatever writes
there is covered without being named, Python or not. tests/test_faults.py runs the short stages through the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from ..pipeline.core.card import STAGES
from ..pipeline.core.card_file import CARD_NAME, CARDS

OFF, LIST, KILL, FULL = range(4)
HOW = {KILL: "killed", FULL: "disk full"}
# What may differ between two runs: times and speeds, how much of the work was this run's, and checksums over these.
VOLATILE = {
    "seconds",
    "duration",
    "start_time",
    "end_time",
    "finished_at",
    "since",
    "pid",
    "samples_per_second",
    "data_wait_share",
    "made",
    "rates",
    "checksum",
}
NAMED_ALONE = (".html", ".svg", ".log", ".lock")  # reports hold times and drawings; that they are there is compared
SKIPPED = ("logs/state/", "events.out.tfevents", "train.png")  # compared otherwise, or named by time
TIMEOUT_S = 900.0  # of a clock that stands nearly still where a machine has much else to do
FULL_SAID = ("disk is full", "No space left on device")


class Control(ctypes.Structure):
    """What faults.c is told, in memory that all processes share."""

    _fields_ = (
        ("mode", ctypes.c_long),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("full", ctypes.c_long),
        ("every_write", ctypes.c_long),
        ("root", ctypes.c_char * 2048),
        ("log", ctypes.c_char * 2048),
    )


@dataclass(frozen=True)
class Outcome:
    """How one run ended: its exit code (negative: by signal; None: it hung and was killed) and what it said."""

    code: int | None
    said: str


@dataclass
class Findings:
    """What came of one stage: its points by kind of operation, how often it was stopped, and what was wrong."""

    stage: str
    points: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0  # states of the disk that differ, each of which was resumed from once
    wrong: list[str] = field(default_factory=list)


def compiler() -> str | None:
    """The C compiler that builds faults.c, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


class Faults:
    """A process that has everything imported, and forks for each run; faults.c is preloaded into it.

    folder: for the workspace that is run in, always at the same path, and for what is kept beside it.
    """

    def __init__(self, folder: Path, *, every_write: bool = False) -> None:
        self.folder, self.ws = folder, folder / "ws"
        library, state = folder / "faults.so", folder / "control"
        cc = compiler()
        assert cc is not None, "a C compiler is needed to build faults.c"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([cc, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        state.write_bytes(bytes(ctypes.sizeof(Control)))
        with state.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.control = Control.from_buffer(self._memory)
        self.control.every_write = int(every_write)
        self.control.root = f"{self.ws}/".encode()
        self.control.log = str(folder / "points.txt").encode()
        environment = {**os.environ, "LD_PRELOAD": str(library), "ECLIPSE_FAULTS": str(state), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "eclipse.bench.faults_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait()

    def run(
        self, arguments: Sequence[str], mode: int = OFF, at: int = 0, *, signals: Sequence[tuple[float, str, int]] = ()
    ) -> Outcome:
        """`eclipse ARGUMENTS` in the workspace, in a process of its own.

        signals: (seconds from its start, "main" or "worker", number): a worker is any process that descends from it.
        """
        output = self.folder / "output.txt"
        self.control.count = self.control.full = 0
        self.control.at, self.control.mode = at, mode
        assert self._server.stdin is not None and self._server.stdout is not None
        job: dict[str, Any] = {"arguments": [*arguments, "-w", str(self.ws)], "signals": sorted(signals)}
        job |= {"output": str(output), "imported": str(self.folder / "imported.txt"), "timeout_s": TIMEOUT_S}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        self.control.mode = OFF
        return Outcome(code, output.read_text(errors="replace"))

    def point(self) -> str:
        """The operation at which the last run was stopped."""
        return Path(self.control.log.decode()).read_text().splitlines()[-1].replace("\t", " ")

    def points(self, arguments: Sequence[str]) -> list[str]:
        """Run undisturbed: every operation that changed a file, `kind<tab>path`."""
        log = Path(self.control.log.decode())
        log.unlink(missing_ok=True)
        outcome = self.run(arguments, LIST)
        assert outcome.code == 0, outcome.said
        return log.read_text().splitlines()

    def restore(self, base: Path) -> None:
        """Make the workspace a copy of `base`."""
        shutil.rmtree(self.ws, ignore_errors=True)
        shutil.copytree(base, self.ws, symlinks=True)

    def stop_everywhere(
        self,
        stage: str,
        base: Path,
        arguments: Sequence[str],
        *,
        resume: Sequence[str] | None = None,
        modes: Sequence[int] = (KILL, FULL),
        every: int = 1,
        told: Callable[[str], object] = lambda message: None,
    ) -> Findings:
        """Stop `eclipse ARGUMENTS` on a copy of `base` at each of its points, run RESUME (the same) and compare."""
        self.restore(base)
        assert (outcome := self.run(arguments)).code == 0, outcome.said
        wanted = contents(self.ws)
        self.restore(base)
        points = self.points(arguments)
        findings = Findings(stage, Counter(line.partition("\t")[0] for line in points))
        resumed: dict[str, str] = {}  # what became of each state of the disk in which a run was stopped
        if unlike := differences(wanted, contents(self.ws)):
            findings.wrong.append(f"two undisturbed runs differ: {unlike}")
            return findings
        for at in range(1, len(points) + 1, every):
            for mode in modes:
                self.restore(base)
                stopped = self.run(arguments, mode, at)
                findings.runs += 1
                wrong = misbehaved(stopped, mode)
                if not wrong:
                    left = on_disk(self.ws)
                    if left not in resumed:  # what a run does depends on nothing else
                        resumed[left] = self._resume(wanted, resume or arguments)
                        findings.resumed += 1
                    wrong = resumed[left]
                if wrong:
                    findings.wrong.append(f"{stage}, {HOW[mode]} at point {at} ({self.point()}): {wrong}")
                    told(findings.wrong[-1])
            told(f"{stage}: {at} of {len(points)} points, {len(findings.wrong)} wrong")
        return findings

    def _resume(self, wanted: dict[str, Any], arguments: Sequence[str]) -> str:
        """What is wrong with what a second run makes of a workspace; nothing: ""."""
        again = self.run(arguments)
        if again.code != 0:
            return f"refused to go on: {again.said[-600:]}"
        return differences(wanted, contents(self.ws))


def misbehaved(stopped: Outcome, mode: int) -> str:
    """What is wrong with how a run was stopped; nothing: ""."""
    if stopped.code is None:
        return "it hung"
    if mode == FULL and stopped.code not in (0, 1):
        return f"exit code {stopped.code}: {stopped.said[-300:]}"
    if "Traceback" in stopped.said or "unexpected" in stopped.said:
        return stopped.said[-600:]
    if mode == FULL and stopped.code == 1 and not any(words in stopped.said for words in FULL_SAID):
        return f"the message does not name the full disk: {stopped.said[-300:]}"
    return ""


def on_disk(root: Path) -> str:
    """A digest of all that a run finds below `root`: names (but for process ids in them) and contents, of JSON without
    times and process ids, of pages and drawings (which nothing reads) whether they are empty."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = re.sub(r"(?<=\.tmp-)\d+|(?<=tfevents).*", "", path.relative_to(root).as_posix())
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_dir() or ".tmp" in name or name == ".lock":  # what is temporary is swept, by its name
            content = ""
        elif "tfevents" in path.name or name.endswith(NAMED_ALONE):
            content = str(path.stat().st_size > 0)
        else:
            content = repr(_content(path))
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()


def contents(root: Path) -> dict[str, Any]:
    """Every file below `root` that a run leaves: bytes, or what of them is the same in every undisturbed run."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and not any(part in name for part in SKIPPED):
            found[name] = None if name.endswith(NAMED_ALONE) else _content(path)
        elif path.is_file() and name.startswith("logs/state/"):
            found[name] = _steady(json.loads(path.read_text())).get("files")
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".json":
        try:
            return _steady(json.loads(data))
        except ValueError:
            return data
    return data


def _steady(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _steady(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """Which files are missing, left over or different; \"\" if none are."""
    missing, left = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    other = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    parts = [("missing", missing), ("left over", left), ("different", other)]
    return "; ".join(f"{how}: {', '.join(sorted(names)[:4])}" for how, names in parts if names)


def small_workspace(folder: Path) -> Path:
    """A workspace of the shapes world in which every stage takes seconds."""
    card = yaml.safe_load((CARDS / "shapes.yaml").read_text())
    card["source"] |= {"rows": 48, "rows_per_shard": 24}
    card["prior"] = {"preset": "tiny"}
    card["train"] |= {"steps": 4, "batch_size": 8, "warmup_steps": 1, "validate_every": 2, "checkpoint_every": 2}
    card["decoder"] |= {"steps": 1}
    card["render"] = {"samples": 1, "prompts": ["a red circle", "a blue square"]}
    card["evaluate"] = {"prompts_per_category": 1, "rows": 20}  # without the reference prior
    # Nothing is dropped for its score: so few rows say little of what is usual.
    card["filter"] = {"exact_copies": "image", "near_copy_cosine": 0.92}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(card, sort_keys=False))
    subprocess.run([sys.executable, "-m", "eclipse.cli", "init", file, folder / "ws"], check=True, stdout=2)
    return folder / "ws"


Base = tuple[str, Path, list[str], list[str] | None]


def bases(faults: Faults, stages: Sequence[str]) -> Iterator[Base]:
    """(what, workspace before it, command, command that continues it) for every stage, afresh and as an overwrite."""
    small_workspace(faults.folder)
    for stage in STAGES:
        before = faults.folder / f"before-{stage}"
        shutil.copytree(faults.ws, before, symlinks=True)
        # The shapes' list is made anew by an overwrite, on another port: what is fetched from it cannot be compared.
        with served(faults) if stage == "download" else contextlib.nullcontext(before) as base:
            if stage in stages:
                yield from afresh_and_again(faults, stage, base)
        faults.restore(before)
        assert (outcome := faults.run([stage, "--quiet"])).code == 0, outcome.said


def afresh_and_again(faults: Faults, stage: str, before: Path) -> Iterator[Base]:
    """The two ways to run a stage on a workspace."""
    after = before.with_name(f"{before.name}-done")
    faults.restore(before)
    assert (outcome := faults.run([stage, "--quiet"])).code == 0, outcome.said
    shutil.copytree(faults.ws, after, symlinks=True)
    yield stage, before, [stage, "--quiet"], None
    yield f"{stage} --overwrite", after, [stage, "--overwrite", "--quiet"], [stage, "--quiet"]


@contextlib.contextmanager
def served(faults: Faults) -> Iterator[Path]:
    """A copy of the small workspace whose source is a list of the same URLs, served as long as the block runs."""
    from ..lab.server import list_path, serve
    from ..pipeline.core.workspace import Workspace

    world, folder = faults.folder / "world", faults.folder / "listed"
    shutil.copytree(faults.ws, world)
    shutil.copytree(faults.ws, folder)
    with serve(Workspace.open(world)):
        card = yaml.safe_load((folder / CARD_NAME).read_text())
        listed = {"kind": "urls", "urls": str(list_path(Workspace(world))), "allow_hosts": ["127.0.0.1"]}
        kept = {name: card["source"][name] for name in ("image_size", "resize_mode", "rows_per_shard", "timeout_s")}
        card["source"] = {**listed, **kept, "retries": 0, "patience_s": 20}
        (folder / CARD_NAME).write_text(yaml.safe_dump(card, sort_keys=False))
        yield folder


def main() -> None:
    """Run what is asked for, write the table, and below it what was wrong."""
    from .results import arguments, hardware, record, table

    parser = arguments(__doc__)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all")
    parser.add_argument("--every", type=int, default=1, help="take each N-th point")
    parser.add_argument(
        "--every-write", action="store_true", help="count each write, not the first one of a file alone"
    )
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine, rows, wrong = hardware(), [], []
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder), every_write=chosen.every_write) as faults:
        for stage, base, arguments_, resume in bases(faults, chosen.stages or STAGES):
            found = faults.stop_everywhere(
                stage, base, arguments_, resume=resume, every=chosen.every, told=lambda line: print(line, flush=True)
            )
            kinds = ", ".join(f"{count} {kind}" for kind, count in found.points.most_common())
            rows.append([stage, f"{sum(found.points.values())} ({kinds})", found.runs, found.resumed, len(found.wrong)])
            wrong += found.wrong
    body = table(["command", "points", "stopped runs", "states resumed from", "wrong"], rows)
    body = "\n".join([body, *(["", *(f"- {each}" for each in wrong)] if wrong else [])])
    settings = {"each N-th point": chosen.every}
    record(
        "python -m eclipse.bench.faults",
        "Stages stopped at every file operation",
        body,
        settings,
        machine,
        chosen.results,
    )


if __name__ == "__main__":
    main()
