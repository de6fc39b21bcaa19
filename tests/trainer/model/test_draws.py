"""Several draws on one reading of a caption: what as many passes give, gradients included, packed and in bins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eclipse.trainer.loss import Draw, Objective
from eclipse.trainer.model.bins import SizeClasses
from eclipse.trainer.model.diffusion import DiffusionPrior
from eclipse.trainer.model.prior import Prior, PriorConfig, sample
from eclipse.trainer.model.transformer import PackedText
from packed_captions import captions

CONFIG = PriorConfig(24, num_layers=3, num_attention_heads=2, attention_head_dim=16)
LENGTHS = [7, 77, 2, 12, 7, 25]
DRAWS = 4


def prior_and_batch() -> tuple[Prior, torch.Tensor, torch.Tensor, PackedText]:
    torch.manual_seed(0)
    prior = Prior(CONFIG)
    _, pooled, text = captions(LENGTHS, 24)
    return prior, torch.randn(len(LENGTHS), DRAWS, 24), pooled, text


@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize("contrastive", [0.0, 0.2])
def test_draws_equal_separate_passes(binned: bool, contrastive: float) -> None:
    prior, noise, pooled, text = prior_and_batch()
    objective, image = Objective(contrastive, 0.1, "sum"), torch.randn(len(LENGTHS), 24)
    uniform = torch.zeros(len(LENGTHS), 2)
    passes = [objective(prior, image, pooled, text, Draw(n, uniform), pooled, 0)["loss"] for n in noise.unbind(1)]
    expected = torch.stack(passes).mean()
    trained = [p for p in prior.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    if binned:
        classes = SizeClasses.of(np.array(LENGTHS), len(LENGTHS), specials=3, text_positions=77, draws=DRAWS)
        bins = classes.lay_out(np.array(LENGTHS))
        spare = torch.zeros(bins.texts - len(text.states), 24)
        text = PackedText(torch.cat([text.states, spare]), text.offsets, bins)
    else:
        separate = torch.stack([prior(n, pooled, text) for n in noise.unbind(1)], dim=1)
        torch.testing.assert_close(prior(noise, pooled, text), separate, atol=1e-5, rtol=0)
    found = objective(prior, image, pooled, text, Draw(noise, uniform), pooled, 0)["loss"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(found, trained), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [5, list(range(len(LENGTHS)))])
def test_sampled_draws_differ_and_the_first_is_the_one_without(seed: int | list[int]) -> None:
    prior, _, pooled, text = prior_and_batch()
    found = sample(prior, pooled, text, seed=seed, draws=3)
    assert found.shape == (len(LENGTHS), 3, 24)
    torch.testing.assert_close(found[:, 0], sample(prior, pooled, text, seed=seed), atol=1e-5, rtol=0)
    assert (found[:, 0] - found[:, 1]).norm(dim=1).min() > 1e-3
    torch.manual_seed(0)
    config = PriorConfig(24, num_layers=1, num_attention_heads=2, attention_head_dim=16, additional_embeddings=4)
    diffusion = DiffusionPrior(config).eval()
    found = sample(diffusion, pooled, text, seed=seed, draws=2)
    torch.testing.assert_close(found[:, 0], sample(diffusion, pooled, text, seed=seed), atol=1e-5, rtol=0)
