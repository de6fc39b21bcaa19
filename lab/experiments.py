"""The closed world's experiments: claims about priors, re-run in minutes. Called by `eclipse lab EXPERIMENT`.

`separation`: can the world tell priors apart, on compositions that none of them saw. `reduction`: the projection loss
averaged or summed over the embedding's dimensions. `sweep`: the dials under which `separation` is worth running.
`world`: a page that shows scenes, checker and models, see `page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.core.card import Card
from ..pipeline.core.errors import UsageError
from ..pipeline.core.files import write_json
from ..pipeline.core.source import ShapesSource
from ..pipeline.core.workspace import Workspace
from .shapes import CATEGORIES, World

if TYPE_CHECKING:
    from ..pipeline.core.progress import Progress
    from .trial import Arm, Trial

EXPERIMENTS = ("world", "separation", "reduction", "sweep")
# From a sweep of one seed: of the settings at which the projection arm learns well, the largest fall of R@1 on unseen.
HELD_OUT, PAIRS = 0.5, 4000
SEEDS = (0, 1, 2)
STEPS = 300  # optimizer steps: nine priors are trained, and 2,160 pictures sampled, in one default run
PROMPTS = 12  # a category and split
FRESH_SCENES = 500  # a split, for figures in embedding space
SWEPT_HELD_OUT = (0.15, 0.5, 0.8)
SWEPT_PAIRS = (1000, 4000, 16000)
TOO_EASY = 0.97  # of the oracle on unseen compositions: no prior could then be told from a better one
CLEAR = 2.0  # standard errors by which two arms must differ
FOUR = ("oracle", "projection", "text", "shuffled")  # the arms that must be told apart
SPLITS = ("seen", "unseen")


@dataclass(frozen=True)
class Dials:
    """What a run may choose; None is the experiment's own default. prompts: a category and split."""

    held_out: float | None = None
    pairs: int | None = None
    seeds: Sequence[int] | None = None
    steps: int | None = None
    prompts: int | None = None
    fresh: int = FRESH_SCENES


def seeds_of(text: str | None) -> tuple[int, ...] | None:
    """The seeds in a list such as 0,1,2, as the command line gives it. UsageError for anything else."""
    if text is None:
        return None
    parts = text.split(",")
    known = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
    if not known or len(set(map(int, parts))) < len(parts):
        what = "seeds are distinct whole numbers below a billion"
        raise UsageError(what, where=f"--seeds {text[:40]}", hint="such as 0,1,2")
    return tuple(int(part) for part in parts)


def run(name: str, out: Path, progress: Progress, dials: Dials, *, card: str | None = None) -> dict[str, Any]:
    """Run one experiment, or what is left of it, in the folder `out`: its summary, JSON-ready.

    Writes NAME.json and NAME.html into `out`. Raises UsageError for an unknown experiment or dials it does not have,
    EclipseError if another process works in `out`.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}", hint=f"choose from {', '.join(EXPERIMENTS)}")
    loaded = Card.load(card or "shapes")
    if not isinstance(loaded.source, ShapesSource):
        raise UsageError(f"card {loaded.name} does not draw shapes", where="--card", hint="leave it out")
    out.mkdir(parents=True, exist_ok=True)
    with Workspace(out).lock(f"lab {name}"):
        if name == "world":
            if dials != Dials():
                raise UsageError("this experiment has no dials", where="eclipse lab world", hint="leave them out")
            from .page import build

            return {"experiment": name, **build(out, progress, card=loaded)}
        summary = {"separation": separation, "reduction": reduction, "sweep": sweep}[name](
            Trials(out, loaded, progress), dials
        )
        figures, page = out / f"{name}.json", out / f"{name}.html"
        summary = {**summary, "report": str(page), "json": str(figures)}
        write_json(figures, {key: value for key, value in summary.items() if key != "pictures"})
        from .experiments_page import write_experiment_page

        write_experiment_page(page, summary)
    summary.pop("pictures", None)
    return summary


class Trials:
    """Makes the trials of an experiment, all with one encoder."""

    def __init__(self, out: Path, card: Card, progress: Progress) -> None:
        from ..decode.conditioning import load_encoder, pick_device

        self.out = out
        self.card = card
        self.progress = progress
        self.encoder = load_encoder(card, pick_device())

    def at(self, dials: Dials, seed: int, *, held_out: float | None = None, pairs: int | None = None) -> Trial:
        """The trial of one seed; held_out and pairs, where given, in place of the dials' own or the defaults."""
        from .trial import Setting, Trial

        setting = Setting(
            held_out=held_out or dials.held_out or HELD_OUT,
            pairs=pairs or dials.pairs or PAIRS,
            steps=dials.steps or STEPS,
            prompts=dials.prompts or PROMPTS,
            seed=seed,
            fresh=dials.fresh,
        )
        return Trial(self.out / "trials", self.card, self.encoder, setting, self.progress)


def separation(trials: Trials, dials: Dials) -> dict[str, Any]:
    """Accuracy by pixel and cosine to the true image embedding of five arms, on seen and unseen compositions."""
    arms: dict[str, Arm | str] = {"oracle": "oracle", **_priors(), "text": "text"}
    seeds = dials.seeds or SEEDS
    accuracy: dict[str, list[dict[str, dict[str, float]]]] = {arm: [] for arm in arms}
    cosine: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    shown: dict[str, Any] = {}
    for seed in seeds:
        trial = trials.at(dials, seed)
        for name, arm in arms.items():
            trials.progress.say(f"seed {seed}: {name}")
            accuracy[name].append(trial.accuracy(arm))
            cosine[name].append(_cosine(trial, arm, arms["projection"]))
        if seed == seeds[0]:
            shown = {name: trial.pictures(arm) for name, arm in arms.items()} | {"prompts": trial.prompts}
    unseen = {arm: [each["mean"]["unseen"] for each in found] for arm, found in accuracy.items()}
    ratio = [p / max(o, 1e-9) for p, o in zip(unseen["projection"], unseen["oracle"], strict=True)]
    pairs = _told_apart(unseen, FOUR)
    return {
        "experiment": "separation",
        "setting": _setting(trials, dials, seeds),
        "accuracy": {
            arm: {
                split: {category: spread(each[category][split] for each in found) for category in (*CATEGORIES, "mean")}
                for split in SPLITS
            }
            for arm, found in accuracy.items()
        },
        "cosine": {
            arm: {split: spread(each[split] for each in found) for split in SPLITS} for arm, found in cosine.items()
        },
        "told_apart": pairs,
        "all_told_apart": all(pair["clear"] for pair in pairs),
        "projection_of_oracle": spread(ratio),
        "too_easy": float(np.mean(ratio)) > TOO_EASY,
        "pictures": shown,
    }


def reduction(trials: Trials, dials: Dials) -> dict[str, Any]:
    """The projection loss as mean and as sum over the D dimensions, all else equal, measured in embedding space."""
    from .trial import EMBEDDING_FIGURES, Arm

    seeds = dials.seeds or SEEDS
    found: dict[str, list[dict[str, dict[str, float]]]] = {"mean": [], "sum": []}
    for seed in seeds:
        trial = trials.at(dials, seed)
        for name, tables in found.items():
            trials.progress.say(f"seed {seed}: {name} over dimensions")
            tables.append(trial.embedding(Arm((("projection_reduction", name),))))
    return {
        "experiment": "reduction",
        "setting": _setting(trials, dials, seeds),
        "lambda": trials.card.train.lambda_,
        "temperature": trials.card.train.temperature,
        "embedding": {
            name: {
                split: {figure: spread(each[split][figure] for each in tables) for figure in EMBEDDING_FIGURES}
                for split in SPLITS
            }
            for name, tables in found.items()
        },
        "sum_less_mean": {
            split: {
                figure: spread(
                    of_sum[split][figure] - of_mean[split][figure]
                    for of_sum, of_mean in zip(found["sum"], found["mean"], strict=True)
                )
                for figure in ("cosine", "recall_1", "similarity_own")
            }
            for split in SPLITS
        },
    }


def sweep(trials: Trials, dials: Dials) -> dict[str, Any]:
    """The projection arm over the dials, beside the oracle: where is a prior short of it, so that one can be better."""
    projection, seeds = _priors()["projection"], dials.seeds or SEEDS[:1]
    grid = []
    for held_out in [dials.held_out] if dials.held_out else SWEPT_HELD_OUT:
        for pairs in [dials.pairs] if dials.pairs else SWEPT_PAIRS:
            trials.progress.say(f"held out {held_out:g}, {pairs:,} pairs")
            here = [trials.at(dials, seed, held_out=held_out, pairs=pairs) for seed in seeds]
            embedding = [trial.embedding(projection) for trial in here]
            scores = {name: [t.accuracy(arm)["mean"] for t in here] for name, arm in _swept(projection).items()}
            row: dict[str, Any] = {"held_out": held_out, "pairs": pairs}
            for split in SPLITS:
                row[f"cosine_{split}"] = float(np.mean([each[split]["cosine"] for each in embedding]))
                row[f"recall_1_{split}"] = float(np.mean([each[split]["recall_1"] for each in embedding]))
                means = {name: float(np.mean([each[split] for each in found])) for name, found in scores.items()}
                row |= {f"{name}_{split}": mean for name, mean in means.items()}
                row[f"of_oracle_{split}"] = means["projection"] / max(means["oracle"], 1e-9)
            grid.append({**row, "too_easy": row["of_oracle_unseen"] > TOO_EASY})
    return {"experiment": "sweep", "setting": _setting(trials, dials, seeds), "grid": grid}


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n − 1) over seeds; no deviation of a single one."""
    found = np.array(list(values), np.float64)
    return {"mean": float(found.mean()), "sd": float(found.std(ddof=1)) if len(found) > 1 else None}


def _priors() -> dict[str, Arm]:
    from .trial import Arm

    projection = (("arm", "projection"),)
    return {"eclipse": Arm(()), "projection": Arm(projection), "shuffled": Arm(projection, shuffled=True)}


def _swept(projection: Arm) -> dict[str, Arm | str]:
    return {"oracle": "oracle", "projection": projection}


def _cosine(trial: Trial, arm: Arm | str, projection: Arm | str) -> dict[str, float]:
    """Cosine to the true image embedding by split. That of the raw text comes with the figures of any prior."""
    if arm == "oracle":
        return dict.fromkeys(SPLITS, 1.0)
    prior = projection if isinstance(arm, str) else arm
    assert not isinstance(prior, str)
    key = "similarity_true" if arm == "text" else "cosine"
    return {split: figures[key] for split, figures in trial.embedding(prior).items()}


def _told_apart(unseen: dict[str, list[float]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every two arms: the difference of their accuracies over seeds, and whether it is clear.

    Clear: of one sign under every seed, and its mean at least CLEAR standard errors from zero.
    """
    pairs = []
    for first, second in combinations(arms, 2):
        difference = np.subtract(unseen[first], unseen[second])
        if difference.mean() < 0:
            first, second, difference = second, first, -difference
        gap = spread(difference)
        error = (gap["sd"] or 0.0) / len(difference) ** 0.5
        clear = len(difference) > 1 and bool(difference.min() > 0 and difference.mean() >= CLEAR * error)
        pairs.append({"better": first, "worse": second, "difference": gap, "clear": clear})
    return pairs


def _setting(trials: Trials, dials: Dials, seeds: Sequence[int]) -> dict[str, Any]:
    """All that a reader needs to run it again."""
    setting = trials.at(dials, seeds[0]).setting
    return {
        "held_out": setting.held_out,
        "held_out_compositions": len(World(seeds[0], setting.held_out).held_out_pairs),
        "pairs": setting.pairs,
        "steps": setting.steps,
        "batch_size": trials.card.train.batch_size,
        "seeds": list(seeds),
        "prompts_per_category_and_split": setting.prompts,
        "fresh_scenes_per_split": setting.fresh,
        "prior": trials.card.prior.preset,
        "decoder_steps": trials.card.decoder.steps,
        "guidance_scale": trials.card.decoder.guidance_scale,
    }
