"""Examines the installation, the machine, each card's needs and a workspace's stored features. Called by cli.py."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .core import hub
from .core.card import CARD_NAME, Card, card_names, resolve
from .core.errors import EclipseError
from .core.progress import Progress
from .core.source import expected_rows, named_files
from .core.workspace import Workspace

DISTRIBUTION = "eclipse-prior"
MIN_OPEN_FILES = 4096
MIN_FREE_BYTES = 5 * 10**9
CAPTION_TOKENS = (12, 20)  # mean real tokens of a caption, start and end included: from COCO to CC12M


def check(state: str, name: str, found: Any = "", to_do: str = "") -> dict[str, str]:
    """One line of the report. state: ok; note (nothing to do); missing (not there yet); broken."""
    return {"state": state, "name": name, "found": str(found), "to_do": to_do}


def examine(card: str | None, root: Path | None, progress: Progress) -> dict[str, Any]:
    """Run every check. Returns {"checks": {title: [check]}, "verdict": str}; "broken" and "missing" count them.

    `card` narrows the cards looked at to one; `root` (or the current directory, if it is a workspace) is verified.
    """
    here = root or Path.cwd()
    ws = Workspace.open(root) if root is not None or (here / CARD_NAME).is_file() else None
    chosen = [Card.load(card)] if card else [ws.card] if ws else [Card.load(name) for name in card_names()]
    progress.say("looking at packages, devices and cards")
    checks = {
        "installation": [*_packages(), *_devices()],
        "machine": list(_machine(here)),
        **{f"card {each.name}": list(_card_needs(each, ws.root if ws else here)) for each in chosen},
    }
    if ws is not None:
        checks["workspace"] = _workspace(ws, progress)
    counts = {
        state: sum(line["state"] == state for group in checks.values() for line in group)
        for state in ("broken", "missing")
    }
    return {"checks": checks, "verdict": _verdict(checks, counts["broken"]), **counts}


def _verdict(checks: dict[str, list[dict[str, str]]], broken: int) -> str:
    """Which cards can start right away, and whether anything is broken."""
    cards = {title.removeprefix("card "): lines for title, lines in checks.items() if title.startswith("card ")}
    ready = [name for name, lines in cards.items() if all(line["state"] not in ("missing", "broken") for line in lines)]
    lacking = [name for name in cards if name not in ready]
    parts = [f"{broken} broken: see above" if broken else "nothing is broken"]
    parts += [f"ready: {', '.join(ready)}"] if ready else []
    parts += [f"something is missing for: {', '.join(lacking)}"] if lacking else []
    return "; ".join(parts)


def _packages() -> Iterator[dict[str, str]]:
    """Python, and every package that the distribution names; those of an extra may be missing."""
    version = sys.version_info[:2]
    advice = "" if version >= (3, 11) else "use 3.11 or later"
    if version >= (3, 13):
        advice = "img2dataset does not import on 3.13: `eclipse download` needs 3.11 or 3.12"
    yield check(
        "note" if version >= (3, 13) else "broken" if advice else "ok", "Python", platform.python_version(), advice
    )
    seen = set()
    for requirement in metadata.requires(DISTRIBUTION) or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name in (DISTRIBUTION, *seen):
            continue
        seen.add(name)
        try:
            yield check("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            wanted = "all" if extra and extra[1] in ("data", "train") else extra[1] if extra else ""
            to_do = f'if wanted: pip install "{DISTRIBUTION}[{wanted}]"' if extra else "install the project again"
            yield check("note" if extra else "broken", name, "not installed", to_do)


def _devices() -> Iterator[dict[str, str]]:
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield check("ok", f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if count == 0:
        yield check("note", "GPU", "none", "every stage runs on the CPU; real cards want a GPU")
    try:
        import faiss
    except ImportError:  # said above, with what to do
        return
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    yield check(
        "ok" if gpus == count else "note",
        "faiss GPUs",
        gpus,
        "" if gpus == count else "duplicates are searched on the CPU",
    )


def _machine(folder: Path) -> Iterator[dict[str, str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield check("ok", "CPU cores", len(os.sched_getaffinity(0)))
    yield check("ok", "memory", f"{memory / 2**30:.1f} GiB", "" if memory >= 4 * 10**9 else "4 GB are wanted")
    free = shutil.disk_usage(_existing(folder)).free
    enough = free >= MIN_FREE_BYTES
    yield check(
        "ok" if enough else "missing", "free disk", f"{free / 1e9:.1f} GB in {folder}", "" if enough else "make room"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    advice = (
        ""
        if enough
        else f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before downloading or training on many parts"
    )
    yield check("ok" if enough else "note", "open files", f"{soft} (at most {hard})", advice)


def _card_needs(card: Card, root: Path) -> Iterator[dict[str, str]]:
    for path in named_files(card.source, root):
        found = path.exists()
        name = "URL list" if card.source.kind == "urls" else "pictures"
        to_do = "" if found else f"`eclipse cards {card.name}` says where to get it"
        yield check("ok" if found else "missing", name, path, to_do)
    yield _encoder_weights(card)
    yield _decoder_weights(card)
    yield from _state_cost(card, root)


def _encoder_weights(card: Card) -> dict[str, str]:
    model, tag = encoder_name(card)
    if model.startswith("local-dir:"):
        return _encoder_directory(card, Path(resolve(model.removeprefix("local-dir:"))))
    name = f"{model} {tag or ''}".strip()
    from .embed.clip import hub_repository

    repository = hub_repository(model, tag)
    found = repository is not None and hub.snapshot(repository) is not None
    return check(
        "ok" if found else "missing",
        "encoder",
        name,
        "" if found else "fetched by the first `eclipse embed`: needs a network",
    )


def _encoder_directory(card: Card, folder: Path) -> dict[str, str]:
    from .embed.clip import CONFIG, check_directory

    if not (folder / CONFIG).exists():
        return check("missing", "encoder", folder, _rebuild(card))
    try:
        check_directory(folder)
    except EclipseError as error:
        return check("broken", "encoder", error.where or folder, f"{error.what}; {_rebuild(card)}")
    return check("ok", "encoder", folder)


def _decoder_weights(card: Card) -> dict[str, str]:
    path = Path(resolve(card.decoder.path))
    if "{models}" in card.decoder.path or path.is_absolute():
        found = (path / "model_index.json").is_file()
        return check("ok" if found else "missing", "decoder", path, "" if found else _rebuild(card))
    found = path.is_dir() or hub.snapshot(card.decoder.path) is not None
    return check(
        "ok" if found else "missing",
        "decoder",
        card.decoder.path,
        "" if found else "fetched by the first `eclipse render`: needs a network",
    )


def _rebuild(card: Card) -> str:
    shipped = "{models}" in card.encoder.model + card.decoder.path
    return "make it again: python -m eclipse.lab.build_models" if shipped else "correct the path in the card"


def _state_cost(card: Card, root: Path) -> Iterator[dict[str, str]]:
    """What text states cost on disk (rows × real tokens × W × 2 bytes), and what running the tower costs instead."""
    rows = expected_rows(card.source)
    tower = text_tower(encoder_name(card)[0])
    if rows is None or tower is None:
        yield check("note", "text states", "cost unknown", "" if rows else "set source.expected_rows in the card")
        return
    low, high = (rows * tokens * tower.width * 2 for tokens in CAPTION_TOKENS)
    free = shutil.disk_usage(_existing(root)).free
    found = f"{size_text(low)} to {size_text(high)} for {rows:,} rows"
    if not card.encoder.text_states:
        yield check("ok", "text states", f"switched off in the card; they would take {found}")
    elif low > free:
        to_do = f"{size_text(free)} are free: more disk, or embed --no-text-states"
        yield check("missing", "text states", found, to_do)
    else:
        yield check("ok", "text states", found)
    flops = 24 * tower.width**2 * tower.layers * sum(CAPTION_TOKENS) / 2
    yield check(
        "note", "without them", f"the text tower runs in training: {flops / 1e9:.2g} GFLOP a caption, each time"
    )


def encoder_name(card: Card) -> tuple[str, str | None]:
    """open_clip's model name and weights tag, with the names of presets replaced."""
    from .embed.clip import PRESETS

    return PRESETS.get(card.encoder.model, (card.encoder.model, card.encoder.pretrained))


@dataclass(frozen=True)
class TextTower:
    """The two numbers behind a text tower's cost."""

    width: int
    layers: int


def text_tower(model: str) -> TextTower | None:
    """The text tower of an open_clip model, from its config file alone; None if that is not at hand."""
    if model.startswith("hf-hub:"):
        return None
    if model.startswith("local-dir:"):
        path = Path(resolve(model.removeprefix("local-dir:"))) / "open_clip_config.json"
    else:
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            return None
        path = Path(package.origin).parent / "model_configs" / f"{model}.json"
    try:
        config = json.loads(path.read_text())
        text = config.get("model_cfg", config)["text_cfg"]
        return TextTower(int(text["width"]), int(text["layers"]))
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def size_text(size: float) -> str:
    """Bytes in the unit that reads best, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _workspace(ws: Workspace, progress: Progress) -> list[dict[str, str]]:
    """Checksums of every stored part, through the store's own verification."""
    if not any(ws.embeddings.glob("part-*.parquet")):
        return [check("note", "stored features", "none yet")]
    from .cache.store import Store

    try:
        store = Store.open(ws.embeddings)
        store.verify(progress)
    except EclipseError as error:
        return [
            check(
                "broken",
                "stored features",
                error.where or ws.embeddings,
                f"{error.what}; {error.hint or ''}".rstrip("; "),
            )
        ]
    return [check("ok", "stored features", f"{len(store):,} rows, every checksum right")]


def _existing(folder: Path) -> Path:
    """The nearest directory that exists, for asking about its disk."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
