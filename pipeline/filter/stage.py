"""Rules in, verdict with reasons out: writes selection.parquet, never the parts. Called by cli.py and `eclipse run`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..cache.part import HEAD_SCORES
from ..core.errors import EclipseError, UsageError
from ..core.files import atomic_path
from ..core.progress import Progress
from ..core.workspace import Workspace
from ..images.sources import shards_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ..cache.store import Store
    from ..core.sections import FilterSection
    from .evidence import Evidence
    from .rules import Finding

SCORES = ("clip_score", *HEAD_SCORES, "wrong_probability", "caption_z", "copy_similarity", "caption_similarity")
LARGEST_DROP = 0.75  # share of the rows it sees from which a rule is stopped, unless the card says otherwise
SHOWN = 12  # pairs that were nearly copies, on the report
FEWEST_ROWS = 20  # below, any share is plausible


def filter_cache(
    ws: Workspace,
    progress: Progress,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    rules: Sequence[str] = (),
) -> dict[str, Any]:
    """Judge every embedded row by the card's rules → summary with counts per reason.

    selection.parquet holds one row for each embedded row, in (part, row) order: part, row, uid, url, caption, keep,
    reason (null where kept), score and threshold (the number that the rule judged the row by and what it was compared
    with, where there is one), duplicate_of {part, row} (null unless a copy; always a kept row), and SCORES (null where
    not computed).

    rules: KEY=VALUE each, in place of keys of the card's filter section. dry_run: writes nothing but what filtering
    again would find anyway (see evidence.py), and says what each rule would drop alone and in sequence.

    Raises EclipseError if `embed` is not done, if the filter was run with other settings and not told to overwrite, or
    if a rule would drop a share of the rows that is implausible.
    """
    options = _with_rules(ws.card.filter, rules)
    given = {"rules": sorted(rules)} if rules else None
    # A dry run asks what a changed card would do: that the stage was run with another is no obstacle.
    with ws.stage("filter", overwrite=overwrite or dry_run, options=given) as run:
        if run.complete:
            return run.summary
        if ws.stage("embed").finished is None:
            raise EclipseError("nothing to filter yet", where=str(ws.embeddings), hint="run `eclipse embed` first")
        from ..cache.store import Store
        from .evidence import Evidence

        evidence = Evidence(Store.open(ws.embeddings), shards_of(ws), ws.logs / "filter", progress)
        if dry_run:
            return _dry_run(evidence, ws, options)
        import pyarrow.parquet as pq

        from ..report.filter_page import filter_page

        table, funnel, about = _judge(evidence, ws, options)
        run.begin()
        with atomic_path(ws.selection) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        rejected = {name: step["rejected"] for name, step in funnel.items() if step["rejected"]}
        summary = {
            "rows": len(table),
            "kept": len(table) - sum(rejected.values()),
            "rejected": dict(sorted(rejected.items(), key=lambda item: -item[1])),
            **about,
            "selection": str(ws.selection),
        }
        close = [] if options.near_copy_cosine is None else evidence.near_misses(SHOWN)
        run.finish(summary, report=filter_page(ws, evidence.store, table, summary, funnel, close, progress))
    return run.summary


def _with_rules(section: FilterSection, rules: Sequence[str]) -> FilterSection:
    """The card's section with some keys replaced. UsageError for what is no key, or no value of it."""
    import yaml
    from pydantic import ValidationError

    given: dict[str, Any] = {}
    for rule in rules:
        key, equals, value = rule.partition("=")
        if not equals or key not in type(section).model_fields:
            near = difflib.get_close_matches(key, type(section).model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "the keys are those of `eclipse cards shapes`, under filter"
            raise UsageError("no rule of that name" if equals else "a rule is KEY=VALUE", where=rule[:200], hint=hint)
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[key] = value
    if not given:
        return section
    # Keys that are off and would be by default count as left out, or a preset named here could not fill them in.
    defaults = type(section).model_fields
    before = {k: v for k, v in section.model_dump().items() if v is not None or defaults[k].default is not None}
    try:
        return type(section).model_validate({**before, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "filter"
        what = problem["msg"].removeprefix("Value error, ")
        raise UsageError(f"{key}: {what}", where="--rule", hint="`eclipse cards --keys` shows every key") from None


def _judge(
    evidence: Evidence, ws: Workspace, options: FilterSection
) -> tuple[pa.Table, dict[str, dict[str, Any]], dict[str, Any]]:
    """Apply the rules → the selection table; seen, rejected and threshold by rule; what the summary says besides."""
    import numpy as np

    from . import rules

    store, progress = evidence.store, evidence.progress
    size = len(store)
    names = [rule.__name__ for rule in rules.RULES]
    reason = np.full(size, -1, np.int8)
    duplicate_of = np.full(size, -1, np.int64)
    scores = {name: np.full(size, np.nan, np.float32) for name in ("score", "threshold", *SCORES)}
    for name in ("clip_score", *store.meta.head_scores):
        scores[name] = np.array(store.column(name).to_numpy(), np.float32)
    funnel: dict[str, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    for name, seen, finding in rules.apply(evidence, options, ws.card.encoder, ws.root):
        _require_plausible(name, seen, finding, options, ws)
        reason[finding.rejected] = names.index(name)
        if finding.duplicate_of is not None:
            duplicate_of[finding.rejected] = finding.duplicate_of
        for score, (rows, values) in finding.scores.items():
            scores[score][rows] = values
        if finding.decided_by is not None:
            scores["score"][finding.rejected] = finding.decided_by
        if (limit := finding.threshold if finding.thresholds is None else finding.thresholds) is not None:
            scores["threshold"][finding.rejected] = limit
        funnel[name] = {"seen": seen, "rejected": len(finding.rejected), "threshold": finding.threshold}
        about |= finding.notes
        if finding.warning:
            about["warnings"] = [*about.get("warnings", []), finding.warning]
            progress.say(f"warning: {finding.warning}")
        progress.say(f"{name.replace('_', ' ')}: {len(finding.rejected):,} of {seen:,} rows rejected")
    return _table(store, names, reason, _settle(duplicate_of), scores), funnel, about


def _require_plausible(name: str, seen: int, finding: Finding, options: FilterSection, ws: Workspace) -> None:
    """A threshold that leaves next to nothing is a mistake far more often than a wish."""
    most = options.largest_drop or LARGEST_DROP
    if seen < FEWEST_ROWS or finding.stated or len(finding.rejected) <= most * seen:
        return
    limit = "" if finding.threshold is None else f" (threshold {finding.threshold:g})"
    raise EclipseError(
        f"{name}{limit} would drop {len(finding.rejected):,} of {seen:,} rows, more than is plausible ({most:.0%})",
        where=f"{ws.card_path}: filter",
        hint="see `eclipse filter --dry-run`; change the rule, or raise filter.largest_drop if this is meant",
    )


def _dry_run(evidence: Evidence, ws: Workspace, options: FilterSection) -> dict[str, Any]:
    """What each rule would drop: of all sound rows by itself, and of what the rules before it leave."""
    from . import rules

    store = evidence.store
    counts: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    for alone in (True, False):
        for name, seen, finding in rules.apply(evidence, options, ws.card.encoder, ws.root, alone=alone):
            dropped = len(finding.rejected)
            # A rule that has no row left to judge in its turn says nothing then.
            row = counts.setdefault(name, {"alone": 0, "in_sequence": 0, "left": 0, "threshold": None})
            row["alone" if alone else "in_sequence"] = dropped
            if not alone:
                row["left"] = seen - dropped
                row["threshold"] = finding.threshold
                warnings += [finding.warning] if finding.warning else []
            elif seen >= FEWEST_ROWS and not finding.stated:
                most = options.largest_drop or LARGEST_DROP
                if dropped > most * seen:
                    warnings.append(f"{name} would be stopped: it drops {dropped:,} of {seen:,} rows by itself")
    kept = len(store) - sum(row["in_sequence"] for row in counts.values())
    return {"dry_run": True, "rows": len(store), "kept": kept, "rules": counts, "warnings": warnings}


def _settle(duplicate_of: np.ndarray) -> np.ndarray:
    """Point every copy at the row that is kept in the end: a keeper of one rule may be the copy of a later one."""
    import numpy as np

    while True:
        further = np.where(duplicate_of >= 0, duplicate_of[duplicate_of], -1)
        if (further < 0).all():
            return duplicate_of
        duplicate_of = np.where(further >= 0, further, duplicate_of)


def _table(
    store: Store, names: list[str], reason: np.ndarray, duplicate_of: np.ndarray, scores: dict[str, np.ndarray]
) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    part, row = store.part_of(np.arange(len(store)))
    copy = duplicate_of >= 0
    of_part, of_row = store.part_of(np.where(copy, duplicate_of, 0)) if len(store) else (part, row)
    columns = {
        "part": pa.array(part, pa.int32()),
        "row": pa.array(row, pa.int32()),
        "uid": store.column("uid"),
        "url": store.column("url"),
        "caption": store.column("caption"),
        "keep": pa.array(reason < 0),
        "reason": pa.DictionaryArray.from_arrays(pa.array(reason, pa.int8(), mask=reason < 0), pa.array(names)),
        "duplicate_of": pa.StructArray.from_arrays(
            [pa.array(of_part, pa.int32()), pa.array(of_row, pa.int32())], ["part", "row"], mask=pa.array(~copy)
        ),
    }
    for name, values in scores.items():
        columns[name] = pa.array(values, pa.float32(), from_pandas=True)  # NaN means not computed: null
    return pa.table(columns)
