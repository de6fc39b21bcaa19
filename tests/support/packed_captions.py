"""Random features of captions, packed. Used by the tests of both priors."""

from __future__ import annotations

import torch
from eclipse.trainer.model.transformer import PackedText


def captions(lengths: list[int], dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, PackedText]:
    """Noise, text embeddings and packed states of captions with these numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    noise, pooled = (torch.randn(len(lengths), dim, generator=generator) for _ in range(2))
    return noise, pooled, PackedText(torch.randn(int(offsets[-1]), dim, generator=generator), offsets)
