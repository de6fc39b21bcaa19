"""Prompts → text features → prior → decoder → files, in the layouts scorers read: the `render` stage."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.files import atomic_path
from ..pipeline.core.registry import find
from . import manifest
from .job import Job, Options, plan_job
from .layouts import picture_seed

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipeline.cache.packed_text import TextFeatures
    from ..pipeline.core.progress import Progress
    from ..pipeline.core.workspace import Workspace
    from .decoder import Decoder
    from .gallery import Entry, Shot
    from .layouts import Picture


# Where the layouts put pictures, and what `_write_batch` writes into each: how pictures are told from other people's.
PLACES = ("samples/*.png", "reference/*.png", f"{'[0-9]' * 5}/samples/*.png")
MARKS = ("prior", "encoder", "decoder", "steps", "guidance_scale")


@dataclass(frozen=True)
class _Models:
    """What makes the pictures: a row of `embeddings` (N, D) for each seed; `rows`: its row of `captions`."""

    embeddings: torch.Tensor
    decoder: Decoder
    captions: TextFeatures | None  # where the decoder reads them
    rows: list[int]


def render(ws: Workspace, progress: Progress, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Render prompts and write pictures, a contact sheet and a gallery; returns the summary.

    options: the fields of `job.Options`. Pictures that are already there are not made again; settings are never mixed
    in one folder. Older pictures are removed only once prompts, prior and decoder are known to work.

    Raises:
        UsageError, EclipseError: unreadable prompts, no prior, other settings, weights or disk that fail.
    """
    job = plan_job(ws, Options(**options))
    if not job.is_stage:
        with ws.lock("render"):
            return _render(ws, progress, job, _found(ws, job, overwrite=overwrite), overwrite=overwrite)
    with ws.stage("render", overwrite=overwrite) as run:
        if run.complete:
            return run.summary
        found = _found(ws, job, overwrite=overwrite)
        # Whether the stage may run again is settled: other pictures in its own folder are of an earlier prior.
        stale = found is not None and found["settings"] != job.settings
        run.finish(_render(ws, progress, job, found, overwrite=overwrite or stale, begin=run.begin))
    return run.summary


def _render(
    ws: Workspace,
    progress: Progress,
    job: Job,
    found: dict[str, Any] | None,
    *,
    overwrite: bool,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """found: the manifest that is there. begin: called when the models are known to work, just before it is written."""
    replaces = overwrite and found is not None
    # A folder that is not there, or whose pictures go, is claimed last. Any other is, or is refused, at once.
    at_once = job.folder.exists() and not replaces
    if at_once:
        complete = manifest.claim(job.folder, job.settings, job.files, overwrite=False)
        if complete is not None:
            return {**complete, "already_complete": True}
    missing = {picture for picture in job.pictures if replaces or not (job.folder / picture.path).is_file()}
    models = _load(ws, progress, job) if missing else None
    begin()
    if found is not None and replaces:
        manifest.write(job.folder, **found)  # `claim` reads it, and it may be a damaged one
    if not at_once:
        manifest.claim(job.folder, job.settings, job.files, overwrite=overwrite)
    if models is not None:
        _make(progress, job, missing, models)
    summary = _show(ws, progress, job, made=len(missing))
    manifest.write(job.folder, job.settings, job.files, summary)
    return summary


def _found(ws: Workspace, job: Job, *, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the job's folder, or None. With `overwrite` a damaged one is made up for from the pictures.

    Raises:
        UsageError, EclipseError: no folder, or a damaged manifest that is not to be, or cannot be, replaced.
    """
    if job.folder.exists() and not job.folder.is_dir():
        raise UsageError("this is a file, not a folder", where=str(job.folder), hint="name another with --out")
    try:
        found = manifest.read(job.folder)
        if found is None or _is_sound(found):
            return found
        problem = EclipseError("the manifest is damaged", where=str(job.folder / manifest.NAME))
    except EclipseError as error:
        problem = error
    except RecursionError:
        problem = EclipseError("the manifest is nested too deeply", where=str(job.folder / manifest.NAME))
    ours = _own_pictures(job.folder)
    if ours or job.folder.resolve().is_relative_to(ws.renders.resolve()):
        if overwrite:
            return {"settings": {}, "files": ours, "summary": None}
        problem.hint = "replace the pictures there with --overwrite, or name another folder with --out"
    raise problem


def _is_sound(found: dict[str, Any]) -> bool:
    files, summary = found["files"], found["summary"]
    named = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return named and isinstance(found["settings"], dict) and isinstance(summary, dict | None)


def _own_pictures(folder: Path) -> list[str]:
    """The pictures in a folder that carry the marks of `_write_batch`, relative to it."""
    from PIL import Image

    ours = []
    for path in (path for place in PLACES for path in sorted(folder.glob(place))):
        try:
            with Image.open(path) as image:
                if image.info.keys() >= set(MARKS):
                    ours.append(path.relative_to(folder).as_posix())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as Pillow fails on what is no PNG
            continue
    return ours


def _load(ws: Workspace, progress: Progress, job: Job) -> _Models:
    """What the pictures need. Encoder, prior and decoder are in memory one after the other, never together."""
    import torch

    from ..pipeline.core.card import resolve
    from .conditioning import encode_texts, load_encoder, pick_device, predict, unconditional
    from .decoder import load_decoder

    card, device = ws.card, pick_device()
    encoder = load_encoder(card, device)
    texts = encode_texts(encoder, [prompt.text for prompt in job.prompts], progress)
    if cut := (texts.n_tokens >= encoder.context_length).nonzero().flatten().tolist():
        first = job.prompts[cut[0]].text[:60]
        limit = f"{len(cut)} prompts fill the encoder's {encoder.context_length} tokens"
        progress.say(f"{limit}, the rest of them is not read; the first: {first}…")
    blank = unconditional(ws, encoder, card.decoder.kind, progress)
    nothing = encode_texts(encoder, [job.negative_prompt], progress) if job.negative_prompt else None
    del encoder
    shots = [(picture.prompt, seed) for picture in job.pictures for seed in picture.seeds]
    rows = [row for row, _ in shots]
    embeddings = predict(job.prior, texts, rows, [seed for _, seed in shots], device)
    if job.reference is not None:
        own = torch.tensor([picture.by_reference for picture in job.pictures for _ in picture.seeds])
        others = predict(job.reference, texts, rows, [seed for _, seed in shots], device)
        embeddings = torch.where(own[:, None], others, embeddings)
    if nothing is not None:
        seed = picture_seed(job.seed, str(job.negative_prompt), 0)
        blank = replace(blank, negative=predict(job.prior, nothing, [0], [seed], device)[0])
    decoder = load_decoder(
        card.decoder.kind,
        resolve(card.decoder.path),
        unconditional=blank,
        image_size=job.size,
        scheduler=job.scheduler,
        batch_size=card.decoder.batch_size,
        device=device,
    )
    if decoder.embedding_dim != embeddings.shape[1]:
        raise EclipseError(
            f"the decoder takes {decoder.embedding_dim} dims, the card's encoder makes {embeddings.shape[1]}",
            where=card.decoder.path,
            hint="name a decoder made for this encoder (decoder.path in the card)",
        )
    reads = card.decoder.kind == "karlo" and not job.blank_decoder_text
    return _Models(embeddings, decoder, texts if reads else None, rows)


def _make(progress: Progress, job: Job, missing: set[Picture], models: _Models) -> None:
    """Make the missing pictures, a batch of whole files at a time. A batch that exhausts the device is halved.

    A batch of which some are there already is made again and the others written: a picture made among fewer would
    differ in rounding from that of a run that nothing interrupted.
    """
    import torch

    files, size, done = deque(job.pictures), models.decoder.batch_size, 0
    with progress.task("render", len(models.rows), "pictures") as task:
        while files:
            batch = [files.popleft()]
            while files and sum(len(p.seeds) for p in batch) + len(files[0].seeds) <= size:
                batch.append(files.popleft())
            seeds = [seed for picture in batch for seed in picture.seeds]
            rows = slice(done, done + len(seeds))
            if missing.isdisjoint(batch):
                done += len(seeds)
                task.advance(len(seeds))
                continue
            images = None
            try:
                images = models.decoder.decode(
                    models.embeddings[rows],
                    seeds=seeds,
                    steps=job.steps,
                    guidance_scale=job.guidance_scale,
                    captions=None if models.captions is None else models.captions.select(models.rows[rows]),
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if images is None:  # out of the handler: the exception's traceback holds what is to be given back
                torch.cuda.empty_cache()
                size = len(seeds) // 2
                progress.say(f"{len(seeds)} pictures at a time exhaust the memory, now {size} (decoder.batch_size)")
                files.extendleft(reversed(batch))
                continue
            _write_batch(job, batch, images, missing)
            done += len(seeds)
            task.advance(len(seeds))


def _write_batch(job: Job, batch: Sequence[Picture], images: Sequence[Image.Image], missing: set[Picture]) -> None:
    from PIL.PngImagePlugin import PngInfo

    rest = iter(images)
    for picture in batch:
        own = [next(rest) for _ in picture.seeds]
        if picture not in missing:
            continue
        info = PngInfo()
        info.add_itxt("prompt", job.prompts[picture.prompt].text)
        for key in (*MARKS, *(["negative_prompt"] if job.negative_prompt else [])):
            of = "reference" if picture.by_reference and key == "prior" else key
            info.add_itxt(key, str(job.settings[of]))
        info.add_text("seed", " ".join(str(seed) for seed in picture.seeds))
        with atomic_path(job.folder / picture.path) as temporary:
            (own[0] if len(own) == 1 else _grid(own)).save(temporary, format="PNG", pnginfo=info)


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """Four pictures as 2×2, row by row."""
    from PIL import Image

    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for k, image in enumerate(images):
        grid.paste(image, (k % 2 * width, k // 2 * height))
    return grid


def _show(ws: Workspace, progress: Progress, job: Job, *, made: int) -> dict[str, Any]:
    """Sidecar files, contact sheet and gallery; returns the summary."""
    from .gallery import contact_sheet, html_gallery

    if job.settings["layout"] == "geneval":
        _write_metadata(job)
    progress.say("laying out the gallery")
    entries = _entries(ws, job)
    decoder = f"{ws.card.decoder.kind}, {job.steps} steps, guidance {job.guidance_scale:g}"
    settings = [("prior", job.settings["prior"]), ("decoder", decoder), ("seed", job.settings["seed"])]
    if job.reference is not None:
        settings.insert(1, ("reference prior", job.settings["reference"]))
    contact_sheet(entries, job.folder / "contact_sheet.png")
    html_gallery(entries, job.folder / "index.html", title=f"Pictures from text: {ws.card.name}", settings=settings)
    verdicts = [shot.right for entry in entries for shot in entry.shots if shot.right is not None]
    reference = [entry.reference.right for entry in entries if entry.reference and entry.reference.right is not None]
    return {
        "prompts": len(job.prompts),
        "pictures": len(job.pictures),
        "made": made,
        "layout": job.settings["layout"],
        "folder": str(job.folder),
        "gallery": str(job.folder / "index.html"),
        "contact_sheet": str(job.folder / "contact_sheet.png"),
        **({"right": round(sum(verdicts) / len(verdicts), 4)} if verdicts else {}),
        **({"right_reference": round(sum(reference) / len(reference), 4)} if reference else {}),
    }


def _write_metadata(job: Job) -> None:
    """GenEval's scorer reads each prompt's own JSON object beside its samples."""
    for i, prompt in enumerate(job.prompts):
        with atomic_path(job.folder / f"{i:05d}" / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(prompt.metadata), encoding="utf-8")


def _entries(ws: Workspace, job: Job) -> list[Entry]:
    """Prompts with their pictures, and the verdicts of the judge that is registered for the card's kind of source."""
    from PIL import Image

    from .gallery import Entry, Shot

    judge = find("judge", ws.card.source.kind)
    shots: list[list[Shot]] = [[] for _ in job.prompts]
    references: dict[int, Shot] = {}
    for picture in job.pictures:
        prompt, shot = job.prompts[picture.prompt], Shot(job.folder / picture.path, " ".join(map(str, picture.seeds)))
        if judge is not None and len(picture.seeds) == 1:
            with Image.open(shot.file) as image:
                verdict = judge(image, prompt)
            if verdict is not None:
                shot = replace(shot, right=verdict.right, facts=verdict.facts)
        if picture.by_reference:
            references[picture.prompt] = shot
        else:
            shots[picture.prompt].append(shot)
    return [
        Entry(prompt.text, tuple(own), prompt.category, prompt.split, references.get(i))
        for i, (prompt, own) in enumerate(zip(job.prompts, shots, strict=True))
    ]
