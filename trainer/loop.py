"""The training loop: batches in, a trained prior out. Called by stage.py, on every process that trains."""

from __future__ import annotations

from typing import Any

import torch

from ..pipeline.core.errors import EclipseError
from ..pipeline.core.progress import Progress
from .data.batches import Batches
from .data.verify import PageCheck
from .distributed import DistEnv, describe
from .evaluate import beside_baselines, embedding_metrics, nearest_pictures, some_captions
from .log import MetricsLog, add_sample, draw_curves
from .model.prior import save_prior
from .pace import Pace
from .run import Run, TrainJob, prepare
from .steps import on_device, open_steps
from .stopping import StopSignals, raise_stopped
from .trackers import open_trackers

SHOWN_OVER_TIME = 6  # captions whose nearest pictures are noted at every validation


def fit(job: TrainJob, world: DistEnv, progress: Progress) -> dict[str, Any]:
    """Train to the job's last step, from where a former run stopped, and write final/. The summary, JSON-ready.

    On SIGTERM and Ctrl-C: saves, then raises Terminated or KeyboardInterrupt. EclipseError if the loss diverges, or if
    a page of the cache is damaged; then nothing is kept of what was learnt since the start.
    """
    run = prepare(job, world, progress.say)
    options = job.options
    with (
        StopSignals() as stop,
        open_log(run) as log,
        PageCheck(run.store, rank=world.rank, world_size=world.size) as check,
        open_batches(run) as batches,
        progress.task("train", options.steps, "steps") as task,
    ):
        task.advance(run.step)
        steps, pace, sound = open_steps(run, stop), Pace(run.prior.config, world), False
        while run.step < options.steps:
            batch = next(batches)
            pace.begins()
            done = steps.take(batch)
            pace.took(batch, batches.wait_seconds)
            last = run.step == options.steps
            measures = last or run.step % options.validate_every == 0
            keeps = last or steps.stopped or run.step % options.checkpoint_every == 0
            if measures or keeps:
                done += steps.settle()  # weights and guard are those of this very step from here on
            for each in done:
                log.add("train", each.step, each.figures)
                task.advance(failures=int(each.figures["skipped"]))
            if measures or keeps:
                with pace.away():
                    sound = sound or pages_are_sound(run, check, stop)
                    if measures and sound:
                        validate(run, log)
                    if keeps:
                        log.flush()
                        if world.is_main and sound:
                            run.save()
            if pace.is_news():
                task.describe(f"{log.summary()}, {pace}")
            if steps.stopped:
                raise_stopped(steps.stopped, run.step, saved=sound)
        if slow := pace.slowness():
            progress.say(slow)
        speed = pace.summary()  # before trackers and threads take their time to end
    return finish(run, log, speed)


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


def open_log(run: Run) -> MetricsLog:
    """The metrics of this run, from its step on; those of processes that do not lead go nowhere."""
    job, leads = run.job, run.world.is_main
    config = {"fingerprint": job.fingerprint, "preset": job.preset, **job.options.model_dump(mode="json")}
    trackers = open_trackers(job.directory, run.step, job.options.wandb, config) if leads else []
    return MetricsLog(job.directory, run.step, active=leads, trackers=trackers)


def open_batches(run: Run) -> Batches:
    """The stream of this process's shares, from the run's step on."""
    options, world, config = run.job.options, run.world, run.prior.config
    layout = config.additional_embeddings, config.num_embeddings, options.draws
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
        bins_for=layout if on_device(run) else None,
    )


def validate(run: Run, log: MetricsLog) -> None:
    """Measure the averaged weights on rows that are held back, all processes a share; keep the best so far as best/."""
    metrics = embedding_metrics(
        run.average,
        run.store,
        run.validation_rows,
        run.job.validation_seed,
        states_from=run.states_from,
        world=run.world,
        half=run.half,
    )
    if not run.world.is_main:
        return
    run.validation = log.add("validation", run.step, metrics)
    some = some_captions(run.validation_rows, run.job.validation_seed, SHOWN_OVER_TIME)
    of = run.average, run.store, some, run.validation_rows, run.job.validation_seed
    found, cosine = nearest_pictures(*of, 1, states_from=run.states_from)
    add_sample(run.job.directory, run.step, some, found[:, 0], cosine[:, 0])
    if run.best is None or metrics["cosine_image"] > run.best["cosine_image"]:
        run.best = {"step": run.step, **metrics}
        save_prior(run.average, run.job.directory / "best")


def finish(run: Run, log: MetricsLog, speed: dict[str, Any]) -> dict[str, Any]:
    """Write final/ and the curves, and sum the run up."""
    job = run.job
    if run.guard.skipped == run.step:
        hint = (
            "lower train.learning_rate and train.lambda, or raise train.temperature; then `eclipse train --overwrite`"
        )
        raise EclipseError("nothing was learnt: every step was skipped", where=f"{run.step} steps", hint=hint)
    final = job.directory / "final"
    if run.world.is_main:
        save_prior(run.average, final)
        draw_curves(log.path, job.report)
    measured = beside_baselines(run.validation) if run.validation else {}
    return {
        "arm": job.options.arm,
        **({"init": job.options.init} if job.options.init else {}),
        "parameters": sum(p.numel() for p in run.prior.parameters()),
        "steps": run.step,
        "skipped_steps": run.guard.skipped,
        "train_rows": len(run.rows),
        "validation_rows": len(run.validation_rows),
        "device": f"{run.world.size} × {describe(run.world.device)}",
        **speed,
        "validation": run.validation,
        **measured,
        "best": run.best,
        "prior": str(final),
        "curves": str(job.report),
    }
