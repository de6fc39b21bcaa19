"""λ-ECLIPSE's prior: its size, its file, and its pass against a padded one built from diffusers' own blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from eclipse.bench.padded import PaddedPrior, pad
from eclipse.trainer.model.prior import PRESETS, ControlPrior, PriorConfig, load_prior, sample, save_prior
from packed_captions import captions
from torch import Tensor, nn

TINY = PriorConfig(24, num_layers=2, num_attention_heads=2, attention_head_dim=8, additional_embeddings=4)


class PaddedControl(PaddedPrior):
    """The control token before the pooled text, as λ-ECLIPSE's inference code orders them."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.embedding_control = nn.Linear(config.embedding_dim, config.width)

    def forward(self, noise: Tensor, text_embedding: Tensor, states: Tensor, mask: Tensor, control: Tensor) -> Tensor:  # type: ignore[override]
        specials = [self.embedding_control(control), self.embedding_proj(text_embedding), self.proj_in(noise)]
        x = torch.cat([self.encoder_hidden_states_proj(states), *(x[:, None] for x in specials)], dim=1)
        x = torch.cat([x, self.prd_embedding.expand(len(x), -1, -1)], dim=1) + self.positional_embedding
        keys = torch.cat([mask, mask.new_ones(len(mask), 4)], dim=1)
        bias = torch.zeros(len(x), x.shape[1], x.shape[1]).masked_fill(~keys[:, None, :], -10000.0)
        bias = (bias + torch.full_like(bias[0], -10000.0).triu(1)).repeat_interleave(self.heads, dim=0)
        for block in self.transformer_blocks:
            x = block(x, attention_mask=bias)
        return self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))


def test_its_size_is_the_published_one() -> None:
    with torch.device("meta"):
        prior = ControlPrior(replace(PRESETS["kandinsky22"], additional_embeddings=4))
    assert sum(p.numel() for p in prior.parameters()) == 34_849_536


def test_it_loads_and_agrees_with_the_padded_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_prior(ControlPrior(TINY), tmp_path)
    prior = load_prior(tmp_path)
    assert isinstance(prior, ControlPrior)
    padded = PaddedControl.like(prior)
    noise, pooled, text = captions([7, 77, 3], 24)
    control = torch.randn(3, 24)
    with torch.no_grad():
        ours = prior(noise, pooled, text, control)
        torch.testing.assert_close(ours, padded(noise, pooled, *pad(text), control), atol=1e-5, rtol=0)
        without = padded(noise, pooled, *pad(text), torch.zeros(3, 24))
        torch.testing.assert_close(prior(noise, pooled, text), without, atol=1e-5, rtol=0)
    assert not torch.allclose(ours, without)
    assert sample(prior, pooled, text, seed=0).shape == (3, 24)
