"""Captions in rows of exactly 128 tokens: the layout of a batch on a GPU, and attention inside each caption there.

Used by transformer.py where a batch comes with Bins (the feed makes them for CUDA; a CPU has its dense blocks of like
lengths, attention.py). Shapes are the same for every batch of one size, so a step can be compiled and captured once.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PER_DRAW, folded

BIN = 128  # tokens: a published prior's longest caption has 80 or 81, and tiles of tensor cores are 64 or 128 wide


@dataclass(frozen=True)
class Bins:
    """Where everything lies in B captions with S special tokens after each, first-fit in T = 128·R places. With K
    draws the last special tokens are K pairs that do not see each other (attention.py).

    source (T,) int64: the row of [N text tokens, then each caption's S special tokens] in each place; 0 where none is.
    place (N + S·B,) int64: its inverse. positions (T,) int64: the row of the positional embedding. caption (T,) int32:
    which caption a place belongs to, -1 for none. last (B·K,) int64: the place of each draw's last token.
    ends (T,) int64: the inverse of last, B·K where a place is not a draw's last. texts: N.
    draw (T,) int32: from 1, 0 where all of a caption's draws see a place; empty (0,) with one draw.
    """

    source: Tensor
    place: Tensor
    positions: Tensor
    caption: Tensor
    last: Tensor
    ends: Tensor
    draw: Tensor
    texts: int

    @classmethod
    def of(
        cls,
        lengths: np.ndarray,
        *,
        specials: int,
        text_positions: int,
        n_text: int | None = None,
        rows: int = 0,
        draws: int = 1,
    ) -> Bins:
        """lengths (B,): text tokens of each caption. specials: of a caption with one draw. n_text: rows of the text
        buffer, at least lengths.sum(); what is beyond belongs to no caption. rows: at least so many bins. On the CPU.
        """
        count, n_text = len(lengths), int(lengths.sum()) if n_text is None else n_text
        once = specials - PER_DRAW
        specials = once + draws * PER_DRAW
        totals = lengths + specials
        begin, needed = first_fit(totals)
        places = BIN * max(rows, needed)
        source, positions = np.zeros(places, np.int64), np.zeros(places, np.int64)
        caption, ends = np.full(places, -1, np.int32), np.full(places, count * draws, np.int64)
        owner = np.repeat(np.arange(count), totals)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(totals) - totals, totals)
        beyond = within - lengths[owner]
        at = begin[owner] + within
        first_text = np.cumsum(lengths) - lengths
        row = np.where(beyond < 0, first_text[owner] + within, n_text + specials * owner + beyond)
        source[at], caption[at] = row, owner
        positions[at] = np.where(beyond < 0, within, text_positions + folded(beyond, once))
        draw = np.zeros(places if draws > 1 else 0, np.int32)
        if draws > 1:
            draw[at] = np.where(beyond < once, 0, 1 + (beyond - once) // PER_DRAW)
        # Text rows that no caption owns are never read: any place serves, its gradient is masked by `owned`.
        place = np.full(n_text + specials * count, places, np.int64)
        place[row] = at
        last = ((begin + totals - 1)[:, None] - np.arange(draws - 1, -1, -1) * PER_DRAW).reshape(-1)
        ends[last] = np.arange(count * draws)
        arrays = (source, place, positions, caption, last, ends, draw)
        return cls(*(torch.from_numpy(x) for x in arrays), texts=n_text)

    def tensors(self) -> list[Tensor]:
        return [self.source, self.place, self.positions, self.caption, self.last, self.ends, self.draw]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Bins:
        return Bins(*(x.to(device, non_blocking=non_blocking) for x in self.tensors()), texts=self.texts)

    def lay_out(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The tokens (N + S·B, width) in their places, each with its row of positions (P, width) added: (T, width)."""
        return Rows.apply(tokens, self.source, self.place) + Positions.apply(positions, self.positions)

    def take_last(self, x: Tensor) -> Tensor:
        """(T, width) → (B·K, width): the rows of the last token of each caption's draws."""
        return Rows.apply(x, self.last, self.ends)

    def in_order(self, x: Tensor) -> Tensor:
        """Bins keep captions in their order."""
        return x

    def pinned(self) -> Bins:
        """In memory that a GPU reads from by itself."""
        return Bins(*(x.pin_memory() for x in self.tensors()), texts=self.texts)


GROWTH = 1.25  # of one size class over the one before
SPREAD = 4.5  # standard deviations of a batch's tokens that the smallest class holds: three in a million have more
TRIALS = 4  # batches laid out to see how full first-fit makes the bins


@dataclass(frozen=True)
class SizeClasses:
    """The few shapes that batches of B captions come in: what is compiled and captured must not change its shape.

    A batch's class follows from its lengths and from those of all captions, never from the batches before it, so that
    a resumed run computes what an undisturbed one does. smallest: text tokens that class 0 holds. places: in bins, for
    each token.
    """

    specials: int
    text_positions: int
    smallest: int
    draws: int = 1
    places: float = 1.05

    @classmethod
    def of(cls, counts: np.ndarray, batch: int, *, specials: int, text_positions: int, draws: int = 1) -> SizeClasses:
        """counts (n,): text tokens of every caption that batches are drawn from."""
        tokens = batch * counts.mean() + SPREAD * counts.std() * math.sqrt(batch)
        smallest = min(math.ceil(tokens), batch * int(counts.max()))
        rng, more = np.random.default_rng(0), specials + (draws - 1) * PER_DRAW
        trials = [rng.choice(counts, batch).astype(np.int64) + more for _ in range(TRIALS)]
        places = max(first_fit(totals)[1] * BIN / totals.sum() for totals in trials)
        return cls(specials, text_positions, smallest, draws, places)

    def lay_out(self, lengths: np.ndarray) -> Bins:
        """The bins of captions of lengths (B,), of the smallest class that they fit into."""
        number = 0
        while True:
            texts = math.ceil(self.smallest * GROWTH**number)
            if texts >= lengths.sum():
                # Where first-fit leaves more empty than it used to, the next class has room.
                more = (self.specials + (self.draws - 1) * PER_DRAW) * len(lengths)
                rows = math.ceil((texts + more) * self.places / BIN) + 1
                bins = Bins.of(
                    lengths,
                    specials=self.specials,
                    text_positions=self.text_positions,
                    n_text=texts,
                    rows=rows,
                    draws=self.draws,
                )
                if len(bins.source) == rows * BIN:
                    return bins
            number += 1


def first_fit(totals: np.ndarray) -> tuple[np.ndarray, int]:
    """First-fit-decreasing of sequences of totals (B,) tokens into bins of BIN: their first places (B,), bins used.

    All sequences of one length are placed at once, so the cost is one pass over the bins for each length that occurs.
    """
    if totals.max(initial=0) > BIN:
        raise ValueError(f"a sequence of {totals.max()} tokens does not fit into {BIN}")
    begin = np.empty(len(totals), np.int64)
    room = np.full(len(totals), BIN, np.int64)  # as many bins as sequences are always enough
    order = np.argsort(-totals, kind="stable")
    sizes, counts = np.unique(totals, return_counts=True)
    used = done = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits = room[: used + -(-count // (BIN // size))] // size
        taken = np.minimum(fits, np.maximum(0, count - (np.cumsum(fits) - fits)))
        bins = np.repeat(np.arange(len(taken)), taken)
        nth = np.arange(count) - np.repeat(np.cumsum(taken) - taken, taken)
        begin[order[done : done + count]] = bins * BIN + (BIN - room[bins]) + nth * size
        room[: len(taken)] -= taken * size
        used, done = max(used, int(bins[-1]) + 1), done + count
    return begin, used


class Rows(torch.autograd.Function):
    """x[index], where no row is taken twice and counts: its gradient is a gather too, not a sum at random places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """inverse: for each row of x where it went, len(index) if nowhere."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        padded = torch.cat([gradient, gradient.new_zeros(1, gradient.shape[1])])
        return padded.index_select(0, inverse), None, None


class Positions(torch.autograd.Function):
    """table[positions] for a small table: its gradient is one product with the positions as one-hot rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.rows = len(table)
        return table.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (positions,) = ctx.saved_tensors
        one_hot = positions[None] == torch.arange(ctx.rows, device=positions.device)[:, None]
        return one_hot.to(gradient.dtype) @ gradient, None


@torch.library.custom_op("eclipse::bin_attention", mutates_args=())
def bin_attention(qkv: Tensor, caption: Tensor, draw: Tensor, heads: int) -> Tensor:
    """Causal attention of every token within its caption, inside bins of BIN.

    qkv (T, 3·width): queries, keys and values side by side; caption, draw (T,) int32, as in Bins → (T, width).
    """
    if _by_kernel(qkv, draw, heads):
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        _kernels().forward[(len(qkv) // BIN, heads)](qkv, caption, out, **_sizes(qkv, heads), num_warps=4)
        return out
    q, k, v, allowed = _dense(qkv, caption, draw, heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return out.transpose(1, 2).reshape(len(qkv), -1)


@bin_attention.register_fake
def _(qkv: Tensor, caption: Tensor, draw: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


@torch.library.custom_op("eclipse::bin_attention_backward", mutates_args=())
def bin_attention_backward(gradient: Tensor, qkv: Tensor, caption: Tensor, draw: Tensor, heads: int) -> Tensor:
    """The gradient of qkv (T, 3·width), from that of the output (T, width)."""
    gradient = gradient.contiguous()
    if _by_kernel(qkv, draw, heads):
        out = torch.empty_like(qkv)
        _kernels().backward[(len(qkv) // BIN, heads)](gradient, qkv, caption, out, **_sizes(qkv, heads), num_warps=8)
        return out
    q, k, v, allowed = _dense(qkv, caption, draw, heads)
    g = gradient.view(-1, BIN, heads, q.shape[-1]).transpose(1, 2)
    scale = 1 / math.sqrt(q.shape[-1])
    weight = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf).float().softmax(-1).to(q.dtype)
    of_weight = g @ v.mT
    of_score = weight * (of_weight - (weight * of_weight).sum(-1, keepdim=True)) * scale
    parts = torch.stack([of_score @ k, of_score.mT @ q, weight.mT @ g])  # (3, bins, heads, BIN, d)
    return parts.permute(1, 3, 0, 2, 4).reshape(qkv.shape)


@bin_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, caption: Tensor, draw: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.heads = inputs[3]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return bin_attention_backward(gradient, *ctx.saved_tensors, ctx.heads), None, None, None


bin_attention.register_autograd(_backward, setup_context=_save)


def allowed_in_bins(caption: Tensor, draw: Tensor) -> Tensor:
    """(R, 1, BIN, BIN) bool: which key each query may see."""
    owner = caption.view(-1, 1, BIN)
    causal = torch.ones(BIN, BIN, dtype=torch.bool, device=caption.device).tril()
    allowed = (owner[..., :, None] == owner[..., None, :]) & causal
    if len(draw):
        of = draw.view(-1, 1, BIN)
        allowed = allowed & ((of[..., None, :] == 0) | (of[..., None, :] == of[..., :, None]))
    return allowed


def _dense(qkv: Tensor, caption: Tensor, draw: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = qkv.view(-1, BIN, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v, allowed_in_bins(caption, draw)


def _by_kernel(qkv: Tensor, draw: Tensor, heads: int) -> bool:
    """The kernel knows nothing of draws: with several, a dense product with a mask takes about twice as long."""
    head_dim = qkv.shape[1] // (3 * heads)
    if len(draw) or not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16) or head_dim not in (16, 32, 64):
        return False
    return _kernels() is not None


def _sizes(qkv: Tensor, heads: int) -> dict[str, Any]:
    head_dim = qkv.shape[1] // (3 * heads)
    return {"scale": 1 / math.sqrt(head_dim), "heads": heads, "size": head_dim, "bin_size": BIN}


@cache
def _kernels() -> Any:
    """The module of kernels, once one of them has run; None where they cannot be built, for want of a C compiler."""
    try:
        from . import bin_kernels

        kernels: Any = bin_kernels
        qkv = torch.zeros(BIN, 3 * 16, dtype=torch.bfloat16, device="cuda")
        caption, out = torch.zeros(BIN, dtype=torch.int32, device="cuda"), qkv.new_empty(BIN, 16)
        kernels.forward[(1, 1)](qkv, caption, out, **_sizes(qkv, 1), num_warps=4)
    except Exception as error:
        warnings.warn(f"attention runs without this project's kernel, which failed: {str(error)[:300]}", stacklevel=2)
        return None
    return kernels
