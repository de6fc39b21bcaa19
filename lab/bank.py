"""What is drawn while a GPU trains, encoded and kept there in buffers of fixed size that fill up. Of `build_further`.

A captured graph reads `filled` anew at every replay, and so draws from all that has arrived by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipeline.embed.clip import Encoder
from .build_movq import encode as to_latents
from .build_unet import RETOLD
from .decoder_steps import Examples, Rows
from .ensemble import LENGTHS, Pairs
from .scene_stream import MOST_CAPTIONS, Drawn

# Room for each length class, in captions a picture of MOST_CAPTIONS at most; about a tenth more than come.
_ROOM = (0.56, 0.31, 0.12, 0.07)
_CHUNK = 8192  # captions encoded at once


def padded_states(
    encoder: Encoder, ids: np.ndarray, n_tokens: np.ndarray, longest: int, device: str
) -> tuple[Tensor, Tensor]:
    """Pooled (n, D) and token states (n, longest, W), both float16 and zero after the end, of n ids (n, ≥longest)."""
    pooled = torch.empty(len(ids), encoder.embedding_dim, dtype=torch.float16, device=device)
    states = torch.zeros(len(ids), longest, encoder.text_width, dtype=torch.float16, device=device)
    for start in range(0, len(ids), _CHUNK):
        own = n_tokens[start : start + _CHUNK].astype(np.int64)
        tokens = torch.from_numpy(ids[start : start + _CHUNK, :longest].astype(np.int64))
        found = encoder.encode_text(tokens, torch.from_numpy(own))
        pooled[start : start + _CHUNK] = found.embedding.half()
        real = np.flatnonzero(np.arange(longest) < own[:, None])
        flat = states[start : start + _CHUNK].flatten(0, 1)
        flat.index_copy_(0, torch.from_numpy(real).to(device), found.states.half())
    return pooled, states


@dataclass(frozen=True)
class EncodedClass:
    """Captions of one length class: text (n, D), states (n, L, W) float16; lengths, picture, column (n,)."""

    text: Tensor
    states: Tensor
    lengths: np.ndarray
    picture: np.ndarray
    column: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """image (P, D) float16 of the pictures of some blocks, and their captions by length class."""

    image: Tensor
    classes: list[EncodedClass]


@torch.inference_mode()
def encoded(encoder: Encoder, blocks: Sequence[Drawn], device: str) -> Encoded:
    """Pictures and captions of blocks of kind "train"."""
    ids, n_tokens = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("ids", "n_tokens"))
    image = encoder.encode_images(np.concatenate([block.pixels for block in blocks])).half()
    classes = []
    for c, longest in enumerate(LENGTHS):
        rows, column = np.nonzero((n_tokens > (LENGTHS[c - 1] if c else 0)) & (n_tokens <= longest))
        own = n_tokens[rows, column]
        text, states = padded_states(encoder, ids[rows, column], own, longest, device)
        classes.append(EncodedClass(text, states, own, rows, column))
    return Encoded(image, classes)


class PairBank:
    """Pairs of the scenes 0, 1, … of the train split: `pairs`, and `column[c]` (n,) int64, which caption of its picture
    each is. pictures: how many are there.
    """

    def __init__(self, encoder: Encoder, room: int, device: str) -> None:
        self.encoder, self.device, self.pictures = encoder, device, 0
        sizes = [round(room * MOST_CAPTIONS * share) + 64 for share in _ROOM]

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.counts = [0] * len(sizes)
        self.column = [zeros(n, dtype=torch.int64) for n in sizes]
        self.pairs = Pairs(
            image=zeros(room, encoder.embedding_dim),
            text=[zeros(n, encoder.embedding_dim) for n in sizes],
            states=[zeros(n, longest, encoder.text_width) for n, longest in zip(sizes, LENGTHS, strict=True)],
            lengths=[zeros(n, dtype=torch.int64) for n in sizes],
            picture=[zeros(n, dtype=torch.int64) for n in sizes],
            filled=zeros(len(sizes), dtype=torch.int64),
        )

    @property
    def room(self) -> int:
        """For how many more pictures."""
        return len(self.pairs.image) - self.pictures

    def add(self, blocks: Sequence[Drawn]) -> None:
        """Encode pictures and captions behind those that are there; what finds no room is left out."""
        self.put(encoded(self.encoder, blocks, self.device))

    @torch.inference_mode()
    def put(self, found: Encoded) -> None:
        """What is encoded already."""
        pairs, first = self.pairs, self.pictures
        image = found.image[: self.room]
        pairs.image[first : first + len(image)] = image
        for c, some in enumerate(found.classes):
            # Rows come in the order of their pictures.
            fits = int(np.searchsorted(some.picture, len(image)))
            start, stop = self.counts[c], min(self.counts[c] + fits, len(pairs.text[c]))
            n = stop - start
            pairs.text[c][start:stop], pairs.states[c][start:stop] = some.text[:n], some.states[:n]
            numbers = (
                (pairs.lengths, some.lengths), (pairs.picture, some.picture + first), (self.column, some.column),
            )  # fmt: skip
            for buffer, values in numbers:
                buffer[c][start:stop] = torch.from_numpy(values[:n].astype(np.int64)).to(self.device)
            self.counts[c] = stop
        pairs.filled.copy_(torch.tensor(self.counts))
        self.pictures += len(image)

    def usable(self, pictures: int, captions: int, longest: int) -> list[Tensor]:
        """Rows of each class: of the first so many pictures, so many captions each, of at most so many tokens."""
        rows = []
        for c, n in enumerate(self.counts):
            fits = (self.pairs.picture[c][:n] < pictures) & (self.column[c][:n] < captions)
            rows.append((fits & (self.pairs.lengths[c][:n] <= longest)).nonzero().flatten())
        return rows


class ExampleBank:
    """Examples of the scenes 0, 1, … of the `any` split for both halves of the decoder: `examples`, and `pixels`
    (N, 64, 64, 3) uint8. pictures, retold: how many scenes are there, and how many of them with other tellings.
    """

    def __init__(self, encoder: Encoder, movq: Any, negative: Tensor, room: int, retold: int, device: str) -> None:
        self.encoder, self.movq, self.device, self.pictures, self.retold = encoder, movq, device, 0, 0

        def half(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float16, device=device)

        def rows(count: int, *, counted: bool = False) -> Rows:
            numbers = torch.arange(count, device=device) * int(counted)
            return Rows(numbers, torch.zeros((), device=device))

        width = encoder.embedding_dim
        self.pixels = torch.zeros(room, 64, 64, 3, dtype=torch.uint8, device=device)
        self.examples = Examples(
            latents=half(room, 4, 16, 16), embedding=half(room, width), retold=half(retold, RETOLD, width),
            retold_of=torch.arange(room, device=device), every=rows(room, counted=True), crowded=rows(room),
            told=rows(retold, counted=True), told_crowded=rows(retold), negative=negative.to(device),
            spread=torch.ones(width, device=device),
        )  # fmt: skip
        self._crowded: list[int] = []
        self._told_crowded: list[int] = []

    @torch.inference_mode()
    def add(self, blocks: Sequence[Drawn]) -> None:
        """Blocks of kind "any", scene after scene, or of kind "retold", whose scenes are there as "any" already."""
        for block in blocks:
            if block.order.kind == "any":
                self._add_pictures(block)
            else:
                self._add_retold(block)

    def _add_pictures(self, block: Drawn) -> None:
        examples, start = self.examples, self.pictures
        pixels = torch.from_numpy(block.pixels[: len(self.pixels) - start]).to(self.device)
        stop = start + len(pixels)
        floats = pixels.permute(0, 3, 1, 2).float() / 255
        self.pixels[start:stop] = pixels
        examples.latents[start:stop] = to_latents(
            self.movq, floats.contiguous(memory_format=torch.channels_last)
        ).half()
        examples.embedding[start:stop] = self.encoder.encode_images(pixels).half()
        if not start:
            examples.spread.copy_(examples.embedding[:stop].float().std(0))
        self._append(examples.crowded, self._crowded, start + np.flatnonzero(block.crowded[: len(pixels)]))
        examples.every.filled.fill_(stop)
        self.pictures = stop

    def _add_retold(self, block: Drawn) -> None:
        examples, start = self.examples, self.retold
        told = self.encoder.encode_images(block.pixels).half().unflatten(0, (-1, RETOLD))
        told = told[: len(examples.retold) - start]
        stop = start + len(told)
        examples.retold[start:stop] = told
        self._append(examples.told_crowded, self._told_crowded, start + np.flatnonzero(block.crowded[: len(told)]))
        examples.told.filled.fill_(stop)
        self.retold = stop

    def _append(self, rows: Rows, known: list[int], more: np.ndarray) -> None:
        rows.numbers[len(known) : len(known) + len(more)] = torch.from_numpy(more.astype(np.int64)).to(self.device)
        known += more.tolist()
        rows.filled.fill_(len(known))
