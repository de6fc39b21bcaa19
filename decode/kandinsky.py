"""Kandinsky 2.2's decoder through diffusers' KandinskyV22Pipeline: image embedding alone → pictures. See `decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.sections import Scheduler
from .decoder import Unconditional, generators_of, picture_noise, pictures_at_once, step_in_float32
from .weights import from_pretrained, quiet_diffusers

if TYPE_CHECKING:
    from PIL import Image

NEGATIVE_FILE = "negative_image_embedding.safetensors"
DEFAULT_IMAGE_SIZE = 512


class KandinskyDecoder:
    """Meets `decoder.Decoder`. Guidance contrasts with the embedding of an all-zero pixel tensor, a constant."""

    name = "kandinsky22"

    def __init__(self, pipe: Any, negative: torch.Tensor, size: tuple[int, int], device: str) -> None:
        self.pipe = pipe
        self.negative = negative
        self.width, self.height = size
        self.embedding_dim = int(pipe.unet.config.encoder_hid_dim)
        step_in_float32(pipe.scheduler)
        self.batch_size = pictures_at_once(round((self.width * self.height) ** 0.5), device)
        require_size(size, len(pipe.movq.config.block_out_channels))
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
        image_size: int | tuple[int, int] | None = None,
        scheduler: str | None = None,
        device: str = "cpu",
    ) -> KandinskyDecoder:
        from diffusers import KandinskyV22Pipeline  # pyright: ignore[reportPrivateImportUsage]

        size = image_size or DEFAULT_IMAGE_SIZE
        found = (unconditional.negative, read_negative(path), unconditional.image_embedding)
        negative = next((embedding for embedding in found if embedding is not None), None)
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
        size = (size, size) if isinstance(size, int) else size
        return cls(pipe, negative.to(device, dtype).reshape(-1), size, device)

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
        embedding, generators = image_embedding.to(self.negative), generators_of(seeds)
        reduction = 2 ** (len(self.pipe.movq.config.block_out_channels) - 1)
        shape = self.pipe.unet.config.in_channels, self.height // reduction, self.width // reduction
        return self.pipe(
            image_embeds=embedding,
            negative_image_embeds=self.negative.expand_as(embedding),
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=picture_noise(shape, generators, like=embedding),
            generator=generators,
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


def require_size(size: tuple[int, int], levels: int) -> None:
    """Raise UsageError unless pictures of this width and height can be made by a MoVQ of so many levels.

    The pipeline rounds any other size up, without a word: to multiples of 64 px with the published decoder's 4 levels.
    """
    step = 4 ** (levels - 1)  # latents are smaller by 2^(levels - 1), and their sides a multiple of the same
    if any(side % step for side in size):
        nearest = " × ".join(str(max(step, round(side / step) * step)) for side in size)
        raise UsageError(
            f"this decoder makes no pictures of {size[0]} × {size[1]} px: sides are multiples of {step}",
            hint=f"use {nearest} (decoder.image_size in the card, or --width and --height)",
        )


def _scheduler(name: str, shipped: Any) -> Any:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler  # pyright: ignore[reportPrivateImportUsage]

    names = get_args(Scheduler)
    if name not in names:
        raise UsageError(f"unknown scheduler {name!r}", hint=f"use one of: {', '.join(names)}")
    if name == "ddpm":
        return DDPMScheduler.from_config(shipped.config)
    # The pipeline drops the UNet's variance channels only where the scheduler names no learned variance. It scales no
    # sample before the UNet either, which rules out the schedulers that want that, Euler's among them.
    config = {key: value for key, value in shipped.config.items() if key != "variance_type"}
    if name == "ddim":
        return DDIMScheduler.from_config(config, timestep_spacing="trailing")
    kind = "sde-dpmsolver++" if name == "dpm++-sde" else "dpmsolver++"
    karras = name == "dpm++-karras"
    if karras and config.get("beta_schedule") == "squaredcos_cap_v2":
        # Karras' sigmas of a cosine schedule, whose largest is beyond 1,000, fall on one training step several times.
        what = "dpm++-karras does not suit this decoder, whose noise follows a cosine"
        raise UsageError(what, where=f"scheduler {name}", hint="use dpm++ or dpm++-sde")
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type=kind, use_karras_sigmas=karras, timestep_spacing="trailing"
    )
