"""One section a benchmark in RESULTS.md, with the hardware it ran on. Used by every script in bench/."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import pyarrow
import torch

from ..pipeline.core.files import atomic_path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = (
    "# Results\n\nEach section is written by the script it names; ours and its peers are measured in the same run.\n"
)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every script understands: --results, so that a trial run leaves RESULTS.md alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write to; default: bench/RESULTS.md")
    return parser


def hardware() -> str:
    """Processor, cores, memory, accelerator, versions, and how busy the machine was with other work."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = f"load average {os.getloadavg()[0]:.1f}"
    versions = f"Python {platform.python_version()}, numpy {numpy.__version__}, pyarrow {pyarrow.__version__}"
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {gpu}; {versions}, torch {torch.__version__}; {load} at the start"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def record(
    script: str, title: str, body: str, settings: Mapping[str, object], machine: str, results: Path = RESULTS
) -> None:
    """Print the section and write it to `results` in place of what the script had there."""
    facts = ", ".join(f"{name} {value}" for name, value in settings.items())
    section = f"## {title}\n\n`{script}`: {facts}. {machine}.\n\n{body}\n"
    print(section)
    before = results.read_text(encoding="utf-8") if results.exists() else TITLE
    head, *sections = before.split("\n## ")
    kept = [text for text in sections if text.partition("\n")[0] != title]
    new = "\n## ".join([head.rstrip("\n") + "\n", *(text.rstrip("\n") + "\n" for text in kept), section[3:]])
    with atomic_path(results) as temporary:
        temporary.write_text(new, encoding="utf-8")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
