"""The plain way to run the prior: every caption padded to 77 tokens, diffusers' own blocks. The peer that bench/step.py
measures against, and the reference that tests compare with.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ..trainer.model.prior import PackedText, Prior, PriorConfig


class PaddedPrior(nn.Module):
    """The published architecture with the tensor names of the published file, so that state dicts interchange."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        dim, width = config.embedding_dim, config.width
        self.heads = config.num_attention_heads
        self.proj_in = nn.Linear(dim, width)
        self.embedding_proj = nn.Linear(dim, width)
        self.encoder_hidden_states_proj = nn.Linear(dim, width)
        tokens = config.num_embeddings + config.additional_embeddings
        self.positional_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                config.num_attention_heads,
                config.attention_head_dim,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, dim)
        self.clip_mean = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, dim), requires_grad=False)

    @classmethod
    def like(cls, prior: Prior) -> PaddedPrior:
        """The same network with the same weights."""
        padded = cls(prior.config)
        padded.load_state_dict(prior.state_dict())
        return padded

    def forward(self, noise: Tensor, text_embedding: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """noise and text_embedding (B, D), states (B, 77, D), mask (B, 77) bool, true on real tokens → (B, D)."""
        specials = [
            self.embedding_proj(text_embedding)[:, None],
            self.proj_in(noise)[:, None],
            self.prd_embedding.expand(len(noise), -1, -1),
        ]
        x = torch.cat([self.encoder_hidden_states_proj(states), *specials], dim=1) + self.positional_embedding
        keys = torch.cat([mask, mask.new_ones(len(mask), len(specials))], dim=1)
        bias = torch.zeros(len(x), x.shape[1], x.shape[1], device=x.device).masked_fill(~keys[:, None, :], -10000.0)
        bias = bias + torch.full_like(bias[0], -10000.0).triu(1)
        bias = bias.repeat_interleave(self.heads, dim=0)  # the layout diffusers expects: (B·heads, L, L)
        for block in self.transformer_blocks:
            x = block(x, attention_mask=bias)
        return self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))


def pad(text: PackedText, length: int = 77) -> tuple[Tensor, Tensor]:
    """Packed captions → states (B, length, W) with zeros behind each caption, and the mask of real tokens."""
    mask = torch.arange(length, device=text.offsets.device)[None, :] < text.offsets.diff()[:, None]
    states = text.states.new_zeros(len(text), length, text.states.shape[1])
    states[mask] = text.states
    return states, mask
