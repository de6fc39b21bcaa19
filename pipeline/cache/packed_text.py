"""Text features of a batch of captions, packed: the one type from the text tower over the prior to the decoder.

Torch alone. Made by pipeline/embed/clip.py and trainer/data, read by trainer/model and decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedText:
    """Token states of B captions end to end, without padding.

    states: (N, W), any float dtype; offsets: (B+1,) int64, caption i is rows offsets[i]:offsets[i+1]. Both lie on one
    device: a pair on two works on a CPU and fails on the first GPU it meets, so it is refused here (ValueError).
    bins: trainer.model.bins.Bins, where everything lies on a GPU, known to the host that read the batch; None where the
    network lays out itself. Opaque here: the cache knows nothing of the trainer.
    """

    states: Tensor
    offsets: Tensor
    bins: Any = None

    def __post_init__(self) -> None:
        if self.states.device != self.offsets.device:
            raise ValueError(f"states on {self.states.device}, offsets on {self.offsets.device}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def n_tokens(self) -> Tensor:
        """(B,) int64: real tokens of each caption, start and end token included."""
        return self.offsets.diff()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedText:
        return PackedText(
            self.states.to(device, non_blocking=non_blocking),
            self.offsets.to(device, non_blocking=non_blocking),
            None if self.bins is None else self.bins.to(device, non_blocking=non_blocking),
        )

    def take(self, start: int, stop: int) -> PackedText:
        """Captions start:stop, as views where possible. Waits for the device, which alone knows the offsets."""
        offsets = self.offsets[start : stop + 1]
        return PackedText(self.states[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def select(self, rows: Sequence[int] | Tensor) -> PackedText:
        """Some captions, in the order of `rows`, each as often as it is named. Waits for the device."""
        index = torch.as_tensor(rows, device=self.device)
        lengths = self.n_tokens[index]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        source = torch.repeat_interleave(self.offsets[index] - offsets[:-1], lengths)
        return PackedText(self.states[source + torch.arange(len(source), device=self.device)], offsets)

    def padded(self, length: int) -> tuple[Tensor, Tensor]:
        """States (B, length, W), zero where a caption is shorter, and the mask (B, length) bool, true on real tokens.

        What is longer is cut. Nothing here waits for the device.
        """
        position = torch.arange(length, device=self.device)
        mask = position < self.n_tokens[:, None]
        # Padding reads its neighbour and is then blanked: an index of fixed shape makes nobody wait.
        source = (self.offsets[:-1, None] + position).clamp(max=max(len(self.states) - 1, 0))
        return torch.where(mask[..., None], self.states[source], 0), mask


@dataclass(frozen=True)
class TextFeatures(PackedText):
    """Everything a text tower makes of B captions. embedding: (B, D) pooled and projected, not normalised."""

    embedding: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding.device != self.states.device:
            raise ValueError(f"states on {self.states.device}, embedding on {self.embedding.device}")

    def cast(self, device: torch.device | str, dtype: torch.dtype) -> TextFeatures:
        """On another device, its numbers in another dtype."""
        states, embedding = (x.to(device, dtype) for x in (self.states, self.embedding))
        return TextFeatures(states, self.offsets.to(device), embedding=embedding)

    def select(self, rows: Sequence[int] | Tensor) -> TextFeatures:
        index = torch.as_tensor(rows, device=self.device)
        text = super().select(index)
        return TextFeatures(text.states, text.offsets, embedding=self.embedding[index])

    def replaced(self, drop: Tensor, by: TextFeatures) -> TextFeatures:
        """With the one caption of `by`, in this one's dtypes, in place of those where drop (B,) is true: caption
        dropout. Waits for the device.
        """
        states, embedding = by.states.to(self.states.dtype), by.embedding.to(self.embedding.dtype)
        every = self.concatenated([self, TextFeatures(states, by.offsets, embedding=embedding)])
        return every.select(torch.where(drop, len(self), torch.arange(len(self), device=self.device)))

    @classmethod
    def concatenated(cls, pieces: Sequence[TextFeatures]) -> TextFeatures:
        """The captions of at least one batch after another."""
        lengths = torch.cat([piece.n_tokens for piece in pieces])
        return cls(
            torch.cat([piece.states for piece in pieces]),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            embedding=torch.cat([piece.embedding for piece in pieces]),
        )
