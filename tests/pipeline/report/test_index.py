"""The overview of a workspace: every link resolves, nothing is linked that is not there; and the page of a training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.report import charts
from eclipse.pipeline.report.index import index_page
from eclipse.pipeline.report.train import _warnings
from eclipse.pipeline.run import run_stage
from eclipse.trainer.log import SAMPLES, read_samples
from eclipse.trainer.stage import train
from learnable_cache import make_workspace

QUIET = Progress(quiet=True)


def links(page: Path) -> list[Path]:
    addresses = re.findall(r'(?:href|src)="([^"#:]+)"', page.read_text(encoding="utf-8"))
    return [page.parent / unquote(address) for address in addresses]


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    ws = make_workspace(tmp_path_factory.mktemp("index") / "ws", steps=30, validate_every=10)
    train(ws, QUIET)
    return ws


def test_every_link_of_the_overview_resolves(ws: Workspace) -> None:
    gallery = ws.renders / "a name #1" / "index.html"
    gallery.parent.mkdir(parents=True)
    gallery.write_text("pictures")
    page = index_page(ws)
    found = links(page)
    assert all(path.exists() for path in found), [path for path in found if not path.exists()]
    resolved = {path.resolve() for path in found}
    assert {gallery, ws.reports / "train.html", ws.selection, ws.card_path} <= resolved
    text = page.read_text()
    assert "not yet" in text and "samples per second" in text and "evaluate.html" not in text


def test_the_page_of_a_training(ws: Workspace) -> None:
    page = ws.reports / "train.html"
    assert all(path.name in ("index.html", "download.html", "embed.html", "filter.html") for path in links(page))
    text = page.read_text()
    for said in ("Cosine to the true image", "constant mean", "raw text", "Gradient norm", "samples per second"):
        assert said in text
    assert text.count("<svg") >= 8


def test_a_training_notes_what_it_makes_of_the_same_captions(ws: Workspace) -> None:
    samples = read_samples(ws.prior)
    assert [line["step"] for line in samples] == [10, 20, 30]
    assert all(line["rows"] == samples[0]["rows"] for line in samples) and len(samples[0]["rows"]) == 6
    assert all(-1 <= cosine <= 1.001 for line in samples for cosine in line["cosine"])
    with (ws.prior / SAMPLES).open("a") as file:
        file.write(json.dumps({**samples[1], "cosine": [0.0] * 6}) + '\n{"step": 30, "rows"')
    assert [line["step"] for line in read_samples(ws.prior)] == [10, 20, 30]
    assert read_samples(ws.prior)[1]["cosine"] == [0.0] * 6, "made again after a resume"


def test_a_stage_writes_the_overview(ws: Workspace) -> None:
    (ws.reports / "index.html").unlink(missing_ok=True)
    run_stage(ws, "train", QUIET, steps=32)
    assert (ws.reports / "index.html").is_file()


def test_what_a_training_page_warns_of() -> None:
    summary = {"skipped_steps": 3, "data_wait_share": 0.5}
    rising = [{"loss": float(step)} for step in range(100)]
    said = " ".join(_warnings(summary, rising))
    assert "3 steps were skipped" in said and "50.0 % of the time" in said and "learning rate" in said
    assert _warnings({"skipped_steps": 0, "data_wait_share": 0.0}, rising[::-1]) == []


def test_first_steps_do_not_flatten_a_fair_curve() -> None:
    y = np.concatenate([np.full(5, 1000.0), np.linspace(2, 1, 195)])
    x = np.arange(200.0)
    assert "1000" not in charts.lines({"loss": (x, y)}, fair=True)
    assert "1000" in charts.lines({"loss": (x, y)})
