"""`eclipse lab`: experiments run end to end on untrained models, resume, and never mix settings."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eclipse.cli import app
from eclipse.decode.conditioning import load_encoder
from eclipse.lab import experiments, trial
from eclipse.lab.drawing import draw
from eclipse.lab.experiments import Dials, run, spread
from eclipse.lab.shapes import CATEGORIES
from eclipse.lab.trial import Arm, Setting, Trial
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.report.charts import dots
from eclipse.trainer.data.split import split
from tiny_workspace import make_workspace
from typer.testing import CliRunner

QUIET = Progress(quiet=True)
DIALS = Dials(held_out=0.5, pairs=80, seeds=(0, 1), steps=4, prompts=1, fresh=12)
TRAIN = {
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "precision": "fp32",
    "validation": 0.1,
    "ema_decay": 0.5,
}
PROJECTION = Arm((("arm", "projection"),))


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a card with untrained models and a training that takes no time."""
    ws = make_workspace(tmp_path_factory.mktemp("card"))
    data = ws.card.model_dump(mode="json", by_alias=True)
    data |= {"prior": {"preset": "tiny"}, "train": TRAIN}
    Card.model_validate(data).dump(ws.card_path)
    return str(ws.card_path)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def separation(card: str, out: Path) -> dict[str, Any]:
    return run("separation", out, QUIET, DIALS, card=card)


def make_trial(root: Path, card_file: str, **changes: Any) -> Trial:
    setting = {"held_out": 0.5, "pairs": 80, "steps": 4, "prompts": 1, "seed": 0, "fresh": 12, **changes}
    card = Card.load(card_file)
    return Trial(root, card, load_encoder(card, "cpu"), Setting(**setting), QUIET)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(trial, name, refuse)


def test_the_cache_holds_the_training_scenes_with_their_own_captions(card: str, tmp_path: Path) -> None:
    one = make_trial(tmp_path, card)
    store = Store.open(one.cache())
    store.verify()
    assert len(store) == 80 and store.meta.encoder_fingerprint == one.encoder.fingerprint
    captions = store.column("caption").to_pylist()
    for color, shape in one.world.held_out_pairs:
        assert not any(f"{color} {shape}" in caption for caption in captions)
    rows = np.arange(80)
    features = one.encoder.encode_text(*one.encoder.tokenize(captions))
    assert np.allclose(store.text_embeddings(rows), features.embedding.numpy(), atol=2e-3)
    states, offsets = store.token_states(rows)
    assert np.allclose(states, features.states.numpy(), atol=1e-2) and offsets[-1] == features.n_tokens.sum()
    scenes = [one.world.scene(i) for i in range(80)]
    images = {tuple(vector) for vector in store.image_embeddings(rows).round(2).tolist()}
    drawn = trial.encode_scenes(one.encoder, scenes).half().numpy()
    assert {tuple(vector) for vector in drawn.round(2).tolist()} == images
    by_caption = {
        one.world.caption(s, rng): i for rng in [np.random.default_rng([0, 29])] for i, s in enumerate(scenes)
    }
    alone = [(row, by_caption[text]) for row, text in enumerate(captions) if captions.count(text) == 1]
    assert len(alone) > 40
    pictures = store.image_embeddings(rows)
    assert all(np.allclose(pictures[row], drawn[scene], atol=1e-2) for row, scene in alone)


def test_shuffled_captions_are_the_same_captions_beside_other_pictures(card: str, tmp_path: Path) -> None:
    one = make_trial(tmp_path, card)
    own, dealt = Store.open(one.cache()), Store.open(one.cache(shuffled=True))
    rows = np.arange(80)
    assert own.column("caption").to_pylist() == dealt.column("caption").to_pylist()
    assert np.array_equal(own.token_states(rows)[0], dealt.token_states(rows)[0])
    pictures, others = own.image_embeddings(rows), dealt.image_embeddings(rows)
    assert np.array_equal(np.sort(pictures, axis=0), np.sort(others, axis=0))
    assert (pictures == others).all(axis=1).mean() < 0.2
    digests = [store.column("image_sha256").to_pylist() for store in (own, dealt)]
    where = [digests[0].index(each) for each in digests[1]]
    assert np.array_equal(pictures[where], others), "a picture's digest goes with its embedding"


def test_separation_scores_five_arms_in_every_category_and_split(separation: dict[str, Any], out: Path) -> None:
    arms = ["oracle", "eclipse", "projection", "shuffled", "text"]
    assert list(separation["accuracy"]) == arms
    for splits in separation["accuracy"].values():
        for table in splits.values():
            assert list(table) == [*CATEGORIES, "mean"]
            assert all(0 <= value["mean"] <= 1 and value["sd"] >= 0 for value in table.values())
            assert np.mean([table[c]["mean"] for c in CATEGORIES]) == pytest.approx(table["mean"]["mean"])
    cosine = {arm: splits["unseen"]["mean"] for arm, splits in separation["cosine"].items()}
    assert cosine["oracle"] == 1.0 and all(-1 <= value < 1 for arm, value in cosine.items() if arm != "oracle")
    assert len({round(value, 6) for value in cosine.values()}) == 5, "no arm stands in for another"
    assert separation["setting"]["seeds"] == [0, 1] and separation["setting"]["held_out_compositions"] == 24
    assert len(separation["told_apart"]) == 6
    figures = json.loads((out / "separation.json").read_text())
    assert figures["accuracy"] == separation["accuracy"] and "pictures" not in figures
    page = (out / "separation.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(CATEGORIES) * len(arms) and "<svg" in page


def test_a_second_run_trains_and_decodes_nothing(
    separation: dict[str, Any], card: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", "decode_pictures", "embedding_metrics", "encode_pairs"):
        forbid(monkeypatch, name)
    assert run("separation", out, QUIET, DIALS, card=card) == separation


def test_an_interrupted_run_keeps_what_was_finished(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = trial.decode_pictures

    def second_fails(*inputs: Any) -> Any:
        decoded.append(len(decoded))
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(trial, "decode_pictures", second_fails)
    dials = Dials(**{**vars(DIALS), "seeds": (0,)})
    with pytest.raises(KeyboardInterrupt):
        run("separation", tmp_path, QUIET, dials, card=card)
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(trained) == 1
    result = run("separation", tmp_path, QUIET, dials, card=card)
    assert len(decoded) == 2 + 4
    assert all(path.stat().st_mtime_ns == when for path, when in trained.items())
    assert result["accuracy"]["oracle"]["seen"]["mean"]["sd"] is None
    assert not any(pair["clear"] for pair in result["told_apart"]), "one seed decides nothing"


def test_another_decoder_is_judged_anew_and_another_setting_trained_anew(
    card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "decoder"
    shutil.copytree(Card.load(card).decoder.path, copy)
    data = Card.load(card).model_dump(mode="json", by_alias=True)
    data["decoder"]["path"] = str(copy)
    moved = tmp_path / "card.yaml"
    Card.model_validate(data).dump(moved)
    make_trial(tmp_path, str(moved)).accuracy(PROJECTION)
    forbid(monkeypatch, "work")
    before = {path.name for path in tmp_path.rglob("renders/*.json")}
    (copy / "note.txt").write_text("retrained")
    make_trial(tmp_path, str(moved)).accuracy(PROJECTION)
    after = {path.name for path in tmp_path.rglob("renders/*.json")}
    assert len(before) == 1 and len(after) == 2
    for changes in ({"steps": 5}, {"pairs": 90}, {"held_out": 0.15}, {"seed": 1}):
        with pytest.raises(AssertionError, match="work was called"):
            make_trial(tmp_path, str(moved), **changes).accuracy(PROJECTION)


def test_pixel_scores_follow_the_pictures(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_trial(tmp_path, card, prompts=2)
    drawn = draw([one.world.scene_for(p, 3) for p in one.prompts])
    monkeypatch.setattr(trial, "decode_pictures", lambda *_: {"arm": drawn})
    assert one.accuracy("oracle")["mean"] == {"seen": 1.0, "unseen": 1.0}
    assert np.array_equal(one.pictures("oracle"), drawn)
    monkeypatch.setattr(trial, "decode_pictures", lambda *_: {"arm": np.zeros_like(drawn)})
    assert one.accuracy("text")["mean"]["unseen"] < 0.1  # a black background may be what was asked


def test_reduction_differs_in_the_loss_alone(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    real = trial.work
    monkeypatch.setattr(trial, "work", lambda job, *rest: jobs.append(job) or real(job, *rest))
    result = run("reduction", tmp_path, QUIET, DIALS, card=card)
    options = [job.options.model_dump() for job in jobs]
    assert [o.pop("projection_reduction") for o in options] == ["mean", "sum"] * 2
    assert options[0] == options[1] and options[2] == options[3] and options[0] != options[2]
    rows, held_back = split(Store.open(jobs[0].embeddings), jobs[0].selection, TRAIN["validation"])
    assert len(rows) + len(held_back) == 80
    cosine = {name: result["embedding"][name]["unseen"]["cosine"]["mean"] for name in ("mean", "sum")}
    difference = result["sum_less_mean"]["unseen"]["cosine"]["mean"]
    assert difference == pytest.approx(cosine["sum"] - cosine["mean"]) and difference != 0
    assert (tmp_path / "reduction.html").read_text(encoding="utf-8").count("<svg") >= 3


def test_sweep_walks_the_dials_that_are_left_open(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SWEPT_HELD_OUT", (0.2, 0.6))
    result = run("sweep", tmp_path, QUIET, Dials(**{**vars(DIALS), "held_out": None, "seeds": None}), card=card)
    assert [(row["held_out"], row["pairs"]) for row in result["grid"]] == [(0.2, 80), (0.6, 80)]
    assert result["setting"]["seeds"] == [0]
    for row in result["grid"]:
        assert row["of_oracle_unseen"] == pytest.approx(row["projection_unseen"] / max(row["oracle_unseen"], 1e-9))
        assert row["too_easy"] == (row["of_oracle_unseen"] > 0.97)
    assert "0.6 held out, 80 pairs" in (tmp_path / "sweep.html").read_text(encoding="utf-8")


def test_two_arms_are_clear_only_under_every_seed() -> None:
    unseen = {"a": [0.9, 0.92, 0.91], "b": [0.5, 0.55, 0.5], "c": [0.52, 0.5, 0.56]}
    pairs = {(p["better"], p["worse"]): p for p in experiments._told_apart(unseen, ("b", "a", "c"))}
    assert pairs["a", "b"]["clear"] and pairs["a", "c"]["clear"] and not pairs["c", "b"]["clear"]
    assert pairs["a", "b"]["difference"]["mean"] == pytest.approx(0.39333, abs=1e-4)
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5)}


def test_dots_take_their_colours_from_the_page() -> None:
    chart = dots({"first": {"seen": (0.5, 0.1), "unseen": (0.4, None)}, "second": {"seen": (0.9, 0.0)}}, label="share")
    assert chart.startswith("<svg") and "var(--accent)" in chart and "#040404" not in chart
    assert all(word in chart for word in ("first", "second", "seen", "unseen", "share"))


@pytest.mark.parametrize(
    ("name", "dials", "card", "said"),
    [
        ("separations", Dials(), None, "unknown experiment"),
        ("world", Dials(pairs=500), None, "no dials"),
        ("sweep", Dials(), "coco", "does not draw shapes"),
    ],
)
def test_what_cannot_be_run_is_refused(name: str, dials: Dials, card: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run(name, tmp_path / "lab", QUIET, dials, card=card)


def test_two_processes_do_not_share_a_folder(tmp_path: Path, card: str) -> None:
    holder = {"stage": "lab sweep", "pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00+0000"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with (tmp_path / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # a lock of its own, as another process would have it
        with pytest.raises(EclipseError, match="in use by lab sweep, pid 1 on elsewhere"):
            run("separation", tmp_path, QUIET, DIALS, card=card)


def test_the_command_prints_the_tables_or_one_json(separation: dict[str, Any], card: str, tmp_path: Path) -> None:
    words = ["lab", "sweep", "-o", str(tmp_path), "--card", card, "--quiet"]
    dials = ["--held-out", "0.5", "--pairs", "100", "--steps", "2", "--prompts", "1", "--seeds", "3"]
    shown = CliRunner().invoke(app, [*words, *dials])
    assert shown.exit_code == 0 and "too easy" in shown.stdout and "sweep.html" in shown.stdout
    as_json = json.loads(CliRunner().invoke(app, [*words, *dials, "--json"]).stdout)
    assert as_json["setting"]["seeds"] == [3] and len(as_json["grid"]) == 1
    refused = CliRunner().invoke(app, [*words, "--seeds", "1,x"])
    assert refused.exit_code == 2 and "distinct whole numbers" in refused.output
