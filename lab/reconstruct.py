"""What the small models make of scenes: decoded from true image embeddings and from captions'. Called by `page`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..decode.conditioning import encode_texts, load_encoder, pick_device
from ..decode.decoder import Unconditional, load_decoder
from ..pipeline.core.card import Card, resolve
from ..pipeline.core.progress import Progress


@dataclass(frozen=True)
class Reconstructions:
    """uint8 (B, S, S, 3) each: from the picture's own embedding (the oracle), and from the raw text embedding."""

    oracle: np.ndarray
    text: np.ndarray


def models_of(card: Card) -> Path | None:
    """The folder of a card's CLIP if that and the decoder are local and there, else None."""
    clip = Path(resolve(card.encoder.model).removeprefix("local-dir:"))
    return clip if clip.is_dir() and Path(resolve(card.decoder.path)).is_dir() else None


def reconstruct(card: Card, pictures: np.ndarray, captions: list[str], progress: Progress) -> Reconstructions:
    """Decode uint8 (B, 64, 64, 3) pictures and their captions with the card's models; seed i for picture i."""
    device = pick_device()
    encoder = load_encoder(card, device)
    pixels = np.stack([encoder.preprocess(Image.fromarray(picture)) for picture in pictures])
    images = encoder.encode_images(pixels)
    texts = encode_texts(encoder, captions, progress).embedding
    nothing = encoder.encode_images(torch.zeros(1, 3, encoder.image_size, encoder.image_size))[0]
    decoder = load_decoder(
        card.decoder.kind,
        resolve(card.decoder.path),
        unconditional=Unconditional(image_embedding=nothing),
        image_size=card.decoder.image_size,
        scheduler=card.decoder.scheduler,
        device=device,
    )
    embeddings = torch.cat([images, texts.to(images)])
    seeds = [*range(len(pictures))] * 2
    decoded: list[np.ndarray] = []
    with progress.task("decode", len(embeddings), "pictures") as task:
        for start in range(0, len(embeddings), decoder.batch_size):
            batch = slice(start, start + decoder.batch_size)
            made = decoder.decode(
                embeddings[batch],
                seeds=seeds[batch],
                steps=card.decoder.steps,
                guidance_scale=card.decoder.guidance_scale,
            )
            decoded += [np.asarray(picture) for picture in made]
            task.advance(len(made))
    stacked = np.stack(decoded)
    return Reconstructions(stacked[: len(pictures)], stacked[len(pictures) :])
