"""Accuracy a category, seen and unseen compositions, by pixel, beside the oracle: `evaluate` on the shapes card.

Arms: `prior`, the trained one; `reference`, the card's, where it names one; `oracle`, the true image embedding of a
fresh scene that fulfils the prompt; `text`, the raw text embedding in place of an image embedding. All arms share
prompts and decoder noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode.job import TEXT_PRIOR, prior_identity
from ..decode.layouts import picture_seed
from ..pipeline.core.card import resolve
from ..pipeline.core.errors import EclipseError
from ..pipeline.core.files import write_json
from ..pipeline.core.source import ShapesSource
from .shapes import CATEGORIES, Prompt, World

if TYPE_CHECKING:
    import torch

    from ..pipeline.cache.packed_text import TextFeatures
    from ..pipeline.core.card import Card
    from ..pipeline.core.progress import Progress
    from ..pipeline.core.workspace import Workspace
    from ..pipeline.embed.clip import Encoder
    from .checker import Verdict

ARMS = ("prior", "reference", "oracle", "text")  # in the order of columns; without a reference, the others
SPLITS = ("seen", "unseen")
FRESH = 10_000_000  # scenes from this index on are never served to a prior
SCENE_SPLIT = {"seen": "train", "unseen": "unseen"}


@dataclass(frozen=True)
class Shot:
    """One picture of one arm: uint8 (64, 64, 3), and what the checker says of it."""

    picture: np.ndarray
    verdict: Verdict


def evaluate_shapes(ws: Workspace, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """Measure the workspace's prior; returns the summary. Writes reports/evaluate.json and reports/evaluate.html.

    Raises:
        EclipseError: no trained prior, weights that cannot be used, or changed settings without `overwrite`.
    """
    with ws.stage("evaluate", overwrite=overwrite) as run:
        if run.complete:
            return run.summary
        run.begin()
        summary, prompts, shots = measure(ws, progress, str(ws.prior / "final"))
        from .score_page import write_score_page

        page, figures = ws.reports / "evaluate.html", ws.reports / "evaluate.json"
        write_json(figures, {**summary, "pictures": _records(prompts, shots)})
        write_score_page(page, ws.card, summary, prompts, shots)
        run.finish({**summary, "json": str(figures)}, report=page)
    return run.summary


def measure(
    ws: Workspace, progress: Progress, prior: str
) -> tuple[dict[str, Any], list[Prompt], dict[str, list[Shot]]]:
    """The figures, the prompts, and each arm's pictures with their verdicts, for one prior (directory or hub id)."""
    from ..decode.conditioning import encode_texts, load_encoder, pick_device, predict, unconditional

    card, device = ws.card, pick_device()
    world, options, identity = world_of(card), card.evaluate, prior_identity(prior)
    prompts = [
        prompt
        for category in CATEGORIES
        for split in SPLITS
        for prompt in world.prompts(category, options.prompts_per_category, split)
    ]
    encoder = load_encoder(card, device)
    texts = encode_texts(encoder, [p.text for p in prompts], progress)
    rows, seeds = range(len(prompts)), [picture_seed(options.seed, p.text, 0) for p in prompts]
    embeddings = {"prior": predict(prior, texts, rows, seeds, device)}
    reference: dict[str, str] = {}
    if options.reference is not None:
        place = resolve(options.reference)
        embeddings["reference"] = predict(place, texts, rows, seeds, device)
        reference = {"reference": prior_identity(place)}
    embeddings["oracle"] = encode_scenes(encoder, [world.scene_for(p, options.seed) for p in prompts])
    embeddings["text"] = predict(TEXT_PRIOR, texts, rows, seeds, device)
    retrieval = _retrieval(world, encoder, prior, max(2, options.rows // len(SPLITS)), device, progress)
    blank = unconditional(ws, encoder, card.decoder.kind, progress)
    del encoder
    pictures = decode_pictures(card, embeddings, texts, seeds, blank, device, progress)
    shots = {arm: judge_pictures(pictures[arm], prompts) for arm in embeddings}
    summary = {
        "prior": identity,
        **reference,
        "prompts": len(prompts),
        "pictures": len(prompts) * len(shots),
        "held_out_compositions": len(world.held_out_pairs),
        "accuracy": _by_category(prompts, shots),
        "embedding": retrieval,
        "warnings": _warnings(retrieval),
    }
    return summary, prompts, shots


def world_of(card: Card) -> World:
    """The world that a card's source names."""
    if not isinstance(card.source, ShapesSource):
        raise EclipseError("only the shapes world can be judged by pixel", where=f"card {card.name}")
    return World(card.source.seed, card.source.held_out)


def encode_scenes(encoder: Encoder, scenes: Sequence[Any], batch: int = 256) -> torch.Tensor:
    """Raw image embeddings (B, D) float32, on the CPU, of scenes drawn afresh."""
    import torch
    from PIL import Image

    from .drawing import draw

    embeddings = []
    for start in range(0, len(scenes), batch):
        drawn = draw(scenes[start : start + batch])
        pixels = np.stack([encoder.preprocess(Image.fromarray(picture)) for picture in drawn])
        embeddings.append(encoder.encode_images(pixels).cpu())
    return torch.cat(embeddings)


def _retrieval(
    world: World, encoder: Encoder, prior: str, count: int, device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    """Fresh scenes with full captions: cosine to the true image embedding, and R@1 of the true picture among all.

    Beside the prior: the raw text embedding, and `mean`, the best constant, which finds the true picture by chance.
    """
    import torch.nn.functional as F

    from ..decode.conditioning import encode_texts, predict

    table = {}
    for split in SPLITS:
        scenes = [world.scene(FRESH + i, SCENE_SPLIT[split]) for i in range(count)]  # type: ignore[arg-type]
        true = F.normalize(encode_scenes(encoder, scenes), dim=1)
        texts = encode_texts(encoder, [world.full_caption(scene) for scene in scenes], progress)
        for arm, source in (("prior", prior), ("text", TEXT_PRIOR)):
            predicted = F.normalize(predict(source, texts, range(count), range(count), device), dim=1)
            cosine = predicted @ true.T
            found = (cosine.argmax(1).cpu().numpy() == np.arange(count)).mean()
            table[f"{arm}_{split}"] = {
                "cosine_to_image": round(float(cosine.diagonal().mean()), 4),
                "recall_at_1": round(float(found), 4),
                "scenes": count,
            }
        # The mean of unit vectors is the constant nearest to them; its length is their mean cosine to it.
        table[f"mean_{split}"] = {
            "cosine_to_image": round(float(true.mean(0).norm()), 4),
            "recall_at_1": round(1 / count, 4),
            "scenes": count,
        }
    return table


def _warnings(table: dict[str, dict[str, float]]) -> list[str]:
    """Where the prior does not beat what needs no training."""
    from ..trainer.evaluate import unbeaten

    found = []
    for split in SPLITS:
        prior, mean, text = (table[f"{arm}_{split}"] for arm in ("prior", "mean", "text"))
        figures = ("cosine_to_image", "recall_at_1")
        arms = {
            "prior": {name: prior[name] for name in figures},
            "constant mean embedding": {"cosine_to_image": mean["cosine_to_image"]},
            "raw text embedding": {name: text[name] for name in figures},
        }
        found += [f"{split} compositions: {warning}" for warning in unbeaten(arms, int(prior["scenes"]))]
    return found


def decode_pictures(
    card: Card,
    embeddings: dict[str, torch.Tensor],
    texts: TextFeatures,
    seeds: Sequence[int],
    blank: Any,
    device: str,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Pictures of every arm, uint8 (B, 64, 64, 3)."""
    from ..decode.decoder import load_decoder
    from .shapes import IMAGE_SIZE

    section = card.decoder
    decoder = load_decoder(
        section.kind,
        resolve(section.path),
        unconditional=blank,
        image_size=section.image_size,
        scheduler=section.scheduler,
        batch_size=section.batch_size,
        device=device,
    )
    captions = texts if section.kind == "karlo" else None
    pictures: dict[str, np.ndarray] = {}
    with progress.task("evaluate", len(seeds) * len(embeddings), "pictures") as task:
        for arm, embedding in embeddings.items():
            images = []
            for start in range(0, len(seeds), decoder.batch_size):
                rows = range(start, min(start + decoder.batch_size, len(seeds)))
                images += decoder.decode(
                    embedding[rows.start : rows.stop],
                    seeds=seeds[rows.start : rows.stop],
                    steps=section.steps,
                    guidance_scale=section.guidance_scale,
                    captions=None if captions is None else captions.select(rows),
                )
                task.advance(len(rows))
            pictures[arm] = np.stack([np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE))) for image in images])
    return pictures


def judge_pictures(pictures: np.ndarray, prompts: Sequence[Prompt]) -> list[Shot]:
    from .checker import judge, read_all

    return [
        Shot(picture, judge(reading, prompt))
        for picture, reading, prompt in zip(pictures, read_all(pictures), prompts, strict=True)
    ]


def _by_category(prompts: Sequence[Prompt], shots: dict[str, list[Shot]]) -> dict[str, dict[str, float]]:
    """Mean score of each category (and of all), one column an arm and split."""
    means = {arm: category_means(prompts, [shot.verdict.score for shot in own]) for arm, own in shots.items()}
    return {
        category: {f"{arm}_{split}": round(means[arm][category][split], 4) for split in row for arm in means}
        for category, row in means["prior"].items()
    }


def category_means(prompts: Sequence[Prompt], scores: Sequence[float]) -> dict[str, dict[str, float]]:
    """Mean score of each category, and of all as `mean`, by split; a split without prompts is left out."""
    table: dict[str, dict[str, float]] = {}
    for category in (*CATEGORIES, "mean"):
        table[category] = {}
        for split in SPLITS:
            chosen = [i for i, p in enumerate(prompts) if p.split == split and category in (p.category, "mean")]
            if chosen:
                table[category][split] = float(np.mean([scores[i] for i in chosen]))
    return table


def _records(prompts: Sequence[Prompt], shots: dict[str, list[Shot]]) -> list[dict[str, Any]]:
    """Prompt by prompt, for whoever wants intervals or pairs."""
    return [
        {
            "prompt": prompt.text,
            "category": prompt.category,
            "split": prompt.split,
            **{arm: own[i].verdict.score for arm, own in shots.items()},
        }
        for i, prompt in enumerate(prompts)
    ]
