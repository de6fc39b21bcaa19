"""One HTML page that shows the shapes world, its checker and its small models. Called by `eclipse lab world`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..pipeline.core.card import Card
from ..pipeline.core.errors import UsageError
from ..pipeline.core.progress import Progress
from ..pipeline.core.source import ShapesSource
from ..pipeline.report.page import data_uri, write_page
from .accuracy import Confusion, blur_and_jpeg, measure
from .annotate import annotated
from .captions import open_categories
from .checker import Reading, judge, read_all
from .drawing import draw
from .shapes import BACKGROUND_RGB, CATEGORIES, COLORS, HSV, RADIUS, SHAPES, Prompt, Scene, Thing, World

FRESH = 1_000_000  # scenes from this index on are never drawn for training
_CHECKED = 2_000  # scenes behind the confusion matrices
_SHOWN = 4  # scenes per category
_REBUILT = 8  # scenes shown beside their reconstructions
_TARGETS = {"clean": 0.99, "spoiled": 0.97}


def build(out_dir: Path, progress: Progress, *, card: Card | None = None, checked: int = _CHECKED) -> dict[str, Any]:
    """Write `world.html` into `out_dir` and return its path with the checker's accuracies, JSON-ready.

    card: whose world and models are shown, by default the embedded one; without local models that part is left out.
    checked: scenes behind the confusion matrices.
    """
    card = card or Card.load("shapes")
    if not isinstance(card.source, ShapesSource):
        raise UsageError(f"card {card.name!r} does not draw shapes", hint="use --card shapes or one made from it")
    world = World(card.source.seed, card.source.held_out)
    out_dir.mkdir(parents=True, exist_ok=True)
    matrices, rate = _measured(world, checked, progress)
    accuracies = {kind: {m.name: round(m.accuracy, 4) for m in found} for kind, found in matrices.items()}
    page = write_page(
        out_dir / "world.html",
        "world.html.j2",
        folders=[Path(__file__).parent / "templates"],
        title="The shapes world",
        lead="A closed world of coloured shapes in which every picture can be read back by pixel: whether a prior "
        "composes what it never saw together is then a number.",
        footer=f"World of seed {world.seed}, {100 * world.held_out:.0f} % of the compositions held out.",
        tiles=_tiles(world, accuracies, rate),
        compositions=_compositions(world),
        colors=COLORS,
        scenes=[(category, _scenes(world, category)) for category in CATEGORIES],
        judged=_judged(world),
        matrices=[
            (clean.name, [_table("clean", clean), _table("blur and JPEG", spoiled)])
            for clean, spoiled in zip(matrices["clean"], matrices["spoiled"], strict=True)
        ],
        checked=checked,
        rebuilt=_rebuilt(world, card, progress),
    )
    return {"page": str(page), "scenes": checked, "accuracy": accuracies}


def _measured(world: World, checked: int, progress: Progress) -> tuple[dict[str, list[Confusion]], float]:
    """Confusion matrices clean and spoiled, and pictures drawn and read per second of CPU time."""
    indices = range(FRESH, FRESH + checked)
    with progress.task("check", 2 * checked, "pictures") as task:
        started = time.process_time()
        clean = measure(world, indices, advance=task.advance)
        rate = checked / (time.process_time() - started)
        spoiled = measure(world, indices, blur_and_jpeg, advance=task.advance)
    return {"clean": clean, "spoiled": spoiled}, rate


def _tiles(world: World, accuracies: dict[str, dict[str, float]], rate: float) -> list[dict[str, str]]:
    tiles = [
        {"value": str(len(COLORS) * len(SHAPES)), "label": "compositions of color and shape", "tone": ""},
        {"value": str(len(world.held_out_pairs)), "label": "of them held out of training", "tone": ""},
    ]
    for kind, words in (("clean", "clean pictures"), ("spoiled", "blur and JPEG")):
        name, worst = min(accuracies[kind].items(), key=lambda item: item[1])
        tone = "good" if worst >= _TARGETS[kind] else "bad"
        label = f"{words}: lowest accuracy ({name}), target {100 * _TARGETS[kind]:.0f} %"
        tiles.append({"value": f"{100 * worst:.2f} %", "label": label, "tone": tone})
    return [*tiles, {"value": f"{rate:,.0f}/s", "label": "pictures drawn and read per second of one core", "tone": ""}]


def _compositions(world: World) -> list[tuple[str, list[dict[str, Any]]]]:
    """One row a shape, one picture a color."""
    rows = []
    for shape in SHAPES:
        things = [
            Thing(shape, color, "solid", "large", "center", 32, 32, RADIUS["large"], 0.0, _rgb(color))
            for color in COLORS
        ]
        pictures = draw([Scene((thing,), "gray", BACKGROUND_RGB["gray"], (0.0, 0.0)) for thing in things])
        row = [
            {
                "src": _source(picture[14:50, 14:50]),
                "held": thing.composition in world.held_out_pairs,
                "color": thing.color,
            }
            for picture, thing in zip(pictures, things, strict=True)
        ]
        rows.append((shape, row))
    return rows


def _scenes(world: World, category: str) -> list[dict[str, Any]]:
    """The first fresh scenes with a caption of this category, starting with different numbers of objects."""
    rng = np.random.default_rng([world.seed, CATEGORIES.index(category)])
    start = FRESH + 100 * CATEGORIES.index(category)
    scenes: list[Scene] = []
    for index in range(start, start + 100):
        scene = world.scene(index, "any")
        if category in open_categories(scene) and len(scenes) < _SHOWN:
            scenes.append(scene)
    captions = [world.caption(scene, rng, category) for scene in scenes]
    return [_shot(picture, caption) for picture, caption in zip(draw(scenes), captions, strict=True)]


def _judged(world: World) -> list[dict[str, Any]]:
    """Prompts with a picture read and judged; in each third picture the first object is repainted."""
    prompts = [p for category in CATEGORIES for p in world.prompts(category, 2, "unseen")]
    scenes = [world.scene_for(prompt) for prompt in prompts]
    scenes = [_repainted(scene) if i % 3 == 2 else scene for i, scene in enumerate(scenes)]
    pictures = draw(scenes)
    return [_verdict(*shown) for shown in zip(prompts, pictures, read_all(pictures), strict=True)]


def _verdict(prompt: Prompt, picture: np.ndarray, reading: Reading) -> dict[str, Any]:
    verdict = judge(reading, prompt)
    right = {i for fact in verdict.facts if fact.right for i in fact.things}
    wrong = {i for fact in verdict.facts if not fact.right for i in fact.things} - right
    return {
        "svg": annotated(picture, reading, wrong),
        "text": prompt.text,
        "category": prompt.category,
        "score": verdict.score,
        "facts": verdict.facts,
        "background": reading.background,
    }


def _repainted(scene: Scene) -> Scene:
    """The scene with its first object in the next color."""
    first = scene.things[0]
    color = COLORS[(COLORS.index(first.color) + 3) % len(COLORS)]
    return replace(scene, things=(replace(first, color=color, rgb=_rgb(color)), *scene.things[1:]))


def _table(title: str, matrix: Confusion) -> dict[str, Any]:
    """A matrix for the template: columns that nothing was read as are left out unless they are also rows."""
    used = [j for j, name in enumerate(matrix.columns) if name in matrix.rows or matrix.counts[:, j].any()]
    totals = matrix.counts.sum(axis=1).clip(min=1)
    rows = [
        (
            name,
            [
                (int(matrix.counts[i, j]), float(matrix.counts[i, j] / totals[i]), matrix.columns[j] == name)
                for j in used
            ],
        )
        for i, name in enumerate(matrix.rows)
    ]
    return {
        "title": title,
        "accuracy": matrix.accuracy,
        "total": matrix.total,
        "columns": [matrix.columns[j] for j in used],
        "rows": rows,
    }


def _rebuilt(world: World, card: Card, progress: Progress) -> list[dict[str, Any]]:
    """Fresh scenes, what the decoder makes of their own embedding, and of their full caption's; [] without models."""
    from .reconstruct import models_of, reconstruct

    if models_of(card) is None:
        return []
    scenes = [world.scene(FRESH + 5_000 + i, "any") for i in range(_REBUILT)]
    pictures, captions = draw(scenes), [world.full_caption(scene) for scene in scenes]
    made = reconstruct(card, pictures, captions, progress)
    sets: Sequence[tuple[str, np.ndarray]] = [
        ("drawn", pictures),
        ("oracle", made.oracle),
        ("text embedding", made.text),
    ]
    readings = {name: read_all(shown) for name, shown in sets}
    return [
        {
            "caption": caption,
            "pictures": [(name, annotated(shown[i], readings[name][i]), _source(shown[i])) for name, shown in sets],
        }
        for i, caption in enumerate(captions)
    ]


def _shot(picture: np.ndarray, caption: str) -> dict[str, Any]:
    return {"src": _source(picture), "pixel": True, "caption": caption, "tag": None, "lines": []}


def _source(picture: np.ndarray) -> str:
    return data_uri(Image.fromarray(picture))[0]


def _rgb(color: str) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(*HSV[color])
