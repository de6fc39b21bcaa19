"""Scenes of the world → CLIP features → embedding parts, without a download. Called by `trial`.

The parts are those of any workspace: the ordinary trainer reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from ..pipeline.cache.part import PartMeta, PartWriter, part_name
from ..pipeline.core.files import atomic_path
from ..pipeline.core.progress import Progress
from ..pipeline.embed.clip import Encoder
from ..pipeline.images.decode import thumbnail, uid_of
from .drawing import draw
from .shapes import IMAGE_SIZE, Scene

BATCH = 250


@dataclass(frozen=True)
class Features:
    """n pairs. image, text: (n, D) float16 raw CLIP embeddings; states: (N, W) float16, captions end to end;
    n_tokens: (n,) int64; thumbnails: (n, 256) uint8; digests: SHA-256 of each picture's pixels.
    """

    captions: list[str]
    digests: list[bytes]
    thumbnails: np.ndarray
    image: np.ndarray
    text: np.ndarray
    states: np.ndarray
    n_tokens: np.ndarray

    def dealt_again(self, seed: int) -> Features:
        """The same pictures and captions, each picture now beside a caption drawn at random from all."""
        order = np.random.default_rng([seed, 23]).permutation(len(self.captions))
        digests = [self.digests[i] for i in order]
        return replace(self, digests=digests, thumbnails=self.thumbnails[order], image=self.image[order])


def encode_pairs(encoder: Encoder, scenes: list[Scene], captions: list[str], progress: Progress) -> Features:
    """Features of these scenes and captions, shortest caption first: a batch is padded to its longest only."""
    n_tokens = encoder.tokenize(captions)[1].numpy()
    order = np.argsort(n_tokens, kind="stable")
    batches: list[tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    with progress.task("draw and encode", len(scenes), "pairs") as task:
        for start in range(0, len(scenes), BATCH):
            rows = order[start : start + BATCH]
            batches.append(_encode(encoder, [scenes[i] for i in rows], [captions[i] for i in rows]))
            task.advance(len(rows))
    digests, *arrays = zip(*batches, strict=True)
    thumbnails, image, text, states = (np.concatenate(array) for array in arrays)
    in_order = [captions[i] for i in order]
    return Features(in_order, [d for some in digests for d in some], thumbnails, image, text, states, n_tokens[order])


def _encode(
    encoder: Encoder, scenes: list[Scene], captions: list[str]
) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    pictures = draw(scenes)
    images = [Image.fromarray(picture) for picture in pictures]
    text = encoder.encode_text(*encoder.tokenize(captions))
    image = encoder.encode_images(np.stack([encoder.preprocess(each) for each in images]))
    half = [tensor.half().cpu().numpy() for tensor in (image, text.embedding, text.states)]
    digests = [hashlib.sha256(picture.tobytes()).digest() for picture in pictures]
    return digests, np.stack([thumbnail(each) for each in images]), half[0], half[1], half[2]


def write_cache(folder: Path, parts: Sequence[Features], encoder: Encoder, *, model: str, made_from: str) -> None:
    """Write one embedding part for each of `parts` into `folder`, whole or not at all. made_from: what names them."""
    meta = PartMeta(
        encoder=model,
        encoder_fingerprint=encoder.fingerprint,
        preprocessing=encoder.preprocessing,
        precision=encoder.precision,
        embedding_dim=encoder.embedding_dim,
        text_width=encoder.text_width,
        card=made_from,
    )
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for number, features in enumerate(parts):
            with PartWriter(temporary / part_name(number), meta) as writer:
                writer.write(_columns(features))


def write_selection(path: Path, rows: int) -> None:
    """A selection that keeps every row of a cache of one part."""
    table = pa.table({"part": np.zeros(rows, np.int32), "row": np.arange(rows, dtype=np.int32), "keep": [True] * rows})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def _columns(features: Features) -> dict[str, np.ndarray | list]:
    n = len(features.captions)
    image, text = (torch.from_numpy(x).float() for x in (features.image, features.text))
    return {
        "uid": [uid_of(d, c) for d, c in zip(features.digests, features.captions, strict=True)],
        "key": [f"{row:09d}" for row in range(n)],
        "url": [""] * n,
        "caption": features.captions,
        "image_sha256": features.digests,
        "thumbnail": features.thumbnails,
        "width": np.full(n, IMAGE_SIZE, np.int32),
        "height": np.full(n, IMAGE_SIZE, np.int32),
        "image_embedding": features.image,
        "text_embedding": features.text,
        "n_tokens": features.n_tokens,
        "text_states": features.states,
        "clip_score": F.cosine_similarity(image, text).numpy(),
    }
