"""The precision report: perfect, sloppy and empty selections over a planted list give the figures they should."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_cache
from eclipse.lab import precision
from eclipse.lab.precision import measure
from eclipse.lab.truth import Planted, planted
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.workspace import Workspace

SOURCE = Card.load("shapes").source
ROWS = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[Planted]]:
    """A cache with one row for each live row of a planted list of ROWS."""
    maker = synthetic_cache.Maker()
    plan = planted(SOURCE.seed, ROWS)  # type: ignore[union-attr]
    live = [entry for entry in plan if entry.kind != "dead"]
    table = [maker.row(i) for i in range(len(live))]
    for row, entry in zip(table, live, strict=True):
        row.url = f"http://127.0.0.1:1{entry.path}"
    ws = synthetic_cache.write(tmp_path_factory.mktemp("precision") / "ws", table)
    text = ws.card_path.read_text().replace(f"rows: {SOURCE.rows}", f"rows: {ROWS}")  # type: ignore[union-attr]
    ws.card_path.write_text(text)
    return Workspace(ws.root), live


def judge(ws: Workspace, reasons: list[str | None]) -> dict:
    part, row = zip(*(divmod(i, synthetic_cache.ROWS_A_PART) for i in range(len(reasons))), strict=True)
    pq.write_table(pa.table({"part": part, "row": row, "reason": pa.array(reasons, pa.string())}), ws.selection)
    return measure(ws)


def perfect(live: list[Planted]) -> list[str | None]:
    return [None if entry.kind == "clean" else entry.kind for entry in live]


def test_a_perfect_filter_scores_one(world) -> None:
    ws, live = world
    for figures in judge(ws, perfect(live)).values():
        assert figures["precision"] == figures["recall"] == 1 and figures["planted"] >= 16


def test_it_does_not_matter_which_of_a_group_stays(world) -> None:
    ws, live = world
    reasons, place = perfect(live), {entry.row: i for i, entry in enumerate(live)}
    copy = next(entry for entry in live if entry.kind == "near_copy")
    assert copy.original is not None
    reasons[place[copy.row]], reasons[place[copy.original]] = None, "near_copy"
    assert judge(ws, reasons)["copies"]["recall"] == 1 == judge(ws, reasons)["copies"]["precision"]


def test_misses_and_false_alarms_are_counted(world) -> None:
    ws, live = world
    reasons = perfect(live)
    missed = next(i for i, entry in enumerate(live) if entry.kind == "near_copy")
    originals = {entry.original for entry in live}
    innocent = [i for i, entry in enumerate(live) if entry.kind == "clean" and entry.row not in originals][:2]
    reasons[missed], reasons[innocent[0]], reasons[innocent[1]] = None, "near_copy", "wrong_caption"
    figures = judge(ws, reasons)
    near = figures["near_copies"]
    assert near["found"] == near["planted"] - 1 and near["precision"] == pytest.approx(
        1 - 1 / near["rejected"], abs=1e-4
    )
    wrong = figures["wrong_captions"]
    assert wrong["recall"] == 1 and wrong["precision"] == pytest.approx(1 - 1 / wrong["rejected"], abs=1e-4)


def test_of_several_captions_pairs_count_for_captions_and_pictures_for_copies(world) -> None:
    """A picture is kept while one of its pairs is; each of its wrong captions is to be found."""
    _, live = world
    plan = {entry.row: entry for entry in live}
    copy = next(entry for entry in live if entry.kind == "near_copy")
    wrong = next(entry for entry in live if entry.kind == "wrong_caption")
    assert copy.original is not None
    pairs = {row: [None if entry.kind == "clean" else entry.kind] * 2 for row, entry in plan.items()}
    pairs[wrong.row] = ["wrong_caption", None]
    figures = precision._captions(live, pairs)  # type: ignore[arg-type]
    planted_pairs = 2 * sum(entry.kind == "wrong_caption" for entry in live)
    assert (figures["found"], figures["planted"]) == (planted_pairs - 1, planted_pairs)
    pairs[copy.original] = ["wrong_caption", None]
    reasons = {row: precision._of_picture(some) for row, some in pairs.items()}  # type: ignore[arg-type]
    assert reasons[copy.original] is None and reasons[copy.row] == "near_copy"
    assert precision._of_picture(["low_clip_score", "exact_copy"]) == "exact_copy"


def test_losing_a_whole_group_is_no_success(world) -> None:
    ws, live = world
    reasons = [None if entry.kind == "clean" else entry.kind for entry in live]
    originals = {entry.original for entry in live if entry.kind == "exact_copy"}
    reasons = ["exact_copy" if entry.row in originals else why for entry, why in zip(live, reasons, strict=True)]
    assert judge(ws, reasons)["exact_copies"]["precision"] == 0.5


def test_keeping_everything_finds_nothing(world) -> None:
    ws, live = world
    figures = judge(ws, [None] * len(live))
    assert figures["copies"]["recall"] == figures["wrong_captions"]["recall"] == 0
    assert figures["copies"]["met"] is False


def test_the_truth_lies_outside_the_workspace(world) -> None:
    ws, _ = world
    assert not [path for path in Path(ws.root).rglob("*") if "truth" in path.name or "planted" in path.name]
