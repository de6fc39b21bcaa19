"""The training loop, and the stage around it. Called by stages.py for `eclipse train`; the lab calls `fit`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.progress import Progress
from ..pipeline.core.seeds import stream_seed
from .data.batches import Batch, Batches
from .data.verify import PageCheck
from .distributed import World, count_gpus, describe, join, under_launcher
from .evaluate import beside_baselines, embedding_metrics
from .log import FILE, MetricsLog, draw_curves, read_metrics
from .loss import Draw
from .model.prior import save_prior
from .run import ARMS, Job, Run, average_weights, check_init, init_place, prepare
from .schedule import learning_rate
from .spawn import spawn
from .stopping import StopSignals, raise_stopped
from .trackers import open_trackers

if TYPE_CHECKING:
    from ..pipeline.core.workspace import Workspace


def fit(job: Job, world: World, progress: Progress) -> dict[str, Any]:
    """Train to the job's last step, from where a former run stopped, and write final/. The summary, JSON-ready.

    On SIGTERM and Ctrl-C: saves, then raises Terminated or KeyboardInterrupt. EclipseError if the loss diverges, or if
    a page of the cache is damaged; then nothing is kept of what was learnt since the start.
    """
    run = prepare(job, world, progress.say)
    options, began, resumed_at = job.options, time.monotonic(), run.step
    with (
        StopSignals() as stop,
        open_log(run) as log,
        PageCheck(run.store, rank=world.rank, world_size=world.size) as check,
        open_batches(run) as batches,
        progress.task("train", options.steps, "steps") as task,
    ):
        task.advance(run.step)
        sound = False
        while run.step < options.steps:
            figures, stopped = training_step(run, next(batches), stop)
            log.add("train", run.step, figures)
            task.advance(failures=int(figures["skipped"]))
            last = run.step == options.steps
            measures = last or run.step % options.validate_every == 0
            keeps = last or stopped or run.step % options.checkpoint_every == 0
            if (measures or keeps) and not sound:
                sound = pages_are_sound(run, check, stop)
            if measures and sound:
                validate(run, log)
                task.describe(log.summary())
            if keeps:
                log.flush()
                if world.leads and sound:
                    run.save()
            if stopped:
                raise_stopped(stopped, run.step, saved=sound)
    return finish(run, log, seconds=time.monotonic() - began, steps=run.step - resumed_at, waited=batches.wait_seconds)


def pages_are_sound(run: Run, check: PageCheck, stop: StopSignals) -> bool:
    """Wait until every page of the cache is checked, by whichever process; False if a signal came before.

    Raises EclipseError that names the damaged file, column and rows.
    """
    check.wait(lambda: bool(stop.received))
    flags = torch.tensor([float(check.running), float(check.failure is not None)], device=run.world.device)
    running, failed = run.world.mean(flags).tolist()  # one answer for all processes
    if failed:
        raise check.failure or RuntimeError("another process found a damaged page")
    return not running


def training_step(run: Run, batch: Batch, stop: StopSignals) -> tuple[dict[str, float], int]:
    """One update from a global batch, of which `batch` is this process's share: figures, and the signal to stop at."""
    options = run.job.options
    terms = accumulate_gradient(run, batch)
    norm = torch.nn.utils.clip_grad_norm_(run.prior.parameters(), options.clip_gradient)
    values = torch.stack([*terms.values(), norm])
    # Every process sees the same means, and so comes to the same decisions.
    shared = run.world.mean(torch.cat([values, values.new_tensor(stop.flags())])).tolist()
    figures = dict(zip([*terms, "gradient_norm"], shared[:-2], strict=True))
    rate = learning_rate(
        run.step,
        peak=options.learning_rate,
        warmup=options.warmup,
        steps=options.steps,
        restarts=options.restarts,
    )
    accepted = run.guard.accepts(run.step, figures["loss"], figures["gradient_norm"])
    if accepted:
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        average_weights(run.average, run.prior, step=run.step, decay=options.ema)
    run.prior.zero_grad()
    run.step += 1
    return {**figures, "learning_rate": rate, "skipped": float(not accepted)}, stop.signal_of(shared[-2:])


def accumulate_gradient(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Backward through the batch, in pieces of options.microbatch rows if that is set; the losses' means over it.

    Each piece is contrasted with the texts of the whole global batch, so pieces change nothing but rounding.
    """
    size, texts = len(batch.rows), run.world.gather(batch.text_embedding)
    draw = draw_for(run, len(texts))
    offset = run.world.rank * size
    means: dict[str, Tensor] = {}
    for start in range(0, size, piece_size := run.job.options.microbatch or size):
        stop = min(start + piece_size, size)
        own = slice(offset + start, offset + stop)
        last_piece = stop == size
        with nullcontext() if last_piece else gradients_kept(run):
            terms = run.objective(
                run.predict,
                batch.image_embedding[start:stop],
                batch.text_embedding[start:stop],
                batch.text if stop - start == size else batch.text.take(start, stop),
                Draw(draw.noise[own], draw.uniform[own]),
                texts,
                first=offset + start,
            )
            share = (stop - start) / size
            (terms["loss"] * share).backward()
        means = {name: means.get(name, 0) + share * term.detach() for name, term in terms.items()}
    return means


def gradients_kept(run: Run) -> Any:
    """Gradients stay on their process for now: they are exchanged with the last piece."""
    return run.model.no_sync() if isinstance(run.model, DistributedDataParallel) else nullcontext()


def draw_for(run: Run, count: int) -> Draw:
    """The random numbers of this step's global batch: they follow from seed and step, however many processes share."""
    seed = stream_seed("training draw", run.job.options.seed, run.step)
    generator = torch.Generator(run.world.device).manual_seed(seed)
    dim = run.prior.config.embedding_dim
    noise = torch.randn(count, dim, generator=generator, device=run.world.device)
    return Draw(noise, torch.rand(count, 2, generator=generator, device=run.world.device))


def open_log(run: Run) -> MetricsLog:
    """The metrics of this run, from its step on; those of processes that do not lead go nowhere."""
    job, leads = run.job, run.world.leads
    config = {"fingerprint": job.fingerprint, "preset": job.preset, **job.options.model_dump(mode="json")}
    trackers = open_trackers(job.directory, run.step, job.options.wandb, config) if leads else []
    return MetricsLog(job.directory, run.step, active=leads, trackers=trackers)


def open_batches(run: Run) -> Batches:
    """The stream of this process's shares, from the run's step on."""
    options, world = run.job.options, run.world
    return Batches(
        run.store,
        run.rows,
        options.batch_size,
        seed=options.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        dtype=torch.bfloat16 if run.half else torch.float32,
        position=run.step * options.batch_size,
        states_from=run.states_from,
        resident=options.resident,
        block_rows=options.block_rows,
    )


def validate(run: Run, log: MetricsLog) -> None:
    """Measure the averaged weights on rows that are held back; keep the best so far as best/."""
    if not run.world.leads:
        return
    rows, seed = run.validation_rows, run.job.validation_seed
    metrics = embedding_metrics(run.average, run.store, rows, seed, states_from=run.states_from)
    log.add("validation", run.step, metrics)
    if run.best is None or metrics["cosine_image"] > run.best["cosine_image"]:
        run.best = {"step": run.step, **metrics}
        save_prior(run.average, run.job.directory / "best")


def finish(run: Run, log: MetricsLog, *, seconds: float, steps: int, waited: float) -> dict[str, Any]:
    """Write final/ and the curves, and sum the run up."""
    job = run.job
    if run.guard.skipped == run.step:
        hint = (
            "lower train.learning_rate and train.lambda, or raise train.temperature; then `eclipse train --overwrite`"
        )
        raise EclipseError("nothing was learnt: every step was skipped", where=f"{run.step} steps", hint=hint)
    final = job.directory / "final"
    if run.world.leads:
        save_prior(run.average, final)
        draw_curves(log.path, job.report)
    validation = [line for line in read_metrics(log.path) if line["kind"] == "validation"]
    # A metrics.jsonl of an earlier version has no baselines in it.
    measured = beside_baselines(validation[-1]) if validation and "mean_cosine_image" in validation[-1] else {}
    return {
        "arm": job.options.arm,
        **({"init": job.options.init} if job.options.init else {}),
        "parameters": sum(p.numel() for p in run.prior.parameters()),
        "steps": run.step,
        "skipped_steps": run.guard.skipped,
        "train_rows": len(run.rows),
        "validation_rows": len(run.validation_rows),
        "device": f"{run.world.size} × {describe(run.world.device)}",
        "seconds": round(seconds, 2),
        "samples_per_second": round(steps * job.options.batch_size / seconds, 1) if steps else 0.0,
        "data_wait_share": round(waited / seconds, 4),
        "validation": validation[-1] if validation else {},
        **measured,
        "best": run.best,
        "prior": str(final),
        "curves": str(job.report),
    }


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

            page = train_page(ws, read_metrics(job.directory / FILE), summary)
        run.finish(summary, report=page)
    return run.summary


def job_for(ws: Workspace, changes: dict[str, Any], fingerprint: str) -> Job:
    """The workspace's job, with changes to the card's train section."""
    card, options = ws.card, ws.card.train.model_copy(update=changes)
    if options.init is not None:
        options = options.model_copy(update={"init": init_place(options.init, ws.root)})
    return Job(
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


def work(job: Job, on_cpu: bool, quiet: bool, progress: Progress | None = None) -> dict[str, Any]:
    """One process's part of a job, alone or among others."""
    threads = torch.get_num_threads()
    try:
        with join(on_cpu=on_cpu) as world:
            return fit(job, world, progress if progress and world.leads else Progress(quiet=quiet or not world.leads))
    finally:
        torch.set_num_threads(threads)  # a small network takes one; later stages of this process want all
