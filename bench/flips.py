"""Flips one bit in each kind of file that a later step reads: it must be noticed by name, mended, or change nothing.

    python -m eclipse.bench.flips            # every kind of file of a small shapes workspace, every step that reads it
    python -m eclipse.bench.flips --bits 20  # more bits a file
    python -m eclipse.bench.flips logs/filter selection  # these kinds of file alone

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

from .faults import KILL, Faults, contents, differences, small_workspace
from .results import arguments, hardware, record, table

Read = dict[str, list[tuple[str, str]]]
# What is read by which command, by the stage that is the last one done before. "train begun": stopped at its second
# checkpoint.
READ: Read = {
    "download": [
        ("images/*.tar", "embed"),
        ("images/*.parquet", "embed"),
        ("images/*_stats.json", "embed"),
        ("logs/state/download.json", "embed"),
        ("rejected.parquet", "embed"),
        ("logs/download-*.json", "download"),
    ],
    "embed": [("embeddings/part-*.parquet", "filter"), ("logs/state/embed.json", "filter")],
    "filter": [
        ("embeddings/part-*.parquet", "train"),
        ("selection.parquet", "train"),
        ("logs/state/filter.json", "train"),
        ("logs/filter/*", "filter --overwrite"),
    ],
    "train begun": [
        ("prior/checkpoints/*/*", "train"),
        ("prior/metrics.jsonl", "train"),
        ("logs/state/train.begun.json", "train"),
    ],
    "train": [("prior/final/*", "render"), ("logs/state/train.json", "render")],
    "render": [
        ("prior/final/*", "evaluate"),
        ("renders/*.safetensors", "render --overwrite"),
        ("renders/default/**/*", "render"),
    ],
}
# Appended to line by line and checked by nothing: curves are drawn from it, and no figure of a summary is read there.
CURVES = "prior/metrics.jsonl"


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


def try_bits(faults: Faults, base: Path, files: str, step: str, *, bits: int, seed: int = 0) -> Tally:
    """Flip `bits` bits, one at a time and anywhere, in the files that match, and run the step on each."""
    command = [*step.split(), "--quiet"]
    faults.restore(base)
    tally, rng = Tally(files, step), random.Random(f"{seed} {files} {step}")
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
        # Footers and headers are small and where it matters most: half of the bits go to the ends.
        bit = (rng.randrange(size), rng.randrange(end), size - 1 - rng.randrange(end))[number % 4 % 3]
        flip(path, bit)
        name = path.relative_to(faults.ws).as_posix()
        flipped = path.read_bytes()
        outcome = faults.run(command)
        named = any(each in outcome.said for each in (path.name, path.stem, path.parent.name))
        if outcome.code is None or "Traceback" in outcome.said or "unexpected" in outcome.said:
            verdict = "SILENT"
            tally.silent.append(f"{name}, bit {bit}, {step}: hung or not understood: {outcome.said[-300:]}")
        elif outcome.code:
            verdict = "named" if named else "noticed"
        else:
            now = contents(faults.ws)
            # The damaged file itself may stay as it is, where it was no step's own to mend.
            if files == CURVES or (path.exists() and path.read_bytes() == flipped):
                now[name] = wanted.get(name)
            unlike = differences(wanted, now)
            verdict = "SILENT" if unlike else "harmless or mended"
            if unlike:
                tally.silent.append(f"{name}, bit {bit}, {step}: {unlike}; it said: {outcome.said[-300:]}")
        tally.bits[verdict] += 1
    return tally


def tallies(faults: Faults, read: Read, *, bits: int) -> Iterator[Tally]:
    """Every pair of `read` on a small workspace."""
    small_workspace(faults.folder)
    for stage in ("download", "embed", "filter", "train", "render"):
        if stage == "train":
            yield from _interrupted_training(faults, read["train begun"], bits)
        assert (outcome := faults.run([stage, "--quiet"])).code == 0, outcome.said
        base = faults.folder / f"after-{stage}"
        shutil.copytree(faults.ws, base, symlinks=True)
        for files, step in read[stage]:
            yield try_bits(faults, base, files, step, bits=bits)
        faults.restore(base)


def _interrupted_training(faults: Faults, read: Sequence[tuple[str, str]], bits: int) -> Iterator[Tally]:
    before, begun = faults.folder / "before-train", faults.folder / "train-begun"
    shutil.copytree(faults.ws, before, symlinks=True)
    points = faults.points(["train", "--quiet"])
    second = [at for at, point in enumerate(points, 1) if point.endswith("-step-00000004")]
    faults.restore(before)
    faults.run(["train", "--quiet"], KILL, second[0])
    shutil.copytree(faults.ws, begun, symlinks=True)
    for files, step in read:
        yield try_bits(faults, begun, files, step, bits=bits)
    faults.restore(before)


def main() -> None:
    """Flip the bits and write the table; below it what was silent."""
    parser = arguments(__doc__)
    parser.add_argument("files", nargs="*", help="kinds of file whose pattern holds one of these; default: every kind")
    parser.add_argument("--bits", type=int, default=12, help="flips for each kind of file and step")
    chosen = parser.parse_args()
    words = chosen.files or [""]
    read = {stage: [row for row in rows if any(word in row[0] for word in words)] for stage, rows in READ.items()}
    machine, rows, silent = hardware(), [], []
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder)) as faults:
        for tally in tallies(faults, read, bits=chosen.bits):
            found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(tally.bits.items())) or "no such file"
            print(f"{tally.files} under {tally.step}: {found}", flush=True)
            rows.append([f"`{tally.files}`", tally.step, found])
            silent += tally.silent
    columns = ["files", "step that reads them", "what became of the flipped bits"]
    body = "\n".join([table(columns, rows), "", *(f"- {each}" for each in silent or ["None was silent."])])
    record(
        "python -m eclipse.bench.flips",
        "One flipped bit in each kind of file",
        body,
        {"bits a row": chosen.bits},
        machine,
        chosen.results,
    )


if __name__ == "__main__":
    main()
