"""The transformer both priors are: packed captions, pre-LN causal blocks, tensors named as published. Used by prior.py
and diffusion.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipeline.cache.packed_text import PackedText
from .attention import PER_DRAW, Layout
from .bins import Bins, bin_attention

__all__ = ["PackedText", "PriorConfig", "PriorTransformer", "like"]


@dataclass(frozen=True)
class PriorConfig:
    """Dimensions, under the published config's names. The width is num_attention_heads · attention_head_dim."""

    embedding_dim: int
    num_layers: int = 10
    num_attention_heads: int = 16
    attention_head_dim: int = 32
    num_embeddings: int = 77
    additional_embeddings: int = 3

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class Attention(nn.Module):
    """Multi-head self-attention with biases; scale 1/√head_dim."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(config.width, config.width)
        self.to_v = nn.Linear(config.width, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor, layout: Layout | Bins) -> Tensor:
        """Attention before the output layer: (T, width) → (T, width). q, k and v come of one product."""
        layers = cast(list[nn.Linear], [self.to_q, self.to_k, self.to_v])
        weight, bias = torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])
        qkv = F.linear(x, weight, bias)
        if isinstance(layout, Bins):
            return bin_attention(qkv, layout.caption, layout.draw, self.heads)
        return layout.attend(qkv)


class Projection(nn.Module):
    """Linear, then exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """width → 4·width → width. net[1] was a dropout that published weights never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Projection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Pre-LayerNorm transformer block under the published tensor names."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn1 = Attention(config)
        self.norm3 = nn.LayerNorm(config.width)
        self.ff = FeedForward(config.width)

    def forward(self, x: Tensor, layout: Layout | Bins, *, last: bool = False) -> Tensor:
        """(T, width) → (T, width); last: what follows attention at each draw's last token alone → (B·K, width).

        Attention itself is a small part, and cheaper at every token than what it takes to single out some.
        """
        attended = self.attn1(self.norm1(x), layout)
        if last:
            x, attended = layout.take_last(x), layout.take_last(attended)
        x = x + self.attn1.to_out[0](attended)
        return x + self.ff(self.norm3(x))


class PriorTransformer(nn.Module):
    """What both priors share: embedded tokens, packed causal blocks, the last token's output.

    A padded implementation masks padded keys and reads only the last token, so leaving padding out changes nothing as
    long as the special tokens keep their positions 77, 78, ...
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.embedding_dim, config.width
        self.proj_in = nn.Linear(dim, width)
        self.embedding_proj = nn.Linear(dim, width)
        self.encoder_hidden_states_proj = nn.Linear(dim, width)
        positions = config.num_embeddings + config.additional_embeddings
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1, positions, width))
        self.prd_embedding = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, dim)
        # In the file, and counted, but never trained; the diffusion baseline keeps its data's scale in them.
        self.clip_mean = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, dim), requires_grad=False)

    def run(self, specials: Sequence[Tensor], text: PackedText) -> Tensor:
        """specials: the embedded special tokens in their order, (B, width) each → (B, D).

        The last PER_DRAW of them may be (B, K, width): K draws that share the text, which sees none of them. Each costs
        two tokens in place of a whole caption, and gives what a pass of its own would → (B·K, D), a caption's together.
        """
        draws = specials[-1].shape[1] if specials[-1].dim() == 3 else 1
        own = torch.stack(tuple(specials[-PER_DRAW:]), dim=-2)
        own = own.reshape(len(own), draws * PER_DRAW, -1)
        appended = torch.cat([*(x[:, None] for x in specials[:-PER_DRAW]), own], dim=1).flatten(0, 1)
        tokens = self.encoder_hidden_states_proj(like(text.states, self.prd_embedding))
        tokens = torch.cat([tokens, appended])
        layout = text.bins
        if layout is None:
            layout = Layout.of(
                text.offsets,
                len(text.states),
                specials=len(specials),
                text_positions=self.config.num_embeddings,
                heads=self.config.num_attention_heads,
                draws=draws,
            )
        x = layout.lay_out(tokens, self.positional_embedding[0])
        *blocks, last = self.transformer_blocks
        for block in blocks:
            x = block(x, layout)
        return layout.in_order(self.proj_to_clip_embeddings(self.norm_out(last(x, layout, last=True))))


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """x in the parameter's dtype; left alone under autocast, which casts on its own."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)
