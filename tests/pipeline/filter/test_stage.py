"""The filter stage on a synthetic cache: verdicts, reasons, keepers; second and interrupted runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import synthetic_cache
from eclipse.pipeline.cache.store import Store, read_selection
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.filter.stage import filter_cache
from eclipse.pipeline.report import embed as report
from synthetic_cache import Maker, Row

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    table, truth = synthetic_cache.plant()
    ws = synthetic_cache.write(tmp_path_factory.mktemp("planted") / "ws", table)
    summary = filter_cache(ws, QUIET)
    return ws, truth, summary, pq.read_table(ws.selection).to_pylist()


def positions(verdicts: list[dict], reason: str) -> set[int]:
    return {i for i, verdict in enumerate(verdicts) if verdict["reason"] == reason}


def test_planted_copies_are_found_and_nothing_else(planted) -> None:
    _, truth, _, verdicts = planted
    assert positions(verdicts, "exact_copy") == set(truth.exact)
    assert positions(verdicts, "near_copy") == set(truth.near)
    assert all(verdicts[i]["keep"] for i in truth.alike), "a look-alike with another thumbnail is no copy"
    assert all(verdicts[i]["keep"] for i in truth.groups), "further captions of a picture are no copies"


def test_every_copy_names_the_row_it_copies(planted) -> None:
    ws, truth, _, verdicts = planted
    store = Store.open(ws.embeddings)
    for copy, original in (truth.exact | truth.near).items():
        of = verdicts[copy]["duplicate_of"]
        assert store.rows_of(np.array([of["part"]]), np.array([of["row"]])).tolist() == [original]
        assert verdicts[copy]["copy_similarity"] > 0.97
    assert all(v["duplicate_of"] is None for v in verdicts if v["keep"])


def test_wrong_captions_are_found(planted) -> None:
    _, truth, summary, verdicts = planted
    found = positions(verdicts, "wrong_caption")
    assert len(found & truth.wrong) >= 0.9 * len(truth.wrong)
    assert len(found - truth.wrong) <= 0.05 * len(found)
    assert summary["wrong_caption_share"] == pytest.approx(len(truth.wrong) / len(verdicts), abs=0.015)


def test_the_selection_judges_every_row_once_and_the_summary_counts_it(planted) -> None:
    ws, _, summary, verdicts = planted
    store = Store.open(ws.embeddings)
    kept = read_selection(ws.selection, store)
    assert kept.tolist() == [i for i, v in enumerate(verdicts) if v["keep"]]
    assert summary["rows"] == len(store) == summary["kept"] + sum(summary["rejected"].values())
    assert summary["kept"] == len(kept)
    assert [v["uid"] for v in verdicts] == store.column("uid").to_pylist()


def test_a_second_run_does_nothing_and_a_changed_card_is_named(planted) -> None:
    ws, _, summary, _ = planted
    before = ws.selection.stat().st_mtime_ns
    assert filter_cache(ws, QUIET) == {**summary, "already_complete": True}
    text = ws.card_path.read_text()
    try:
        ws.card_path.write_text(text.replace("near_copy_cosine: 0.92", "near_copy_cosine: 0.9"))
        with pytest.raises(EclipseError, match=r"filter.near_copy_cosine: 0.92 → 0.9"):
            filter_cache(Workspace.open(ws.root), QUIET)
    finally:
        ws.card_path.write_text(text)
    assert ws.selection.stat().st_mtime_ns == before


def test_an_interrupted_run_leaves_nothing_and_the_next_ends_the_same(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, _, verdicts = planted
    table, _ = synthetic_cache.plant()
    ws = synthetic_cache.write(tmp_path / "ws", table)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", _half_written)
        with pytest.raises(KeyboardInterrupt):
            filter_cache(ws, QUIET)
    assert not ws.selection.exists() and not list(ws.root.glob(".tmp-*"))
    filter_cache(ws, QUIET)
    assert pq.read_table(ws.selection).to_pylist() == verdicts


def _half_written(table: object, path: Path, **_: object) -> None:
    Path(path).write_bytes(b"PAR1")
    raise KeyboardInterrupt


def test_the_filter_wants_embeddings_first(tmp_path: Path) -> None:
    from eclipse.pipeline.core.card import Card

    with pytest.raises(EclipseError, match="nothing to filter"):
        filter_cache(Workspace.create(tmp_path / "ws", Card.load("shapes")), QUIET)


def small(rows: int = 60) -> list[Row]:
    maker = Maker(1)
    return [maker.row(i) for i in range(rows)]


def reasons(root: Path, table: list[Row], **options: object) -> list[str | None]:
    off = {"wrong_caption": None, "exact_copies": None, "near_copy_cosine": None}
    ws = synthetic_cache.write(root, table, **{**off, **options})
    filter_cache(ws, QUIET)
    return pq.read_table(ws.selection)["reason"].to_pylist()


def test_size_shape_and_length_rules(tmp_path: Path) -> None:
    table = small(6)
    table[1].size, table[2].size = (40, 64), (64, 20)
    table[3].caption, table[4].caption = "  ab ", "x" * 300
    found = reasons(
        tmp_path / "ws", table, min_side=30, max_aspect_ratio=1.5, min_caption_length=3, max_caption_length=200
    )
    assert found == [None, "aspect_ratio", "small_picture", "caption_length", "caption_length", None]


def test_clip_score_rules_drop_the_lowest_and_the_lowest_share(tmp_path: Path) -> None:
    table = small()
    table[7].text = -table[7].text
    assert reasons(tmp_path / "least", table, min_clip_score=0.0) == [None] * 7 + ["low_clip_score"] + [None] * 52
    found = reasons(tmp_path / "share", table, min_clip_score_quantile=0.1)
    assert found.count("low_clip_score") == 6 and found[7] == "low_clip_score"


def test_a_rule_without_its_score_says_what_to_do(tmp_path: Path) -> None:
    for kind, option in (("aesthetic", "min_aesthetic_score"), ("safety", "max_safety_score")):
        with pytest.raises(EclipseError, match=f"{kind} score") as error:
            reasons(tmp_path / kind, small(4), **{option: 5.0})
        assert f"encoder.{kind}" in str(error.value)


def test_a_row_rejected_for_its_quality_does_not_remove_its_copy(tmp_path: Path) -> None:
    table = small()
    table.append(Row(table[5].image, table[5].text, table[5].grey, "http://127.0.0.1/again.jpg", "a good caption"))
    table[5].caption = "x"
    found = reasons(tmp_path / "ws", table, exact_copies="image", min_caption_length=3)
    assert found[5] == "caption_length" and found[60] is None


def test_duplicates_of_duplicates_point_at_the_row_that_stays(tmp_path: Path) -> None:
    maker, table = Maker(1), small()
    near = maker.like(table[5], 60, embedding=0.05, grey=2)
    table += [near, Row(near.image, near.text, near.grey, "http://127.0.0.1/61.jpg", "same bytes as row 60")]
    ws = synthetic_cache.write(tmp_path / "ws", table, wrong_caption=None)
    filter_cache(ws, QUIET)
    verdicts = pq.read_table(ws.selection).to_pylist()
    assert [verdicts[i]["reason"] for i in (5, 60, 61)] == [None, "near_copy", "exact_copy"]
    assert verdicts[60]["duplicate_of"] == verdicts[61]["duplicate_of"] == {"part": 0, "row": 5}


def test_keep_best_keeps_the_copy_with_the_best_score(tmp_path: Path) -> None:
    table = small()
    table.append(Row(table[5].image, table[5].image, table[5].grey, "http://127.0.0.1/again.jpg", "it fits better"))
    assert reasons(tmp_path / "first", table, exact_copies="image")[60] == "exact_copy"
    found = reasons(tmp_path / "best", table, exact_copies="image", keep="best")
    assert found[5] == "exact_copy" and found[60] is None


def test_one_row_is_enough(tmp_path: Path) -> None:
    ws = synthetic_cache.write(tmp_path / "ws", small(1), wrong_caption=0.5)
    assert filter_cache(ws, QUIET)["rows"] == 1


def test_the_page_shows_copies_and_captions_with_their_pictures(planted) -> None:
    ws, truth, _, verdicts = planted
    page = (ws.reports / "filter.html").read_text()
    assert "data:image/png;base64," in page and "<svg" in page and 'src=""' not in page
    shown = [position for position in positions(verdicts, "near_copy") if f"picture number {position} " in page]
    assert len(shown) >= 10
    assert any(f"wrong {position}" in page for position in truth.wrong)


def test_the_page_says_how_alike_the_two_pictures_are_that_it_shows(tmp_path: Path) -> None:
    maker, table = Maker(1), small(30)
    table += [maker.like(table[5], 30, embedding=0.6, grey=60)]  # 30 goes for 5, as a semantic duplicate
    table += [maker.like(table[30], 31, embedding=0.05, grey=2)]  # 31 goes for 30, and so for 5
    options = {"near_copy_cosine": 0.98, "near_copy_picture": None, "semantic_cosine": 0.9, "wrong_caption": None}
    ws = synthetic_cache.write(tmp_path / "ws", table, **options)
    filter_cache(ws, QUIET)
    verdict = pq.read_table(ws.selection).to_pylist()[31]
    assert verdict["reason"] == "near_copy" and verdict["duplicate_of"]["row"] == 5
    assert verdict["copy_similarity"] > 0.98
    one, other = (table[n].image / np.linalg.norm(table[n].image) for n in (31, 5))
    told = [float(value) for value in re.findall(r"copy (0\.\d+)", (ws.reports / "filter.html").read_text())]
    assert one @ other < 0.97 and min(told) == pytest.approx(one @ other, abs=2e-3)


def test_the_embed_page_measures_retrieval_and_the_gap(planted) -> None:
    ws, *_ = planted
    path = report.embed_page(ws, Store.open(ws.embeddings), {"not an image": 3})
    page = path.read_text()
    assert "not an image" in page and "modality gap" in page and page.count("<figure") >= 40


def test_the_embed_page_shows_lengths_and_the_nearest_other_pictures(tmp_path: Path) -> None:
    maker, table = Maker(1), small(report.QUERIES - 2)  # so few rows that every one is shown
    twin = maker.like(table[3], 100, embedding=0.01, grey=1)
    again = Row(table[3].image, table[3].text, table[3].grey, table[3].url, "the same picture told otherwise")
    ws = synthetic_cache.write(tmp_path / "ws", [*table, twin, again])
    page = report.embed_page(ws, Store.open(ws.embeddings), {}).read_text()
    assert "Length of the embeddings of pictures" in page and "Length of the embeddings of captions" in page
    section = page.split("Nearest neighbours</h2>")[1].split("<h2>")[0]
    shown = [re.findall(r'alt="(.*?)"', group) for group in section.split('<div class="group">')[1:]]
    nearest = {query: first for query, first, *_ in shown}
    assert nearest[table[3].caption] == nearest[again.caption] == twin.caption, "a picture is no neighbour of itself"
    assert nearest[twin.caption] in (table[3].caption, again.caption)
