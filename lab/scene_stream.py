"""Draws scenes in many processes and encodes them on a device as they come, for training on far more pictures than are
ever stored. Called by `build_further`.

Workers draw, caption and tokenise (numpy alone); the caller's process encodes. What is kept of a picture is what a
training reads: its embedding, its latents, its captions' token ids.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Set
from dataclasses import dataclass
from multiprocessing.pool import IMapIterator, Pool
from typing import Literal

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer

from ..pipeline.embed.tokens import CaptionTokenizer
from .build_unet import RETOLD
from .captions import fitting_categories, open_categories
from .drawing import draw
from .shapes import Scene, World

BLOCK = 500
MOST_CAPTIONS = 5  # a picture, of different categories, all different: as many as a picture of COCO has
MOST_TOKENS = 56
_CONTEXT = 77
_CAPTIONS, _RETELLING = 31, 26  # streams of the seed


@dataclass(frozen=True)
class Order:
    """A block to draw. kind: "train", scenes with captions; "any", scenes of all compositions; "retold", RETOLD others
    for each scene of the `any` split that share a caption with it.
    """

    kind: Literal["train", "any", "retold"]
    first: int
    count: int


@dataclass(frozen=True)
class Drawn:
    """pixels (n, 64, 64, 3) uint8, for "retold" RETOLD rows per scene; crowded (n,) bool: three or four objects;
    ids (n, MOST_CAPTIONS, MOST_TOKENS) uint16 and n_tokens (n, MOST_CAPTIONS) uint8, 0 where there is no caption: for
    "train" alone.
    """

    order: Order
    pixels: np.ndarray
    crowded: np.ndarray
    ids: np.ndarray | None = None
    n_tokens: np.ndarray | None = None


def captions_of(world: World, scene: Scene, index: int) -> list[str]:
    """Up to five different captions of scene number `index` of the train split, in categories drawn at random."""
    rng = np.random.default_rng([world.seed, _CAPTIONS, index])
    fitting = fitting_categories(scene)
    chosen = [fitting[i] for i in rng.permutation(len(fitting))[:MOST_CAPTIONS]]
    return list(dict.fromkeys(world.caption(scene, rng, category) for category in chosen))


_WORLD: World
_TOKENIZER: CaptionTokenizer
_WITHOUT: Set[str]


def workers(world: World, processes: int, without: Set[str] = frozenset()) -> Pool:
    """Processes that draw. Start them before anything runs on a GPU: they are forked, which is quick.

    without: texts that no caption may be, such as the prompts of an evaluation.
    """
    prepare(world, without)
    return multiprocessing.get_context("fork").Pool(processes)


def prepare(world: World, without: Set[str]) -> None:
    """Make this process one that draws."""
    global _WORLD, _TOKENIZER, _WITHOUT
    _WORLD, _TOKENIZER, _WITHOUT = world, CaptionTokenizer(SimpleTokenizer(), _CONTEXT), without
    _ = world.held_out_pairs
    torch.set_num_threads(1)


def stream(pool: Pool, orders: Iterable[Order]) -> IMapIterator[Drawn]:
    """The blocks in their order; its `next` takes a timeout."""
    return pool.imap(draw_block, orders)


def draw_block(order: Order) -> Drawn:
    """Draw one block, in a process that is prepared for it."""
    split = "train" if order.kind == "train" else "any"
    indices = range(order.first, order.first + order.count)
    scenes = [_WORLD.scene(i, split) for i in indices]
    crowded = np.array([len(scene.things) > 2 for scene in scenes])
    if order.kind == "retold":
        told = []
        for index, scene in zip(indices, scenes, strict=True):
            rng = np.random.default_rng([_WORLD.seed, _RETELLING, index])
            fitting = open_categories(scene)
            category = fitting[int(rng.integers(len(fitting)))]
            told += [_WORLD.retold(scene, category, rng) for _ in range(RETOLD)]
        return Drawn(order, draw(told), crowded)
    pixels = draw(scenes)
    if order.kind == "any":
        return Drawn(order, pixels, crowded)
    captions = [
        [caption for caption in captions_of(_WORLD, scene, i) if caption not in _WITHOUT]
        for i, scene in zip(indices, scenes, strict=True)
    ]
    tokens = _TOKENIZER([caption for some in captions for caption in some])
    counts = [len(some) for some in captions]
    ids = np.zeros((order.count, MOST_CAPTIONS, MOST_TOKENS), np.uint16)
    n_tokens = np.zeros((order.count, MOST_CAPTIONS), np.uint8)
    there = np.arange(MOST_CAPTIONS) < np.array(counts)[:, None]
    ids[there] = tokens.ids.numpy()[:, :MOST_TOKENS]
    n_tokens[there] = tokens.n_tokens.numpy()
    return Drawn(order, pixels, crowded, ids, n_tokens)
