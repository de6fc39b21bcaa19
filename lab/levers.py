"""The levers of the five-minute prior and their values, each tried under several seeds. Called by `build_further`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..trainer.model.prior import PRESETS, PriorConfig
from .ensemble import LENGTHS, Settings

SEEDS = (0, 1, 2)
PICTURES = 12_600  # what the filter leaves of the embedded card's list


@dataclass(frozen=True)
class Lever:
    """pictures: distinct ones; captions: of each at most; longest: captions of more tokens are left out."""

    name: str
    settings: Settings
    config: PriorConfig = PRESETS["tiny"]
    pictures: int = PICTURES
    captions: int = 5
    longest: int = LENGTHS[-1]


BASE = Settings(2000)  # the card's when they were tried


def shape(layers: int, heads: int) -> PriorConfig:
    return PriorConfig(128, num_layers=layers, num_attention_heads=heads)


def levers(scale: float = 1.0) -> list[Lever]:
    """In the order in which they are tried. scale: of steps and pictures, for a rehearsal."""

    def some(name: str, *, config: PriorConfig = PRESETS["tiny"], pictures: int = PICTURES, captions: int = 5,
             longest: int = LENGTHS[-1], **changes: Any) -> Lever:  # fmt: skip
        return Lever(name, replace(BASE, **changes), config, pictures, captions, longest)

    small = PRESETS["small"]
    found = [
        some("base"),
        some("captions 1", captions=1),
        some("steps 4000", steps=4000),
        some("steps 8000", steps=8000),
        some("lr 1e-2", learning_rate=1e-2),
        some("lr 2e-2", learning_rate=2e-2),
        some("contrastive 0.05", contrastive_weight=0.05),
        some("contrastive 0", contrastive_weight=0.0),
        some("layers 4 width 128", config=shape(4, 4)),
        some("layers 4 width 128, steps 4000", config=shape(4, 4), steps=4000),
        some("small, steps 4000, batch 128", config=small, steps=4000, batch_size=128),
        some("ema 0.995", ema=0.995),
        some("batch 32, steps 4000", batch_size=32, steps=4000),
        some("longest 37", longest=37),
        some("longest 21", longest=21),
        some("contrastive 0.5", contrastive_weight=0.5),
        some("lr 3e-3", learning_rate=3e-3),
        some("adamw 1e-3", optimizer="adamw", learning_rate=1e-3),
        some("adamw 3e-3", optimizer="adamw", learning_rate=3e-3),
        some("layers 4 width 96", config=shape(4, 3)),
        some("layers 6 width 96", config=shape(6, 3)),
        some("layers 2 width 192", config=shape(2, 6)),
        some("small, steps 2000", config=small),
        some("small, steps 4000", config=small, steps=4000),
        some("batch 128", batch_size=128),
        some("batch 256", batch_size=256),
        some("ema 0.95", ema=0.95),
        some("ema 0.99", ema=0.99),
        some("captions 2", captions=2),
        some("captions 3", captions=3),
        some("pictures 25000, steps 4000", pictures=25_000, steps=4000),
        some("pictures 50000, steps 4000", pictures=50_000, steps=4000),
        some("pictures 100000, steps 8000", pictures=100_000, steps=8000),
        some("pictures 6300, steps 4000", pictures=6_300, steps=4000),
        some("small, pictures 100000, steps 8000", config=small, pictures=100_000, steps=8000),
        some("small, steps 8000", config=small, steps=8000),
        some("steps 1000", steps=1000),
        some("steps 16000", steps=16_000),
        some("pictures 100000, steps 16000", pictures=100_000, steps=16_000),
        some("small, pictures 100000, steps 16000", config=small, pictures=100_000, steps=16_000),
        some("temperature 0.03", temperature=0.03),
        some("warmup 200", warmup=200),
        some("weight decay 0.1", weight_decay=0.1),
        some("batch 16, steps 8000", batch_size=16, steps=8000),
    ]  # fmt: skip
    return [scaled(lever, scale) for lever in found]


def scaled(lever: Lever, scale: float) -> Lever:
    """With a share of its steps and pictures."""
    settings = replace(lever.settings, steps=max(1, round(lever.settings.steps * scale)))
    return replace(lever, settings=settings, pictures=max(1, round(lever.pictures * scale)))


# Alternatives of one lever at the same number of steps and pairs: the best of each is combined with the others'.
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "learning rate": {
        "base": {}, "lr 3e-3": {"learning_rate": 3e-3}, "lr 1e-2": {"learning_rate": 1e-2},
        "lr 2e-2": {"learning_rate": 2e-2},
    },
    "contrastive": {
        "base": {}, "contrastive 0": {"contrastive_weight": 0.0}, "contrastive 0.05": {"contrastive_weight": 0.05},
        "contrastive 0.5": {"contrastive_weight": 0.5},
    },
    "ema": {"base": {}, "ema 0.95": {"ema": 0.95}, "ema 0.99": {"ema": 0.99}, "ema 0.995": {"ema": 0.995}},
}  # fmt: skip


def combined(results: Mapping[str, Mapping[str, Any]], scale: float = 1.0) -> list[Lever]:
    """The best of each choice together, by the mean accuracy on seen compositions, in a few sizes."""

    def accuracy(name: str) -> float:
        found = results.get(name, {}).values()
        return float(np.mean([table["mean"]["seen"] for table in found])) if found else 0.0

    chosen: dict[str, Any] = {}
    for choices in CHOICES.values():
        chosen |= choices[max(choices, key=accuracy)]
    best = replace(BASE, **chosen)
    said = ", ".join(f"{k} {v}" for k, v in chosen.items()) or "base"
    sizes = [("tiny", PRESETS["tiny"]), ("layers 4 width 128", shape(4, 4)), ("layers 6 width 96", shape(6, 3))]
    found = [
        Lever(f"combined ({said}), {name}, batch {batch}, steps {steps}, longest {longest}",
              replace(best, steps=steps, batch_size=batch), config, PICTURES, 5, longest)
        for steps, batch in ((2000, 64), (4000, 32), (4000, 64)) for name, config in sizes for longest in (53, 37)
    ]  # fmt: skip
    return [scaled(lever, scale) for lever in found]
