"""Metrics in embedding space where they are known, and the evaluate stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.trainer.evaluate import beside_baselines, embedding_metrics, evaluate
from eclipse.trainer.model.prior import PackedText, Prior, PriorConfig, save_prior
from learnable_cache import make_workspace

QUIET = Progress(quiet=True)


class Oracle(Prior):
    """Answers with whatever the store holds for the caption's embedding."""

    def __init__(self, store: Store, column: str) -> None:
        super().__init__(PriorConfig(16, num_layers=1, num_attention_heads=1, attention_head_dim=8))
        rows = np.arange(len(store))
        self.texts = torch.from_numpy(store.text_embeddings(rows)).float()
        self.answers = torch.from_numpy(getattr(store, column)(rows)).float()

    def generate(self, noise: torch.Tensor, text_embedding: torch.Tensor, text: PackedText) -> torch.Tensor:
        found = (text_embedding[:, None] == self.texts[None]).all(2).int().argmax(1)
        return 2 * self.answers[found]


def test_metrics_of_oracle_and_of_the_raw_text_embedding(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", pictures=150)
    store = Store.open(ws.embeddings)
    rows = np.arange(150)
    oracle = embedding_metrics(Oracle(store, "image_embeddings"), store, rows, 0)
    assert oracle["cosine_image"] == pytest.approx(1) and oracle["recall_1"] == 1
    assert oracle["similarity_own"] == pytest.approx(oracle["similarity_true_image"], abs=1e-5)
    assert oracle["norm_ratio"] == pytest.approx(2)
    text = embedding_metrics(Oracle(store, "text_embeddings"), store, rows, 0)
    assert text["similarity_own"] == pytest.approx(1)
    assert text["cosine_image"] == pytest.approx(oracle["similarity_true_image"], abs=1e-5)
    assert text["recall_1"] == text["text_recall_1"] < 0.5
    assert abs(text["similarity_shuffled"]) < 0.2


def test_a_constant_is_as_good_as_the_baseline_says_and_is_no_prior(tmp_path: Path) -> None:
    store = Store.open(make_workspace(tmp_path / "ws", pictures=150).embeddings)
    rows = np.arange(150)
    images = store.image_embeddings(rows).astype(np.float32)
    mean = torch.from_numpy((images / np.linalg.norm(images, axis=1, keepdims=True)).mean(0))
    constant = Oracle(store, "image_embeddings")
    constant.answers = mean.expand(len(store), -1)
    metrics = embedding_metrics(constant, store, rows, 0)
    assert metrics["cosine_image"] == pytest.approx(metrics["mean_cosine_image"], abs=1e-5)
    assert metrics["chance_recall_1"] == pytest.approx(metrics["recall_1"], abs=1e-5) == 1 / 150
    oracle = beside_baselines(embedding_metrics(Oracle(store, "image_embeddings"), store, rows, 0))
    assert oracle["warnings"] == [] and oracle["beside_baselines"]["prior"]["recall_at_1"] == 1


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"cosine_image": 0.791}, "constant mean embedding: its cosine to the true image is 0.791, not above 0.843"),
        ({"cosine_image": 0.2}, "raw text embedding: its cosine to the true image is 0.200, not above 0.300"),
        ({"recall_1": 0.04}, "raw text embedding: its share of true images found first is 0.040, not above 0.050"),
        ({"recall_1": 0.002}, "in 2 of 1,000 rows, which is chance"),
        ({}, ""),
    ],
)
def test_a_prior_that_beats_no_baseline_is_named(figures: dict[str, float], said: str) -> None:
    fine = {"cosine_image": 0.9, "recall_1": 0.3, "mean_cosine_image": 0.843, "similarity_true_image": 0.3}
    found = beside_baselines({**fine, "text_recall_1": 0.05, "chance_recall_1": 0.001, **figures})["warnings"]
    assert any(said in warning for warning in found) if said else not found


def test_a_rows_noise_depends_on_seed_and_row_alone(tmp_path: Path) -> None:
    store = Store.open(make_workspace(tmp_path / "ws").embeddings)
    torch.manual_seed(0)
    prior = Prior(PriorConfig(16, num_layers=1, num_attention_heads=1, attention_head_dim=8))
    rows = np.arange(40)
    first = embedding_metrics(prior, store, rows, 0)
    assert embedding_metrics(prior, store, rows[::-1].copy(), 0)["cosine_image"] == pytest.approx(first["cosine_image"])
    assert embedding_metrics(prior, store, rows, 1)["cosine_image"] != first["cosine_image"]


def test_the_stage_measures_held_back_rows_once(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws")
    with pytest.raises(EclipseError, match="no trained prior"):
        evaluate(ws, QUIET)
    save_prior(Prior(PriorConfig(16, num_layers=1, num_attention_heads=1, attention_head_dim=8)), ws.prior / "final")
    summary = evaluate(ws, QUIET)
    assert 2 <= summary["rows"] <= 40 and "cosine_image" in summary
    assert any("does not beat the constant mean embedding" in warning for warning in summary["warnings"])
    assert evaluate(ws, QUIET) == {**summary, "already_complete": True}
