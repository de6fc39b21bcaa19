"""Training end to end on a small cache: resume, signals, damage, several processes, divergence, baselines."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError, Terminated, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.trainer import loop, stage, steps
from eclipse.trainer.data import verify
from eclipse.trainer.data.split import split
from eclipse.trainer.guard import Guard
from eclipse.trainer.log import read_metrics
from eclipse.trainer.model.prior import load_prior, save_prior
from learnable_cache import make_workspace
from safetensors.torch import load_file

QUIET = Progress(quiet=True)


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def losses(ws: Workspace) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"]) for line in read_metrics(ws.prior / "metrics.jsonl") if line["kind"] == "train"
    ]


def weights(ws: Workspace) -> dict[str, torch.Tensor]:
    return load_prior(ws.prior / "final").state_dict()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Any) -> None:
    """Before this step of the next run, call `how`."""
    for kind in (steps.HostSteps, steps.DeviceSteps):
        real = kind.take

        def take(self: Any, batch: Any, kind: Any = kind, real: Any = real) -> Any:
            if self.run.step == step:
                monkeypatch.setattr(kind, "take", real)
                how()
            return real(self, batch)

        monkeypatch.setattr(kind, "take", take)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    ws = make_workspace(tmp_path_factory.mktemp("undisturbed") / "ws")
    stage.train(ws, QUIET)
    return ws


def test_learns_and_reports(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=90, validate_every=30, checkpoint_every=30)
    summary = stage.train(ws, QUIET)
    json.dumps(summary)
    assert summary["validation"]["cosine_image"] > 0.9
    assert summary["validation"]["recall_1"] > 0.9
    assert summary["steps"] == 90 and summary["skipped_steps"] == 0
    assert (ws.reports / "train.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (ws.prior / "checkpoints").iterdir()} == {"step-00000060", "step-00000090"}
    assert (ws.prior / "latest").resolve().name == "step-00000090"
    assert list((ws.prior / "tensorboard").glob("events*"))
    for name in ("final", "best"):
        assert load_prior(ws.prior / name).config.embedding_dim == 16
    assert stage.train(ws, QUIET) == {**summary, "already_complete": True}
    with pytest.raises(EclipseError, match="other settings"):
        stage.train(ws, QUIET, steps=7)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signal_saves_and_resume_is_bitwise_equal(
    undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[BaseException]
) -> None:
    ws = make_workspace(tmp_path / "ws")
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(raised):
        stage.train(ws, QUIET)
    assert (ws.prior / "latest").resolve().name == "step-00000006"
    stage.train(ws, QUIET)
    assert losses(ws) == losses(undisturbed)
    assert all(torch.equal(x, weights(ws)[name]) for name, x in weights(undisturbed).items())


def test_muon_learns_and_resumes_bitwise_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"optimizer": "muon", "learning_rate": 1e-2, "steps": 60, "checkpoint_every": 20}
    whole = make_workspace(tmp_path / "whole", **settings)
    summary = stage.train(whole, QUIET)
    assert summary["validation"]["recall_1"] > 0.9
    cut = make_workspace(tmp_path / "cut", **settings)
    interrupt_at(monkeypatch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(cut, QUIET)
    stage.train(cut, QUIET)
    kept = load_file(cut.prior / "latest" / "optimizer.safetensors")
    assert "proj_in.weight.momentum_buffer" in kept and "proj_in.bias.exp_avg" in kept
    assert losses(cut) == losses(whole)
    assert all(torch.equal(x, weights(cut)[name]) for name, x in weights(whole).items())


def test_how_rows_are_held_changes_nothing(
    undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = make_workspace(tmp_path / "ws", resident=True)
    with monkeypatch.context() as patch:
        patch.delattr("eclipse.trainer.data.feeds.StoreFeed.request")  # validation reads through it, and is left out
        patch.setattr(loop, "validate", lambda run, log: None)
        stage.train(ws, QUIET)
    assert losses(ws) == losses(undisturbed)
    blocks = make_workspace(tmp_path / "blocks", block_rows=8)
    stage.train(blocks, QUIET)
    assert losses(blocks) != losses(undisturbed)  # another order, so another run


def test_wandb_gets_the_figures_where_the_card_names_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ws = make_workspace(tmp_path / "ws", steps=12, wandb="priors")
    stage.train(ws, QUIET)
    (log,) = (ws.prior / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert b"validation/cosine_image" in written and b"train/loss" in written
    name = log.stem
    stage.train(ws, QUIET, overwrite=True)
    (log,) = (ws.prior / "wandb").glob("offline-run-*/*.wandb")
    assert log.stem != name  # the service drops steps that a known run already has


def test_damaged_checkpoint_falls_back_to_the_one_before(
    undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = make_workspace(tmp_path / "ws")

    def crash() -> None:
        raise RuntimeError("power failure")

    interrupt_at(monkeypatch, 10, crash)
    with pytest.raises(RuntimeError, match="power failure"):
        stage.train(ws, QUIET)
    newest = ws.prior / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1  # one bit, which no length or header betrays
    newest.write_bytes(damaged)
    heard = Heard()
    stage.train(ws, heard)
    assert any("step-00000008 is damaged" in message and "step-00000004" in message for message in heard.messages)
    assert losses(ws) == losses(undisturbed)


def test_figures_of_the_summary_are_not_read_from_the_log(
    undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = make_workspace(tmp_path / "ws")
    with monkeypatch.context() as patch, pytest.raises(EclipseError, match="power failure"):
        patch.setattr(loop, "save_prior", save_prior_but_final)
        stage.train(ws, QUIET)
    log = ws.prior / "metrics.jsonl"
    log.write_text(re.sub(r'"cosine_image": [^,]*', '"cosine_image": 0.125', log.read_text()))
    wanted = undisturbed.stage("train").finished
    assert wanted is not None and wanted.summary["validation"]["step"] == 12
    assert stage.train(ws, QUIET)["validation"] == wanted.summary["validation"]


def save_prior_but_final(prior: Any, folder: Path) -> None:
    if folder.name == "final":
        raise EclipseError("power failure")
    save_prior(prior, folder)


def test_checkpoints_of_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = make_workspace(tmp_path / "ws", pictures=40)
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(ws, QUIET)
    import pyarrow.parquet as pq

    table = pq.read_table(ws.selection)
    pq.write_table(table.set_column(2, "keep", [[True] * len(table)]), ws.selection)
    with pytest.raises(EclipseError, match="other rows"):
        stage.train(ws, QUIET)
    stage.train(ws, QUIET, overwrite=True)


def test_microbatches_change_only_rounding(undisturbed: Workspace, tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", microbatch=5)
    stage.train(ws, QUIET)
    np.testing.assert_allclose(losses(ws), losses(undisturbed), rtol=1e-5)


def test_two_processes_equal_one_with_their_batch(undisturbed: Workspace, tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "eclipse.cli", "train", "-w", str(ws.root), "--gpus", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12  # one summary, though two processes ran the command
    np.testing.assert_allclose(losses(ws), losses(undisturbed), rtol=1e-5)
    ours, theirs = (
        [line for line in read_metrics(each.prior / "metrics.jsonl") if line["kind"] == "validation"]
        for each in (ws, undisturbed)
    )
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(
            [a[name] for name in a if name != "kind"], [b[name] for name in a if name != "kind"], rtol=1e-4
        )
    assert ws.stage("train").finished is not None


def test_the_pace_is_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.validate

    def slow(run: Any, log: Any) -> None:
        time.sleep(0.5)
        real(run, log)

    monkeypatch.setattr(loop, "validate", slow)
    summary = stage.train(make_workspace(tmp_path / "ws"), QUIET)
    assert summary["seconds"] > summary["training_seconds"] + 0.9  # two validations
    assert 0 <= summary["data_wait_share"] < 1 and summary["model_flop_utilisation"] > 0
    tokens = summary["tokens_per_second"] / summary["samples_per_second"]
    assert 2 < tokens < 77 and summary["tflops_per_second"] > 0


def test_former_names_of_keys_are_read_and_what_began_under_them_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = make_workspace(tmp_path / "ws")
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(ws, QUIET)
    text = ws.card_path.read_text()
    for now, then in (("warmup_steps", "warmup"), ("ema_decay", "ema"), ("grad_clip_norm", "clip_gradient")):
        assert f"{now}:" in text
        text = text.replace(f"{now}:", f"{then}:")
    ws.card_path.write_text(text)
    assert stage.train(Workspace.open(ws.root), QUIET)["steps"] == 12
    assert [step for step, _ in losses(ws)] == list(range(1, 13))


def test_draws_train_and_are_refused_for_the_diffusion_arm(tmp_path: Path) -> None:
    summary = stage.train(make_workspace(tmp_path / "ws", draws=3, microbatch=5, steps=4), QUIET)
    assert summary["steps"] == 4 and summary["skipped_steps"] == 0
    with pytest.raises(UsageError, match="one pass"):
        stage.train(make_workspace(tmp_path / "diffusion", draws=2), QUIET, arm="diffusion")


def test_a_job_travels_to_other_processes(tmp_path: Path) -> None:
    job = stage.job_for(make_workspace(tmp_path / "ws", pictures=10), {"steps": 4}, "fingerprint")
    assert pickle.loads(pickle.dumps(job)) == job and job.options.steps == 4


def test_two_threads_for_a_small_prior_and_all_for_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    interrupt_at(monkeypatch, 1, lambda: used.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        stage.train(make_workspace(tmp_path / "ws", steps=3), QUIET)
        assert used == [2] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_an_overwrite_that_cannot_start_costs_nothing(undisturbed: Workspace, tmp_path: Path) -> None:
    ws = Workspace(shutil.copytree(undisturbed.root, tmp_path / "ws"))
    before = weights(ws)
    with pytest.raises(UsageError, match="99 GPUs"):
        stage.train(ws, QUIET, gpus=99, overwrite=True)
    ws.selection.write_bytes(b"no table")
    with pytest.raises(EclipseError) as caught:
        stage.train(ws, QUIET, overwrite=True)
    assert str(ws.selection) in str(caught.value)
    after = weights(ws)
    assert ws.stage("train").finished is not None and all(torch.equal(after[name], before[name]) for name in before)


def test_a_training_that_learns_nothing_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "accepts", skipping)
    ws = make_workspace(tmp_path / "ws", steps=3)
    with pytest.raises(EclipseError, match="every step was skipped"):
        stage.train(ws, QUIET)
    assert not (ws.prior / "final").exists()


def skipping(guard: Guard, loss: float, gradient_norm: float) -> bool:
    guard.skipped += 1
    return False


def test_sigterm_of_the_command_exits_143(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=100_000, validate_every=50_000)
    command = [sys.executable, "-m", "eclipse.cli", "train", "-w", str(ws.root)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    latest = ws.prior / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 143, messages
    assert "continues from there" in messages
    assert len(losses(ws)) == int(latest.resolve().name.removeprefix("step-"))


def test_bad_steps_are_skipped_and_a_diverged_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.HostSteps.accumulate_gradient
    bad = {3, 4}

    def poisoned(self: Any, batch: Any) -> Any:
        terms = real(self, batch)
        if self.run.step in bad:
            self.run.prior.prd_embedding.grad.fill_(float("nan"))
        return terms

    monkeypatch.setattr(steps.HostSteps, "accumulate_gradient", poisoned)
    ws = make_workspace(tmp_path / "ws")
    summary = stage.train(ws, QUIET)
    assert summary["skipped_steps"] == 2
    assert all(bool(x.isfinite().all()) for x in weights(ws).values())
    bad |= set(range(1000))
    ws = make_workspace(tmp_path / "diverging", steps=60)
    with pytest.raises(EclipseError, match="training diverged"):
        stage.train(ws, QUIET)
    assert not (ws.prior / "final").exists()


def test_arms_train_to_their_own_objective(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "projection")
    stage.train(ws, QUIET, arm="projection")
    lines = [line for line in read_metrics(ws.prior / "metrics.jsonl") if line["kind"] == "train"]
    assert all(line["loss"] == line["projection"] and line["contrastive"] > 0 for line in lines)
    with pytest.raises(UsageError, match="unknown arm"):
        stage.train(ws, QUIET, arm="gan")


def test_the_split_keeps_a_picture_on_one_side(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", pictures=300)
    store = Store.open(ws.embeddings)
    training, validation = split(store, ws.selection, 0.2)
    assert len(set(training) | set(validation)) == len(training) + len(validation) == 540
    assert 60 < len(validation) < 160
    sha = store.column("image_sha256").to_pylist()
    assert not {sha[row] for row in training} & {sha[row] for row in validation}
    assert len(split(store, ws.selection, 1e-9)[1]) >= 2


def test_an_unfit_preset_is_one_message(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", pictures=20)
    card = ws.card.model_copy(update={"prior": ws.card.prior.model_copy(update={"preset": "karlo"})})
    ws.__dict__["card"] = card
    with pytest.raises(UsageError, match="768"):
        stage.train(ws, QUIET)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are captured on a GPU, on this CPU, where they merely run."""
    for module in (steps, loop):
        monkeypatch.setattr(module, "on_device", lambda run: True)


@pytest.mark.parametrize("settings", [{}, {"resident": True}, {"optimizer": "muon", "arm": "projection", "draws": 2}])
def test_steps_decided_on_the_device_equal_those_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, settings: dict[str, Any]
) -> None:
    whole = make_workspace(tmp_path / "host", **settings)
    stage.train(whole, QUIET)
    request.getfixturevalue("as_on_a_gpu")
    ws = make_workspace(tmp_path / "device", **settings)
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(ws, QUIET)
    assert (ws.prior / "latest").resolve().name == "step-00000006"
    summary = stage.train(ws, QUIET)
    assert [step for step, _ in losses(ws)] == list(range(1, 13)) and summary["skipped_steps"] == 0
    np.testing.assert_allclose(losses(ws), losses(whole), rtol=2e-4)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_resumed_device_steps_are_bitwise_equal_and_a_diverged_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ws = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "ws")
    stage.train(whole, QUIET)
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(ws, QUIET)
    stage.train(ws, QUIET)
    assert losses(ws) == losses(whole)
    assert all(torch.equal(x, weights(ws)[name]) for name, x in weights(whole).items())
    bad = make_workspace(tmp_path / "bad", steps=60, learning_rate=1e20)
    with pytest.raises(EclipseError, match="training diverged"):
        stage.train(bad, QUIET)
    assert not (bad.prior / "final").exists()


@pytest.mark.cuda
def test_resume_on_a_gpu_is_bitwise_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ws = make_workspace(tmp_path / "whole"), make_workspace(tmp_path / "ws")
    stage.train(whole, QUIET, gpus=1)
    interrupt_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        stage.train(ws, QUIET, gpus=1)
    stage.train(ws, QUIET, gpus=1)
    assert losses(ws) == losses(whole)
    assert all(torch.equal(x, weights(ws)[name]) for name, x in weights(whole).items())


def flip_page(ws: Workspace, column: str) -> Path:
    """One bit of a page of the second part, within what no footer and no size tells."""
    part = Store.open(ws.embeddings).parts[1]
    chunk = part.groups[0].chunks[column]
    with part.path.open("r+b") as file:
        file.seek(chunk.offset + chunk.size - 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return part.path


@pytest.mark.parametrize("column", ["image_embedding", "text_embedding", "text_states"])
def test_a_damaged_page_is_named_and_nothing_learnt_from_it_is_kept(tmp_path: Path, column: str) -> None:
    ws = make_workspace(tmp_path / "ws")
    path = flip_page(ws, column)
    with pytest.raises(EclipseError, match="checksums do not match") as error:
        stage.train(ws, QUIET)
    assert f"{path} ({column}, rows 0 to 119)" in str(error.value.where)
    assert not list(ws.prior.glob("checkpoints/*")) and not (ws.prior / "final").exists()
    assert not (ws.prior / "best").exists()


def test_a_stop_before_the_pages_are_checked_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = make_workspace(tmp_path / "ws")
    done = threading.Event()
    monkeypatch.setattr(Store, "verify", lambda *_, **__: done.wait(30))
    monkeypatch.setattr(verify, "GRACE_S", 0.3)
    interrupt_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(verify.PageCheck, "__exit__", lambda *_: done.set())
    with pytest.raises(Terminated, match="before every embedding was verified"):
        stage.train(ws, QUIET)
    assert not list(ws.prior.glob("checkpoints/*"))
