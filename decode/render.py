"""Prompts → text features → prior → decoder → files, in the layouts scorers read: the `render` stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import EclipseError
from ..pipeline.card import STAGE_SECTIONS
from ..pipeline.workspace import atomic_path
from . import manifest
from .job import Job, Options, plan_job

if TYPE_CHECKING:
    from PIL import Image

    from ..lab.shapes import Prompt as ShapesPrompt
    from ..pipeline.workspace import Workspace
    from ..progress import Progress
    from .gallery import Entry, Shot
    from .layouts import Picture


def render(ws: Workspace, progress: Progress, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Render prompts and write pictures, a contact sheet and a gallery; returns the summary.

    options: the fields of `job.Options`. Pictures that are already there are not made again; settings are never mixed
    in one folder.

    Raises:
        UsageError, EclipseError: unreadable prompts, no prior, other settings, weights or disk that fail.
    """
    job = plan_job(ws, Options(**options))
    if not job.is_stage:
        return _render(ws, progress, job, overwrite=overwrite)
    fingerprint = ws.card.fingerprint(*STAGE_SECTIONS["render"])
    if overwrite:
        ws.reset("render")
    elif summary := ws.completed("render", fingerprint):
        return summary
    ws.begin("render", fingerprint)
    found = manifest.read(job.folder)
    # Whether the stage may run again was settled above: other pictures in its own folder are of an earlier prior.
    stale = found is not None and found["settings"] != job.settings
    summary = _render(ws, progress, job, overwrite=overwrite or stale)
    ws.finish("render", fingerprint, summary)
    return summary


def _render(ws: Workspace, progress: Progress, job: Job, *, overwrite: bool) -> dict[str, Any]:
    complete = manifest.claim(job.folder, job.settings, job.files, overwrite=overwrite)
    if complete is not None:
        return {**complete, "already_complete": True}
    missing = [picture for picture in job.pictures if not (job.folder / picture.path).is_file()]
    if missing:
        _make(ws, progress, job, missing)
    summary = _show(ws, progress, job, made=len(missing))
    manifest.write(job.folder, job.settings, job.files, summary)
    return summary


def _make(ws: Workspace, progress: Progress, job: Job, missing: Sequence[Picture]) -> None:
    """Make the missing pictures. Encoder, prior and decoder are in memory one after the other, never together."""
    from ..pipeline.card import resolve
    from .conditioning import encode_texts, load_encoder, pick_device, predict, unconditional
    from .decoder import load_decoder

    card, device = ws.card, pick_device()
    encoder = load_encoder(card, device)
    used = sorted({picture.prompt for picture in missing})
    texts = encode_texts(encoder, [job.prompts[i].text for i in used], progress)
    if texts.cut:
        first = job.prompts[used[texts.cut[0]]].text[:60]
        limit = f"{len(texts.cut)} prompts fill the encoder's {encoder.context_length} tokens"
        progress.say(f"{limit}, the rest of them is not read; the first: {first}…")
    blank = unconditional(ws, encoder, card.decoder.kind, progress)
    del encoder
    row_of = {prompt: row for row, prompt in enumerate(used)}
    shots = [(row_of[picture.prompt], seed) for picture in missing for seed in picture.seeds]
    embeddings = predict(job.prior, texts, [row for row, _ in shots], [seed for _, seed in shots], device)
    decoder = load_decoder(
        card.decoder.kind,
        resolve(card.decoder.path),
        unconditional=blank,
        image_size=card.decoder.image_size,
        scheduler=job.scheduler,
        device=device,
    )
    if decoder.embedding_dim != embeddings.shape[1]:
        raise EclipseError(
            f"the decoder takes {decoder.embedding_dim} dims, the card's encoder makes {embeddings.shape[1]}",
            where=card.decoder.path,
            hint="name a decoder made for this encoder (decoder.path in the card)",
        )
    captions = texts.captions() if card.decoder.kind == "karlo" and not job.blank_decoder_text else None
    with progress.task("render", sum(len(p.seeds) for p in job.pictures), "pictures") as task:
        task.advance(sum(len(p.seeds) for p in job.pictures) - len(shots))
        done = 0
        for batch in _batches(missing, decoder.batch_size):
            seeds = [seed for picture in batch for seed in picture.seeds]
            rows = [row for row, _ in shots[done : done + len(seeds)]]
            images = decoder.decode(
                embeddings[done : done + len(seeds)],
                seeds=seeds,
                steps=job.steps,
                guidance_scale=job.guidance_scale,
                captions=None if captions is None else captions.take(rows),
            )
            _write_batch(job, batch, images)
            done += len(seeds)
            task.advance(len(seeds))


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[list[Picture]]:
    """Whole files, about `size` pictures at a time."""
    batch: list[Picture] = []
    for picture in pictures:
        if batch and sum(len(p.seeds) for p in batch) + len(picture.seeds) > size:
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _write_batch(job: Job, batch: Sequence[Picture], images: Sequence[Image.Image]) -> None:
    from PIL.PngImagePlugin import PngInfo

    rest = iter(images)
    for picture in batch:
        own = [next(rest) for _ in picture.seeds]
        info = PngInfo()
        info.add_itxt("prompt", job.prompts[picture.prompt].text)
        for key in ("prior", "encoder", "decoder", "steps", "guidance_scale"):
            info.add_itxt(key, str(job.settings[key]))
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
    contact_sheet(entries, job.folder / "contact_sheet.png")
    html_gallery(entries, job.folder / "index.html", title=f"Pictures from text: {ws.card.name}", settings=settings)
    verdicts = [shot.right for entry in entries for shot in entry.shots if shot.right is not None]
    return {
        "prompts": len(job.prompts),
        "pictures": len(job.pictures),
        "made": made,
        "layout": job.settings["layout"],
        "folder": str(job.folder),
        "gallery": str(job.folder / "index.html"),
        "contact_sheet": str(job.folder / "contact_sheet.png"),
        **({"right": round(sum(verdicts) / len(verdicts), 4)} if verdicts else {}),
    }


def _write_metadata(job: Job) -> None:
    """GenEval's scorer reads each prompt's own JSON object beside its samples."""
    for i, prompt in enumerate(job.prompts):
        with atomic_path(job.folder / f"{i:05d}" / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(prompt.metadata), encoding="utf-8")


def _entries(ws: Workspace, job: Job) -> list[Entry]:
    """Prompts with their pictures, judged by the shapes world's checker where the prompts are that world's own."""
    from .gallery import Entry, Shot

    judged = ws.card.source.kind == "shapes"
    shots: list[list[Shot]] = [[] for _ in job.prompts]
    for picture in job.pictures:
        prompt, shot = job.prompts[picture.prompt], Shot(job.folder / picture.path, " ".join(map(str, picture.seeds)))
        if judged and prompt.wanted is not None and len(picture.seeds) == 1:
            shot = _judged(shot, prompt.wanted)
        shots[picture.prompt].append(shot)
    return [
        Entry(prompt.text, tuple(own), prompt.category, prompt.split)
        for prompt, own in zip(job.prompts, shots, strict=True)
    ]


def _judged(shot: Shot, wanted: ShapesPrompt) -> Shot:
    import numpy as np
    from PIL import Image

    from ..lab.checker import judge, read
    from ..lab.shapes import IMAGE_SIZE

    with Image.open(shot.file) as image:
        verdict = judge(read(np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))), wanted)
    facts = tuple((fact.asked if fact.right else f"{fact.asked}: {fact.seen}", fact.right) for fact in verdict.facts)
    return replace(shot, right=verdict.all_right, facts=facts)
