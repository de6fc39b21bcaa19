"""Texts → text features → image embeddings: what comes before a decoder. Called by `render` and the lab's scorer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..pipeline.cache.packed_text import TextFeatures
from ..pipeline.core.errors import EclipseError
from ..pipeline.core.files import atomic_path
from ..pipeline.core.seeds import stream_seed
from .decoder import Unconditional
from .job import TEXT_PRIOR

if TYPE_CHECKING:
    from ..pipeline.core.card import Card
    from ..pipeline.core.progress import Progress
    from ..pipeline.core.workspace import Workspace
    from ..pipeline.embed.clip import Encoder
    from ..trainer.model.diffusion import DiffusionPrior
    from ..trainer.model.prior import Prior

CHUNK = 256


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(card: Card, device: str) -> Encoder:
    """The card's CLIP."""
    from ..pipeline.core.card import resolve
    from ..pipeline.embed.clip import Encoder

    section = card.encoder
    return Encoder.load(resolve(section.model), section.pretrained, precision=section.precision, device=device)


def encode_texts(encoder: Encoder, texts: Sequence[str], progress: Progress) -> TextFeatures:
    """Text features of every text, in order, on the encoder's device."""
    features: list[TextFeatures] = []
    with progress.task("encode", len(texts), "prompts") as task:
        for start in range(0, len(texts), CHUNK):
            features.append(encoder.encode_text(*encoder.tokenize(texts[start : start + CHUNK])))
            task.advance(len(features[-1]))
    return TextFeatures.concatenated(features)


def predict(
    prior: str | Prior | DiffusionPrior, texts: TextFeatures, rows: Sequence[int], seeds: Sequence[int], device: str
) -> torch.Tensor:
    """Image embeddings (len(rows), D) float32 on the CPU for the captions in `rows`, one seed each.

    prior: a directory or hub id in the published format, a loaded one, or "text".

    Raises:
        EclipseError: the prior cannot be read, or was made for another encoder.
    """
    index = torch.as_tensor(list(rows))
    if prior == TEXT_PRIOR:
        return texts.embedding.cpu()[index]
    from ..trainer.model.prior import load_prior, sample

    model = load_prior(prior, device=device) if isinstance(prior, str) else prior
    dim = texts.embedding.shape[1]
    if model.config.embedding_dim != dim:
        raise EclipseError(
            f"the prior has embedding dim {model.config.embedding_dim}, the card's encoder {dim}",
            where=prior if isinstance(prior, str) else None,
            hint="name a prior trained on this encoder's features",
        )
    predicted = []
    for start in range(0, len(rows), CHUNK):
        text = texts.select(index[start : start + CHUNK])
        # A decoder draws its latents from the bare seed, as stock diffusers does: the prior needs a stream of its own.
        noise_seeds = [stream_seed("prior noise", seed) for seed in seeds[start : start + CHUNK]]
        embedding = sample(model, text.embedding, text, seed=noise_seeds)
        predicted.append(embedding.float().cpu())
    return torch.cat(predicted)


def unconditional(ws: Workspace, encoder: Encoder, decoder_kind: str, progress: Progress) -> Unconditional:
    """What guidance contrasts with, from the card's encoder; the image embedding is kept in the workspace."""
    if decoder_kind == "karlo":
        return Unconditional(caption=encode_texts(encoder, [""], progress))
    file = ws.renders / f"negative-image-embedding-{encoder.fingerprint[:16]}.safetensors"
    embedding = _read_kept(file)
    if embedding is None:
        from safetensors.torch import save_file

        size = encoder.image_size
        embedding = encoder.encode_images(torch.zeros(1, 3, size, size))[0].cpu().contiguous()
        with atomic_path(file) as temporary:
            save_file({"negative_image_embedding": embedding, "crc32": _crc32(embedding)}, temporary)
    return Unconditional(image_embedding=embedding)


def _read_kept(file: Path) -> torch.Tensor | None:
    """What an earlier call kept, None if it is not there or no longer what was written: it is made again then."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(file)
        embedding = kept["negative_image_embedding"]
        return embedding if torch.equal(kept["crc32"], _crc32(embedding)) else None
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError):
        return None


def _crc32(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(zlib.crc32(tensor.numpy().tobytes()))
