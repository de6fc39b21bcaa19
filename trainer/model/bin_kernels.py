"""Attention in bins of 128 tokens as two Triton kernels, one program a bin and head. Imported by bins.py on CUDA alone.

A whole bin is one tile, so the backward pass needs no statistics of the forward one, no second kernel and no atomics.
"""

# Triton compiles this text itself: what indexing means here is its own matter.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(qkv, caption, at, head, dim, scale, heads: tl.constexpr, size: tl.constexpr):
    """q, k, v (BIN, size) of this bin and head, in half precision, and the attention weights (BIN, BIN) float32."""
    rows = qkv + at[:, None].to(tl.int64) * (3 * heads * size) + head * size + dim[None, :]
    q = tl.load(rows)
    k = tl.load(rows + heads * size)
    v = tl.load(rows + 2 * heads * size)
    owner = tl.load(caption + at)
    score = tl.dot(q, tl.trans(k)) * scale
    allowed = (owner[:, None] == owner[None, :]) & (at[:, None] >= at[None, :])
    score = tl.where(allowed, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return q, k, v, weight / tl.sum(weight, 1)[:, None]


@triton.jit
def forward(qkv, caption, out, scale, heads: tl.constexpr, size: tl.constexpr, bin_size: tl.constexpr):
    at, head, dim = tl.program_id(0) * bin_size + tl.arange(0, bin_size), tl.program_id(1), tl.arange(0, size)
    _, _, v, weight = _weights(qkv, caption, at, head, dim, scale, heads, size)
    value = tl.dot(weight.to(v.dtype), v)
    to = out + at[:, None].to(tl.int64) * (heads * size) + head * size + dim[None, :]
    tl.store(to, value.to(v.dtype))


@triton.jit
def backward(
    gradient,
    qkv,
    caption,
    out,
    scale,
    heads: tl.constexpr,
    size: tl.constexpr,
    bin_size: tl.constexpr,
):
    at, head, dim = tl.program_id(0) * bin_size + tl.arange(0, bin_size), tl.program_id(1), tl.arange(0, size)
    q, k, v, weight = _weights(qkv, caption, at, head, dim, scale, heads, size)
    g = tl.load(gradient + at[:, None].to(tl.int64) * (heads * size) + head * size + dim[None, :])
    to = out + at[:, None].to(tl.int64) * (3 * heads * size) + head * size + dim[None, :]
    of_v = tl.dot(tl.trans(weight.to(g.dtype)), g)
    tl.store(to + 2 * heads * size, of_v.to(g.dtype))
    of_weight = tl.dot(g, tl.trans(v))
    of_score = weight * (of_weight - tl.sum(weight * of_weight, 1)[:, None]) * scale
    of_score = of_score.to(g.dtype)
    tl.store(to, tl.dot(of_score, k).to(g.dtype))
    tl.store(to + heads * size, tl.dot(tl.trans(of_score), q).to(g.dtype))
