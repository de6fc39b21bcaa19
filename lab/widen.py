"""Widens the UNet's outermost level without losing what it has learnt. Called by `build_unet`.

Net2Net (arXiv 1511.05641): each channel becomes two, what reads it splits its weight between them, and a little noise
tells the two apart. Group norms over channels of two levels change their groups, which training mends in a few steps.
"""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

_NOISE = 0.02  # of the weights' own spread
_SPLIT = (0.3, 0.7)  # a channel's share in what it and its double pass on, drawn uniformly


def widen(narrow: UNet2DConditionModel, wide: UNet2DConditionModel, seed: int) -> UNet2DConditionModel:
    """Fill `wide` from `narrow`: the same UNet but for twice the channels in its first level. Returns `wide`."""
    rng = torch.Generator().manual_seed(seed)
    old = narrow.state_dict()
    filled = {name: _grown(name, old[name], like.shape, rng) for name, like in wide.state_dict().items()}
    wide.load_state_dict(filled)
    return wide


def _grown(name: str, weight: Tensor, shape: torch.Size, rng: torch.Generator) -> Tensor:
    if weight.shape == shape:
        return weight.clone()
    if name == "time_embedding.linear_1.weight":
        return _more_frequencies(weight)
    grown = _doubled(weight, shape[0] - weight.shape[0])
    if weight.ndim > 1 and (extra := shape[1] - weight.shape[1]):
        grown = _split(grown.transpose(0, 1), extra, rng).transpose(0, 1)
    if weight.ndim > 1:
        grown = grown + _NOISE * weight.std() * torch.randn(grown.shape, generator=rng)
    return grown.contiguous()


def _doubled(weight: Tensor, extra: int) -> Tensor:
    """The last `extra` rows twice each: where two levels are concatenated, the outer one comes last."""
    kept = len(weight) - extra
    return torch.cat([weight[:kept], weight[kept:].repeat_interleave(2, 0)])


def _split(weight: Tensor, extra: int, rng: torch.Generator) -> Tensor:
    """`_doubled`, for inputs: the two shares of a row add up to it."""
    kept = len(weight) - extra
    low, high = _SPLIT
    share = low + (high - low) * torch.rand(extra, *[1] * (weight.ndim - 1), generator=rng)
    pairs = torch.stack([weight[kept:] * share, weight[kept:] * (1 - share)], 1)
    return torch.cat([weight[:kept], pairs.flatten(0, 1)])


def _more_frequencies(weight: Tensor) -> Tensor:
    """Sinusoids of twice as many frequencies: every second one is an old one, the others start at zero."""
    return torch.stack([weight, torch.zeros_like(weight)], 2).flatten(1)
