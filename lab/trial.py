"""One world of one seed: its features, the priors trained on them, and what those are worth. Called by `experiments`.

Every finished piece is a file named by all that decides it: a second run finds it, a changed setting makes another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode.conditioning import encode_texts, pick_device, predict, unconditional
from ..decode.job import TEXT_PRIOR
from ..decode.layouts import picture_seed
from ..pipeline.cache.store import Store
from ..pipeline.core.card import Card, resolve
from ..pipeline.core.files import atomic_path, write_json
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..trainer.distributed import count_gpus
from ..trainer.evaluate import embedding_metrics
from ..trainer.model.prior import load_prior
from ..trainer.run import TrainJob
from ..trainer.stage import work
from .features import Features, encode_pairs, write_cache, write_selection
from .score import FRESH, SCENE_SPLIT, SPLITS, category_means, decode_pictures, encode_scenes, judge_pictures
from .shapes import CATEGORIES, Prompt, Scene, World

if TYPE_CHECKING:
    from ..pipeline.embed.clip import Encoder

_CAPTION = 29  # stream of the seed for the captions of the training scenes
EMBEDDING_FIGURES = {  # our name → that of trainer.evaluate
    "cosine": "cosine_image",
    "recall_1": "recall_1",
    "similarity_own": "similarity_own",
    "norm_ratio": "norm_ratio",
    "similarity_true": "similarity_true_image",
    "text_recall_1": "text_recall_1",
}


@dataclass(frozen=True)
class Arm:
    """A prior to train: what differs from the card's train section; shuffled: on pictures dealt out at random."""

    changes: tuple[tuple[str, Any], ...]
    shuffled: bool = False


@dataclass(frozen=True)
class Setting:
    """Where a trial stands. pairs: training pairs; prompts: prompts per category and split; fresh: scenes a split that
    the figures in embedding space are measured on, each with its full caption.
    """

    held_out: float
    pairs: int
    steps: int
    prompts: int
    seed: int
    fresh: int


class Trial:
    """A setting of the world's dials under one seed: of the scenes, held-out compositions, prompts and training."""

    def __init__(self, root: Path, card: Card, encoder: Encoder, setting: Setting, progress: Progress) -> None:
        self.card = card
        self.encoder = encoder
        self.setting = setting
        self.progress = progress
        self.world = World(setting.seed, setting.held_out)
        name = f"held-out-{setting.held_out:g}-pairs-{setting.pairs}-seed-{setting.seed}"
        self.ws = Workspace(root / name)

    def embedding(self, arm: Arm) -> dict[str, dict[str, float]]:
        """Figures of a trained arm in embedding space, by split, under the names of EMBEDDING_FIGURES. The last two are
        of no arm: the true images' similarity to their captions, and R@1 of the raw text embedding.
        """
        prior = self.prior(arm)
        path = prior.parent / f"embedding-{digest([self.setting.fresh, self.setting.seed])}.json"
        return _kept(path, lambda: self._embedding(prior))

    def accuracy(self, arm: Arm | str) -> dict[str, dict[str, float]]:
        """Score by pixel, category (and mean) → split; arm: a prior to train, "oracle", or "text"."""
        path = self._scores_path(arm)
        return _kept(path, lambda: self._scored(arm, path))["accuracy"]

    def pictures(self, arm: Arm | str) -> np.ndarray:
        """What `accuracy` judged: uint8 (P, 64, 64, 3), in the order of `prompts`."""
        from PIL import Image

        self.accuracy(arm)
        sheet = np.asarray(Image.open(self._scores_path(arm).with_suffix(".png")))
        return sheet.reshape(len(self.prompts), sheet.shape[1], *sheet.shape[1:])

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of every category and split."""
        n = self.setting.prompts
        return [p for category in CATEGORIES for split in SPLITS for p in self.world.prompts(category, n, split)]

    def prior(self, arm: Arm) -> Path:
        """Train an arm, unless it is there: its directory in the published format. Resumes a run that was stopped."""
        options = self.card.train.model_copy(
            update={
                "steps": self.setting.steps,
                "seed": self.setting.seed,
                "validate_every": self.setting.steps,
                **dict(arm.changes),
            }
        )
        fingerprint = digest([self._made_from, arm.shuffled, self.card.prior.preset, options.model_dump(mode="json")])
        folder = self.ws.prior / fingerprint
        if (folder / "summary.json").exists():
            return folder / "final"
        embeddings = self.cache(shuffled=arm.shuffled)
        write_selection(self.ws.selection, self.setting.pairs)
        job = TrainJob(
            directory=folder,
            embeddings=embeddings,
            selection=self.ws.selection,
            report=folder / "train.png",
            preset=self.card.prior.preset,
            options=options,
            encoder=self.card.encoder,
            fingerprint=fingerprint,
            validation_rows=self.card.evaluate.rows,
        )
        summary = work(job, count_gpus(None) == 0, self.progress.quiet, self.progress)
        write_json(folder / "summary.json", {"shuffled": arm.shuffled, **summary})
        return folder / "final"

    def cache(self, *, shuffled: bool = False) -> Path:
        """The folder with the features of the training pairs, made if they are not there."""
        folder = self.ws.root / ("embeddings-shuffled" if shuffled else "embeddings")
        if not self._is_made(folder):
            features = self._training_pairs
            parts = [features.dealt_again(self.setting.seed) if shuffled else features]
            self._write(folder, parts)
        return folder

    @property
    def _made_from(self) -> str:
        setting = self.setting
        return digest([self.encoder.fingerprint, setting.seed, setting.held_out, setting.pairs])

    def _is_made(self, folder: Path) -> bool:
        return folder.is_dir() and Store.open(folder).meta.card == self._made_from

    def _write(self, folder: Path, parts: list[Features]) -> None:
        write_cache(folder, parts, self.encoder, model=self.card.encoder.model, made_from=self._made_from)

    @cached_property
    def _training_pairs(self) -> Features:
        rng = np.random.default_rng([self.setting.seed, _CAPTION])
        scenes = [self.world.scene(i) for i in range(self.setting.pairs)]
        return encode_pairs(self.encoder, scenes, [self.world.caption(s, rng) for s in scenes], self.progress)

    @cached_property
    def _fresh(self) -> Store:
        """Fresh scenes with distinct full captions: part 0 of seen compositions alone, part 1 each with an unseen."""
        folder = self.ws.root / f"fresh-{self.setting.fresh}"
        if not self._is_made(folder):
            parts = []
            for split in SPLITS:
                scenes = self._distinct_scenes(split)
                parts.append(encode_pairs(self.encoder, list(scenes.values()), list(scenes), self.progress))
            self._write(folder, parts)
        return Store.open(folder)

    def _distinct_scenes(self, split: str) -> dict[str, Scene]:
        """Full caption → scene: equal captions would make finding the true picture a matter of luck."""
        scenes: dict[str, Scene] = {}
        index = FRESH
        while len(scenes) < self.setting.fresh:
            scene = self.world.scene(index, SCENE_SPLIT[split])  # type: ignore[arg-type]
            scenes.setdefault(self.world.full_caption(scene), scene)
            index += 1
        return scenes

    def _embedding(self, prior: Path) -> dict[str, dict[str, float]]:
        store, model = self._fresh, load_prior(prior, device=pick_device())
        table = {}
        for number, split in enumerate(SPLITS):
            rows = np.arange(self.setting.fresh) + number * self.setting.fresh
            found = embedding_metrics(model, store, rows, self.setting.seed)
            table[split] = {name: found[key] for name, key in EMBEDDING_FIGURES.items()}
        return table

    def _scores_path(self, arm: Arm | str) -> Path:
        source = arm if isinstance(arm, str) else self.prior(arm).parent.name
        decoder = [self.card.decoder.model_dump(mode="json"), self._decoder_identity]
        name = digest([source, self.encoder.fingerprint, decoder, self.setting.prompts])
        return self.ws.renders / f"{name}.json"

    @cached_property
    def _decoder_identity(self) -> str:
        return weights_identity(resolve(self.card.decoder.path))

    def _scored(self, arm: Arm | str, path: Path) -> dict[str, Any]:
        from PIL import Image

        prompts, device = self.prompts, pick_device()
        quiet = Progress(quiet=True)
        texts = encode_texts(self.encoder, [p.text for p in prompts], quiet)
        rows, seeds = range(len(prompts)), [picture_seed(self.setting.seed, p.text, 0) for p in prompts]
        if arm == "oracle":
            embedding = encode_scenes(self.encoder, [self.world.scene_for(p, self.setting.seed) for p in prompts])
        else:
            source = TEXT_PRIOR if isinstance(arm, str) else str(self.prior(arm))
            embedding = predict(source, texts, rows, seeds, device)
        blank = unconditional(self.ws, self.encoder, self.card.decoder.kind, quiet)
        drawn = decode_pictures(self.card, {"arm": embedding}, texts, seeds, blank, device, self.progress)["arm"]
        shots = judge_pictures(drawn, prompts)
        scores = [shot.verdict.score for shot in shots]
        with atomic_path(path.with_suffix(".png")) as temporary:
            Image.fromarray(np.concatenate(list(drawn))).save(temporary, "PNG")
        return {
            "arm": arm if isinstance(arm, str) else dict(arm.changes) | {"shuffled": arm.shuffled},
            "accuracy": category_means(prompts, scores),
            "prompts": [
                {"prompt": p.text, "category": p.category, "split": p.split, "score": score}
                for p, score in zip(prompts, scores, strict=True)
            ],
        }


def digest(value: Any) -> str:
    """16 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights_identity(path: str) -> str:
    """What tells a model directory's content from another's; a hub id stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(folder)}".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON at `path`; made and written first if it is not there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))
