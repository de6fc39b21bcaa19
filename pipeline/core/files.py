"""Files that appear whole or not at all: written beside, synced, renamed. Used by whatever writes to a workspace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
# What the holder of the workspace's lock may remove: ours, and what safetensors writes beside the file it is to make.
TEMPORARIES = ".tmp*"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a directory to; synced and renamed to `path` when the block ends well.

    On any error the half-written one is removed and an old `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    remove(temporary)
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else ():
            _sync(file)
        _sync(temporary)
        if path.is_dir() and temporary.is_dir():  # rename(2) refuses a directory that is not empty
            old = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}")
            path.rename(old)
            temporary.rename(path)
            remove(old)
        else:
            temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise
    _sync(path.parent)  # the rename itself is only on disk once the directory is


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of all else that it says, however it is laid out in its file."""
    plain = json.loads(json.dumps(record))  # as it will be read
    return {**plain, "checksum": _checksum(plain)}


def unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError if anything in it has changed. Former versions wrote no checksum."""
    plain = dict(record)
    if plain.pop("checksum", None) not in (None, _checksum(plain)):
        raise ValueError("its checksum does not match: the file was changed or damaged")
    return plain


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_regular(path: Path) -> None:
    """Raise OSError for what is no regular file: opening a named pipe would wait forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
