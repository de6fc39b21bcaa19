"""What a training run is made of, fresh or resumed: network, average, optimizer, rows. Called by loop.py."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..pipeline.cache.store import Store
from ..pipeline.core import hub
from ..pipeline.core.card import resolve
from ..pipeline.core.card_file import CARD_NAME
from ..pipeline.core.errors import EclipseError, UsageError
from .checkpoint import load_newest, point_latest, save_checkpoint
from .data.empty_caption import empty_caption
from .data.feeds import StatesFrom
from .data.live_text import live_text
from .data.split import split
from .distributed import DistEnv, describe, multiplies_bfloat16
from .guard import Guard
from .loss import Objective
from .model.diffusion import DiffusionObjective, DiffusionPrior
from .model.prior import PRESETS, Prior, load_prior
from .model.transformer import PriorConfig
from .optim import make_optimizers, optimizer_tensors, restore_optimizers
from .schedule import learning_rate

if TYPE_CHECKING:
    from ..pipeline.core.sections import EncoderSection, TrainSection

ARMS = ("eclipse", "projection", "diffusion")
PUBLISHED = ("karlo", "kandinsky22")  # presets whose embedding_dim is part of what they are
KEPT_CHECKPOINTS = 2
STATISTICS_ROWS = 10_000

WORTH_SPLITTING = 2_000_000  # parameters from which a CPU step gains from more threads than two


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, and where to put it. Plain values: processes are started with it.

    directory: the workspace's prior/, or any other. report: where the curves go. fingerprint: what a checkpoint must
    carry to be resumed. validation_rows: at most so many are measured.
    """

    directory: Path
    embeddings: Path
    selection: Path
    report: Path
    preset: str
    options: TrainSection
    encoder: EncoderSection
    fingerprint: str
    validation_rows: int
    validation_seed: int = 0
    continues: str | None = None  # the fingerprint of a finished run of fewer steps, whose checkpoints do too


@dataclass
class Run:
    """A run between two steps. `step` counts global batches consumed, skipped ones included; `states_from` makes token
    states where the cache stores none.
    """

    job: TrainJob
    world: DistEnv
    store: Store
    rows: np.ndarray
    validation_rows: np.ndarray
    prior: Prior | DiffusionPrior
    model: nn.Module
    average: Prior | DiffusionPrior
    optimizers: tuple[torch.optim.Optimizer, ...]
    objective: Objective | DiffusionObjective
    guard: Guard
    states_from: StatesFrom | None
    step: int = 0
    best: dict[str, Any] | None = None
    validation: dict[str, Any] = field(default_factory=dict)  # the latest; a log has no checksum

    @property
    def half(self) -> bool:
        """Whether the forward pass runs in bfloat16."""
        return self.job.options.precision == "bf16" and multiplies_bfloat16(self.world.device)

    def predict(self, *inputs: Any) -> Tensor:
        """The network, in the job's precision, with gradients exchanged between processes."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.half):
            return self.model(*inputs)

    def save(self) -> None:
        """Write a checkpoint; on the leading process only."""
        state = {
            "fingerprint": self.job.fingerprint,
            "rows": _identity(self.rows),
            "guard": asdict(self.guard),
            "best": self.best,
            "validation": self.validation,
        }
        tensors = {
            "prior": self.prior.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer_tensors(self.optimizers, self.prior),
        }
        save_checkpoint(self.job.directory / "checkpoints", self.step, state, tensors, keep=KEPT_CHECKPOINTS)

    def resume(self, say: Callable[[str], None]) -> None:
        """Continue from the newest intact checkpoint, if there is one."""
        folder = self.job.directory / "checkpoints"
        found = load_newest(folder, say if self.world.is_main else lambda message: None)
        if found is None:
            return
        state = found.state
        known = (self.job.fingerprint, self.job.continues)
        if state["fingerprint"] not in known or state["rows"] != _identity(self.rows):
            what = "settings" if state["fingerprint"] not in known else "rows"
            hint = "undo the change, or start again with `eclipse train --overwrite`"
            raise EclipseError(f"these checkpoints are of a run with other {what}", where=str(folder), hint=hint)
        self.prior.load_state_dict(found.tensors["prior"])
        self.average.load_state_dict(found.tensors["average"])
        restore_optimizers(self.optimizers, self.prior, found.tensors["optimizer"])
        self.guard = Guard(**state["guard"])
        self.step, self.best = found.step, state["best"]
        self.validation = state.get("validation", {})  # which former versions did not keep
        if self.world.is_main:  # which a run killed just after it wrote the checkpoint has not done
            point_latest(folder, self.step)
        if state["fingerprint"] == self.job.continues and self.world.is_main:
            options = self.job.options
            rate = learning_rate(
                self.step,
                peak=options.learning_rate,
                warmup=options.warmup_steps,
                steps=options.steps,
                restarts=options.restarts,
            )
            # Its schedule had come to its end: the one over more steps is in the middle of its cosine here.
            say(f"going on from step {self.step:,} of the finished run; the learning rate is {rate:.2g} again")


def prepare(job: TrainJob, world: DistEnv, say: Callable[[str], None]) -> Run:
    """Open the cache, build everything with the job's seed, resume. The same on every process."""
    store = Store.open(job.embeddings)
    rows, held_back = split(store, job.selection, job.options.validation)
    chosen = np.random.default_rng(job.validation_seed).permutation(held_back)[: job.validation_rows]
    states_from = live_text(store, job.encoder, world.device)
    if job.options.precision == "bf16" and not multiplies_bfloat16(world.device):
        say(f"training in float32: the card's bf16 is for GPUs from Ampere on, and this is a {describe(world.device)}")
    torch.manual_seed(job.options.seed)  # after the text tower, which draws weights of its own
    prior = _network(job, store)
    if job.options.init is not None and not any((job.directory / "checkpoints").glob("step-*")):
        start_from(prior, job.options.init)
    prior = prior.to(world.device)
    if world.device.type == "cpu" and sum(p.numel() for p in prior.parameters()) < WORTH_SPLITTING:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more wait for each other
    if isinstance(prior, DiffusionPrior):
        _normalise(prior, store, rows, job, world)
    run = Run(
        job=job,
        world=world,
        store=store,
        rows=rows,
        validation_rows=np.sort(chosen),
        prior=prior,
        model=prior,
        average=copy.deepcopy(prior).requires_grad_(False).eval(),
        optimizers=make_optimizers(
            prior,
            job.options.optimizer,
            learning_rate=job.options.learning_rate,
            weight_decay=job.options.weight_decay,
        ),
        objective=_objective(prior, job, store, world),
        guard=Guard(),
        states_from=states_from,
    )
    run.resume(say)
    if world.size > 1:
        run.model = DistributedDataParallel(prior, device_ids=None if world.device.type == "cpu" else [world.device])
    return run


def prior_config(preset: str, store: Store, arm: str, draws: int = 1) -> PriorConfig:
    """The preset for this cache. UsageError where the two do not fit."""
    config, dim = PRESETS[preset], store.embedding_dim
    if store.text_width != dim:
        what = f"token states have {store.text_width} dimensions, embeddings {dim}: no published prior is made for that"
        raise UsageError(
            what, where="encoder.model", hint="use an encoder whose text tower is as wide as its embedding"
        )
    if preset in PUBLISHED and config.embedding_dim != dim:
        hint = "use prior.preset small or large, which take any dimension, or this preset's own encoder"
        raise UsageError(
            f"preset {preset} is made for {config.embedding_dim} dimensions, the cache has {dim}",
            where="prior.preset",
            hint=hint,
        )
    if arm == "diffusion" and draws > 1:
        raise UsageError(
            "several draws per caption are for priors of one pass", where="train.draws", hint="set it to 1"
        )
    longest = int(store.token_counts().max())
    if longest > config.num_embeddings:
        what = f"a caption has {longest} tokens; priors take {config.num_embeddings}"
        raise UsageError(what, where="encoder.model", hint="use an encoder with CLIP's context length")
    specials = DiffusionPrior.specials if arm == "diffusion" else Prior.specials
    return replace(config, embedding_dim=dim, additional_embeddings=specials)


def init_place(name: str, folder: Path) -> str:
    """What `train.init` names: a directory, given relative to `folder`, a workspace's own prior in it, or a hub id.

    Raises:
        UsageError: no such directory, and no hub id either.
    """
    path = folder / Path(resolve(name)).expanduser()
    if path.is_dir():
        return str(path / "prior" / "final" if (path / CARD_NAME).is_file() else path)
    if not hub.is_hub_id(name):
        raise UsageError("no such prior to start from", where=name, hint="name a directory, or a hub id (train.init)")
    return name


def check_init(job: TrainJob) -> None:
    """Raise what `start_from` raises, before a run begins."""
    start_from(_network(job, Store.open(job.embeddings)), str(job.options.init))


def start_from(prior: Prior | DiffusionPrior, init: str) -> None:
    """Give `prior` the weights of another. UsageError, by name, where it is another network."""
    theirs = load_prior(init)
    if type(theirs) is not type(prior):
        raise UsageError(
            f"the prior to start from is a {type(theirs).__name__}, this run trains a {type(prior).__name__}",
            where=init,
            hint="name another (train.init), or train the same arm (train.arm)",
        )
    ours, found = asdict(prior.config), asdict(theirs.config)
    if other := [f"{name} is {found[name]}, not {ours[name]}" for name in ours if found[name] != ours[name]]:
        fitting = [
            name
            for name, config in PRESETS.items()
            if replace(config, embedding_dim=found["embedding_dim"]) == theirs.config
        ]
        same_dim = found["embedding_dim"] == ours["embedding_dim"]
        raise UsageError(
            f"the prior to start from is another network: {'; '.join(other)}",
            where=init,
            hint=f"set prior.preset: {fitting[0]} in the card" if fitting and same_dim else "name another (train.init)",
        )
    prior.load_state_dict(theirs.state_dict())


def _network(job: TrainJob, store: Store) -> Prior | DiffusionPrior:
    config = prior_config(job.preset, store, job.options.arm, job.options.draws)
    return DiffusionPrior(config) if job.options.arm == "diffusion" else Prior(config)


def _objective(
    prior: Prior | DiffusionPrior, job: TrainJob, store: Store, world: DistEnv
) -> Objective | DiffusionObjective:
    if isinstance(prior, DiffusionPrior):
        return DiffusionObjective(prior)
    options = job.options
    weight = 0.0 if options.arm == "projection" else options.lambda_
    empty = empty_caption(job.embeddings, job.encoder, store, world) if options.caption_dropout else None
    return Objective(weight, options.temperature, options.projection_reduction, options.caption_dropout, empty)


def _normalise(prior: DiffusionPrior, store: Store, rows: np.ndarray, job: TrainJob, world: DistEnv) -> None:
    """Mean and deviation of the training images, and the features of the empty caption."""
    some = np.sort(np.random.default_rng(job.options.seed).permutation(rows)[:STATISTICS_ROWS])
    images = torch.from_numpy(store.image_embeddings(some)).float()
    nothing = empty_caption(job.embeddings, job.encoder, store, world)
    with torch.no_grad():
        prior.clip_mean.copy_(images.mean(0, keepdim=True))
        prior.clip_std.copy_(images.std(0, keepdim=True).clamp_min(1e-6))
        prior.empty_text_embedding.copy_(nothing.embedding)
        prior.empty_text_states.copy_(nothing.states)


def _identity(rows: np.ndarray) -> str:
    return f"{len(rows)} rows, crc32 {zlib.crc32(rows.tobytes()):08x}"
