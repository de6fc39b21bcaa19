"""Records of stages without the work behind them; called by tests of what goes by such records."""

from __future__ import annotations

from typing import Any

from eclipse.pipeline.core.workspace import Workspace


def finish(ws: Workspace, *stages: str, summary: dict[str, Any] | None = None, **options: Any) -> None:
    """Leave each stage finished with the workspace's card, whatever files lie there as what it made."""
    for name in stages:
        forget(ws, name)
        with ws.stage(name, options=options) as run:
            run.begin()
            run.finish({"rows": 3} if summary is None else summary)


def begin(ws: Workspace, name: str, **options: Any) -> None:
    """Leave a stage begun with the workspace's card, as if killed."""
    with ws.stage(name, options=options) as run:
        run.begin()


def forget(ws: Workspace, name: str) -> None:
    """Leave no record of the stage, and all of its files."""
    for ending in ("json", "begun.json", "stale.json"):
        ws.stage(name).path(ending).unlink(missing_ok=True)
