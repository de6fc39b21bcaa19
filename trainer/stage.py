"""The stage: a workspace's prior trained, on this machine's devices or as torchrun arranged. Called by stages.py; the
lab calls `work`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..pipeline.core.errors import UsageError
from ..pipeline.core.progress import Progress
from .distributed import count_gpus, join, under_launcher
from .log import FILE, read_metrics, read_samples
from .loop import fit
from .run import ARMS, TrainJob, check_init, init_place
from .spawn import spawn

if TYPE_CHECKING:
    from ..pipeline.core.workspace import Workspace


def train(
    ws: Workspace,
    progress: Progress,
    *,
    gpus: int | None = None,
    overwrite: bool = False,
    steps: int | None = None,
    arm: str | None = None,
    init: str | None = None,
) -> dict[str, Any]:
    """The stage: train the card's prior from the filtered cache, on this machine's GPUs or as torchrun arranged.

    steps, arm and init stand in for the card's. Resumes by itself, and a finished run goes on where more steps are
    asked for; under other settings than before it raises EclipseError.
    """
    if arm not in (None, *ARMS):
        raise UsageError(f"unknown arm {arm!r}", where="--arm", hint=f"choose from {', '.join(ARMS)}")
    init = None if init is None else init_place(init, Path.cwd())
    asked = (("steps", steps), ("arm", arm), ("init", init))
    changes = {name: value for name, value in asked if value not in (None, getattr(ws.card.train, name))}
    with ws.stage("train", overwrite=overwrite, options=changes) as run:
        if run.complete:
            return run.summary
        former = None if overwrite else run.finished
        count, job = count_gpus(gpus), job_for(ws, changes, run.fingerprint)
        if former is not None and run.extends(former):
            job = replace(job, continues=former.fingerprint)
        elif job.options.init is not None:
            check_init(job)  # before anything is noted or set aside
        run.begin()
        if count > 1 and not under_launcher():
            summary = spawn(work, count, job, False, progress.quiet)
        else:
            summary = work(job, count == 0, progress.quiet, progress)
        page = None
        if run.leads:
            from ..pipeline.report.train import train_page

            page = train_page(ws, read_metrics(job.directory / FILE), read_samples(job.directory), summary)
        run.finish(summary, report=page)
    return run.summary


def job_for(ws: Workspace, changes: dict[str, Any], fingerprint: str) -> TrainJob:
    """The workspace's job, with changes to the card's train section."""
    card, options = ws.card, ws.card.train.model_copy(update=changes)
    if options.init is not None:
        options = options.model_copy(update={"init": init_place(options.init, ws.root)})
    return TrainJob(
        directory=ws.prior,
        embeddings=ws.embeddings,
        selection=ws.selection,
        report=ws.reports / "train.png",
        preset=card.prior.preset,
        options=options,
        encoder=card.encoder,
        fingerprint=fingerprint,
        validation_rows=card.evaluate.rows,
        validation_seed=card.evaluate.seed,
    )


def work(job: TrainJob, on_cpu: bool, quiet: bool, progress: Progress | None = None) -> dict[str, Any]:
    """One process's part of a job, alone or among others."""
    threads, products = torch.get_num_threads(), torch.backends.cuda.matmul
    exact = products.allow_tf32
    try:
        # Of a run in bfloat16 the contrastive loss alone multiplies float32, which would be a tenth of a large step.
        products.allow_tf32 = exact or job.options.precision == "bf16"
        with join(on_cpu=on_cpu) as world:
            return fit(
                job, world, progress if progress and world.is_main else Progress(quiet=quiet or not world.is_main)
            )
    finally:
        products.allow_tf32 = exact
        torch.set_num_threads(threads)  # a small network takes two; later stages of this process want all
