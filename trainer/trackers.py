"""Where figures go besides metrics.jsonl: TensorBoard events, and Weights & Biases if the card names a project. Used by
log.py and loop.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..pipeline.core.errors import UsageError
from ..pipeline.core.files import atomic_path

EVERY = 10  # steps between training figures; metrics.jsonl has them all


class Tracker(Protocol):
    """Takes finite figures by name, such as "train/loss", after a step."""

    def add(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files; those of steps that a resumed run makes again are hidden."""

    def __init__(self, directory: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=from_step + 1 if from_step else None)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of a project on Weights & Biases; resumed training goes on in it. WANDB_MODE=offline keeps it on this disk.

    Raises UsageError if the package is missing or refuses to start.
    """

    def __init__(self, directory: Path, project: str, identity: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            hint = "install it (pip install wandb), or set train.wandb to null"
            raise UsageError("Weights & Biases is not installed", where="train.wandb", hint=hint) from error
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        try:
            self._run = wandb.init(
                project=project, dir=str(directory), id=identity, resume="allow", config=config, settings=quiet
            )
        except wandb.Error as error:
            hint = "run `wandb login`, set WANDB_MODE=offline, or set train.wandb to null"
            raise UsageError(f"Weights & Biases did not start: {error}", where="train.wandb", hint=hint) from error

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(directory: Path, from_step: int, project: str | None, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run in `directory`; TensorBoard's is left out where a training node lacks the package."""
    trackers: list[Tracker] = []
    if project is not None:
        trackers.append(WandB(directory, project, _identity(directory), config))
    with suppress(ImportError):
        trackers.append(TensorBoard(directory / "tensorboard", from_step))
    return trackers


def _identity(directory: Path) -> str:
    """The W&B run of what is trained in `directory`: a resume goes on in it, a training begun anew gets another.

    Drawn once and kept beside the checkpoints: W&B drops what comes to a known run with smaller steps than it had.
    """
    path = directory / "wandb-run-id"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:16])
    return path.read_text()
