"""Karlo's decoder on the live parts of diffusers: a 64 px UNet and two super-resolution UNets. See `decoder`.

diffusers' own UnCLIPPipeline is deprecated; this does the same steps (kakaobrain/karlo-v1-alpha's folders and tensor
names), and the pictures are the same for the same noise. The decoder also reads the text: without captions it gets the
empty caption instead, so that nothing but the image embedding speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.core.errors import EclipseError, UsageError
from .decoder import Unconditional, generators_of, picture_noise, pictures_at_once, step_in_float32
from .weights import from_pretrained, quiet_diffusers

if TYPE_CHECKING:
    from PIL import Image

SUPER_RESOLUTION_STEPS = 7
# Captions are padded to CLIP's context, as stock diffusers does, however short they are. Attention is over text and
# picture together, and diffusers extends the text's mask by the picture's tokens unless the two have one length: with
# 4 extra and 60 caption tokens the 64 of a map of 8×8 were met, and the mask stayed too short.
CONTEXT = 77


class UnCLIPTextProjModel(ModelMixin, ConfigMixin):
    """Image and text embeddings → what the decoder UNet takes (arXiv 2204.06125, 2.1); published tensor names."""

    @register_to_config
    def __init__(
        self,
        *,
        clip_extra_context_tokens: int = 4,
        clip_embeddings_dim: int = 768,
        time_embed_dim: int,
        cross_attention_dim: int,
    ) -> None:
        super().__init__()
        dim = clip_embeddings_dim
        self.extra_tokens = clip_extra_context_tokens
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(dim))
        self.embedding_proj = nn.Linear(dim, time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(dim, time_embed_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(dim, clip_extra_context_tokens * cross_attention_dim)
        self.encoder_hidden_states_proj = nn.Linear(dim, cross_attention_dim)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embedding: Tensor, captions: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """image_embedding (B, D) → context (B, extra + L, C), its mask (B, extra + L) bool, addition to time (B, T)."""
        time = self.clip_image_embeddings_project_to_time_embeddings(image_embedding)
        time = time + self.embedding_proj(captions.embedding)
        extra = self.clip_extra_context_tokens_proj(image_embedding)
        extra = extra.reshape(len(image_embedding), -1, self.extra_tokens).permute(0, 2, 1)
        states, mask = captions.padded(CONTEXT)
        text = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(states))
        mask = F.pad(mask, (self.extra_tokens, 0), value=True)
        return torch.cat([extra, text], dim=1), mask, time


@dataclass
class Parts:
    """The published repository's folders that a decoder needs (its prior, text encoder and tokenizer are not read)."""

    text_proj: UnCLIPTextProjModel
    decoder: Any
    super_res_first: Any
    super_res_last: Any
    decoder_scheduler: Any
    super_res_scheduler: Any


class KarloDecoder:
    """Meets `decoder.Decoder`. Guidance contrasts with the learned image embedding and the empty caption."""

    name = "karlo"

    def __init__(self, parts: Parts, empty: TextFeatures, device: str) -> None:
        self.parts = parts
        self.empty = empty
        self.device = device
        self.embedding_dim = int(parts.text_proj.config["clip_embeddings_dim"])
        self.image_size = int(parts.super_res_first.config.sample_size)
        for scheduler in (parts.decoder_scheduler, parts.super_res_scheduler):
            step_in_float32(scheduler)
        self.batch_size = pictures_at_once(self.image_size, device)
        if empty.embedding.shape[1] != self.embedding_dim:
            raise EclipseError(
                f"the encoder's captions have {empty.embedding.shape[1]} dims, the decoder takes {self.embedding_dim}",
                hint="use a decoder made for the card's encoder",
            )

    @classmethod
    def load(
        cls,
        path: str,
        *,
        unconditional: Unconditional,
        image_size: int | tuple[int, int] | None = None,
        scheduler: str | None = None,
        device: str = "cpu",
    ) -> KarloDecoder:
        if scheduler is not None:
            raise UsageError("Karlo's decoder has one scheduler of its own", hint="leave decoder.scheduler out")
        if unconditional.caption is None:
            raise EclipseError("guidance needs the features of the empty caption", where=path)
        quiet_diffusers()
        dtype = torch.float32 if device == "cpu" else torch.float16
        kinds = {
            "text_proj": UnCLIPTextProjModel,
            "decoder": UNet2DConditionModel,
            "super_res_first": UNet2DModel,
            "super_res_last": UNet2DModel,
        }
        models = {
            name: from_pretrained(kind, path, half=device != "cpu", subfolder=name).to(device, dtype).eval()
            for name, kind in kinds.items()
        }
        schedulers = {
            name: from_pretrained(UnCLIPScheduler, path, subfolder=name)
            for name in ("decoder_scheduler", "super_res_scheduler")
        }
        made = cls(Parts(**models, **schedulers), unconditional.caption.cast(device, dtype), device)
        if image_size not in (None, made.image_size, (made.image_size, made.image_size)):
            raise UsageError(
                f"this decoder makes pictures of {made.image_size} px, not {image_size}",
                where=path,
                hint=f"set decoder.image_size: {made.image_size} in the card",
            )
        return made

    @torch.inference_mode()
    def decode(
        self,
        image_embedding: Tensor,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        captions: TextFeatures | None = None,
    ) -> list[Image.Image]:
        """See `Decoder.decode`. Without captions it sees the empty one. steps: of the first stage, at least 2."""
        if steps < 2:
            raise UsageError(f"{steps} decoder steps", hint="Karlo's schedule needs at least 2")
        generators = generators_of(seeds)
        embedding = image_embedding.to(self.empty.embedding)
        text = self.empty.select([0] * len(embedding)) if captions is None else captions
        text = text.cast(self.device, embedding.dtype)
        small = self._decode(embedding, text, steps, guidance_scale, generators)
        return _pictures(self._enlarge(small, generators))

    def _decode(
        self,
        embedding: Tensor,
        text: TextFeatures,
        steps: int,
        guidance_scale: float,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Small pictures (B, 3, h, w) in −1..1; guided where guidance_scale > 1."""
        parts, guided = self.parts, guidance_scale > 1
        if guided:
            nothing = parts.text_proj.learned_classifier_free_guidance_embeddings.expand_as(embedding)
            embedding = torch.cat([nothing, embedding])
            text = TextFeatures.concatenated([self.empty.select([0] * len(nothing)), text])
        context, mask, time = parts.text_proj(embedding, text)
        size, channels = parts.decoder.config.sample_size, parts.decoder.config.in_channels
        x = picture_noise((channels, size, size), generators, like=embedding)
        for t, before in _timesteps(parts.decoder_scheduler, steps, x.device):
            twice = torch.cat([x, x]) if guided else x
            predicted = parts.decoder(
                sample=twice, timestep=t, encoder_hidden_states=context, class_labels=time, attention_mask=mask
            ).sample
            if guided:
                without, with_text = predicted.chunk(2)
                noise, variance = with_text.split(channels, dim=1)
                without = without[:, :channels]
                predicted = torch.cat([without + guidance_scale * (noise - without), variance], dim=1)
            step = parts.decoder_scheduler.step(predicted, t, x, prev_timestep=before, generator=generators)
            x = step.prev_sample
        return x.clamp(-1, 1)

    def _enlarge(self, small: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Super-resolution in 7 steps, the last by a network of its own."""
        parts, size = self.parts, self.image_size
        # In float32, since CPUs resize in no other precision.
        options = {"size": [size, size], "mode": "bicubic", "align_corners": False, "antialias": True}
        upscaled = F.interpolate(small.float(), **options).to(small.dtype)
        x = picture_noise(upscaled.shape[1:], generators, like=small)
        schedule = _timesteps(parts.super_res_scheduler, SUPER_RESOLUTION_STEPS, x.device)
        for i, (t, before) in enumerate(schedule):
            unet = parts.super_res_last if i == len(schedule) - 1 else parts.super_res_first
            predicted = unet(sample=torch.cat([x, upscaled], dim=1), timestep=t).sample
            step = parts.super_res_scheduler.step(predicted, t, x, prev_timestep=before, generator=generators)
            x = step.prev_sample
        return x


def _timesteps(scheduler: Any, steps: int, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    """Each timestep with the one that follows it, None after the last."""
    scheduler.set_timesteps(steps, device=device)
    times = list(scheduler.timesteps)
    return list(zip(times, [*times[1:], None], strict=True))


def _pictures(x: Tensor) -> list[Image.Image]:
    from PIL import Image

    values = (x * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(picture) for picture in (values * 255).round().astype(np.uint8)]
