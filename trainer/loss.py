"""The objective of ECLIPSE: projection loss plus contrastive loss, and nothing else. Called by train.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.captions import EmptyCaption
from .model.transformer import PackedText


@dataclass(frozen=True)
class Draw:
    """What one step draws at random for B rows: noise (B, D) ~ N(0, I), and uniform (B, 2) for whoever needs it."""

    noise: Tensor
    uniform: Tensor


@dataclass(frozen=True)
class Objective:
    """L = ‖z − ẑ‖² + λ · InfoNCE(ẑ → text), equations 5 to 7 of arXiv 2312.04655. λ = 0 is the projection baseline.

    reduction: whether the squared error is summed over the D dimensions of an embedding or averaged; both are averaged
    over rows. The paper does not say which it does: with the mean, λ weighs D times more.

    caption_dropout: this share of captions is replaced by `empty_caption`; such rows have no contrastive loss, since
    nothing could tell the network which text is theirs.
    """

    contrastive_weight: float
    temperature: float
    reduction: Literal["mean", "sum"]
    caption_dropout: float = 0.0
    empty_caption: EmptyCaption | None = None

    def __call__(
        self,
        prior: Callable[[Tensor, Tensor, PackedText], Tensor],
        image_embedding: Tensor,
        text_embedding: Tensor,
        text: PackedText,
        draw: Draw,
        all_text_embeddings: Tensor,
        first: int,
    ) -> dict[str, Tensor]:
        """Losses of B rows that are rows first:first+B of the global batch; all_text_embeddings (global, D).

        Returns scalars: loss, and its terms projection and contrastive. A row's loss depends on no other row's
        prediction, only on the frozen text embeddings of all: so a global batch cut into pieces, on one device or
        many, has exactly the gradient of the whole.
        """
        kept = None
        if self.empty_caption is not None and self.caption_dropout:
            kept = draw.uniform[:, 1] >= self.caption_dropout
            text_embedding, text = self.empty_caption.instead(text_embedding, text, ~kept)
        prediction = prior(draw.noise, text_embedding, text).float()
        projection = projection_loss(prediction, image_embedding.float(), self.reduction)
        contrastive = contrastive_loss(prediction, all_text_embeddings.float(), first, self.temperature, kept)
        loss = projection + self.contrastive_weight * contrastive if self.contrastive_weight else projection
        return {"loss": loss, "projection": projection.detach(), "contrastive": contrastive.detach()}


def projection_loss(prediction: Tensor, target: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Squared error of (B, D) against (B, D): summed or averaged over D, averaged over B."""
    error = (prediction - target).square()
    return (error.sum(1) if reduction == "sum" else error.mean(1)).mean()


def contrastive_loss(
    prediction: Tensor, texts: Tensor, first: int, temperature: float, kept: Tensor | None = None
) -> Tensor:
    """InfoNCE of predictions (B, D) against texts (global, D): prediction i belongs to text first + i; cosine / τ.

    Averaged over B, with 0 for rows where kept (B,) is false.
    """
    logits = F.normalize(prediction, dim=1) @ F.normalize(texts, dim=1).T / temperature
    each = F.cross_entropy(logits, torch.arange(first, first + len(prediction), device=logits.device), reduction="none")
    return (each if kept is None else each * kept).mean()
