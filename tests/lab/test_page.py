"""The world's page: scenes, readings, matrices, and reconstructions where models are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from eclipse.lab.annotate import SCALE, annotated
from eclipse.lab.checker import read
from eclipse.lab.drawing import draw
from eclipse.lab.page import build
from eclipse.lab.shapes import CATEGORIES, COLORS, SHAPES, World
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import UsageError
from eclipse.pipeline.core.progress import Progress
from tiny_clip import make_clip
from tiny_decoders import save_tiny_kandinsky


def shapes_card(clip: str, decoder: Path) -> Card:
    card = Card.load("shapes")
    encoder = card.encoder.model_copy(update={"model": clip})
    section = card.decoder.model_copy(update={"path": str(decoder), "steps": 2})
    return card.model_copy(update={"encoder": encoder, "decoder": section})


def test_the_page_shows_the_world_and_measures_the_checker(tmp_path: Path) -> None:
    card = shapes_card(f"local-dir:{tmp_path / 'none'}", tmp_path / "none")
    summary = build(tmp_path / "out", Progress(quiet=True), card=card, checked=60)
    html = Path(summary["page"]).read_text(encoding="utf-8")
    assert set(summary["accuracy"]) == {"clean", "spoiled"}
    assert min(summary["accuracy"]["clean"].values()) > 0.95
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', html), "the page is self-contained"
    assert all(f"<h3>{name}</h3>" in html for name in (*CATEGORIES, "texture", "size", "background", "count"))
    assert html.count('<table class="confusion">') == 12
    world = World(card.source.seed, card.source.held_out)  # type: ignore[union-attr]
    for color in COLORS:
        for shape in SHAPES:
            held = (color, shape) in world.held_out_pairs
            assert f'title="{color} {shape}{", held out" if held else ""}"' in html
    prompts = [p.text for category in CATEGORIES for p in world.prompts(category, 2, "unseen")]
    assert all(text in html for text in prompts)
    assert html.count('<g class="bad">') >= 4, "a wrong picture is shown to be wrong"
    assert "lacks the small CLIP" in html


def test_with_models_reconstructions_stand_beside_the_originals(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip")
    card = shapes_card(clip, save_tiny_kandinsky(tmp_path / "decoder", embedding_dim=32))
    summary = build(tmp_path / "out", Progress(quiet=True), card=card, checked=10)
    html = Path(summary["page"]).read_text(encoding="utf-8")
    for name in ("drawn", "oracle", "text embedding"):
        assert html.count(f"<b>{name}</b>") == 8
    shown = re.findall(r'<b>(?:oracle|text embedding)</b><img src="([^"]+)"', html)
    assert len(set(shown)) == 16, "each picture is decoded from its own embedding"


def test_boxes_and_labels_lie_on_the_objects() -> None:
    world = World()
    for picture in draw([world.scene(i, "any") for i in range(30)]):
        reading = read(picture)
        svg = str(annotated(picture, reading, wrong={0}))
        assert svg.count('<g class="bad">') == 1 and svg.count("<g class=") == len(reading.things)
        boxes = [tuple(map(int, m)) for m in re.findall(r'rect x="(-?\d+)" y="(-?\d+)" width="(\d+)"', svg)]
        for seen, (x, y, width) in zip(reading.things, boxes, strict=True):
            assert (x, y, width) == (SCALE * seen.box[0], SCALE * seen.box[1], SCALE * (seen.box[2] - seen.box[0]))
            assert f">{seen.color} {seen.shape}<" in svg and f">{seen.size} {seen.texture}<" in svg
        lines = np.array([float(y) for y in re.findall(r'tspan x="[\d.]+" y="(-?\d+)"', svg)])
        assert (lines > 8).all() and (lines <= 64 * SCALE).all()


def test_a_card_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'coco' does not draw shapes"):
        build(tmp_path, Progress(quiet=True), card=Card.load("coco"))
    assert not (tmp_path / "world.html").exists()
