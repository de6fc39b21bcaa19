"""`eclipse evaluate` on the shapes card: figures a category and split, judged by pixel, on untrained models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from eclipse.lab import score
from eclipse.lab.drawing import draw
from eclipse.lab.score import ARMS, FRESH, evaluate_shapes
from eclipse.lab.shapes import CATEGORIES
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from tiny_workspace import make_workspace, save_tiny_prior

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("score"))


@pytest.fixture(scope="module")
def summary(ws: Workspace) -> dict:
    return evaluate_shapes(ws, QUIET)


def test_every_arm_is_scored_in_every_category_and_split(summary: dict) -> None:
    columns = {f"{arm}_{split}" for arm in ("prior", "oracle", "text") for split in ("seen", "unseen")}
    assert list(summary["accuracy"]) == [*CATEGORIES, "mean"]
    for row in summary["accuracy"].values():
        assert set(row) == columns and all(0 <= value <= 1 for value in row.values())
    assert summary["prompts"] == 6 * 2 * 2 and summary["pictures"] == 3 * summary["prompts"]
    assert set(summary["embedding"]) == {
        f"{arm}_{split}" for arm in ("prior", "text", "mean") for split in ("seen", "unseen")
    }
    assert all(-1 <= row["cosine_to_image"] <= 1 for row in summary["embedding"].values())
    # An untrained prior is beaten by a constant, and says so.
    assert any("seen compositions: the prior does not beat the constant mean" in each for each in summary["warnings"])


def test_figures_and_page_are_written_and_a_second_run_does_nothing(ws: Workspace, summary: dict) -> None:
    figures = json.loads(Path(summary["json"]).read_text())
    assert figures["accuracy"] == summary["accuracy"]
    pictures = figures["pictures"]
    for category in CATEGORIES:
        scores = [p["oracle"] for p in pictures if p["category"] == category and p["split"] == "unseen"]
        assert figures["accuracy"][category]["oracle_unseen"] == pytest.approx(np.mean(scores), abs=1e-4)
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 24 * 3
    assert "trained prior" in page and "unseen compositions" in page
    assert evaluate_shapes(ws, QUIET) == {**summary, "already_complete": True}


def test_a_reference_prior_is_an_arm_of_its_own(ws: Workspace, tmp_path: Path) -> None:
    """Here it is the workspace's own prior: it gets the same prompts and noise, and so the same figures."""
    shutil.copytree(ws.root, tmp_path / "ws")
    save_tiny_prior(tmp_path / "other", seed=3)
    card = Workspace.open(tmp_path / "ws").card
    for place, same in ((ws.prior / "final", True), (tmp_path / "other", False)):
        named = card.model_copy(update={"evaluate": card.evaluate.model_copy(update={"reference": str(place)})})
        named.dump(tmp_path / "ws" / "eclipse.yaml")
        found = evaluate_shapes(Workspace.open(tmp_path / "ws"), QUIET, overwrite=True)
        assert found["pictures"] == 4 * found["prompts"] and (found["reference"] == found["prior"]) is same
        assert list(found["accuracy"]["mean"]) == [f"{arm}_{split}" for split in ("seen", "unseen") for arm in ARMS]
        assert "reference" in json.loads(Path(found["json"]).read_text())["pictures"][0]
        page = Path(found["report"]).read_text(encoding="utf-8")
        shown = re.findall('data:image/png;base64,([^"]*)', page)
        assert len(shown) == 24 * 4 and "reference prior" in page
        assert (shown[0::4] == shown[1::4]) is same and shown[0::4] != shown[2::4]
    gone = card.model_copy(update={"evaluate": card.evaluate.model_copy(update={"reference": str(tmp_path / "gone")})})
    gone.dump(tmp_path / "ws" / "eclipse.yaml")
    with pytest.raises(EclipseError, match="no such prior"):
        evaluate_shapes(Workspace.open(tmp_path / "ws"), QUIET, overwrite=True)


def test_perfect_pictures_score_one_and_empty_ones_nothing(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ws.root, tmp_path / "ws")
    world, n = score.world_of(ws.card), ws.card.evaluate.prompts_per_category
    prompts = [p for c in CATEGORIES for s in ("seen", "unseen") for p in world.prompts(c, n, s)]
    perfect = draw([world.scene_for(prompt, 5) for prompt in prompts])
    black = np.zeros_like(perfect)
    every_second = np.where(np.arange(len(perfect))[:, None, None, None] % 2, black, perfect)
    drawn = {"prior": every_second, "oracle": perfect, "text": black}
    monkeypatch.setattr(score, "decode_pictures", lambda *_: drawn)
    mean = evaluate_shapes(Workspace.open(tmp_path / "ws"), QUIET, overwrite=True)["accuracy"]["mean"]
    assert mean["oracle_seen"] == mean["oracle_unseen"] == 1.0
    assert mean["prior_seen"] == pytest.approx(0.5, abs=0.1)
    assert mean["text_seen"] < 0.1  # a black background may be what was asked


def test_the_oracle_sees_scenes_and_retrieval_scenes_are_fresh(ws: Workspace) -> None:
    from eclipse.decode.conditioning import load_encoder

    world = score.world_of(ws.card)
    prompts = world.prompts("complex", 3, "unseen")
    encoder = load_encoder(ws.card, "cpu")
    embeddings = score.encode_scenes(encoder, [world.scene_for(p, 0) for p in prompts], batch=2)
    assert embeddings.shape == (3, encoder.embedding_dim)
    again = score.encode_scenes(encoder, [world.scene_for(prompts[2], 0)])
    assert np.allclose(embeddings[2], again[0], atol=1e-4)
    assert ws.card.source.rows < FRESH  # type: ignore[union-attr]


def test_without_a_prior_the_message_says_what_to_do(tmp_path: Path, ws: Workspace) -> None:
    shutil.copytree(ws.root, tmp_path / "ws")
    shutil.rmtree(tmp_path / "ws" / "prior")
    with pytest.raises(EclipseError, match="no prior") as error:
        evaluate_shapes(Workspace.open(tmp_path / "ws"), QUIET, overwrite=True)
    assert error.value.hint and "eclipse train" in error.value.hint
