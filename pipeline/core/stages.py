"""Finds the workspace, and calls one stage or all of them in turn under its lock; runs the lab. Used by cli.py."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from .card import CARD_NAME, STAGES, Card, card_names
from .errors import UsageError
from .files import write_json
from .progress import Progress
from .source import FetchOptions
from .workspace import Workspace

ENTRIES = {
    "download": ("pipeline.download.stage", "download"),
    "embed": ("pipeline.embed.stage", "embed"),
    "filter": ("pipeline.filter.stage", "filter_cache"),
    "train": ("trainer.stage", "train"),
    "render": ("decode.render", "render"),
    "evaluate": ("trainer.evaluate", "evaluate"),
}
SHAPES_EVALUATION = ("lab.score", "evaluate_shapes")
CLUSTERED = ("download", "embed")  # stages whose shard tasks can run on a cluster
DEVICES = ("embed", "train")
RESOURCES = ("gpus", "cluster")  # options that change how a stage runs, not what it makes


def locate(card: str | None, root: Path | None, *, default_card: str | None = None) -> Workspace:
    """Open the named workspace, the current directory, or a new one made from the card.

    With no directory named: the current one if it is a workspace, else ./eclipse-NAME for a named card, else
    ./eclipse-<default_card>. A card that differs from the workspace's own is refused.
    """
    if root is None and (Path.cwd() / CARD_NAME).is_file():
        root = Path.cwd()
    if card is None and (default_card is None or (root is not None and (root / CARD_NAME).is_file())):
        return Workspace.open(root)
    if card is None and root is None and (Path.cwd() / f"eclipse-{default_card}" / CARD_NAME).is_file():
        return Workspace.open(Path.cwd() / f"eclipse-{default_card}")
    loaded = Card.load(card or str(default_card))
    return Workspace.create(root or Path.cwd() / f"eclipse-{loaded.name}", loaded)


def begin_workspace(card: str, root: Path, like: str) -> Workspace:
    """Make a workspace of a card, or of pictures that are there: then the card is proposed, all else as in `like`."""
    if card in card_names() or card.endswith((".yaml", ".yml")):
        return locate(card, root)
    if not (Path(card).exists() or "/" in card or any(letter in card for letter in "*?[{")):
        return locate(card, root)  # which says what it does not know
    from ..download.propose import propose

    return Workspace.create(root, propose(card, like, root.absolute().name))


def run_stage(
    ws: Workspace, stage: str, progress: Progress, *, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Run one stage to its end and return its summary. A complete one answers from its state file alone."""
    asked = {name for name, value in options.items() if value is not None} - set(RESOURCES)
    # Of pictures that are read where they lie there may be more by now: `embed` looks for itself.
    looks = stage == "embed" and not isinstance(ws.card.source, FetchOptions)
    if not overwrite and not asked and not looks and (done := ws.stage(stage).completed()):
        return done
    module_name, function_name = ENTRIES[stage]
    if stage == "evaluate" and ws.card.source.kind == "shapes":
        module_name, function_name = SHAPES_EVALUATION
    if stage in ("render", "evaluate") and options.get("prior") is None:
        check_prior(ws, progress)
    function = getattr(importlib.import_module(f"eclipse.{module_name}"), function_name)
    given = {name: value for name, value in options.items() if value is not None}
    summary = function(ws, progress, overwrite=overwrite, **given)
    if os.environ.get("RANK", "0") == "0":
        _overview(ws)
    return summary


def _overview(ws: Workspace) -> None:
    importlib.import_module("eclipse.pipeline.report.index").index_page(ws)


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
    if ws.card.source.kind == "shapes" and (dirt := _dirt(ws, measure_it=not idle)):
        result["dirt"] = dirt
    return result


def _dirt(ws: Workspace, *, measure_it: bool) -> dict[str, Any] | None:
    """How much of the dirt planted in the shapes world was found; measured once for each run of the filter."""
    path, state = ws.reports / "dirt.json", ws.stage("filter").finished
    assert state is not None
    known = _read_json(path)
    if known.get("filtered_at") == state.finished_at and "found" in known:
        return known["found"]
    if not measure_it:
        return None
    from ...lab.precision import measure

    found = measure(ws)
    write_json(path, {"filtered_at": state.finished_at, "found": found})
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that can be made again; empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


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


def run_experiment(
    name: str, out: Path, progress: Progress, *, card: str | None, seeds: str | None, **dials: Any
) -> dict[str, Any]:
    """Run one of the lab's experiments in the folder `out`; `seeds` is a list such as 0,1,2."""
    numbers = None
    if seeds is not None:
        parts = seeds.split(",")
        known = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
        if not known or len(set(map(int, parts))) < len(parts):
            what = "seeds are distinct whole numbers below a billion"
            raise UsageError(what, where=f"--seeds {seeds[:40]}", hint="such as 0,1,2")
        numbers = tuple(int(part) for part in parts)
    from ...lab.experiments import Dials, run

    return run(name, out, progress, Dials(seeds=numbers, **dials), card=card)
