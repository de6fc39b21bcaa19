"""Attention inside each caption of a packed batch: no padding in storage or in compute. Called by prior.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PER_DRAW = 2  # tokens that a draw has to itself: its noise, and the one that the prediction is read from


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a packed batch of B captions with S special tokens after each: T = N + S·B tokens.

    Captions are ordered by length, so that those of one length are neighbours and form a dense block. With K draws, a
    caption's last special tokens are K groups of PER_DRAW, at the same positions, that do not see each other.

    order (B,): the caption at each place. source (T,): the row of [all text tokens, then each caption's S special
    tokens] that each packed token comes from. positions (T,): its row of the positional embedding.
    starts (B+1,) int32: where each sequence begins. longest: an upper bound of the lengths, known without a sync.
    """

    order: Tensor
    source: Tensor
    positions: Tensor
    starts: Tensor
    longest: int
    draws: int

    @classmethod
    def of(cls, offsets: Tensor, n_text: int, *, specials: int, text_positions: int, draws: int = 1) -> Layout:
        """offsets (B+1,) int64: caption i owns the text tokens offsets[i]:offsets[i+1] of n_text in all. specials: of
        a caption with one draw.
        """
        once = specials - PER_DRAW
        specials = once + draws * PER_DRAW
        device = offsets.device
        lengths = offsets.diff()
        order = lengths.argsort(stable=True)
        text_lengths = lengths[order]
        totals = text_lengths + specials
        starts = F.pad(totals.cumsum(0), (1, 0))
        n_tokens = n_text + specials * len(order)
        place = torch.repeat_interleave(torch.arange(len(order), device=device), totals, output_size=n_tokens)
        within = torch.arange(n_tokens, device=device) - starts[place]
        beyond_text = within - text_lengths[place]
        text_row = offsets[order][place] + within
        special_row = n_text + specials * order[place] + beyond_text
        return cls(
            order=order,
            source=torch.where(beyond_text < 0, text_row, special_row),
            positions=torch.where(beyond_text < 0, within, text_positions + folded(beyond_text, once)),
            starts=starts.int(),
            longest=text_positions + specials,
            draws=draws,
        )

    @cached_property
    def last(self) -> Tensor:
        """(B·K,) the packed row of the last token of each sequence's draws."""
        ends = self.starts[1:].long() - 1
        if self.draws == 1:
            return ends
        back = torch.arange(self.draws - 1, -1, -1, device=ends.device) * PER_DRAW
        return (ends[:, None] - back).flatten()

    @cached_property
    def each(self) -> Tensor:
        """(B+1,) int32: the starts of sequences of one token."""
        return torch.arange(len(self.order) + 1, device=self.order.device, dtype=torch.int32)

    def allowed(self, length: int) -> Tensor:
        """(length, length) bool: which token of a sequence each of its tokens sees, where it has several draws."""
        token = torch.arange(length, device=self.order.device)
        shared = length - self.draws * PER_DRAW
        draw = torch.where(token < shared, -1, (token - shared) // PER_DRAW)
        return (token[:, None] >= token) & ((draw == -1) | (draw == draw[:, None]))

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """(sequences, tokens in each) of every run of equally long sequences."""
        lengths, counts = self.starts.diff().unique_consecutive(return_counts=True)
        return list(zip(counts.tolist(), lengths.tolist(), strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, heads: int) -> Tensor:
    """Causal attention of every token within its own sequence. q, k, v (T, width) → (T, width)."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    if layout.draws == 1 and (variable_length := _kernel(q)):
        starts, longest = layout.starts, layout.longest
        return variable_length(q, k, v, starts, starts, longest, longest, window_size=(-1, 0)).flatten(1)
    sizes = [count * length for count, length in layout.blocks]
    outputs = [
        _dense(block_q, block_k, block_v, count, causal=True, allowed=_mask(layout, length))
        for (count, length), block_q, block_k, block_v in zip(
            layout.blocks, q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        )
    ]
    return torch.cat(outputs)


def attend_last(q: Tensor, k: Tensor, v: Tensor, layout: Layout, heads: int) -> Tensor:
    """Attention of each draw's last token to what it sees. q (B·K, width), k and v (T, width) → (B·K, width)."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    if layout.draws == 1 and (variable_length := _kernel(q)):
        return variable_length(q, k, v, layout.each, layout.starts, 1, layout.longest).flatten(1)
    counts = [count for count, _ in layout.blocks]
    sizes = [count * length for count, length in layout.blocks]
    outputs = [
        _dense(block_q, block_k, block_v, count, causal=False, allowed=_mask(layout, length, last=True))
        for (count, length), block_q, block_k, block_v in zip(
            layout.blocks, q.split([n * layout.draws for n in counts]), k.split(sizes), v.split(sizes), strict=True
        )
    ]
    return torch.cat(outputs)


def folded(beyond: Any, once: int) -> Any:
    """The position, counted from the first special one, of each of a sequence's special tokens 0, 1, 2, …: those after
    the first `once` repeat every PER_DRAW. Of a tensor or an array.
    """
    return beyond - (beyond >= once + PER_DRAW) * ((beyond - once) // PER_DRAW * PER_DRAW)


def _mask(layout: Layout, length: int, *, last: bool = False) -> Tensor | None:
    """None where plain causal attention is meant. last: the rows of each draw's last token alone."""
    if layout.draws == 1:
        return None
    allowed = layout.allowed(length)
    return allowed[length - layout.draws * PER_DRAW + PER_DRAW - 1 :: PER_DRAW] if last else allowed


def _dense(q: Tensor, k: Tensor, v: Tensor, count: int, *, causal: bool, allowed: Tensor | None) -> Tensor:
    """Attention in a block of `count` equally long sequences: (count·L, H, d) each → (count·L, H·d)."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    if allowed is not None:
        causal = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _kernel(q: Tensor) -> Callable[..., Any] | None:
    """The variable-length kernel, where this tensor can use it: half precision on an Ampere card or a later one."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not _is_ampere(q.device):
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
