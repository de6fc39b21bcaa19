"""Checkpoints: whole or not at all, verified when read, a damaged one never stops a resume. Called by run.py.

A checkpoint is a directory of safetensors files and a state.json that holds their checksums, and its own; there is no
pickle in it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipeline.core.errors import EclipseError
from ..pipeline.core.files import TEMPORARY_PREFIX, atomic_path, sealed, unsealed, write_json
from .guard import Guard

STATE = "state.json"
# What a run saves and cannot go on without: see `Run.save` in run.py.
NEEDED_STATE = {"fingerprint": str, "rows": str, "guard": dict, "best": (dict, type(None))}
NEEDED_TENSORS = ("prior", "average", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the step it was made after, other JSON state, and tensors by file and name, on the CPU."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]], *, keep: int
) -> Path:
    """Write folder/step-NNNNNNNN, point folder/../latest to it, and remove all but the `keep` newest."""
    from safetensors.torch import save_file

    path = _path(folder, step)
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for name, named in tensors.items():
            on_cpu = {key: x.detach().cpu().contiguous() for key, x in named.items()}
            save_file(on_cpu, temporary / f"{name}.safetensors")
        checksums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / STATE, sealed({"step": step, "state": state, "checksums": checksums}))
    point_latest(folder, step)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return path


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is intact; says which ones are not. None if there is none."""
    paths = _newest_first(folder)
    for position, path in enumerate(paths):
        try:
            return load_checkpoint(path)
        except EclipseError as error:
            before = f"falling back to {paths[position + 1].name}" if position + 1 < len(paths) else "starting anew"
            say(f"checkpoint {path.name} is damaged ({error.what}): {before}")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. EclipseError if any of it is missing or not as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = unsealed(json.loads((path / STATE).read_text()))
        for name, checksum in record["checksums"].items():
            if _checksum(path / name) != checksum:
                raise EclipseError(f"checksum of {name} does not match", where=str(path))
        tensors = {Path(name).stem: load_file(path / name) for name in record["checksums"]}
        _require_complete(record, tensors)
        return Checkpoint(record["step"], record["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise EclipseError(f"{type(error).__name__}: {error}", where=str(path)) from error


def _require_complete(record: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raise ValueError where state.json is JSON of another shape: nothing else watches over this file."""
    if type(record["step"]) is not int or record["step"] < 0:
        raise ValueError(f"{STATE} names no step")
    for name, kind in NEEDED_STATE.items():
        if not isinstance(record["state"][name], kind):
            raise ValueError(f"{STATE} has no usable {name}")
    Guard(**record["state"]["guard"])
    if missing := [name for name in NEEDED_TENSORS if name not in tensors]:
        raise ValueError(f"{STATE} does not name {missing[0]}.safetensors")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def point_latest(folder: Path, step: int) -> None:
    """Have the link folder/../latest lead to the checkpoint of this step, if it does not."""
    link, target = folder.parent / "latest", _path(folder, step)
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"crc32:{value:08x}"
