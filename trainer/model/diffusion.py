"""The diffusion baseline of the same size: what ECLIPSE is compared with. Called by run.py and prior.py.

Tensor names, token order and time embedding are those of diffusers' PriorTransformer, which can load these weights. The
unconditional branch's caption, the empty one, is kept in the same file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipeline.cache.packed_text import TextFeatures
from ..loss import Draw
from .transformer import PackedText, PriorConfig, PriorTransformer, like

TRAINING_STEPS = 1000
SAMPLING_STEPS = 25
GUIDANCE = 4.0
CAPTION_DROPOUT = 0.1
LARGEST = 5.0  # in standard deviations; Kandinsky's own prior clips there too, since guidance overshoots


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, cosines first, through a two-layer perceptron: (B,) → (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
        angles = timesteps[:, None].float() * rates
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=1))))


class DiffusionPrior(PriorTransformer):
    """Predicts the clean image embedding, normalised by clip_mean and clip_std, from a noisy one."""

    specials = 4

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.time_embedding = TimeEmbedding(config.width)
        self.register_buffer("empty_text_embedding", torch.zeros(1, config.embedding_dim))
        self.register_buffer("empty_text_states", torch.zeros(2, config.embedding_dim))  # start and end
        self.empty_text_embedding: Tensor
        self.empty_text_states: Tensor

    def forward(self, noisy: Tensor, timesteps: Tensor, text_embedding: Tensor, text: PackedText) -> Tensor:
        """noisy (B, D) normalised, timesteps (B,) in 0..999 → clean (B, D), normalised."""
        noisy, text_embedding = (like(x, self.prd_embedding) for x in (noisy, text_embedding))
        prd = self.prd_embedding[0].expand(len(noisy), -1)
        time = self.time_embedding(timesteps)
        return self.run([self.embedding_proj(text_embedding), time, self.proj_in(noisy), prd], text)

    def generate(self, noise: Tensor, text_embedding: Tensor, text: PackedText) -> Tensor:
        """DDIM without added noise (arXiv 2010.02502), SAMPLING_STEPS steps, classifier-free guidance: raw (B, D)."""
        everywhere = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        nothing = self.without(everywhere, text_embedding, text)
        signal = alphas_cumprod(noise.device)
        stride = TRAINING_STEPS // SAMPLING_STEPS
        noisy = noise
        for step in range(TRAINING_STEPS - 1, 0, -stride):
            timesteps = torch.full((len(noise),), step, device=noise.device)
            conditional = self(noisy, timesteps, text_embedding, text).float()
            unconditional = self(noisy, timesteps, *nothing).float()
            clean = (unconditional + GUIDANCE * (conditional - unconditional)).clamp(-LARGEST, LARGEST)
            now, then = signal[step], signal[step - stride] if step >= stride else torch.ones_like(signal[0])
            direction = (noisy - now.sqrt() * clean) / (1 - now).sqrt()
            noisy = then.sqrt() * clean + (1 - then).sqrt() * direction
        return noisy * self.clip_std + self.clip_mean

    def without(self, drop: Tensor, text_embedding: Tensor, text: PackedText) -> tuple[Tensor, PackedText]:
        """The captions with the empty one, which the unconditional branch is given, where drop (B,) is true."""
        offsets = torch.tensor([0, len(self.empty_text_states)], device=text.device)
        nothing = TextFeatures(self.empty_text_states, offsets, embedding=self.empty_text_embedding)
        kept = TextFeatures(text.states, text.offsets, embedding=text_embedding).replaced(drop, nothing)
        return kept.embedding, PackedText(kept.states, kept.offsets)


@dataclass(frozen=True)
class DiffusionObjective:
    """Squared error of the predicted clean embedding at a random timestep, a tenth of the captions dropped.

    Called as objective.Objective is; the texts of the whole batch have no part in it.
    """

    prior: DiffusionPrior

    def __call__(
        self,
        predict: Callable[..., Tensor],
        image_embedding: Tensor,
        text_embedding: Tensor,
        text: PackedText,
        draw: Draw,
        all_text_embeddings: Tensor,
        first: int,
    ) -> dict[str, Tensor]:
        timesteps = (draw.uniform[:, 0] * TRAINING_STEPS).long()
        drop = draw.uniform[:, 1] < CAPTION_DROPOUT
        text_embedding, text = self.prior.without(drop, text_embedding, text)
        clean = (image_embedding.float() - self.prior.clip_mean) / self.prior.clip_std
        signal = alphas_cumprod(clean.device)[timesteps][:, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * draw.noise
        loss = (predict(noisy, timesteps, text_embedding, text).float() - clean).square().mean()
        return {"loss": loss, "projection": loss.detach(), "contrastive": torch.zeros_like(loss)}


def alphas_cumprod(device: torch.device) -> Tensor:
    """(1000,) share of the signal's variance left at each timestep, for the linear schedule of arXiv 2006.11239."""
    betas = torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0).float().to(device)
