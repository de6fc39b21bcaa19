"""What a folder of pictures was made with, so that a rendering resumes and never mixes settings. Called by `render`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.files import TEMPORARIES, write_json

NAME = "manifest.json"
PAGES = ("index.html", "contact_sheet.png")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where there is none."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return {"settings": manifest["settings"], "files": manifest["files"], "summary": manifest["summary"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EclipseError(
            f"unreadable manifest: {error}", where=str(folder / NAME), hint="name another folder with --out"
        ) from None


def claim(folder: Path, settings: dict[str, Any], files: Sequence[str], *, overwrite: bool) -> dict[str, Any] | None:
    """Make `folder` hold pictures of `settings`: the summary if they are all there, None if some are to be made.

    overwrite: remove the pictures of an earlier rendering first, and nothing else.

    Raises:
        UsageError: the folder holds pictures of other settings, or files that are not ours.
    """
    found = read(folder)
    # A render that was killed as it began leaves the half-written manifest, which the lock sweeps in renders/ alone.
    for leftover in list(folder.rglob(TEMPORARIES)):
        leftover.unlink(missing_ok=True)
    if found is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                "the folder holds what `eclipse render` did not make", where=str(folder), hint="name an empty one"
            )
    elif overwrite:
        clear(folder, found["files"])
    elif found["settings"] != settings and any((folder / name).exists() for name in found["files"]):
        raise UsageError(
            f"the pictures there were made with other settings: {'; '.join(_differences(found['settings'], settings))}",
            where=str(folder),
            hint="name another folder with --out, or replace them with --overwrite",
        )
    elif found["settings"] == settings and found["summary"] and _all_there(folder, files):
        return found["summary"]
    write(folder, settings, files, summary=None)
    return None


def write(folder: Path, settings: dict[str, Any], files: Sequence[str], summary: dict[str, Any] | None) -> None:
    """`summary` None: the rendering has begun; otherwise it is complete."""
    write_json(folder / NAME, {"settings": settings, "files": list(files), "summary": summary})


def clear(folder: Path, files: Sequence[str]) -> None:
    """Remove pictures, pages and the folders they leave empty; the manifest last, so that a kill can be repeated."""
    root = folder.resolve()
    for name in (*files, *PAGES):
        file = (folder / name).resolve()
        if file.is_relative_to(root):
            file.unlink(missing_ok=True)
    for directory, _, _ in os.walk(folder, topdown=False):
        if Path(directory) != folder and not any(Path(directory).iterdir()):
            shutil.rmtree(directory)
    (folder / NAME).unlink(missing_ok=True)


def _all_there(folder: Path, files: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in (*files, *PAGES))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = list(dict.fromkeys([*before, *after]))
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
