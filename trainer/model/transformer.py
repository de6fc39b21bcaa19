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
from .attention import PER_DRAW, Layout, attend, attend_last
from .bins import Bins, Positions, Rows, bin_attention

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

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return self.to_out[0](attend(self.to_q(x), self.to_k(x), self.to_v(x), layout, self.heads))

    def last(self, x: Tensor, layout: Layout) -> Tensor:
        """The output at each sequence's last token alone: (T, width) → (B, width)."""
        return self.to_out[0](attend_last(self.to_q(x[layout.last]), self.to_k(x), self.to_v(x), layout, self.heads))

    def binned(self, x: Tensor, bins: Bins) -> Tensor:
        """Attention before the output layer: (T, width) in bins → (T, width). q, k and v come of one product."""
        layers = cast(list[nn.Linear], [self.to_q, self.to_k, self.to_v])
        weight, bias = torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])
        return bin_attention(F.linear(x, weight, bias), bins.caption, bins.draw, self.heads)


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

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.attn1(self.norm1(x), layout)
        return x + self.ff(self.norm3(x))

    def last(self, x: Tensor, layout: Layout) -> Tensor:
        """The block's output at each sequence's last token alone: (T, width) → (B, width)."""
        y = x[layout.last] + self.attn1.last(self.norm1(x), layout)
        return y + self.ff(self.norm3(y))

    def binned(self, x: Tensor, bins: Bins, *, last: bool) -> Tensor:
        """The block on bins (T, width); last: what follows attention at each caption's last token alone (B, width).

        Attention itself is a small part, and cheaper at every token than what it takes to single out some.
        """
        attended = self.attn1.binned(self.norm1(x), bins)
        if last:
            x, attended = (Rows.apply(y, bins.last, bins.ends) for y in (x, attended))
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
        if text.bins is not None:
            return self._run_binned(appended, text.states, text.bins)
        count = len(text)
        layout = Layout.of(
            text.offsets,
            len(text.states),
            specials=len(specials),
            text_positions=self.config.num_embeddings,
            draws=draws,
        )
        tokens = self.encoder_hidden_states_proj(like(text.states, self.prd_embedding))
        tokens = torch.cat([tokens, appended])
        # embedding() rather than indexing: its backward is the quick one on a CPU, and deterministic everywhere.
        x = F.embedding(layout.source, tokens) + F.embedding(layout.positions, self.positional_embedding[0])
        for block in self.transformer_blocks[:-1]:
            x = block(x, layout)
        x = cast(Block, self.transformer_blocks[-1]).last(x, layout)
        x = self.proj_to_clip_embeddings(self.norm_out(x))
        if count > 1:
            x = F.embedding(layout.order.argsort(), x.view(count, -1)).view(x.shape)
        return x

    def _run_binned(self, appended: Tensor, states: Tensor, bins: Bins) -> Tensor:
        """The same on bins: shapes depend on the batch's size alone, nothing waits for the device."""
        tokens = self.encoder_hidden_states_proj(like(states, self.prd_embedding))
        tokens = torch.cat([tokens, appended])
        x = Rows.apply(tokens, bins.source, bins.place)
        x = x + Positions.apply(self.positional_embedding[0], bins.positions)
        *blocks, last = cast(list[Block], list(self.transformer_blocks))
        for block in blocks:
            x = block.binned(x, bins, last=False)
        return self.proj_to_clip_embeddings(self.norm_out(last.binned(x, bins, last=True)))


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """x in the parameter's dtype; left alone under autocast, which casts on its own."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)
