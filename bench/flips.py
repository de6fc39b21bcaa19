"""Flips one bit in each kind of file that a later step reads: it must be noticed by name, mended, or change nothing.

    python -m eclipse.bench.flips            # every kind of file of a small shapes workspace, every step that reads it
    python -m eclipse.bench.flips --bits 20  # more bits a file

`SILENT` in its table is a defect: the step succeeded, and what it made differs from what it makes of the whole file.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .faults import Faults, contents, differences, small_workspace

# (files, the steps that read them): patterns below a workspace in which every stage before the first step is done.
READ: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("images/*.tar", ("embed",)),
    ("images/*.parquet", ("embed",)),
    ("images/*_stats.json", ("embed",)),
    ("logs/state/download.json", ("embed",)),
    ("rejected.parquet", ("embed",)),
    ("embeddings/part-*.parquet", ("filter", "train", "evaluate")),
    ("logs/state/embed.json", ("filter",)),
    ("selection.parquet", ("train",)),
    ("logs/state/filter.json", ("train",)),
    ("prior/final/*", ("render", "evaluate")),
    ("logs/state/train.json", ("render",)),
    ("renders/*.safetensors", ("render",)),
)


@dataclass
class Tally:
    """What became of the bits flipped in one kind of file under one step."""

    files: str
    step: str
    bits: Counter[str] = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over, in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def try_bits(
    faults: Faults, base: Path, files: str, step: str, *, bits: int, seed: int = 0, arguments: Sequence[str] = ()
) -> Tally:
    """Flip `bits` bits, one at a time and anywhere, in the first file that matches, and run the step on each."""
    command = [step, "--quiet", *arguments]
    faults.restore(base)
    tally, rng = Tally(files, step), random.Random(f"{seed} {files} {step}")
    # Footers and headers are small and where it matters most: half of the bits go to the ends.
    found = sorted(path for path in faults.ws.glob(files) if path.is_file() and path.stat().st_size)
    if not found:
        return tally
    assert (outcome := faults.run(command)).code == 0, outcome.said
    wanted = contents(faults.ws)
    for number in range(bits):
        faults.restore(base)
        path = faults.ws / rng.choice(found).relative_to(faults.ws)
        size = 8 * path.stat().st_size
        end = min(size, 8 * 2048)
        bit = (rng.randrange(size), rng.randrange(end), size - 1 - rng.randrange(end))[number % 4 % 3]
        flip(path, bit)
        name = path.relative_to(faults.ws).as_posix()
        flipped = path.read_bytes()
        outcome = faults.run(command)
        if outcome.code is None or "Traceback" in outcome.said or "unexpected" in outcome.said:
            verdict = "SILENT"
            tally.silent.append(f"{name}, bit {bit}, {step}: hung or not understood: {outcome.said[-300:]}")
        elif outcome.code:
            verdict = "named" if path.name in outcome.said or path.stem in outcome.said else "noticed"
        else:
            now = contents(faults.ws)
            # The damaged file itself may stay as it is, where it was no step's own to mend.
            if path.exists() and path.read_bytes() == flipped:
                now[name] = wanted.get(name)
            unlike = differences(wanted, now)
            verdict = "SILENT" if unlike else "harmless or mended"
            if unlike:
                tally.silent.append(f"{name}, bit {bit}, {step}: {unlike}")
        tally.bits[verdict] += 1
    return tally


def tallies(faults: Faults, *, bits: int) -> Iterator[Tally]:
    """Every pair of READ on a small workspace."""
    small_workspace(faults.folder)
    for stage in ("download", "embed", "filter", "train", "render", "evaluate"):
        base = faults.folder / f"before-{stage}"
        shutil.copytree(faults.ws, base, symlinks=True)
        for files, steps in READ:
            if stage in steps:
                yield try_bits(faults, base, files, stage, bits=bits)
        faults.restore(base)
        assert (outcome := faults.run([stage, "--quiet"])).code == 0, outcome.said


def main() -> None:
    """Print a line for each kind of file and step, and what was silent."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=12, help="flips for each kind of file and step")
    bits = parser.parse_args().bits
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder)) as faults:
        for tally in tallies(faults, bits=bits):
            found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(tally.bits.items())) or "no such file"
            print(f"{tally.files} under {tally.step}: {found}", flush=True)
            for each in tally.silent:
                print(f"  {each}", flush=True)


if __name__ == "__main__":
    main()
