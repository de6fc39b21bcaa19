"""reports/index.html: the way to every page, picture and file of a workspace. Written after each stage: `run_stage`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..core.card import STAGES
from ..core.workspace import Workspace
from . import page as pages

WHAT = {
    "download": "Pictures and captions fetched into shards",
    "embed": "CLIP features of every pair",
    "filter": "A verdict with a reason for every row",
    "train": "The prior",
    "render": "Pictures from prompts",
    "evaluate": "How good the prior is",
}
# The figures of a summary that say most, by stage: key, unit or name, how to write it. The first few that are there.
HEADLINES: dict[str, tuple[tuple[str, str], ...]] = {
    "download": (("images", "pictures"), ("rows", "rows of the list")),
    "embed": (("rows", "rows"), ("images_per_s", "pictures per second")),
    "filter": (("kept", "rows kept"), ("rows", "rows")),
    "train": (("steps", "steps"), ("samples_per_second", "samples per second"), ("train_rows", "rows")),
    "render": (("pictures", "pictures"), ("right", "of them right, by pixel"), ("prompts", "prompts")),
    "evaluate": (("cosine_image", "cosine to the true image"), ("recall_1", "true images found first")),
}
PAGES = {stage: f"{stage}.html" for stage in STAGES if stage != "render"}
FILES = (
    ("eclipse.yaml", "the data card, every key"),
    ("selection.parquet", "one row an embedded row: keep, reason, scores"),
    ("rejected.parquet", "every input that got no row, with the reason"),
    ("prior/final/config.json", "the prior, in the published format"),
    ("prior/metrics.jsonl", "figures of every step"),
    ("reports/search.html", "the last search: pictures nearest to a text"),
    ("reports/evaluate.json", "the evaluation, prompt by prompt"),
)


def index_page(ws: Workspace) -> Path:
    """Write the page from what the stages have recorded. It links to nothing that is not there."""
    states = {stage: ws.stage(stage).finished for stage in STAGES}
    done = [stage for stage, state in states.items() if state is not None]
    galleries = sorted(ws.renders.glob("*/index.html"), key=lambda path: (path.parent.name != "default", path))
    stages = []
    for stage, state in states.items():
        own = galleries[0] if stage == "render" and galleries else ws.reports / PAGES.get(stage, "none")
        stages.append(
            {
                "name": stage,
                "what": WHAT[stage],
                "link": _link(ws, own),
                "done": state is not None,
                "when": state.finished_at[:16].replace("T", " ") if state is not None else "",
                "seconds": None if state is None else state.summary.get("seconds"),
                "figures": [] if state is None else _headlines(stage, state.summary),
                "warnings": [] if state is None else [str(text) for text in state.summary.get("warnings", [])],
            }
        )
    return pages.write_page(
        ws.reports / "index.html",
        "index.html.j2",
        title=ws.card.title or ws.card.name,
        lead=ws.card.description,
        footer=f"card {ws.card.name} · {ws.root}",
        links=pages.stage_links("Overview"),
        stages=stages,
        done=len(done),
        galleries=[
            {"name": path.parent.name, "link": _link(ws, path), "sheet": _link(ws, path.parent / "contact_sheet.png")}
            for path in galleries
        ],
        curves=_link(ws, ws.reports / "train.png"),
        files=[(name, said, _link(ws, ws.root / name)) for name, said in FILES if (ws.root / name).exists()],
        licence=ws.card.licence,
    )


def _link(ws: Workspace, path: Path) -> str | None:
    """The address of a file as seen from the page; None where it is not there."""
    return quote(Path(os.path.relpath(path, ws.reports)).as_posix()) if path.is_file() else None


def _headlines(stage: str, summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = [(_number(summary[key]), label) for key, label in HEADLINES[stage] if _is_number(summary.get(key))]
    rejected = summary.get("rejected")
    if isinstance(rejected, dict) and rejected:
        found.append((_number(sum(rejected.values())), "set aside"))
    mean = summary.get("accuracy", {}).get("mean", {}) if stage == "evaluate" else {}
    found += [
        (_number(mean[f"{arm}_seen"]), f"{arm}, seen") for arm in ("prior", "oracle", "text") if f"{arm}_seen" in mean
    ]
    found += [(_number(mean[key]), "prior, unseen") for key in ("prior_unseen",) if key in mean]
    if stage == "train":
        validation = summary.get("validation") or {}
        found += [
            (_number(validation[key]), "cosine to the true image") for key in ("cosine_image",) if key in validation
        ]
    return found[:5]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
