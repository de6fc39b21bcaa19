"""Image shards → embedding parts: each part once and whole, every input accounted for. Called by cli.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.part import part_name
from ..core.errors import EclipseError, UsageError
from ..core.pool import Actors, Place, Processes, ray_cluster
from ..images.rejects import Reject, write_rejected
from ..images.sources import look, shards_of
from .fates import Fate
from .run import EmbedRun
from .tasks import ShardTask

if TYPE_CHECKING:
    from ..core.progress import Progress
    from ..core.workspace import Workspace
    from .lane import LaneSpec

STAGE = "embed"
BATCH_SIZES = {"cpu": 64, "cuda": 256}


def embed(
    ws: Workspace,
    progress: Progress,
    *,
    gpus: int | None = None,
    cluster: str = "local",
    overwrite: bool = False,
    text_states: bool | None = None,
    devices: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Embed every image shard of the workspace; finished parts are checked and kept.

    gpus: how many to use (None: all there are; 0: the CPU). cluster: `local`, `ray` or `ray://HOST:PORT`. text_states
    overrides the card's. devices: torch device names, a worker process each, instead of `gpus`. batch_size: pictures
    (None: 64 on a CPU, 256 on a GPU). Raises EclipseError if there is nothing to embed, if parts of other settings are
    in the way, if shards failed for good (named; the others are kept), or if an input has no fate.
    """
    keep_states = ws.card.encoder.text_states if text_states is None else text_states
    options = {} if keep_states == ws.card.encoder.text_states else {"text_states": keep_states}
    with ws.lock(STAGE):
        more = look(ws) > 0  # shards that have appeared since
    with ws.stage(STAGE, overwrite=overwrite, go_on=more, options=options) as run:
        if run.complete:
            return run.summary
        used = list(devices) if devices else _devices(gpus, cluster)
        tasks = plan(ws, batch_size or BATCH_SIZES[used[0].partition(":")[0]])

        def begin() -> None:
            """The encoder is there and everything asked for makes sense: nothing old goes before."""
            orphans = [] if overwrite else orphaned_parts(ws, tasks)
            run.begin()
            for part in orphans:
                progress.say(f"{part.name} is of an earlier download and has no image shard any more: removed")
                part.unlink()

        work = EmbedRun(tasks, progress, begin=begin, piece_done=run.give_up_old)
        spec = _spec(ws, progress, keep_states, used, run.card_fingerprint)
        if cluster != "local":
            with ray_cluster(cluster) as ray:
                actors = Actors(ray, spec, ws.root)
                work.by(actors, actors.places(gpus=used[0] != "cpu"))
        elif used == ["cpu"]:
            work.here(spec)
        else:
            names = [f"{device} {i}" if used.count(device) > 1 else device for i, device in enumerate(used)]
            pairs = zip(names, used, strict=True)
            work.by(Processes(spec), [Place(name, device, sharing=len(used)) for name, device in pairs])
        work.require_complete()
        summary, page = _summary(ws, work)
        run.finish(summary, report=page)
    return run.summary


def plan(ws: Workspace, batch_size: int) -> list[ShardTask]:
    """One task for each image shard, numbered like it. Raises EclipseError if there is none."""
    shards = shards_of(ws)
    if not shards:
        raise EclipseError("no image shards to embed", where=str(ws.images), hint="run `eclipse download` first")
    return [
        ShardTask(number, shard, ws.embeddings / part_name(number), _fates(ws) / f"{number:05d}.json", batch_size)
        for number, shard in shards.items()
    ]


def orphaned_parts(ws: Workspace, tasks: Sequence[ShardTask]) -> list[Path]:
    """Parts of a download that was made anew with fewer shards, which nothing will replace.

    Raises EclipseError for a part without a shard whose shard was not `download`'s: somebody took the pictures away.
    """
    wanted = {task.part.name for task in tasks}
    orphans = [path for path in sorted(ws.embeddings.glob("part-*.parquet")) if path.name not in wanted]
    if orphans and ws.stage("download").finished is None:
        raise EclipseError(
            "this part belongs to no image shard",
            where=str(orphans[0]),
            hint="move it away, or start over with `eclipse embed --overwrite`",
        )
    return orphans


def _fates(ws: Workspace) -> Path:
    return ws.logs / STAGE


def _devices(gpus: int | None, cluster: str) -> list[str]:
    if gpus == 0:
        return ["cpu"]
    if cluster != "local":
        return ["cuda"]  # whatever the cluster has; this machine's own devices do not matter
    import torch

    present = torch.cuda.device_count()
    if gpus is not None and gpus > present:
        raise UsageError(f"{gpus} GPUs asked for, {present} here", hint="leave --gpus out to use what there is")
    return [f"cuda:{index}" for index in range(gpus or present)] or ["cpu"]


def _spec(
    ws: Workspace, progress: Progress, text_states: bool, devices: Sequence[str], card_fingerprint: str
) -> LaneSpec:
    from .clip import PRESETS
    from .heads import find_head
    from .lane import LaneSpec

    section = ws.card.encoder
    model, pretrained = PRESETS.get(section.model, (section.model, section.pretrained))
    aesthetic = find_head(section.aesthetic, model, pretrained) if section.aesthetic else None
    if section.aesthetic and aesthetic is None:
        progress.say(f"no aesthetic head for {model}: parts get no aesthetic_score")
    heads = (("aesthetic", aesthetic), ("safety", section.safety))
    if devices == ["cpu"] and section.precision != "fp32":
        progress.say(f"the encoder computes in float32 on a CPU, where the card says {section.precision}")
    return LaneSpec(
        model=model,
        pretrained=pretrained,
        precision=section.precision,
        heads=tuple((kind, file) for kind, file in heads if file),
        text_states=text_states,
        card=card_fingerprint,
    )


def _summary(ws: Workspace, run: EmbedRun) -> tuple[dict[str, Any], Path]:
    """Add up the fates, write rejected.parquet and the page. Raises EclipseError if the counts do not add up."""
    totals = {"rows": 0, "inputs": 0, "parts": len(run.tasks), "truncated_captions": 0}

    def rejects() -> Iterator[Reject]:
        for task in run.tasks:
            fate = Fate.load(task)
            if fate is None:
                raise EclipseError("the account of this shard is gone", where=str(task.part), hint="run it again")
            fate.check()
            totals["rows"] += fate.rows
            totals["inputs"] += fate.inputs
            totals["truncated_captions"] += fate.truncated
            yield from fate.rejected

    reasons = write_rejected(ws, STAGE, rejects())
    set_aside = sum(reasons.values())
    if totals["inputs"] == 0:
        hint = "run `eclipse download`, or put tars with pictures there"
        raise EclipseError("the image shards hold no picture", where=str(ws.images), hint=hint)
    if totals["rows"] == 0:
        raise EclipseError(
            f"none of {totals['inputs']:,} inputs could be embedded", where=str(ws.rejected), hint="see its reasons"
        )
    from ..cache.store import Store
    from ..report.embed import embed_page

    assert run.meta is not None
    store = Store.open(ws.embeddings, encoder=run.meta.encoder_fingerprint)
    if not totals["inputs"] == totals["rows"] + set_aside == len(store) + set_aside:
        raise EclipseError(
            f"{totals['inputs']:,} inputs, but {len(store):,} rows and {set_aside:,} rejects: some have no fate",
            where=str(ws.embeddings),
            hint="start over with `eclipse embed --overwrite`, and please report this fault",
        )
    summary = {
        **totals,
        "rejected": reasons,
        "encoder": run.meta.encoder,
        "embedded_now": run.embedded,
        "images_per_s": round(run.embedded / run.seconds, 1) if run.embedded else 0.0,
        "devices": sorted(run.rates),
        "embeddings": str(ws.embeddings),
    }
    return summary, embed_page(ws, store, reasons)
