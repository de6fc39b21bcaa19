"""The protocol every decoder meets, what it is given, and the registry. Called by `render` and the lab's scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.core.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

# kind → module and class; modules are imported when asked for, since diffusers takes seconds
KINDS = {
    "kandinsky22": (".kandinsky", "KandinskyDecoder"),
    "karlo": (".karlo", "KarloDecoder"),
}


@dataclass(frozen=True)
class Unconditional:
    """What the encoder makes of nothing, for guidance's other branch.

    `image_embedding` (D,): the image tower's output on an all-zero pixel tensor (Kandinsky 2.2's convention).
    `negative` (D,): in its place, what the prior makes of a negative prompt. `caption`: the features of the empty
    caption (Karlo).
    """

    image_embedding: torch.Tensor | None = None
    negative: torch.Tensor | None = None
    caption: TextFeatures | None = None


class Decoder(Protocol):
    """Image embeddings → pictures. A picture depends on its own embedding, caption and seed, not on its batch."""

    name: str
    embedding_dim: int
    batch_size: int  # how many pictures at once suit the device

    def decode(
        self,
        image_embedding: torch.Tensor,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        captions: TextFeatures | None = None,
    ) -> list[Image.Image]:
        """image_embedding (B, D) raw CLIP, one seed a picture → B RGB pictures. `captions` None: without text."""
        ...


def load_decoder(
    kind: str,
    path: str,
    *,
    unconditional: Unconditional,
    image_size: int | tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
) -> Decoder:
    """Load a decoder from a directory or a hub id. `scheduler` None: the one that comes with it.

    image_size: the side of its pictures in pixels, or their width and height; None: what it was made for.

    Raises:
        UsageError: unknown kind or option, a size that it cannot make.
        EclipseError: weights that cannot be found, read or used.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown decoder kind {kind!r}", hint=f"use one of: {', '.join(KINDS)}")
    module, name = KINDS[kind]
    decoder_class = getattr(import_module(module, __package__), name)
    made: Decoder = decoder_class.load(
        path, unconditional=unconditional, image_size=image_size, scheduler=scheduler, device=device
    )
    if batch_size is not None:
        made.batch_size = batch_size
    return made


def picture_noise(shape: Sequence[int], generators: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise (B, *shape) from one CPU generator a picture, so that devices and batches agree."""
    noise = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(noise).to(device=like.device, dtype=like.dtype)


def step_in_float32(scheduler: Any) -> None:
    """Have a diffusers scheduler compute and draw its noise in float32, whatever the networks' dtype.

    It draws in the dtype that it is given, and not every version of torch draws the same numbers in half precision.
    """
    given = scheduler.step

    def step(predicted: torch.Tensor, t: Any, x: torch.Tensor, **options: Any) -> Any:
        found = given(predicted.float(), t, x.float(), **options)
        found.prev_sample = found.prev_sample.to(x.dtype)
        return found

    scheduler.step = step


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def pictures_at_once(image_size: int, device: str) -> int:
    """A batch that keeps the device busy: 32 pictures of 64 px, fewer as they grow, more on an accelerator.

    There it is 8 of 512 px or 32 of 256 px, guidance doubling each: 128 of 256 px need more than 40 GB with Karlo.
    """
    budget = 32 * 64**2 if device == "cpu" else 512 * 64**2
    return max(1, min(256, budget // image_size**2))
