"""Attention inside each caption of a packed batch: no padding in storage or in products. Called by transformer.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PER_DRAW = 2  # tokens that a draw has to itself: its noise, and the one that the prediction is read from
SPREAD = 1.4  # of the lengths that share a block: its longest caption has at most so many times its shortest's tokens


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a packed batch of B captions with S special tokens after each: T = N + S·B tokens.

    Captions are ordered by length, so that those of nearly one length are neighbours and form a dense block. With K
    draws, a caption's last special tokens are K groups of PER_DRAW, at the same positions, that do not see each other.

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
    heads: int

    @classmethod
    def of(
        cls, offsets: Tensor, n_text: int, *, specials: int, text_positions: int, heads: int, draws: int = 1
    ) -> Layout:
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
            heads=heads,
        )

    def lay_out(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The tokens (N + S·B, width) in their places, each with its row of positions (P, width) added: (T, width)."""
        # embedding() rather than indexing: its backward is the quick one on a CPU, and deterministic everywhere.
        return F.embedding(self.source, tokens) + F.embedding(self.positions, positions)

    def take_last(self, x: Tensor) -> Tensor:
        """(T, width) → (B·K, width): the rows of the last token of each sequence's draws."""
        back = torch.arange(self.draws - 1, -1, -1, device=x.device) * PER_DRAW
        return F.embedding((self.starts[1:, None] - 1 - back).flatten(), x)

    def in_order(self, x: Tensor) -> Tensor:
        """(B·K, D), from the order of the sequences to that of the captions."""
        return F.embedding(self.order.argsort(), x.view(len(self.order), -1)).view(x.shape)

    def allowed(self, lengths: Tensor, size: int) -> Tensor:
        """(n, size, size) bool: which token of n sequences each of their tokens sees, where they have several draws."""
        token = torch.arange(size, device=lengths.device)
        shared = lengths[:, None] - self.draws * PER_DRAW
        draw = torch.where(token < shared, -1, (token - shared) // PER_DRAW)
        same = (draw[:, None] == -1) | (draw[:, None] == draw[..., None])
        return same & (token[:, None] >= token)

    @cached_property
    def dense(self) -> Dense:
        return Dense.of(self)

    def attend(self, qkv: Tensor) -> Tensor:
        """Causal attention of every token within its own sequence. qkv (T, 3·width), side by side → (T, width)."""
        if self.draws == 1 and (variable_length := _kernel(qkv)):
            q, k, v = qkv.view(len(qkv), 3, self.heads, -1).unbind(1)
            starts, longest = self.starts, self.longest
            return variable_length(q, k, v, starts, starts, longest, longest, window_size=(-1, 0)).flatten(1)
        return _DenseAttention.apply(qkv, self.dense)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Dense:
    """The sequences as blocks of (n, heads, L) places, L the longest of a block: few large operations in place of many.

    What a shorter sequence leaves over lies behind it, where causal attention never looks.

    blocks: slices of all P·heads places, with L, and what is added to scores, -∞ where nothing is seen.
    into (3·P·heads,): for the places of q, then k, then v, the row of (T, 3, heads) they are filled from.
    out (T·heads,): the place of each token's head. back (T·3·heads,): the inverse of `into`. spare: places of no token.
    source (P·heads,): the row of (T, heads) of each place.
    """

    blocks: list[tuple[slice, int, Tensor]]
    into: Tensor
    out: Tensor
    back: Tensor
    spare: Tensor
    source: Tensor

    @classmethod
    def of(cls, layout: Layout) -> Dense:
        heads, starts, device = layout.heads, layout.starts.long(), layout.starts.device
        sizes, lengths = starts.diff(), starts.diff().tolist()
        edges = [0]
        for i, length in enumerate(lengths):
            if length > SPREAD * lengths[edges[-1]]:
                edges.append(i)
        edges.append(len(lengths))
        blocks, first, size_of, used = [], [], [], 0
        for a, b in pairwise(edges):
            n, size = b - a, lengths[b - 1] if b else 0
            if layout.draws == 1:
                allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()
            else:
                allowed = layout.allowed(sizes[a:b], size).repeat_interleave(heads, 0)
            score = torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -torch.inf)
            blocks.append((slice(used, used + n * heads * size), size, score))
            first += range(used, used + n * heads * size, max(1, heads * size))
            size_of += [size] * n
            used += n * heads * size
        first, size_of = (torch.tensor(x, device=device) for x in (first, size_of))
        n_tokens = sum(lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes, output_size=n_tokens)
        within = torch.arange(n_tokens, device=device) - starts[owner]
        head, kind = torch.arange(heads, device=device), torch.arange(3, device=device)
        out = (first[owner] + within)[:, None] + head * size_of[owner][:, None]  # (T, heads)
        source = torch.full((used,), -1, device=device)
        source[out.flatten()] = torch.arange(out.numel(), device=device)
        spare = (source < 0).nonzero()[:, 0]
        source = source.clamp(min=0)  # a place of no token is filled from any
        into = (source // heads * 3 * heads + source % heads) + (kind * heads)[:, None]
        back = out[:, None] + (kind * used)[:, None]
        return cls(blocks, into.flatten(), out.flatten(), back.flatten(), spare, source)


class _DenseAttention(torch.autograd.Function):
    """softmax(q·kᵀ/√d)·v in the blocks of a Dense, whatever their number with four copies in all."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, dense: Dense) -> Tensor:
        d = qkv.numel() // len(dense.back)
        rows = qkv.reshape(-1, d).index_select(0, dense.into)
        q, k, v = rows.view(3, -1, d).unbind(0)
        out, weights = torch.empty_like(q), []
        for places, size, score in dense.blocks:
            bq, bk, bv, to = (x[places].view(-1, size, d) for x in (q, k, v, out))
            weight = torch.baddbmm(score.to(bq.dtype), bq, bk.mT, alpha=1 / math.sqrt(d)).softmax(-1)
            torch.bmm(weight, bv, out=to)
            weights.append(weight)
        ctx.save_for_backward(rows, out, *weights)
        ctx.dense = dense
        return out.index_select(0, dense.out).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dense: Dense = ctx.dense
        rows, out, *weights = ctx.saved_tensors
        d = rows.shape[1]
        of_out = gradient.reshape(-1, d).index_select(0, dense.source).index_fill_(0, dense.spare, 0)
        along = (of_out * out).sum(1, keepdim=True)  # what the softmax takes away
        of_rows = torch.empty_like(rows)
        (q, k, v), (of_q, of_k, of_v) = (x.view(3, -1, d).unbind(0) for x in (rows, of_rows))
        for (places, size, _), weight in zip(dense.blocks, weights, strict=True):
            g, bq, bk, bv, to_q, to_k, to_v = (x[places].view(-1, size, d) for x in (of_out, q, k, v, of_q, of_k, of_v))
            torch.bmm(weight.mT, g, out=to_v)
            of_score = torch.bmm(g, bv.mT).sub_(along[places].view(-1, size, 1)).mul_(weight).mul_(1 / math.sqrt(d))
            torch.bmm(of_score, bk, out=to_q)
            torch.bmm(of_score.mT, bq, out=to_k)
        return of_rows.index_select(0, dense.back).view(len(gradient), -1), None


def folded(beyond: Any, once: int) -> Any:
    """The position, counted from the first special one, of each of a sequence's special tokens 0, 1, 2, …: those after
    the first `once` repeat every PER_DRAW. Of a tensor or an array.
    """
    return beyond - (beyond >= once + PER_DRAW) * ((beyond - once) // PER_DRAW * PER_DRAW)


def _kernel(q: Tensor) -> Callable[..., Any] | None:
    """The variable-length kernel, where this tensor can use it: half precision on an Ampere card or a later one."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not _is_ampere(q.device):
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
