"""Measures the lab's models on fresh scenes and writes their model card. Called by `build_models card`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Template
from torch import Tensor
from torch.nn import functional as F

from ..decode.conditioning import encode_texts, predict
from ..decode.decoder import Unconditional
from ..decode.layouts import picture_seed
from ..pipeline.core.card import Card
from ..pipeline.core.files import atomic_path, write_json
from ..pipeline.core.progress import Progress
from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import load_prior
from . import build_further, build_unet
from .checker import judge, read_all
from .score import FRESH, SPLITS, category_means, decode_pictures, encode_scenes
from .shapes import CATEGORIES, Prompt, Scene, World

ORACLE_TARGETS = {"color": 0.95, "shape": 0.95, "texture": 0.95, "spatial": 0.90, "numeracy": 0.90}
SCENES_A_MEAN = 24
MOVQ_BEFORE = 986  # steps on a GPU before those of further.json
TRAINED = ("clip", "movq", "refine", "unet", "unet-further", "unet-wide", "unet-crowded")  # whose logs the card quotes
Accuracies = dict[str, float]  # by category


@dataclass(frozen=True)
class Geometry:
    """How image and text embeddings lie to each other, measured on normalised embeddings."""

    matched_cosine: float
    mismatched_cosine: float
    modality_gap: float  # length of the difference of the two mean unit vectors
    caption_of_picture_r1: float
    picture_of_caption_r1: float
    scenes: int


def distinct_scenes(world: World, n: int) -> list[Scene]:
    """`n` fresh scenes no two of which have the same full caption."""
    found: dict[str, Scene] = {}
    index = FRESH
    while len(found) < n:
        scene = world.scene(index, "any")
        found.setdefault(world.full_caption(scene), scene)
        index += 1
    return list(found.values())


@torch.inference_mode()
def measure_geometry(encoder: Encoder, world: World, n: int = 1000) -> Geometry:
    """Matched cosine, modality gap and retrieval among `n` fresh scenes with full, distinct captions."""
    scenes = distinct_scenes(world, n)
    image, text = encode_scenes(encoder, scenes), embed_captions(encoder, [world.full_caption(s) for s in scenes])
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    similarity = image @ text.T
    own = torch.arange(n)
    off = (similarity.sum() - similarity.diag().sum()) / (n * (n - 1))
    return Geometry(
        matched_cosine=similarity.diag().mean().item(),
        mismatched_cosine=off.item(),
        modality_gap=(image.mean(0) - text.mean(0)).norm().item(),
        caption_of_picture_r1=(similarity.argmax(1) == own).float().mean().item(),
        picture_of_caption_r1=(similarity.argmax(0) == own).float().mean().item(),
        scenes=n,
    )


def embed_captions(encoder: Encoder, captions: list[str], batch: int = 250) -> Tensor:
    """Raw text embeddings (N, D)."""
    parts = [encoder.encode_text(*encoder.tokenize(captions[i : i + batch])) for i in range(0, len(captions), batch)]
    return torch.cat([part.embedding for part in parts])


def measure_decoder(
    encoder: Encoder, world: World, card: Card, reference: Path, each: int, progress: Progress
) -> dict[str, dict[str, Accuracies]]:
    """Accuracy, arm → split ("seen", "unseen", "all") → category, decoding true image embeddings (`oracle`), means over
    those of several scenes that fulfil the prompt (`mean`), text embeddings (`text`), and what the reference prior
    predicts (`reference`).
    """
    prompts = [p for c in CATEGORIES for split in ("seen", "unseen") for p in world.prompts(c, each, split)]
    texts = encode_texts(encoder, [p.text for p in prompts], progress)
    embeddings = {
        "oracle": encode_scenes(encoder, [world.scene_for(p) for p in prompts]),
        "mean": _mean_embeddings(encoder, world, prompts),
        "text": embed_captions(encoder, [p.text for p in prompts]),
    }
    seeds = [picture_seed(0, p.text, 0) for p in prompts]
    embeddings["reference"] = predict(str(reference), texts, range(len(prompts)), seeds, "cpu")
    pictures = decode_pictures(card, embeddings, texts, seeds, Unconditional(), "cpu", progress)
    found = {}
    for arm, shown in pictures.items():
        scores = [judge(reading, prompt).score for reading, prompt in zip(read_all(shown), prompts, strict=True)]
        means = category_means(prompts, scores)
        found[arm] = {split: {c: means[c][split] for c in means} for split in SPLITS}
        found[arm]["all"] = {c: float(np.mean(list(means[c].values()))) for c in means}
    return found


def _mean_embeddings(encoder: Encoder, world: World, prompts: list[Prompt]) -> Tensor:
    """(B, D): of scenes other than the oracle's."""
    scenes = [world.scene_for(prompt, 1 + i) for prompt in prompts for i in range(SCENES_A_MEAN)]
    return encode_scenes(encoder, scenes).unflatten(0, (len(prompts), SCENES_A_MEAN)).mean(1)


def write_model_card(folder: Path, models: Path, card: Card, each: int, progress: Progress) -> dict[str, Any]:
    """Measure everything and write `models/MODEL_CARD.md` and `models/figures.json`; returns the figures.

    What was trained elsewhere, so that its log is not in `folder`, keeps the figures that it has.
    """
    before = json.loads((models / "figures.json").read_text(encoding="utf-8"))["training"]
    world = World()
    encoder = Encoder.load(f"local-dir:{models / 'clip'}")
    figures: dict[str, Any] = {
        "clip": asdict(measure_geometry(encoder, world)),
        "decoder": measure_decoder(encoder, world, card, models / "prior", each, progress),
        "prompts_per_category": 2 * each,
        "sampling": {"steps": card.decoder.steps, "guidance_scale": card.decoder.guidance_scale},
        "training": {name: _last(folder / f"{name}.jsonl") or before[name] for name in TRAINED},
        "megabytes": round(sum(f.stat().st_size for f in models.rglob("*.safetensors")) / 1e6, 1),
    }
    write_json(models / "figures.json", figures)
    recipes = {
        "first": build_unet.FIRST,
        "further": build_unet.FURTHER,
        "wide": build_unet.WIDE,
        "crowded": build_unet.CROWDED,
    }
    template = Path(__file__).parent / "templates" / "model_card.md.j2"
    text = Template(template.read_text(encoding="utf-8"), trim_blocks=True).render(
        figures,
        card=card,
        world=world,
        targets=ORACLE_TARGETS,
        categories=CATEGORIES,
        batch={name: recipe.batch for name, recipe in recipes.items()},
        unet_parameters=build_unet.load(models / "decoder" / "unet").num_parameters(),
        retold=build_unet.RETOLD,
        crowded=build_unet.CROWDED.phases[-1],
        scenes_a_mean=SCENES_A_MEAN,
        further=json.loads((models / "further.json").read_text(encoding="utf-8")),
        prior_parameters=sum(p.numel() for p in load_prior(models / "prior").parameters()),
        prior_batch=build_further.REFERENCES["small"][1].batch_size,
        movq_batch=build_further.Sizes.movq_batch,
        movq_before=MOVQ_BEFORE,
        unet_batch=build_further.Sizes.unet_batch,
    )
    with atomic_path(models / "MODEL_CARD.md") as beside:
        beside.write_text(text.rstrip() + "\n", encoding="utf-8")
    return figures


def _last(log: Path) -> dict[str, float] | None:
    """The last line of a training log, if there is one."""
    return json.loads(log.read_text().splitlines()[-1]) if log.exists() else None
