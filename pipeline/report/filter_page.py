"""reports/filter.html: what was kept, why the rest was not, and how near the thresholds it lay; called by filter.

Everything drawn is a sample of bounded size, so that a page of ten million rows takes as long as one of a million.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.vectors import unit
from ..core.progress import Progress
from ..core.workspace import Workspace
from . import charts
from .clusters import clusters
from .page import chart, shares, stage_page, tile
from .pictures import SHOWN, Shots
from .words import SCORES, in_words

if TYPE_CHECKING:
    import pyarrow as pa

    from ..cache.store import Store

DRAWN = 200_000  # rows a histogram is drawn from
CLUSTERED, CLUSTERS = 20_000, 16  # rows that are clustered, and into how many
BESIDE = 6  # rows shown on each side of a threshold
COPIES = {"exact_copy": "Exact copies", "near_copy": "Near copies", "semantic_duplicate": "Semantic duplicates"}
# Rules that judge by one score of every row: its column, and whether rows above the threshold are dropped.
SCORED = {
    "low_clip_score": ("clip_score", False),
    "low_aesthetic_score": ("aesthetic_score", False),
    "high_safety_score": ("safety_score", True),
    "wrong_caption": ("wrong_probability", True),
}


def filter_page(
    ws: Workspace,
    store: Store,
    table: pa.Table,
    summary: dict[str, Any],
    funnel: dict[str, dict[str, Any]],
    near_misses: list[tuple[int, int, float]],
    progress: Progress,
) -> Path:
    """Write the page → its path. table: the selection; funnel: seen, rejected and threshold of each rule, in order.

    near_misses: pairs of rows that just failed as copies, with the correlation of their pictures.
    """
    with progress.task("drawing the report", 3, "parts") as task:
        kept = table["keep"].to_numpy()
        reason = table["reason"].combine_chunks()
        names = reason.dictionary.to_pylist()
        code = np.asarray(reason.indices.fill_null(-1))
        scores = {name: np.asarray(table[name].to_numpy(), np.float32) for name, _ in SCORED.values()}
        similarity = np.asarray(table["copy_similarity"].to_numpy(), np.float32)
        of = table["duplicate_of"].combine_chunks()
        part, row = (np.asarray(of.field(name).fill_null(0)) for name in ("part", "row"))
        is_copy = np.asarray(of.is_valid())
        keeper = np.full(len(table), -1, np.int64)
        keeper[is_copy] = store.rows_of(part[is_copy], row[is_copy])
        rng = np.random.default_rng(0)

        def some(rows: np.ndarray, most: int = SHOWN) -> np.ndarray:
            return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))

        def rejected(name: str) -> np.ndarray:
            return np.flatnonzero(code == names.index(name)) if name in names else np.empty(0, np.int64)

        drawn = some(np.arange(len(table)), DRAWN)
        figures = _charts(drawn, kept, scores, similarity[rejected("near_copy")], funnel)
        task.advance()

        # Rows to show: groups of copies, both sides of each threshold, rejected captions, kept ones.
        groups = {name: _largest_groups(rejected(name), keeper) for name in COPIES}
        sides = []
        for name, (column, above) in SCORED.items():
            threshold = funnel.get(name, {}).get("threshold")
            if threshold is not None and funnel[name]["rejected"]:
                value = scores[column]
                dropped, stayed = rejected(name), np.flatnonzero(kept & np.isfinite(value))
                sign = 1 if above else -1
                dropped = dropped[np.argsort(sign * value[dropped], kind="stable")[:BESIDE]]
                stayed = stayed[np.argsort(-sign * value[stayed], kind="stable")[:BESIDE]]
                sides.append((column, threshold, dropped, stayed))
        faint = rejected("near_copy")
        faint = faint[np.argsort(similarity[faint], kind="stable")[:BESIDE]]
        said = np.asarray(table["caption_similarity"].to_numpy(), np.float32)
        listed = rejected("evaluation_overlap")
        listed = listed[np.isfinite(said[listed])]
        listed = listed[np.argsort(said[listed], kind="stable")[:SHOWN]]
        wrong, at_random = some(rejected("wrong_caption")), some(np.flatnonzero(kept))
        members, share = _clusters(store, kept, code, names, some(np.arange(len(table)), CLUSTERED))
        shown = [np.array(g, np.int64) for found in groups.values() for g, _ in found]
        shown += [rows for _, _, *both in sides for rows in both] + [faint, keeper[faint], wrong, listed, at_random]
        shown += [members.ravel(), np.array([n for i, j, _ in near_misses for n in (i, j)], np.int64)]
        shots = Shots(ws, store, np.concatenate(shown).tolist())
        task.advance()

        def alike(copy: int) -> str:
            """Of the two pictures that are shown: what a copy was dropped for may itself be the copy of what stays."""
            one, other = unit(store.image_embeddings(np.array([copy, keeper[copy]])))
            return f"copy {float(one @ other):.3f}"

        def pair(first: int, second: int, tag: str, tone: str) -> list[dict[str, Any]]:
            return [
                shots(first, "stays" if kept[first] else "", "good" if kept[first] else ""),
                shots(second, tag, tone),
            ]

        path = stage_page(
            ws,
            "filter",
            "filter.html.j2",
            title="What was kept, and why",
            lead=f"{summary['kept']:,} of {summary['rows']:,} rows go into training.",
            warnings=summary.get("warnings", []),
            tiles=[
                tile(summary["kept"], "rows kept", "good"),
                tile(sum(summary["rejected"].values()), "rows rejected"),
                *(tile(n, in_words(name)) for name, n in summary["rejected"].items()),
            ],
            funnel=[{"name": in_words(name), "left": v["seen"] - v["rejected"], **v} for name, v in funnel.items()],
            rejected=shares(summary["rejected"], summary["rows"]),
            charts=figures,
            copies=[
                (
                    COPIES[name],
                    [
                        [
                            shots(group[0], f"stays, {size:,} " + ("copy" if size == 1 else "copies"), "good"),
                            *(shots(r, alike(r), "bad") for r in group[1:]),
                        ]
                        for group, size in found
                    ],
                )
                for name, found in groups.items()
                if found
            ],
            sides=[
                {
                    "title": SCORES[column][0],
                    "threshold": f"{threshold:.3g}",
                    "dropped": [shots(r, f"{scores[column][r]:.3f}", "bad") for r in dropped],
                    "stayed": [shots(r, f"{scores[column][r]:.3f}", "good") for r in stayed],
                }
                for column, threshold, dropped, stayed in sides
            ],
            faint=[pair(int(keeper[r]), int(r), alike(int(r)), "bad") for r in faint],
            misses=[pair(i, j, f"no copy {value:.3f}", "good") for i, j, value in near_misses],
            wrong=[shots(r, f"P(wrong) {scores['wrong_probability'][r]:.2f}", "bad") for r in wrong],
            listed=[shots(r, f"cosine {said[r]:.3f}", "bad") for r in listed.tolist()],
            clusters=[
                {
                    "shots": [shots(r) for r in rows.tolist()],
                    "name": f"{dropped:.0%} dropped",
                    "note": f"{size:.1%} of the rows" + (f"; most often: {in_words(why)}" if why else ""),
                }
                for rows, (size, dropped, why) in zip(members, share, strict=True)
            ],
            kept=[shots(r, lines=[f"CLIP score {scores['clip_score'][r]:.3f}"]) for r in at_random],
        )
        task.advance()
    return path


def _charts(
    drawn: np.ndarray,
    kept: np.ndarray,
    scores: dict[str, np.ndarray],
    copies: np.ndarray,
    funnel: dict[str, dict[str, Any]],
) -> list[dict[str, str]]:
    """Every score that there is, of kept and rejected rows, with the threshold of its rule; how alike copies are."""
    found = []
    for rule, (column, _) in SCORED.items():
        value, stays = scores[column][drawn], kept[drawn]
        if not np.isfinite(value).any():
            continue
        threshold = funnel.get(rule, {}).get("threshold")
        svg = charts.histogram(
            {"kept": value[stays], "rejected": value[~stays]},
            label=SCORES[column][1].partition(",")[0],
            marks={} if threshold is None else {"threshold": threshold},
            log=column == "wrong_probability",
        )
        found.append(chart(*SCORES[column], svg))
    if len(copies):
        threshold = funnel["near_copy"]["threshold"]
        svg = charts.histogram({"copies": copies[:DRAWN]}, label="cosine", marks={"threshold": threshold})
        found.append(chart("Near copies", "cosine to the picture it was dropped for", svg))
    return found


def _largest_groups(copies: np.ndarray, keeper: np.ndarray) -> list[tuple[list[int], int]]:
    """The keepers with the most copies, each with its two first copies, and how many it has."""
    if not len(copies):
        return []
    who, count = np.unique(keeper[copies], return_counts=True)
    largest = np.argsort(-count, kind="stable")[: SHOWN // 2]
    order = copies[np.argsort(keeper[copies], kind="stable")]
    first = np.searchsorted(keeper[order], who[largest])
    return [
        ([int(who[k]), *order[start : start + min(2, count[k])].tolist()], int(count[k]))
        for k, start in zip(largest.tolist(), first.tolist(), strict=True)
    ]


def _clusters(
    store: Store, kept: np.ndarray, code: np.ndarray, names: list[str], rows: np.ndarray
) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """Pictures like each other: three rows of each cluster (c, 3); its share of rows, share dropped, chief reason.

    Most dropped first. Clusters of fewer than three sampled rows are left out.
    """
    found = []
    for inside in clusters(store, rows, CLUSTERS):
        why = code[inside]
        reasons = np.bincount(why[why >= 0], minlength=max(len(names), 1))
        chief = names[int(reasons.argmax())] if reasons.any() else ""
        found.append((inside[:3], (len(inside) / len(rows), float(1 - kept[inside].mean()), chief)))
    found.sort(key=lambda item: -item[1][1])
    return np.array([middle for middle, _ in found], np.int64).reshape(-1, 3), [about for _, about in found]
