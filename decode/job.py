"""What one rendering is: its prompts, files and settings, worked out before anything heavy is loaded. For `render`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EclipseError, UsageError
from .layouts import DEFAULT_SAMPLES, Picture, plan
from .prompts import Prompt, default_prompts, prompts_of, read_prompts

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace

SHAPES_PROMPTS_PER_CATEGORY = 4
TEXT_PRIOR = "text"  # in place of a prior: the raw text embedding, the baseline every comparison needs
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Options:
    """What a caller may choose; None is filled in from the card."""

    prompts: Path | Sequence[str] | None = None  # a file (see `read_prompts`) or texts
    out: Path | None = None  # the folder; None: one under the workspace's renders/
    layout: str = "flat"
    samples: int | None = None  # pictures a prompt
    seed: int | None = None
    prior: str | None = None  # a directory or hub id, or "text" for the raw text embedding; None: the workspace's own
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    blank_decoder_text: bool = False  # Karlo's decoder sees the empty caption instead of the prompt


@dataclass(frozen=True)
class Job:
    """Everything that decides what the pictures look like. `is_stage`: nothing was chosen, the card decides all."""

    prompts: tuple[Prompt, ...]
    pictures: tuple[Picture, ...]
    folder: Path
    prior: str
    steps: int
    guidance_scale: float
    scheduler: str | None
    blank_decoder_text: bool
    settings: dict[str, Any]
    is_stage: bool

    @property
    def files(self) -> list[str]:
        return [picture.path.as_posix() for picture in self.pictures]


def plan_job(ws: Workspace, options: Options) -> Job:
    """Fill in from the card what was left open. Raises what `read_prompts` and `plan` raise, and without a prior."""
    card, layout = ws.card, options.layout
    prompts = _prompts(ws, options.prompts)
    default_samples = card.render.samples if layout == "flat" else DEFAULT_SAMPLES.get(layout, 1)
    samples = default_samples if options.samples is None else options.samples
    seed = card.render.seed if options.seed is None else options.seed
    pictures = plan(layout, prompts, samples, seed)
    prior = options.prior or str(ws.prior / "final")
    steps = card.decoder.steps if options.steps is None else options.steps
    guidance = card.decoder.guidance_scale if options.guidance_scale is None else options.guidance_scale
    scheduler = options.scheduler or card.decoder.scheduler
    if steps < 1 or guidance < 0:
        raise UsageError(f"{steps} steps, guidance {guidance:g}", hint="use at least 1 step, guidance from 0 up")
    settings = {
        "layout": layout,
        "samples": samples,
        "seed": seed,
        "prompts": _digest([[prompt.name, prompt.text, prompt.metadata] for prompt in prompts]),
        "prior": prior_identity(prior),
        "encoder": card.fingerprint("encoder")[:16],
        "decoder": card.decoder.path,
        "image_size": card.decoder.image_size,
        "steps": steps,
        "guidance_scale": guidance,
        "scheduler": scheduler,
        "blank_decoder_text": options.blank_decoder_text,
    }
    is_stage = options == Options()
    return Job(
        prompts=tuple(prompts),
        pictures=tuple(pictures),
        folder=_folder(ws, options, is_stage),
        prior=prior,
        steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        blank_decoder_text=options.blank_decoder_text,
        settings=settings,
        is_stage=is_stage,
    )


def _folder(ws: Workspace, options: Options, is_stage: bool) -> Path:
    if options.out is not None:
        return Path(options.out)
    if isinstance(options.prompts, Path):
        return ws.renders / f"{options.prompts.stem}-{options.layout}"
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
        with (path / WEIGHTS).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise EclipseError(
            f"there is no prior: {error.strerror}",
            where=str(path / WEIGHTS),
            hint="run `eclipse train`, or name one with --prior",
        ) from None


def _prompts(ws: Workspace, prompts: Path | Sequence[str] | None) -> list[Prompt]:
    if isinstance(prompts, Path):
        return read_prompts(prompts)
    if prompts is not None or ws.card.render.prompts:
        return prompts_of(prompts if prompts is not None else ws.card.render.prompts)
    return default_prompts(ws.card, SHAPES_PROMPTS_PER_CATEGORY)
