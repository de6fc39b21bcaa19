"""The shapes world's prompts for `eclipse render`, and what its checker says of pictures. Found by the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..decode.prompts import Prompt, Verdict
from .checker import judge, read
from .shapes import CATEGORIES, IMAGE_SIZE, World

if TYPE_CHECKING:
    from PIL import Image

    from ..pipeline.core.card import Card
from ..pipeline.core.source import ShapesSource


def default_prompts(card: Card, per_category: int) -> list[Prompt]:
    """`per_category` prompts in each category and split of the card's world, with what they ask for."""
    source = card.source
    assert isinstance(source, ShapesSource)
    world = World(source.seed, source.held_out)
    found = [
        prompt
        for category in CATEGORIES
        for split in ("seen", "unseen")
        for prompt in world.prompts(category, per_category, split)
    ]
    return [
        Prompt(p.text, f"{i:05d}", {"prompt": p.text, "tag": p.category, "split": p.split}, p.category, p.split, p)
        for i, p in enumerate(found)
    ]


def judge_picture(picture: Image.Image, prompt: Prompt) -> Verdict | None:
    """Whether the picture shows what the prompt asks for, read from its pixels; None for prompts of anybody else."""
    if prompt.wanted is None:
        return None
    verdict = judge(read(np.asarray(picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))), prompt.wanted)
    facts = tuple((fact.asked if fact.right else f"{fact.asked}: {fact.seen}", fact.right) for fact in verdict.facts)
    return Verdict(verdict.all_right, facts)
