"""An export: a prior in the published format, and what it takes to use and judge it. For `eclipse export` and `push`.

config.json, diffusion_pytorch_model.safetensors    as ECLIPSE's own; readers of that format ignore the rest
eclipse.json     which encoder it reads, which decoder draws it, the whole data card, the stages' figures
README.md        the same for people: the model card that the hub shows
gallery.png      the contact sheet of the default rendering, where there is one
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .. import __version__
from ..pipeline.core.card import MODELS, STAGES, Card, resolve
from ..pipeline.core.card_file import CARD_NAME
from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.files import atomic_path, write_json
from ..pipeline.core.workspace import Workspace

if TYPE_CHECKING:
    from ..pipeline.core.progress import Progress

RECORD, MODEL_CARD, PICTURE = "eclipse.json", "README.md", "gallery.png"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FILES = (CONFIG, WEIGHTS, RECORD, MODEL_CARD, PICTURE)
FORMAT = 1
LOCAL = "local-dir:"


@dataclass(frozen=True)
class Record:
    """What an eclipse.json says. `card` is a data card as `Card` reads it; `stages` are the stages' figures."""

    name: str
    encoder: str
    pretrained: str | None
    encoder_fingerprint: str | None
    card: dict[str, Any]
    stages: dict[str, dict[str, Any]]


def export_prior(ws: Workspace, directory: Path, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the workspace's trained prior to `directory` as an export; returns the summary.

    Files there that are no part of an export are left alone, and so is a README.md that was written by hand.

    Raises:
        UsageError: `directory` holds something else, or an export and `overwrite` is not set. EclipseError: no prior.
    """
    final = ws.prior / "final"
    if not (final / CONFIG).is_file():
        raise EclipseError("no trained prior", where=str(final), hint="run `eclipse train` first")
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    visible = {name for name in there if not name.startswith(".")}  # .gitattributes and the hub's own cache may stay
    if (directory.exists() and not directory.is_dir()) or visible - set(FILES):
        hint = "name another directory; --overwrite replaces nothing but an earlier export"
        raise UsageError("there is something already that is no export", where=str(directory), hint=hint)
    if visible and not overwrite:
        raise UsageError("there is an export already", where=str(directory), hint="name another, or add --overwrite")
    parameters = _write(ws, final, directory.absolute(), progress, public=False)
    return {
        "export": str(directory.absolute()),
        "parameters": parameters,
        "model_card": str(directory.absolute() / MODEL_CARD),
        "files": sorted(name for name in FILES if (directory / name).is_file()),
    }


def push_prior(
    ws: Workspace,
    repo: str,
    progress: Progress,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Export the workspace's prior and send it to the hub as the model repository `repo` (owner/name).

    Paths of this machine are cut to their last name in what is sent. dry_run: nothing leaves the machine, and no
    network is needed; the summary lists what would be sent.
    """
    from ..pipeline.core import hub

    if not hub.is_hub_id(repo):
        raise UsageError("this is no repository's id", where=repo, hint="write owner/name, such as ada/shapes-prior")
    final = ws.prior / "final"
    if not (final / CONFIG).is_file():
        raise EclipseError("no trained prior", where=str(final), hint="run `eclipse train` first")
    if not dry_run and (problem := hub.unreachable()) is not None:
        raise EclipseError(
            f"the hub cannot be reached: {problem}",
            where=repo,
            hint=f"try `eclipse push {repo} --dry-run`, which needs none",
        )
    if ws.card.encoder.model.startswith(LOCAL) and "{models}" not in ws.card.encoder.model:
        progress.say("the encoder is a directory of this machine: whoever loads the prior has to name it themselves")
    with tempfile.TemporaryDirectory(prefix="eclipse-push-") as folder:
        _write(ws, final, Path(folder), progress, public=True, repo=repo)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        summary: dict[str, Any] = {"repository": repo, "files": sizes, "bytes": sum(sizes.values())}
        if dry_run:
            return {**summary, "sent": False, "model_card": (Path(folder) / MODEL_CARD).read_text(encoding="utf-8")}
        progress.say(f"sending {len(sizes)} files, {summary['bytes'] / 1e6:.1f} MB")
        address = hub.send(repo, Path(folder), private=private, overwrite=overwrite, mark=RECORD)
        return {**summary, "sent": True, "address": address}


def _write(ws: Workspace, final: Path, directory: Path, progress: Progress, *, public: bool, repo: str = "") -> int:
    """Write every file of an export; the config last, so that a directory with one is complete. Parameters."""
    from ..trainer.model.prior import load_prior, save_prior
    from .model_card import model_card

    prior = load_prior(final)
    parameters = sum(p.numel() for p in prior.parameters())
    directory.mkdir(parents=True, exist_ok=True)
    readme = directory / MODEL_CARD
    by_hand = readme.is_file() and _digest(readme) != _read_json(directory / RECORD).get("model_card_sha256")
    sheet = ws.renders / "default" / "contact_sheet.png"
    if sheet.is_file():
        with atomic_path(directory / PICTURE) as temporary:
            shutil.copyfile(sheet, temporary)
    record = describe(ws, prior.config.embedding_dim, public=public)
    text = model_card(record, parameters, repo=repo, picture=PICTURE if (directory / PICTURE).is_file() else None)
    if by_hand:
        progress.say(f"{readme} was written by hand and stays as it is")
    else:
        with atomic_path(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(directory / RECORD, {**record, "model_card_sha256": digest})
    save_prior(prior, directory)
    return parameters


def describe(ws: Workspace, embedding_dim: int, *, public: bool) -> dict[str, Any]:
    """The content of eclipse.json. public: directories of this machine are cut to their last name."""
    card = ws.card.model_dump(mode="json", by_alias=True)
    urls = card["source"].get("urls")
    if urls:  # a list's place says nothing to anybody else, its name may
        card["source"]["urls"] = [Path(url).name for url in ([urls] if isinstance(urls, str) else urls)]
    if public:
        card["encoder"]["model"] = _public(card["encoder"]["model"])
        card["decoder"]["path"] = _public(card["decoder"]["path"])
        card["train"]["init"] = _public(card["train"]["init"]) if card["train"].get("init") else None
    encoder = card["encoder"]
    states = {stage: ws.stage(stage).finished for stage in STAGES}
    return {
        "format": FORMAT,
        "made_by": f"eclipse {__version__}",
        "name": card["name"],
        "encoder": {
            "model": encoder["model"],
            "pretrained": encoder["pretrained"],
            "fingerprint": _encoder_fingerprint(ws),
            "embedding_dim": embedding_dim,
        },
        "card": card,
        "stages": {stage: figures(state.summary) for stage, state in states.items() if state is not None},
        "trained_at": trained.finished_at if (trained := states["train"]) is not None else None,
    }


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what belongs to this machine: numbers, and mappings of numbers, and a few names."""
    kept: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            kept[key] = figures(value)
        elif isinstance(value, (int, float)) or key in ("arm", "device"):
            kept[key] = value
    return {key: value for key, value in kept.items() if value != {}}


def read_record(directory: Path) -> Record | None:
    """The eclipse.json of an export, or None where there is none (ECLIPSE's own priors have none).

    Raises:
        EclipseError: it is there and cannot be read.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        encoder = found["encoder"]
        record = Record(
            name=str(found["name"]),
            encoder=encoder["model"],
            pretrained=encoder["pretrained"],
            encoder_fingerprint=encoder["fingerprint"],
            card=dict(found["card"]),
            stages=dict(found["stages"]),
        )
        strings = (record.encoder, record.pretrained or "", record.encoder_fingerprint or "")
        if not all(isinstance(text, str) for text in strings):
            raise TypeError("encoder.model, pretrained and fingerprint are texts")
        return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EclipseError(
            f"unreadable record of an export: {type(error).__name__} {error}",
            where=str(path),
            hint="export it again, or remove this file and name the encoder yourself: load(…, encoder=…)",
        ) from None


def trusted_encoder(record: Record, directory: Path, *, from_hub: bool) -> str:
    """The encoder's name, where a file may name it: open_clip's own, a hub id, or what ships with the installation.

    Raises:
        UsageError: a directory that a file from elsewhere names: whoever loads the prior has to name it.
    """
    name = record.encoder
    if not name.startswith(LOCAL):
        return name
    folder = Path(resolve(name.removeprefix(LOCAL))).resolve()
    if folder.is_relative_to(MODELS.resolve()):
        return name
    if from_hub or not folder.is_dir():
        raise UsageError(
            f"its encoder is a directory, {name}, of the machine it was trained on",
            where=str(directory),
            hint='name the encoder: eclipse.load(…, encoder="local-dir:/path/of/it")',
        )
    return name


def find(dir_or_hub_id: Path | str) -> Path:
    """The directory of an export: here, or in the hub's cache after fetching it. A workspace stands for its prior."""
    from ..pipeline.core import hub

    path, name = Path(dir_or_hub_id).expanduser(), str(dir_or_hub_id)
    if path.is_dir():
        if (path / CARD_NAME).is_file():
            raise UsageError(
                "this is a workspace, not an export",
                where=name,
                hint=f'eclipse.open("{name}").prior() loads its prior; `eclipse export DIR` writes it for others',
            )
        return path
    if isinstance(dir_or_hub_id, Path) or not hub.is_hub_id(name):
        raise EclipseError("no such prior", where=name, hint="name a directory, or a hub id such as owner/name")
    return hub.fetch(name, (CONFIG, WEIGHTS), (RECORD,), what="prior", name_it="in place of the id")


def card_of(prior: str) -> Card | None:
    """The data card that came with a prior, to make a workspace of; None for the raw text embedding, which has none.

    Raises:
        UsageError: `prior` is no export; what `trusted_encoder` raises.
    """
    from .job import TEXT_PRIOR

    if prior == TEXT_PRIOR:
        return None
    directory = find(prior)
    record = read_record(directory)
    if record is None:
        raise UsageError(
            f"no workspace here, and no {RECORD} with this prior that says which encoder and decoder it takes",
            where=prior,
            hint=f"make a workspace first: `eclipse init coco DIR`, then `eclipse render -w DIR --prior {prior}`",
        )
    trusted_encoder(record, directory, from_hub=not Path(prior).is_dir())
    try:
        made = Card.model_validate(record.card)
    except ValidationError as error:
        raise UsageError(
            f"its data card cannot be read: {error.errors()[0]['msg']}", where=str(directory / RECORD)
        ) from None
    if Path(resolve(made.decoder.path)).is_absolute() and "{models}" not in made.decoder.path:
        raise UsageError(
            f"its decoder is a directory, {made.decoder.path}, of the machine it was trained on",
            where=str(directory),
            hint=f"make a workspace with a decoder of your own, then `eclipse render -w DIR --prior {prior}`",
        )
    return made


def _public(name: str) -> str:
    """A model's name with a directory of this machine cut to its last part."""
    if "{models}" in name:
        return name
    if name.startswith(LOCAL):
        return LOCAL + Path(name.removeprefix(LOCAL)).name
    return Path(name).name if Path(name).is_absolute() else name


def _encoder_fingerprint(ws: Workspace) -> str | None:
    """The digest of the encoder's weights, which every embedding part carries."""
    if not any(ws.embeddings.glob("part-*.parquet")):
        return None
    from ..pipeline.cache.store import Store

    return Store.open(ws.embeddings).meta.encoder_fingerprint


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}
