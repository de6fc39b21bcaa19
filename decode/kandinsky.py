"""Kandinsky 2.2's decoder through diffusers' KandinskyV22Pipeline: image embedding alone → pictures. See `decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.core.errors import EclipseError, UsageError
from .decoder import Unconditional, generators_of, pictures_at_once
from .weights import from_pretrained, quiet_diffusers

if TYPE_CHECKING:
    from PIL import Image

NEGATIVE_FILE = "negative_image_embedding.safetensors"
SCHEDULERS = ("ddpm", "ddim")
DEFAULT_IMAGE_SIZE = 512


class KandinskyDecoder:
    """Meets `decoder.Decoder`. Guidance contrasts with the embedding of an all-zero pixel tensor, a constant."""

    name = "kandinsky22"

    def __init__(self, pipe: Any, negative: torch.Tensor, image_size: int, device: str) -> None:
        self.pipe = pipe
        self.negative = negative
        self.image_size = image_size
        self.embedding_dim = int(pipe.unet.config.encoder_hid_dim)
        self.batch_size = pictures_at_once(image_size, device)
        if negative.numel() != self.embedding_dim:
            raise EclipseError(
                f"the negative image embedding has {negative.numel()} dims, the decoder takes {self.embedding_dim}",
                hint="use a decoder made for the card's encoder",
            )

    @classmethod
    def load(
        cls,
        path: str,
        *,
        unconditional: Unconditional,
        image_size: int | None = None,
        scheduler: str | None = None,
        device: str = "cpu",
    ) -> KandinskyDecoder:
        from diffusers import KandinskyV22Pipeline  # pyright: ignore[reportPrivateImportUsage]

        negative = read_negative(path)
        if negative is None:
            negative = unconditional.image_embedding
        if negative is None:
            raise EclipseError(
                "guidance needs the embedding of an all-zero picture", where=path, hint=f"put {NEGATIVE_FILE} beside it"
            )
        quiet_diffusers()
        dtype = torch.float32 if device == "cpu" else torch.float16
        pipe: Any = from_pretrained(KandinskyV22Pipeline, path, half=device != "cpu")
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device, dtype)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.movq.to(memory_format=torch.channels_last)
        if scheduler is not None:
            pipe.scheduler = _scheduler(scheduler, pipe.scheduler)
        return cls(pipe, negative.to(device, dtype).reshape(-1), image_size or DEFAULT_IMAGE_SIZE, device)

    @torch.inference_mode()
    def decode(
        self,
        image_embedding: torch.Tensor,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        captions: TextFeatures | None = None,
    ) -> list[Image.Image]:
        """See `Decoder.decode`; this decoder never sees the text."""
        embedding = image_embedding.to(self.negative)
        return self.pipe(
            image_embeds=embedding,
            negative_image_embeds=self.negative.expand_as(embedding),
            height=self.image_size,
            width=self.image_size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators_of(seeds),
        ).images


def read_negative(path: str) -> torch.Tensor | None:
    """The negative image embedding (D,) stored beside a local decoder, or None."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path) / NEGATIVE_FILE
    if not file.is_file():
        return None
    try:
        return next(iter(load_file(file).values())).float().reshape(-1)
    except (SafetensorError, StopIteration) as error:
        raise EclipseError(f"not a file of one tensor: {error}", where=str(file), hint="remove or replace it") from None


def _scheduler(name: str, shipped: Any) -> Any:
    from diffusers import DDIMScheduler, DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}", hint=f"use one of: {', '.join(SCHEDULERS)}")
    if name == "ddpm":
        return DDPMScheduler.from_config(shipped.config)
    # The pipeline drops the UNet's variance channels only where the scheduler names no learned variance.
    config = {key: value for key, value in shipped.config.items() if key != "variance_type"}
    return DDIMScheduler.from_config(config, timestep_spacing="trailing")
