"""The diffusion baseline against diffusers' own prior, and its objective and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from eclipse.bench.padded import pad
from eclipse.pipeline.cache.packed_text import TextFeatures
from eclipse.pipeline.core.progress import Progress
from eclipse.trainer.loss import Draw
from eclipse.trainer.model.diffusion import DiffusionObjective, DiffusionPrior
from eclipse.trainer.model.prior import PriorConfig, load_prior, sample, save_prior
from eclipse.trainer.stage import train
from learnable_cache import DIM, make_workspace
from packed_captions import captions

TINY = PriorConfig(24, num_layers=2, num_attention_heads=2, attention_head_dim=8, additional_embeddings=4)


def test_equals_diffusers_prior_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(TINY)
    save_prior(prior, tmp_path)
    theirs = PriorTransformer.from_pretrained(tmp_path)
    noisy, pooled, text = captions([3, 9, 77, 9], 24)
    timesteps = torch.tensor([0, 10, 500, 999])
    states, mask = pad(text)
    expected = theirs(noisy, timesteps, pooled, states, attention_mask=mask)  # type: ignore[operator]
    ours = prior(noisy, timesteps, pooled, text)
    torch.testing.assert_close(ours, expected.predicted_image_embedding, atol=1e-5, rtol=0)
    again = load_prior(tmp_path)
    assert isinstance(again, DiffusionPrior)
    assert torch.equal(again(noisy, timesteps, pooled, text), ours)


def test_dropped_captions_become_the_empty_one() -> None:
    prior = DiffusionPrior(TINY)
    prior.empty_text_embedding.fill_(7)
    prior.empty_text_states.fill_(8)
    _, pooled, text = captions([3, 5, 4], 24)
    drop = torch.tensor([False, True, False])
    changed, packed = prior.without(drop, pooled, text)
    assert packed.offsets.tolist() == [0, 3, 5, 9]
    assert packed.states[3:5].eq(8).all() and changed[1].eq(7).all()
    assert torch.equal(packed.states[5:], text.states[8:]) and torch.equal(changed[[0, 2]], pooled[[0, 2]])


def test_a_perfect_predictor_has_no_loss_and_is_sampled_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = DiffusionPrior(TINY)
    prior.clip_mean.fill_(0.5)
    prior.clip_std.fill_(2.0)
    _, pooled, text = captions([3, 5], 24)
    images = torch.randn(2, 24)
    clean = (images - 0.5) / 2.0

    def perfect(*inputs: Any) -> torch.Tensor:
        return clean

    draw = Draw(torch.randn(2, 24), torch.rand(2, 2))
    terms = DiffusionObjective(prior)(perfect, images, pooled, text, draw, pooled, 0)
    assert terms["loss"].item() == 0
    monkeypatch.setattr(prior, "forward", perfect)
    torch.testing.assert_close(sample(prior, pooled, text, seed=0), images, atol=1e-4, rtol=0)


def test_the_arm_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        """Stands in for a CLIP: this cache has none."""

        def tokenize(self, texts: list[str]) -> tuple[list[str], None]:
            return texts, None

        def encode_text(self, texts: list[str], n_tokens: None) -> TextFeatures:
            assert texts == [""]
            return TextFeatures(torch.zeros(2, DIM), torch.tensor([0, 2]), embedding=torch.zeros(1, DIM))

    loaded: list[dict[str, Any]] = []
    load = "eclipse.pipeline.embed.clip.Encoder.load"
    monkeypatch.setattr(load, lambda *names, **options: loaded.append(options) or Encoder())
    ws = make_workspace(tmp_path / "ws", steps=30, validate_every=30)
    summary = train(ws, Progress(quiet=True), arm="diffusion")
    assert summary["arm"] == "diffusion"
    prior = load_prior(ws.prior / "final")
    assert isinstance(prior, DiffusionPrior)
    assert prior.clip_std.ne(1).all()
    summary = train(ws, Progress(quiet=True), arm="diffusion", overwrite=True, steps=2)
    assert summary["steps"] == 2 and loaded == [{"text_only": True}]  # what it made the first time is kept
