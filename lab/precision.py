"""How much of the planted dirt the filter found: precision and recall against the truth. Called by `run` and tests.

The only reader of the truth beside the server that plants it. It looks at a finished selection, and changes nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pyarrow.parquet as pq

from ..pipeline.cache.store import Store
from ..pipeline.core.files import write_json
from ..pipeline.core.source import ShapesSource
from ..pipeline.core.workspace import Workspace
from .truth import Planted, planted, row_of

COPY_REASONS = ("exact_copy", "near_copy")
CAPTION_REASONS = ("wrong_caption", "low_clip_score")
TARGETS = {"copies": (0.95, 0.95), "wrong_captions": (0.9, 0.8)}  # precision, recall


def measure(ws: Workspace) -> dict[str, Any]:
    """Compare selection.parquet of a shapes workspace with what was planted → for each kind of dirt its counts.

    Copies: an original and its copies are a group, and of the members that come to the copy rules all but one should
    be rejected, whichever stays. A rejection as a copy is right while another member of its group is kept; a group
    that is left with more than one has misses. Members that failed to download, or that other rules rejected, are
    neither right nor wrong here. A picture is kept while one of its captions is. Wrong captions: pair by pair.
    By kind: precision, recall, found, planted, rejected.
    """
    plan, pairs = _verdicts(ws)
    reasons = {row: _of_picture(some) for row, some in pairs.items()}
    kinds = {"copies": COPY_REASONS, "exact_copies": COPY_REASONS[:1], "near_copies": COPY_REASONS[1:]}
    result = {name: _copies(plan, reasons, which) for name, which in kinds.items()}
    result["wrong_captions"] = _captions(plan, pairs)
    for name, (precision, recall) in TARGETS.items():
        result[name]["target"] = {"precision": precision, "recall": recall}
        result[name]["met"] = result[name]["precision"] >= precision and result[name]["recall"] >= recall
    return result


def audit(ws: Workspace, *, measure_it: bool) -> dict[str, Any] | None:
    """How much of the planted dirt was found, for `eclipse run`; measured once for each run of the filter.

    None where it is not known and not to be measured now.
    """
    path, state = ws.reports / "dirt.json", ws.stage("filter").finished
    assert state is not None
    try:
        known = json.loads(path.read_text())
        if known["filtered_at"] == state.finished_at:
            return dict(known["found"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file, or none that can be read: it is made again
    if not measure_it:
        return None
    found = measure(ws)
    write_json(path, {"filtered_at": state.finished_at, "found": found})
    return found


def _verdicts(ws: Workspace) -> tuple[list[Planted], dict[int, list[str | None]]]:
    """The plan, and of every picture that was embedded the reason of each of its pairs (None: kept)."""
    source = ws.card.source
    assert isinstance(source, ShapesSource)
    store = Store.open(ws.embeddings)
    table = pq.read_table(ws.selection, columns=["part", "row", "reason"])
    rows = store.rows_of(table["part"].to_numpy(), table["row"].to_numpy())
    numbers = [row_of(url) for url in store.column("url", rows).to_pylist()]
    pairs: dict[int, list[str | None]] = defaultdict(list)
    for number, reason in zip(numbers, table["reason"].to_pylist(), strict=True):
        pairs[number].append(reason)
    return planted(source.seed, source.rows), pairs


def _of_picture(reasons: list[str | None]) -> str | None:
    """None if a pair is kept, else that it is a copy, else what its first pair was rejected for."""
    if None in reasons:
        return None
    return next((reason for reason in reasons if reason in COPY_REASONS), reasons[0])


def _copies(plan: list[Planted], reasons: dict[int, str | None], which: tuple[str, ...]) -> dict[str, Any]:
    """Counts for the copies of one or both kinds; a rejection is judged by the reason it was given."""
    wanted = {"exact_copy" if reason == "exact_copy" else "near_copy" for reason in which}
    groups: dict[int, list[int]] = defaultdict(list)
    for entry in plan:
        if entry.original is not None and entry.kind in wanted:
            groups[entry.original].append(entry.row)
    planted_count = found = 0
    member = set()
    for original, copies in groups.items():
        present = [row for row in (original, *copies) if row in reasons and reasons[row] in (None, *COPY_REASONS)]
        member.update(present)
        kept = sum(reasons[row] is None for row in present)
        planted_count += max(len(present) - 1, 0)
        found += min(len(present) - kept, len(present) - 1) if present else 0
    rejected = [row for row, reason in reasons.items() if reason in which]
    right = min(sum(row in member for row in rejected), found)
    return _figures(right, len(rejected), found, planted_count)


def _captions(plan: list[Planted], pairs: dict[int, list[str | None]]) -> dict[str, Any]:
    wrong = [reason for entry in plan if entry.kind == "wrong_caption" for reason in pairs.get(entry.row, ())]
    found = sum(reason in CAPTION_REASONS for reason in wrong)
    rejected = sum(reason in CAPTION_REASONS for some in pairs.values() for reason in some)
    return _figures(found, rejected, found, len(wrong))


def _figures(right: int, rejected: int, found: int, planted_count: int) -> dict[str, Any]:
    return {
        "precision": round(right / rejected, 4) if rejected else 1.0,
        "recall": round(found / planted_count, 4) if planted_count else 1.0,
        "found": found,
        "planted": planted_count,
        "rejected": rejected,
    }
