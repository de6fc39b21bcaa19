"""What one rendering is: its prompts, files and settings, worked out before anything heavy is loaded. For `render`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..pipeline.core import hub
from ..pipeline.core.card import resolve
from ..pipeline.core.errors import EclipseError, UsageError
from ..pipeline.core.files import file_sha256
from ..pipeline.core.registry import find
from ..pipeline.core.sections import MAX_DENOISING_STEPS, MAX_IMAGE_SIZE, Scheduler
from .layouts import DEFAULT_SAMPLES, Picture, beside, plan, slug
from .prompts import Prompt, default_prompts, prompts_of, read_prompts

if TYPE_CHECKING:
    from ..pipeline.core.sections import DecoderSection
    from ..pipeline.core.workspace import Workspace

SHAPES_PROMPTS_PER_CATEGORY = 4
TEXT_PRIOR = "text"  # in place of a prior: the raw text embedding, the baseline every comparison needs
MIN_SIDE = 16  # pixels of a picture
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Options:
    """What a caller may choose; None is filled in from the card."""

    prompts: Path | Sequence[str] | None = None  # a file (see `read_prompts`) or texts
    out: Path | None = None  # the folder; None: one under the workspace's renders/
    layout: str = "flat"
    samples: int | None = None  # pictures per prompt
    seed: int | None = None
    prior: str | None = None  # a directory or hub id, or "text" for the raw text embedding; None: the workspace's own
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    blank_decoder_text: bool = False  # Karlo's decoder sees the empty caption instead of the prompt
    negative_prompt: str | None = None  # what guidance leads away from, through the prior
    width: int | None = None  # of the pictures in pixels; the card's side where one is left out
    height: int | None = None
    prompt_column: str | None = None  # of a .csv or .tsv, in place of Prompt


@dataclass(frozen=True)
class Job:
    """Everything that decides what the pictures look like. `is_stage`: nothing was chosen, the card decides all."""

    prompts: tuple[Prompt, ...]
    pictures: tuple[Picture, ...]
    folder: Path
    prior: str
    reference: str | None  # of the pictures `by_reference`
    steps: int
    guidance_scale: float
    scheduler: str | None
    blank_decoder_text: bool
    negative_prompt: str | None
    size: tuple[int, int]
    seed: int
    settings: dict[str, Any]
    is_stage: bool

    @property
    def files(self) -> list[str]:
        return [picture.path.as_posix() for picture in self.pictures]


def plan_job(ws: Workspace, options: Options) -> Job:
    """Fill in from the card what was left open, and check what can be checked without loading a model.

    Raises:
        UsageError: what `read_prompts` and `plan` raise; a setting that the decoder cannot work with; a prior or a
            decoder that is not there. EclipseError: there is no trained prior.
    """
    card, layout = ws.card, options.layout
    prompts = _prompts(ws, options.prompts, options.prompt_column)
    default_samples = card.render.samples if layout == "flat" else DEFAULT_SAMPLES.get(layout, 1)
    samples = default_samples if options.samples is None else options.samples
    seed = card.render.seed if options.seed is None else options.seed
    pictures = plan(layout, prompts, samples, seed)
    prior = str(ws.prior / "final") if options.prior is None else options.prior
    if options.prior not in (None, TEXT_PRIOR):
        _require_place(prior, "prior", hint="name a directory, a hub id such as owner/name, or text (--prior)")
    steps = card.decoder.steps if options.steps is None else options.steps
    guidance = card.decoder.guidance_scale if options.guidance_scale is None else options.guidance_scale
    scheduler = card.decoder.scheduler if options.scheduler is None else options.scheduler
    size = (options.width or card.decoder.image_size, options.height or card.decoder.image_size)
    negative = (options.negative_prompt or "").strip() or None
    _check_decoder(card.decoder, steps, guidance, scheduler, options.blank_decoder_text, negative, size)
    is_stage = options == Options()
    # Prompts that a judge knows are shown with what training on gives, where the card says what did.
    reference = None
    if is_stage and find("judge", card.source.kind) is not None and not card.render.prompts and card.evaluate.reference:
        reference = resolve(card.evaluate.reference)
        _require_place(reference, "reference prior", hint="name another in the card's evaluate.reference, or none")
        pictures += beside(pictures)
    settings = {
        "layout": layout,
        "samples": samples,
        "seed": seed,
        "prompts": _digest([[prompt.name, prompt.text, prompt.metadata] for prompt in prompts]),
        "prior": prior_identity(prior),
        "encoder": card.section_fingerprint("encoder")[:16],
        "decoder": card.decoder.path,
        "image_size": size[0] if size[0] == size[1] else f"{size[0]} × {size[1]}",
        "steps": steps,
        "guidance_scale": guidance,
        "scheduler": scheduler,
        "blank_decoder_text": options.blank_decoder_text,
        **({"negative_prompt": negative} if negative else {}),
        **({"reference": prior_identity(reference)} if reference else {}),
    }
    return Job(
        prompts=tuple(prompts),
        pictures=tuple(pictures),
        folder=_folder(ws, options, is_stage, settings),
        prior=prior,
        reference=reference,
        steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        blank_decoder_text=options.blank_decoder_text,
        negative_prompt=negative,
        size=size,
        seed=seed,
        settings=settings,
        is_stage=is_stage,
    )


def _check_decoder(
    section: DecoderSection,
    steps: int,
    guidance: float,
    scheduler: str | None,
    blank_text: bool,
    negative: str | None,
    size: tuple[int, int],
) -> None:
    """Raise UsageError for settings that this kind of decoder would refuse later, after minutes of loading."""
    karlo = section.kind == "karlo"
    least = 2 if karlo else 1  # Karlo's schedule is the way between two times
    if not least <= steps <= MAX_DENOISING_STEPS:
        raise UsageError(f"{steps} denoising steps", hint=f"use {least} to {MAX_DENOISING_STEPS}")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise UsageError(f"a guidance scale of {guidance:g}", hint="use a finite number from 0 up")
    if scheduler is not None and scheduler not in get_args(Scheduler):
        raise UsageError(f"unknown scheduler {scheduler!r}", hint=f"use one of: {', '.join(get_args(Scheduler))}")
    if scheduler is not None and karlo:
        raise UsageError("Karlo's decoder has one scheduler of its own", hint="leave decoder.scheduler out")
    if negative and karlo:
        raise UsageError("Karlo's decoder takes no negative prompt", hint="leave --negative out")
    if negative and guidance <= 1:
        raise UsageError(
            f"a negative prompt has no effect at a guidance scale of {guidance:g}",
            hint="use --guidance-scale 4 or more",
        )
    if not all(MIN_SIDE <= side <= MAX_IMAGE_SIZE for side in size):
        raise UsageError(f"pictures of {size[0]} × {size[1]} px", hint=f"use sides of {MIN_SIDE} to {MAX_IMAGE_SIZE}")
    if not karlo and (levels := _movq_levels(Path(resolve(section.path)))) is not None:
        from .kandinsky import require_size

        require_size(size, levels)
    if blank_text and not karlo:
        raise UsageError(f"a {section.kind} decoder reads no text", hint="leave --blank-decoder-text out")
    _require_place(resolve(section.path), "decoder", hint="name a directory or a hub id (decoder.path in the card)")


def _movq_levels(decoder: Path) -> int | None:
    """How many levels a local decoder's MoVQ has; None where its config cannot be read, which loading will explain."""
    try:
        return len(json.loads((decoder / "movq" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _require_place(name: str, what: str, *, hint: str) -> None:
    """Raise UsageError unless `name` is a directory, or can be a hub id."""
    path = Path(name)
    if name and path.is_dir():
        return
    if name and path.exists():
        raise UsageError(f"this is a file, not the directory of a {what}", where=name, hint=hint)
    if not hub.is_hub_id(name):
        raise UsageError(f"no such {what}", where=repr(name) if not name.strip() else name, hint=hint)


def _folder(ws: Workspace, options: Options, is_stage: bool, settings: dict[str, Any]) -> Path:
    if options.out is not None:
        return Path(options.out)
    if isinstance(options.prompts, Path):
        return ws.renders / f"{options.prompts.stem}-{options.layout}"
    if options.prompts is not None and len(options.prompts) == 1:
        # A prompt typed on the command line, and again with another seed: each has a folder of its own.
        return ws.renders / f"{slug(options.prompts[0], 48) or 'prompt'}-{_digest(settings)[:6]}"
    return ws.renders / ("default" if is_stage else f"custom-{options.layout}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def prior_identity(prior: str) -> str:
    """What tells one prior from another: the first 16 digits of its weights' SHA-256, or a hub id.

    Raises EclipseError if a local directory holds no readable weights.
    """
    path = Path(prior)
    if prior == TEXT_PRIOR or not (path.is_absolute() or path.is_dir()):
        return prior
    try:
        return file_sha256(path / WEIGHTS)[:16]
    except OSError as error:
        raise EclipseError(
            f"there is no prior: {error.strerror}",
            where=str(path / WEIGHTS),
            hint="run `eclipse train`, or name one with --prior",
        ) from None


def _prompts(ws: Workspace, prompts: Path | Sequence[str] | None, column: str | None) -> list[Prompt]:
    if isinstance(prompts, Path):
        return read_prompts(prompts, column=column)
    if column is not None:
        raise UsageError("only a .csv or .tsv has columns", hint="leave --prompt-column out, or name such a file")
    if prompts is not None or ws.card.render.prompts:
        return prompts_of(prompts if prompts is not None else ws.card.render.prompts)
    return default_prompts(ws.card, SHAPES_PROMPTS_PER_CATEGORY)
