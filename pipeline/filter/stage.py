"""Rules in, verdict with reasons out: writes selection.parquet, never the parts. Called by cli.py and `eclipse run`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..cache.part import HEAD_SCORES
from ..core.errors import EclipseError
from ..core.files import atomic_path
from ..core.progress import Progress
from ..core.workspace import Workspace
from ..images.shards import shards_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ..cache.store import Store

SCORES = ("clip_score", *HEAD_SCORES, "wrong_probability", "caption_z", "copy_similarity")


def filter_cache(ws: Workspace, progress: Progress, *, overwrite: bool = False) -> dict:
    """Judge every embedded row by the card's rules → summary with counts per reason.

    selection.parquet holds one row for each embedded row, in (part, row) order: part, row, uid, keep, reason (null
    where kept), duplicate_of {part, row} (null unless a copy; always a kept row), and SCORES (null where not computed).
    Raises EclipseError if `embed` is not done, or if the filter was run with other settings and not told to overwrite.
    """
    with ws.stage("filter", overwrite=overwrite) as run:
        if run.complete:
            return run.summary
        if ws.stage("embed").finished is None:
            raise EclipseError("nothing to filter yet", where=str(ws.embeddings), hint="run `eclipse embed` first")
        run.begin()
        import pyarrow.parquet as pq

        from ..cache.store import Store
        from ..report import stages as report

        store = Store.open(ws.embeddings)
        table, notes = _judge(store, ws, progress)
        with atomic_path(ws.selection) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        summary = {**_summary(table, notes), "selection": str(ws.selection)}
        run.finish(summary, report=report.filter_page(ws, store, table, summary, progress))
    return run.summary


def _judge(store: Store, ws: Workspace, progress: Progress) -> tuple[pa.Table, dict[str, float]]:
    """Apply the rules and lay their findings out as the selection table."""
    import numpy as np

    from . import rules

    reason = np.full(len(store), None, dtype=object)
    duplicate_of = np.full(len(store), -1, np.int64)
    scores = {name: np.full(len(store), np.nan, np.float32) for name in SCORES}
    for name in ("clip_score", *store.meta.head_scores):
        scores[name] = np.array(store.column(name).to_numpy(), np.float32)
    notes: dict[str, float] = {}
    for name, finding in rules.apply(store, shards_of(ws), ws.card.filter, progress):
        reason[finding.rejected] = name
        if finding.duplicate_of is not None:
            duplicate_of[finding.rejected] = finding.duplicate_of
        for score, (rows, values) in finding.scores.items():
            scores[score][rows] = values
        notes |= finding.notes
        progress.say(f"{name.replace('_', ' ')}: {len(finding.rejected):,} rows rejected")
    return _table(store, reason, _settle(duplicate_of), scores), notes


def _settle(duplicate_of: np.ndarray) -> np.ndarray:
    """Point every copy at the row that is kept in the end: a keeper of one rule may be the copy of a later one."""
    import numpy as np

    while True:
        further = np.where(duplicate_of >= 0, duplicate_of[duplicate_of], -1)
        if (further < 0).all():
            return duplicate_of
        duplicate_of = np.where(further >= 0, further, duplicate_of)


def _table(store: Store, reason: np.ndarray, duplicate_of: np.ndarray, scores: dict[str, np.ndarray]) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    part, row = store.part_of(np.arange(len(store)))
    copy = duplicate_of >= 0
    of_part, of_row = store.part_of(np.where(copy, duplicate_of, 0)) if len(store) else (part, row)
    columns = {
        "part": pa.array(part, pa.int32()),
        "row": pa.array(row, pa.int32()),
        "uid": store.column("uid"),
        "keep": pa.array([why is None for why in reason], pa.bool_()),
        "reason": pa.array(reason, pa.string()).dictionary_encode(),
        "duplicate_of": pa.StructArray.from_arrays(
            [pa.array(of_part, pa.int32()), pa.array(of_row, pa.int32())], ["part", "row"], mask=pa.array(~copy)
        ),
    }
    for name, values in scores.items():
        columns[name] = pa.array(values, pa.float32(), from_pandas=True)  # NaN means not computed: null
    return pa.table(columns)


def _summary(table: pa.Table, notes: dict[str, float]) -> dict:
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason is not None)
    kept = len(table) - sum(reasons.values())
    return {
        "rows": len(table),
        "kept": kept,
        "rejected": dict(reasons.most_common()),
        **notes,
    }
