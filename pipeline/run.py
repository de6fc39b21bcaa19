"""Finds the workspace, and runs one stage or all of them in turn. Used by cli.py."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from pathlib import Path
from typing import Any

from .core.card import STAGES, Card
from .core.card_file import CARD_NAME, card_names
from .core.errors import EclipseError, UsageError
from .core.progress import Progress
from .core.registry import find
from .core.source import FetchOptions
from .core.workspace import Workspace

ENTRIES = {
    "download": ("pipeline.download.stage", "download"),
    "embed": ("pipeline.embed.stage", "embed"),
    "filter": ("pipeline.filter.stage", "filter_cache"),
    "train": ("trainer.stage", "train"),
    "render": ("decode.render", "render"),
    "evaluate": ("trainer.evaluate", "evaluate"),
}
CLUSTERED = ("download", "embed")  # stages whose shard tasks can run on a cluster
DEVICES = ("embed", "train")
RESOURCES = ("gpus", "cluster")  # options that change how a stage runs, not what it makes


def locate(
    card: str | None,
    root: Path | None,
    progress: Progress,
    *,
    default_card: str | None = None,
    prior: str | None = None,
) -> Workspace:
    """Open the named workspace, the current directory, or a new one made from the card.

    With no directory named: the current one if it is a workspace, else ./eclipse-NAME for a named card, else
    ./eclipse-<default_card>. A card that differs from the workspace's own is refused; keys that go by other names now
    are said. prior: an export or hub id to render from; outside a workspace its own data card makes one.
    """
    if prior is not None and card is None and not ((root or Path.cwd()) / CARD_NAME).is_file():
        from ..decode.export import card_of

        if (made := card_of(prior)) is not None:
            return Workspace.create(root or Path.cwd() / f"eclipse-{made.name}-pictures", made)
    if root is None and (Path.cwd() / CARD_NAME).is_file():
        root = Path.cwd()
    default = Path.cwd() / f"eclipse-{default_card}"
    if card is None and root is None and (default / CARD_NAME).is_file():
        root = default
    if card is None and (default_card is None or (root is not None and (root / CARD_NAME).is_file())):
        ws = Workspace.open(root)
        for note in Card.read(ws.card_path)[1]:
            progress.say(note)
        return ws
    loaded, notes = Card.read(card or str(default_card))
    for note in notes:
        progress.say(note)
    return Workspace.create(root or Path.cwd() / f"eclipse-{loaded.name}", loaded)


def begin_workspace(card: str, root: Path, like: str, progress: Progress) -> Workspace:
    """Make a workspace of a card, or of pictures that are there: then the card is proposed, all else as in `like`."""
    if card in card_names() or card.endswith((".yaml", ".yml")):
        return locate(card, root, progress)
    if not (Path(card).exists() or "/" in card or any(letter in card for letter in "*?[{")):
        return locate(card, root, progress)  # which says what it does not know
    from .download.propose import propose

    return Workspace.create(root, propose(card, like, root.absolute().name))


def run_stage(
    ws: Workspace, stage: str, progress: Progress, *, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Run one stage to its end and return its summary. A complete one answers from its state file alone."""
    asked = {name for name, value in options.items() if value is not None} - set(RESOURCES)
    # Of pictures that are read where they lie there may be more by now: `embed` looks for itself.
    looks = stage == "embed" and not isinstance(ws.card.source, FetchOptions)
    if not overwrite and not asked and not looks and (done := ws.stage(stage).completed()):
        if _leads() and _overview_is_old(ws):
            write_overview(ws, stage)
        return done
    if stage in ("render", "evaluate") and options.get("prior") is None:
        check_prior(ws, progress)
    function = find("evaluation", ws.card.source.kind) if stage == "evaluate" else None
    if function is None:
        module_name, function_name = ENTRIES[stage]
        function = getattr(importlib.import_module(f"eclipse.{module_name}"), function_name)
    given = {name: value for name, value in options.items() if value is not None}
    summary = function(ws, progress, overwrite=overwrite, **given)
    if _leads():
        write_overview(ws, stage)
    return summary


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def write_overview(ws: Workspace, stage: str) -> None:
    """Write the page of all stages, unless another command holds the workspace: that one will."""
    with contextlib.suppress(EclipseError), ws.lock(stage):
        importlib.import_module("eclipse.pipeline.report.index").index_page(ws)


def _overview_is_old(ws: Workspace) -> bool:
    """Whether a run was killed between its record and the page; what it left half-written goes with the lock."""
    page = ws.reports / "index.html"
    newest = max((path.stat().st_mtime_ns for path in ws.logs.glob("state/*.json")), default=0)
    return not page.exists() or page.stat().st_mtime_ns < newest


def run_all(
    ws: Workspace, progress: Progress, *, overwrite: bool = False, gpus: int | None = None, cluster: str = "local"
) -> dict[str, Any]:
    """Every stage in turn; `gpus` and `cluster` go to the stages that take them."""
    cluster_option("embed", cluster)
    summaries: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(STAGES, start=1):
        started = time.monotonic()
        progress.say(f"[{number}/{len(STAGES)}] {stage}")
        options: dict[str, Any] = {"gpus": gpus} if stage in DEVICES else {}
        if stage in CLUSTERED:
            options.update(cluster_option(stage, cluster))
        summaries[stage] = run_stage(ws, stage, progress, overwrite=overwrite, **options)
        complete = summaries[stage].get("already_complete")
        progress.say("      complete already" if complete else f"      done in {time.monotonic() - started:.1f} s")
    result: dict[str, Any] = {
        "workspace": str(ws.root),
        "overview": str(ws.reports / "index.html"),
        "stages": summaries,
    }
    idle = all(summary.get("already_complete") for summary in summaries.values())
    audit = find("audit", ws.card.source.kind)
    if audit is not None and (dirt := audit(ws, measure_it=not idle)):
        result["dirt"] = dirt
    return result


def cluster_option(stage: str, cluster: str) -> dict[str, str]:
    """The `cluster` option of a stage that has shard tasks to spread; refused for the others, unless local."""
    known = ("local", "ray", *(["spark"] if stage == "download" else []))
    if cluster not in known and not cluster.startswith("ray://"):
        hint = f"use {', '.join(known)}, or ray://HOST:PORT"
        raise UsageError("unknown cluster", where=f"--cluster {cluster}", hint=hint)
    if cluster == "local":
        return {}
    if stage not in CLUSTERED:
        hint = "several nodes train under torchrun" if stage == "train" else "leave --cluster out"
        raise UsageError(f"{stage} runs on this machine only", where=f"--cluster {cluster}", hint=hint)
    return {"cluster": cluster}


def check_prior(ws: Workspace, progress: Progress) -> None:
    """Say so if the trained prior is not of the present data. Raises EclipseError if it is damaged."""
    ws.stage("train").require_intact()
    if ws.stage("train").finished is None and (ws.prior / "final").is_dir():
        progress.say("the prior was trained before its data changed; `eclipse train --overwrite` makes a new one")
