"""What each stage of a workspace has done, and what comes next. Reads state files only; called by cli.py."""

from __future__ import annotations

from typing import Any

from .card import STAGE_SECTIONS, differences
from .workspace import STAGES, Workspace

SHOWN_COUNTS = 4
PARTIAL = {"download": ("images", "*.tar", "shards"), "embed": ("embeddings", "part-*.parquet", "parts")}


def gather(ws: Workspace) -> dict[str, Any]:
    """JSON-ready: workspace, card, holder (who is at work, or None), stages, and the command that is next (or None).

    A stage is `complete`; `damaged` if a file it left is gone or of another size; `changed` if the card's settings
    behind it are other ones now; `begun`; or `waiting`.
    """
    stages = [_stage_row(ws, stage) for stage in STAGES]
    open_stages = [row["stage"] for row in stages if row["state"] != "complete"]
    changed = next((row["stage"] for row in stages if row["state"] == "changed"), None)
    command = (
        f"eclipse {open_stages[0]}" + (" --overwrite" if changed == open_stages[0] else "") if open_stages else None
    )
    return {
        "workspace": str(ws.root),
        "card": ws.card.name,
        "holder": ws.holder(),
        "stages": stages,
        "next": command,
    }


def _stage_row(ws: Workspace, stage: str) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "state": "waiting", "counts": "", "changes": [], "finished_at": ""}
    state, begun = ws.state(stage), ws.begun(stage)
    if state is not None:
        row.update(state="complete", counts=counts_text(state.summary), finished_at=state.finished_at)
        before = state.card
    elif begun is not None:
        row.update(state="begun", counts=_partial(ws, stage))
        before = begun["card"]
    else:
        return row
    now = ws.card.model_dump(mode="json", by_alias=True)
    if changes := differences(before, now, STAGE_SECTIONS[stage]):
        row.update(state="changed", changes=changes, counts="; ".join(changes[:3]))
    elif damage := ws.damage(stage):
        row.update(state="damaged", counts=damage)
    return row


def counts_text(summary: dict[str, Any]) -> str:
    """The first whole numbers of a stage's summary, on one line."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, int) and not isinstance(v, bool)}
    return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in list(numbers.items())[:SHOWN_COUNTS])


def _partial(ws: Workspace, stage: str) -> str:
    if stage not in PARTIAL:
        return ""
    folder, pattern, unit = PARTIAL[stage]
    return f"{sum(1 for _ in (ws.root / folder).glob(pattern)):,} {unit} so far"
