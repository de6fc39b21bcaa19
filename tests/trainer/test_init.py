"""Starting from another prior, and going on from a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.status import gather
from eclipse.pipeline.core.workspace import Workspace
from eclipse.trainer.log import read_metrics
from eclipse.trainer.model.prior import Prior, PriorConfig, load_prior, save_prior
from eclipse.trainer.stage import train
from learnable_cache import make_workspace

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    ws = make_workspace(tmp_path_factory.mktemp("trained") / "ws", steps=20, validate_every=10)
    train(ws, QUIET)
    return ws


def first_loss(ws: Workspace) -> float:
    return next(line["loss"] for line in read_metrics(ws.prior / "metrics.jsonl") if line["kind"] == "train")


def test_a_run_starts_from_a_directory_or_a_workspace(trained: Workspace, tmp_path: Path) -> None:
    fresh = make_workspace(tmp_path / "fresh", steps=2)
    train(fresh, QUIET)
    for i, place in enumerate((trained.prior / "final", trained.root)):
        ws = make_workspace(tmp_path / str(i), steps=2)
        summary = train(ws, QUIET, init=str(place))
        assert first_loss(ws) < 0.8 * first_loss(fresh)
        assert summary["init"] == str(trained.prior / "final")
    ws = make_workspace(tmp_path / "card", steps=2, init="../there")
    save_prior(load_prior(trained.prior / "final"), tmp_path / "there")
    train(ws, QUIET)
    assert first_loss(ws) < 0.8 * first_loss(fresh)


def test_another_network_is_refused_by_name_and_leaves_no_trace(trained: Workspace, tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=2)
    config = load_prior(trained.prior / "final").config
    deeper = PriorConfig(config.embedding_dim, config.num_layers + 1, config.num_attention_heads)
    save_prior(Prior(deeper), tmp_path / "deeper")
    with pytest.raises(UsageError, match=f"num_layers is {config.num_layers + 1}, not {config.num_layers}"):
        train(ws, QUIET, init=str(tmp_path / "deeper"))
    with pytest.raises(UsageError, match="no such prior to start from"):
        train(ws, QUIET, init="nowhere")
    assert ws.stage("train").begun is None
    train(ws, QUIET)


def test_more_steps_go_on_from_a_finished_run(trained: Workspace, tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=20, validate_every=10)
    train(ws, QUIET)
    before = load_prior(ws.prior / "final").state_dict()
    summary = train(ws, QUIET, steps=30)
    steps = [line["step"] for line in read_metrics(ws.prior / "metrics.jsonl") if line["kind"] == "train"]
    assert summary["steps"] == 30 and steps == list(range(1, 31))
    after = load_prior(ws.prior / "final").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert train(ws, QUIET, steps=30)["already_complete"] is True
    with pytest.raises(EclipseError, match="finished with other settings"):
        train(ws, QUIET, steps=25)


def test_more_steps_in_the_card_go_on_too_and_status_says_so(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=4)
    train(ws, QUIET)
    card = ws.card
    longer = card.model_copy(update={"train": card.train.model_copy(update={"steps": 6})})
    longer.dump(ws.card_path)
    ws = Workspace.open(ws.root)
    row = next(row for row in gather(ws)["stages"] if row["stage"] == "train")
    assert row["state"] == "changed"
    assert train(ws, QUIET)["steps"] == 6
