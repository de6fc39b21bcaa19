"""The ECLIPSE prior: text features and noise in, CLIP image embedding out; reads and writes the published format.

Called by steps.py, evaluate.py, decode/render.py and the lab.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...pipeline.core import hub
from ...pipeline.core.errors import EclipseError
from ...pipeline.core.files import atomic_path, write_json
from .transformer import PackedText, PriorConfig, PriorTransformer, like

if TYPE_CHECKING:
    from .diffusion import DiffusionPrior

__all__ = ["PRESETS", "PackedText", "Prior", "PriorConfig", "load_prior", "sample", "save_prior"]

PRESETS = {
    "tiny": PriorConfig(128, num_layers=2, num_attention_heads=4),
    "small": PriorConfig(128, num_layers=4, num_attention_heads=8),
    "karlo": PriorConfig(768),  # published, 33,143,040 parameters
    "kandinsky22": PriorConfig(1280),  # published, 34,193,152 parameters
    # The paper's scaled variant has 89 M parameters and no dimensions: these, 89,056,512 parameters, are ours.
    "large": PriorConfig(1280, num_layers=12, num_attention_heads=24),
}


class Prior(PriorTransformer):
    """The ECLIPSE prior (arXiv 2312.04655): one pass, no time embedding."""

    specials = 3

    def forward(self, noise: Tensor, text_embedding: Tensor, text: PackedText) -> Tensor:
        """noise (B, D) ~ N(0, I), text_embedding (B, D), text of B captions → raw CLIP image embedding (B, D).

        noise (B, K, D): K draws per caption, for little more than one → (B, K, D). In bins: as many as they are for.
        """
        noise, text_embedding = (like(x, self.prd_embedding) for x in (noise, text_embedding))
        # These three stand at positions 77, 78 and 79 however short the caption is, as in the published network, which
        # pads it to 77. Attention is causal and nothing attends to padding, so leaving the padding out changes no
        # result; taking positions from the packed length instead of 77 would. Only the last token sees all others:
        # the prediction is read there.
        prd = self.prd_embedding[0].expand(*noise.shape[:-1], -1)
        return self.run([self.embedding_proj(text_embedding), self.proj_in(noise), prd], text).view(noise.shape)

    def generate(self, noise: Tensor, text_embedding: Tensor, text: PackedText) -> Tensor:
        """One pass; the method `sample` calls on either kind of prior."""
        return self(noise, text_embedding, text)


class ControlPrior(Prior):
    """λ-ECLIPSE's prior (arXiv 2402.05195): ECLIPSE's with a control token. It is read; nothing trains one here.

    One pass like `Prior`, steered by a picture: in λ-ECLIPSE the CLIP image embedding of a Canny edge map. As in its
    authors' inference code, one more linear layer makes a token that stands between the text's token states and the
    pooled text embedding: 77 + 4 positions, 34,849,536 parameters. What is not here is the rest of their method: the
    states of a subject's word replaced by a picture's embedding.
    """

    specials = 4

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.embedding_control = nn.Linear(config.embedding_dim, config.width)

    def forward(self, noise: Tensor, text_embedding: Tensor, text: PackedText, control: Tensor | None = None) -> Tensor:
        """noise, text_embedding, control (B, D), text of B captions → raw CLIP image embedding (B, D).

        control None: an all-zero embedding, which leaves the layer's bias. The published code always passes one and
        names no default for pictures without control, so this choice is ours.
        """
        control = torch.zeros_like(text_embedding) if control is None else control
        noise, text_embedding, control = (like(x, self.prd_embedding) for x in (noise, text_embedding, control))
        prd = self.prd_embedding[0].expand(len(noise), -1)
        specials = [self.embedding_control(control), self.embedding_proj(text_embedding), self.proj_in(noise), prd]
        return self.run(specials, text)


@torch.no_grad()
def sample(
    prior: Prior | DiffusionPrior,
    text_embedding: Tensor,
    text: PackedText,
    *,
    seed: int | Sequence[int],
    draws: int | None = None,
) -> Tensor:
    """Image embeddings (B, D) float32 for B captions, from seeded noise ~ N(0, I).

    An int seeds the batch as a whole. With one seed a caption, a caption's noise does not depend on its neighbours.
    Noise is drawn on the CPU, so that every device sees the same.

    draws: several a caption → (B, draws, D), the first of them the one that is made without this. A one-pass prior
    makes them on one reading of the caption; of the diffusion baseline each is a sampling of its own.
    """
    count, dim = text_embedding.shape
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.stack([torch.randn(count, dim, generator=generator) for _ in range(draws or 1)], dim=1)
    else:
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} captions")
        generators = [torch.Generator().manual_seed(int(each)) for each in seed]
        # One by one: the first of several numbers drawn at once are not those that fewer would be.
        each_draw = [torch.stack([torch.randn(dim, generator=g) for g in generators]) for _ in range(draws or 1)]
        noise = torch.stack(each_draw, dim=1)
    device = prior.prd_embedding.device
    noise, text_embedding, text = noise.to(device), text_embedding.to(device), text.to(device)
    if draws is None:
        return prior.generate(noise[:, 0], text_embedding, text).float()
    if isinstance(prior, Prior):
        return prior.generate(noise, text_embedding, text).float()
    return torch.stack([prior.generate(each, text_embedding, text) for each in noise.unbind(1)], dim=1).float()


CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# The keys that are no dimension, as published. A reader accepts no other value: it would be another network.
FIXED = {
    "added_emb_type": "prd",
    "clip_embed_dim": None,
    "dropout": 0.0,
    "embedding_proj_dim": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "norm_in_type": None,
}
MOST_LAYERS, LARGEST_DIMENSION = 1_000, 65_536  # beyond any network of this class: a damaged file builds no giant
DIMENSIONS = tuple(PriorConfig.__dataclass_fields__)


def save_prior(prior: Prior | DiffusionPrior, directory: Path | str) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors (float32), as the published priors are.

    Each file appears whole or not at all; the config last, so that a directory with one is complete. EclipseError if
    a weight is not finite.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    header = {"_class_name": "PriorTransformer", "_diffusers_version": "0.20.2"}
    dimensions = {name: getattr(prior.config, name) for name in DIMENSIONS}
    tensors = {name: x.detach().to("cpu", torch.float32).contiguous() for name, x in prior.state_dict().items()}
    _check_finite(tensors, directory / WEIGHTS)
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(directory / CONFIG, dict(sorted({**header, **FIXED, **dimensions}.items())))
    # safetensors makes files that only their owner may read: these are for whoever may read the config.
    (directory / WEIGHTS).chmod((directory / CONFIG).stat().st_mode)


def load_prior(dir_or_hub_id: Path | str, device: torch.device | str = "cpu") -> Prior | DiffusionPrior:
    """Read a prior in the published format from a directory, or from the hub by its id (`owner/name`).

    A file with a time embedding is the diffusion baseline, one with `embedding_control` λ-ECLIPSE's prior. Raises
    EclipseError naming the file and what is wrong.
    """
    directory = _find(dir_or_hub_id)
    config = _read_config(directory / CONFIG)
    tensors = _read_tensors(directory / WEIGHTS)
    if any(name.startswith("time_embedding.") for name in tensors):
        from .diffusion import DiffusionPrior as Kind
    elif any(name.startswith("embedding_control.") for name in tensors):
        Kind = ControlPrior  # noqa: N806
    else:
        Kind = Prior  # noqa: N806
    if config.additional_embeddings != Kind.specials:
        raise EclipseError(
            f"additional_embeddings is {config.additional_embeddings}, but its tensors are those of a prior"
            f" with {Kind.specials}",
            where=str(directory / CONFIG),
            hint="config and weights are of two different priors: copy or download both again",
        )
    with torch.device("meta"):
        prior = Kind(config)
    _check_tensors(tensors, prior, directory / WEIGHTS)
    prior.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
    return prior.to(device).eval()


def _find(dir_or_hub_id: Path | str) -> Path:
    directory, name = Path(dir_or_hub_id), str(dir_or_hub_id)
    if directory.is_dir():
        return directory
    if isinstance(dir_or_hub_id, Path) or not hub.is_hub_id(name):
        raise EclipseError("no such prior", where=name, hint="name a directory, or a hub id such as owner/name")
    return hub.fetch(name, (CONFIG, WEIGHTS), what="prior", name_it="in place of the id")


def _read_config(path: Path) -> PriorConfig:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EclipseError(f"cannot read the prior's config: {error}", where=str(path)) from error
    if not isinstance(config, dict) or config.get("_class_name") != "PriorTransformer":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise EclipseError(
            f"not the config of a prior: _class_name is {found!r}, not 'PriorTransformer'", where=str(path)
        )
    dimensions = {}
    for name in DIMENSIONS:
        value, most = config.get(name), MOST_LAYERS if name == "num_layers" else LARGEST_DIMENSION
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            what = f"{name} is {str(value)[:40]}, not a whole number from 1 to {most:,}"
            raise EclipseError(what, where=str(path))
        dimensions[name] = value
    same = {"clip_embed_dim": dimensions["embedding_dim"], "embedding_proj_dim": dimensions["embedding_dim"]}
    for name, value in FIXED.items():
        if config.get(name, value) not in (value, same.get(name, value)):
            raise EclipseError(f"{name} is {config[name]!r}; only {value!r} is supported", where=str(path))
    return PriorConfig(**dimensions)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EclipseError(
            f"cannot read the prior's weights: {error}", where=str(path), hint="copy or download the file again"
        ) from error


def _check_tensors(tensors: dict[str, Tensor], prior: torch.nn.Module, path: Path) -> None:
    expected = prior.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise EclipseError(f"{len(missing)} tensors are missing, {missing[0]} among them", where=str(path))
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise EclipseError(f"{len(unknown)} tensors are unknown, {unknown[0]} among them", where=str(path))
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(tensor.shape)} as its config says"
            raise EclipseError(f"the shape of {name} is {shapes}", where=str(path))
    _check_finite(tensors, path)


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            hint = "a training that diverged: lower train.learning_rate and run `eclipse train --overwrite`"
            raise EclipseError(f"{name} holds numbers that are not finite", where=str(path), hint=hint)
