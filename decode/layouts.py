"""Where each picture goes, for people and for the scorers that read it: one function a layout. Called by `render`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..pipeline.core.errors import UsageError
from .prompts import Prompt

# How many samples a prompt gets when nothing is said: what each scorer expects.
DEFAULT_SAMPLES = {"flat": 1, "geneval": 4, "t2i-compbench": 10, "dpg": 4, "hrs": 1}
LAYOUTS = tuple(DEFAULT_SAMPLES)
MAX_NAME_BYTES = 220  # of 255, so that a temporary name beside it fits too


@dataclass(frozen=True)
class Picture:
    """One file: a picture, or with several seeds a 2×2 grid. `path` is relative to the output directory.

    by_reference: made by the card's reference prior, in place of the job's own.
    """

    path: Path
    prompt: int
    seeds: tuple[int, ...]
    by_reference: bool = False


def plan(layout: str, prompts: Sequence[Prompt], samples: int, seed: int) -> list[Picture]:
    """Every file of a rendering. A seed depends on the text, its sample number and `seed` alone, not on its place."""
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", hint=f"use one of: {', '.join(LAYOUTS)}")
    if samples < 1:
        raise UsageError(f"{samples} samples per prompt", hint="ask for at least one")
    if layout == "dpg" and samples != 4:
        raise UsageError(f"{samples} samples per prompt: a DPG-Bench file is a 2×2 grid", hint="use --samples 4")
    _require_readable(layout, prompts)
    seeds = _seeds(prompts, samples, seed)
    if layout == "dpg":
        names = _unique([_safe(prompt.name) for prompt in prompts])
        return [Picture(Path("samples", f"{names[i]}.png"), i, tuple(seeds[i])) for i in range(len(prompts))]
    return [
        Picture(_path(layout, i, k, prompt, samples), i, (seeds[i][k],))
        for i, prompt in enumerate(prompts)
        for k in range(samples)
    ]


def _require_readable(layout: str, prompts: Sequence[Prompt]) -> None:
    """Raise UsageError for prompts that the layout's scorer would misread, or could not read at all."""
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number}: {prompt.text[:60]}"
        if layout == "geneval" and not (
            isinstance(prompt.metadata.get("tag"), str) and isinstance(prompt.metadata.get("include"), list)
        ):
            raise UsageError(
                "GenEval's scorer needs `tag` and `include` with each prompt",
                where=where,
                hint="use GenEval's own evaluation_metadata.jsonl, or --layout flat",
            )
        if layout == "t2i-compbench" and "_" in prompt.text:
            raise UsageError(
                "T2I-CompBench's scorer reads the prompt out of the file's name, up to the first '_'",
                where=where,
                hint="write it without '_', or use --layout flat",
            )
        if layout == "t2i-compbench" and len(prompt.text.encode()) > MAX_NAME_BYTES:
            raise UsageError(
                f"T2I-CompBench's scorer reads the prompt out of the file's name, which holds {MAX_NAME_BYTES} bytes",
                where=where,
                hint="shorten it, or use --layout flat",
            )
        if layout == "dpg" and not prompt.own_file:
            raise UsageError(
                "DPG-Bench's scorer finds a prompt by its picture's name, and prompts of a list have none",
                where=where,
                hint="name the folder of DPG-Bench's prompts, a .txt file each",
            )


def beside(pictures: Sequence[Picture]) -> list[Picture]:
    """The first picture of each prompt once more, for the reference prior, with the same seed."""
    first: dict[int, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.prompt, picture)
    return [replace(p, path=Path("reference", p.path.name), by_reference=True) for p in first.values()]


def _path(layout: str, i: int, k: int, prompt: Prompt, samples: int) -> Path:
    if layout == "geneval":  # the scorer enters every folder of digits
        return Path(f"{i:05d}", "samples", f"{k:04d}.png")
    if layout == "t2i-compbench":  # the scorer reads the prompt out of the name, and its number behind the last '_'
        return Path("samples", f"{_safe(prompt.text)}_{i * samples + k:06d}.png")
    if layout == "hrs":
        return Path("samples", f"{i:05d}_{k:02d}.png")
    return Path("samples", f"{i:05d}_{k:02d}_{slug(prompt.text, 60)}.png")


def slug(text: str, most: int) -> str:
    """The words of a text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most]


def _seeds(prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[int]]:
    """seeds[prompt][sample], 32 bits each; the second occurrence of a text gets seeds of its own."""
    seen: Counter[str] = Counter()
    table = []
    for prompt in prompts:
        table.append([picture_seed(seed, prompt.text, seen[prompt.text] * samples + k) for k in range(samples)])
        seen[prompt.text] += 1
    return table


def picture_seed(seed: int, text: str, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{sample}\0{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _safe(name: str) -> str:
    """A file name for any text: no separator, not hidden, short enough in bytes."""
    name = re.sub(r"[/\\\0\t]", " ", name)
    name = name.encode()[:MAX_NAME_BYTES].decode("utf-8", errors="ignore").rstrip()
    return f"_{name[1:]}" if name.startswith(".") else name


def _unique(names: list[str]) -> list[str]:
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UsageError(f"two prompts would be written to {repeated}.png", hint="give their files different names")
    return names
