"""The empty caption in place of some of a batch's own: caption dropout. Called by loss.py and diffusion.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.transformer import PackedText


@dataclass(frozen=True)
class EmptyCaption:
    """What the encoder makes of "": embedding (1, D), states (n, W) of its start and end token."""

    embedding: Tensor
    states: Tensor

    def instead(self, text_embedding: Tensor, text: PackedText, drop: Tensor) -> tuple[Tensor, PackedText]:
        """The features of a batch, with those of the empty caption where drop (B,) is true."""
        n_states = len(text.states)
        lengths = torch.where(drop, len(self.states), text.offsets.diff())
        starts = torch.where(drop, n_states, text.offsets[:-1])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        token = torch.arange(int(offsets[-1]), device=offsets.device)
        token = token + (starts - offsets[:-1]).repeat_interleave(lengths)
        states = torch.cat([text.states, self.states.to(text.states.dtype)])
        pooled = torch.where(drop[:, None], self.embedding.to(text_embedding.dtype), text_embedding)
        return pooled, PackedText(states[token], offsets)
