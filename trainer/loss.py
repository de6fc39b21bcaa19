"""The objective of ECLIPSE: projection loss plus contrastive loss, and nothing else. Called by steps.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipeline.cache.packed_text import TextFeatures
from .model.transformer import PackedText

BLOCK_ROWS = 2048  # predictions whose similarities to all texts exist at once


@dataclass(frozen=True)
class Draw:
    """What one step draws at random for B rows: noise (B, D) or (B, K, D) ~ N(0, I), and uniform (B, 2)."""

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
    empty_caption: TextFeatures | None = None

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
        """Losses of B rows that are rows first:first+B of the global batch; all_text_embeddings (global, D). Where
        draw.noise is (B, K, D), losses are averaged over a caption's K predictions.

        Returns scalars: loss, and its terms projection and contrastive. A row's loss depends on no other row's
        prediction, only on the frozen text embeddings of all: so a global batch cut into pieces, on one device or
        many, has exactly the gradient of the whole.
        """
        kept = None
        if self.empty_caption is not None and self.caption_dropout:
            kept = draw.uniform[:, 1] >= self.caption_dropout
            features = TextFeatures(text.states, text.offsets, embedding=text_embedding)
            features = features.replaced(~kept, self.empty_caption)
            text_embedding, text = features.embedding, PackedText(features.states, features.offsets)
        prediction = prior(draw.noise, text_embedding, text).float()
        target = image_embedding.float()
        each = [prediction] if prediction.dim() == 2 else prediction.unbind(1)
        projection = torch.stack([projection_loss(one, target, self.reduction) for one in each]).mean()
        # Where the contrastive loss is but a figure, its gradient, the dearer half of it, is not asked for.
        texts = all_text_embeddings.float()
        contrasted = each if self.contrastive_weight else [one.detach() for one in each]
        losses = [contrastive_loss(one, texts, first, self.temperature, kept) for one in contrasted]
        contrastive = torch.stack(losses).mean()
        loss = projection + self.contrastive_weight * contrastive if self.contrastive_weight else projection
        return {"loss": loss, "projection": projection.detach(), "contrastive": contrastive.detach()}


def projection_loss(prediction: Tensor, target: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Squared error of (B, D) against (B, D): summed or averaged over D, averaged over B."""
    error = (prediction - target).square()
    return (error.sum(1) if reduction == "sum" else error.mean(1)).mean()


def contrastive_loss(
    prediction: Tensor,
    texts: Tensor,
    first: int,
    temperature: float,
    kept: Tensor | None = None,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:
    """InfoNCE of predictions (B, D) against texts (global, D): prediction i belongs to text first + i; cosine / τ.

    Averaged over B, with 0 for rows where kept (B,) is false. texts are constants: they get no gradient.
    """
    return _InfoNCE.apply(prediction, texts, first, temperature, kept, block_rows)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """The loss and, in the same pass, its exact gradient, block_rows predictions at a time.

    A row's loss needs no other prediction. So the softmax over all texts, the largest thing in a step with a batch of
    16,384 (1 GB, kept until the backward pass), exists for one block of rows only and is used up at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        texts: Tensor,
        first: int,
        temperature: float,
        kept: Tensor | None,
        block_rows: int,
    ) -> Tensor:
        length = prediction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit, texts = prediction / length, F.normalize(texts, dim=1)
        share = torch.full_like(length, 1 / len(prediction))
        if kept is not None:
            share = share * kept[:, None]
        losses, gradients = [], []
        for start in range(0, len(unit), block_rows):
            block = unit[start : start + block_rows]
            own = texts[first + start : first + start + len(block)]
            logits = block @ texts.T / temperature
            losses.append(logits.logsumexp(1) - (block * own).sum(1) / temperature)
            if ctx.needs_input_grad[0]:
                gradients.append(logits.softmax(1) @ texts - own)
        if gradients:
            gradient = torch.cat(gradients) * (share / temperature)
            along = (gradient * unit).sum(1, keepdim=True)  # what normalisation takes away
            ctx.save_for_backward((gradient - along * unit) / length)
        return (torch.cat(losses) * share[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return of_loss * gradient, None, None, None, None, None
