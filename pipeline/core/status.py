"""What each stage of a workspace has done, and what comes next. Reads records only; called by cli.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .card import STAGES, differences
from .stage import PIECES, Stage
from .workspace import Workspace

SHOWN_COUNTS = 4
UNITS = {"download": "shards", "embed": "parts", "train": "checkpoints"}


def gather(ws: Workspace) -> dict[str, Any]:
    """JSON-ready: workspace, card, holder (who is at work, or None), stages, and the command that is next (or None).

    A stage is `complete`; `damaged` if a file it left is gone or of another size; `changed` if the card's settings
    behind it are other ones now; `begun`; `stale` if what it was made from was made anew since; or `waiting`.
    """
    rows = [_row(ws.stage(name)) for name in STAGES]
    # Tars in images/ of which no download knows were put there by somebody: `embed` reads them, `download` refuses.
    given = rows[0]["state"] == "waiting" and any(ws.images.glob("*.tar"))
    first = next((row for row in rows[given:] if row["state"] != "complete"), None)
    return {
        "workspace": str(ws.root),
        "card": ws.card.name,
        "holder": ws.holder(),
        "stages": rows,
        "next": None if first is None else _command(ws, first["stage"], first["state"]),
    }


def _row(stage: Stage) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage.name, "state": "waiting", "counts": "", "changes": [], "finished_at": ""}
    if (finished := stage.finished) is not None:
        row.update(state="complete", counts=counts_text(finished.summary), finished_at=finished.finished_at)
    elif stage.begun is not None:
        pieces = sum(1 for _ in stage.ws.root.glob(PIECES[stage.name])) if stage.name in PIECES else 0
        row.update(state="begun", counts=f"{pieces:,} {UNITS[stage.name]} so far" if stage.name in PIECES else "")
    elif stage.stale is not None:
        row.update(state="stale", counts="what it was made from has changed")
    if (record := finished or stage.begun) is None:
        return row
    now = stage.ws.card.model_dump(mode="json", by_alias=True)
    if changes := differences(record.card, now, stage.name):
        row.update(state="changed", changes=changes, counts="; ".join(changes[:3]))
    elif damage := stage.damage(thorough=False):
        row.update(state="damaged", counts=damage)
    return row


def _command(ws: Workspace, name: str, state: str) -> str:
    """The command that brings this stage to its end; it is meant to be typed as it stands."""
    stage, words = ws.stage(name), ["eclipse", name]
    record = stage.begun or stage.finished
    # Checkpoints of other rows cannot be continued from.
    of_other_rows = name == "train" and record is None and any(ws.root.glob(PIECES[name]))
    goes_on = state == "changed" and stage.finished is not None and stage.extends(stage.finished)
    if (state == "changed" and not goes_on) or of_other_rows:
        words.append("--overwrite")
    elif record is not None:
        for option, value in (record.options or {}).items():
            flag = option.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    if ws.root != Path.cwd():
        words += ["-w", str(ws.root)]
    return shlex.join(words)


def counts_text(summary: dict[str, Any]) -> str:
    """The first whole numbers of a stage's summary, on one line."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, int) and not isinstance(v, bool)}
    return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in list(numbers.items())[:SHOWN_COUNTS])
