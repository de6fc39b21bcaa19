"""A trained prior to call with text, for `eclipse.load`: the network, its encoder, and what guidance needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..pipeline.core.card import resolve
from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.progress import Progress
from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import Prior, load_prior
from . import export
from .conditioning import encode_texts, pick_device, predict
from .layouts import picture_seed

if TYPE_CHECKING:
    from ..trainer.model.diffusion import DiffusionPrior
    from .diffusers_prior import DiffusersPrior

# ECLIPSE's own priors carry no record; their dimension says which of the two published encoders they read.
PUBLISHED_ENCODERS = {768: "karlo", 1280: "kandinsky22"}


OUTPUTS = ("image_embeds", "negative_image_embeds")


@dataclass(frozen=True, eq=False)
class PriorOutput(Mapping[str, torch.Tensor]):
    """What diffusers' prior pipelines return, under the same names: image_embeds and negative_image_embeds (N, D).

    `KandinskyV22Pipeline(**output)` and `image_embeds, negative_image_embeds = output.to_tuple()` both work.
    """

    image_embeds: torch.Tensor
    negative_image_embeds: torch.Tensor

    def to_tuple(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image_embeds, self.negative_image_embeds

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in OUTPUTS:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(OUTPUTS)

    def __len__(self) -> int:
        return len(OUTPUTS)


class TextToImagePrior:
    """Text in, CLIP image embeddings out. Made by `eclipse.load`.

    prior: the network; encoder: the CLIP it reads; record: what its eclipse.json says, None for a prior without one.
    """

    def __init__(
        self, prior: Prior | DiffusionPrior, encoder: Encoder, name: str, record: export.Record | None
    ) -> None:
        dim = prior.config.embedding_dim
        if encoder.embedding_dim != dim:
            raise UsageError(
                f"the prior reads features of {dim} dimensions, this encoder makes {encoder.embedding_dim}",
                where=name,
                hint="name the encoder it was trained on: eclipse.load(…, encoder=…)",
            )
        self.prior = prior
        self.encoder = encoder
        self.name = name
        self.record = record
        self._blank: torch.Tensor | None = None

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.prior.parameters())
        return f"<prior {self.name}: {parameters:,} parameters, {self.prior.config.embedding_dim} dimensions>"

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def __call__(
        self, prompt: str | Sequence[str], *, draws: int = 1, negative_prompt: str | None = None, seed: int = 0
    ) -> PriorOutput:
        """Image embeddings for one prompt or several, `draws` of each in turn: (len(prompts) · draws, D) float32.

        Draw k of a prompt depends on the prompt, k and `seed` alone, and is what `eclipse render --seed` draws.
        negative_prompt: what guidance shall lead away from; None: the image tower's output on an all-zero picture, as
        Kandinsky 2.2 does it.

        Raises:
            UsageError: no prompt, or fewer than one draw.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise UsageError("an empty prompt", hint="say what the picture shall show")
        if draws < 1:
            raise UsageError(f"{draws} draws", hint="ask for at least one")
        embeds = self._embed(prompts, draws, seed)
        negative = self._embed([negative_prompt], 1, seed) if negative_prompt else self.blank()[None]
        return PriorOutput(embeds, negative.expand_as(embeds).contiguous())

    def blank(self) -> torch.Tensor:
        """(D,) the image tower's output on an all-zero pixel tensor."""
        if self._blank is None:
            size = self.encoder.image_size
            self._blank = self.encoder.encode_images(torch.zeros(1, 3, size, size))[0]
        return self._blank

    def as_diffusers(self) -> DiffusersPrior:
        """The network as the `prior_prior` of diffusers' `KandinskyV22CombinedPipeline`; see `diffusers_prior`."""
        from .diffusers_prior import DiffusersPrior

        if not isinstance(self.prior, Prior):
            raise UsageError(
                "a diffusion prior is no one-pass prior", where=self.name, hint="call it: it samples by itself"
            )
        return DiffusersPrior.wrap(self.prior)

    def _embed(self, prompts: Sequence[str], draws: int, seed: int) -> torch.Tensor:
        texts = encode_texts(self.encoder, prompts, Progress(quiet=True))
        rows = [row for row in range(len(prompts)) for _ in range(draws)]
        seeds = [picture_seed(seed, prompts[row], k) for row in range(len(prompts)) for k in range(draws)]
        return predict(self.prior, texts, rows, seeds, str(self.device)).to(self.device)


def load(
    dir_or_hub_id: Path | str, *, encoder: str | None = None, device: str | None = None, precision: str = "fp32"
) -> TextToImagePrior:
    """Load a prior with the encoder that it reads, from a directory or from the hub by its id (owner/name).

    encoder: an open_clip name with its tag (`ViT-L-14/openai`), `hf-hub:…`, `local-dir:…`, or a preset's name; None:
    what the export's eclipse.json names, and for ECLIPSE's own priors, which have none, the encoder of their
    dimension. device: None: the GPU if there is one. precision: of the encoder, fp32, bf16 or fp16.

    Raises:
        UsageError: nothing says which encoder. EclipseError: prior or encoder cannot be had or read, or the encoder's
            weights are not those that the prior was trained on.
    """
    name, device = str(dir_or_hub_id), device or pick_device()
    directory = export.find(dir_or_hub_id)
    record = export.read_record(directory)
    prior = load_prior(directory, device)
    model, pretrained = _encoder(prior, record, directory, encoder, from_hub=not Path(dir_or_hub_id).is_dir())
    loaded = Encoder.load(resolve(model), pretrained, precision=precision, device=device)
    known = record.encoder_fingerprint if record is not None else None
    if known is not None and loaded.fingerprint != known:
        raise EclipseError(
            f"{model} has other weights than the encoder that this prior was trained on",
            where=name,
            hint="name the right one: eclipse.load(…, encoder=…)",
        )
    return TextToImagePrior(prior, loaded, name, record)


def _encoder(
    prior: Any, record: export.Record | None, directory: Path, named: str | None, *, from_hub: bool
) -> tuple[str, str | None]:
    """Name and tag of the encoder: what the caller names, the record, or the published one of this dimension."""
    if named is not None:
        model, _, tag = named.partition("/") if not named.startswith(("hf-hub:", export.LOCAL)) else (named, "", "")
        return model, tag or None
    if record is not None:
        return export.trusted_encoder(record, directory, from_hub=from_hub), record.pretrained
    dim = prior.config.embedding_dim
    if dim in PUBLISHED_ENCODERS:
        return PUBLISHED_ENCODERS[dim], None
    raise UsageError(
        f"nothing says which encoder this prior of {dim} dimensions reads: there is no {export.RECORD}",
        where=str(directory),
        hint='name it: eclipse.load(…, encoder="ViT-L-14/openai"), or "local-dir:…"',
    )
