"""reports/train.html: how a training went, on axes that its first steps do not flatten; called by the train stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.store import Store
from ..core.errors import EclipseError
from ..core.workspace import Workspace
from ..images.sources import shards_of
from ..images.tar import is_remote
from . import charts
from .page import chart, percent, stage_page, tile
from .pictures import Shots

# The curves of the training's own figures: what each is, and how to read it.
TRAINING = {
    "loss": ("Loss", "projection + λ · contrastive, on the batches trained on"),
    "projection": ("Projection loss", "squared error to the true image embedding"),
    "contrastive": ("Contrastive loss", "InfoNCE of predictions among the batch's captions"),
    "gradient_norm": ("Gradient norm", "before it is clipped; a jump that stays is a training that comes apart"),
    "learning_rate": ("Learning rate", "warm-up, then a cosine to zero"),
}
# Of the validation: title, how to read it, the curves, and the levels beside them with their names.
VALIDATION: tuple[tuple[str, str, tuple[str, ...], dict[str, str]], ...] = (
    (
        "Cosine to the true image",
        "on rows held back; a prior must lie above both dashed lines",
        ("cosine_image",),
        {"mean_cosine_image": "constant mean", "similarity_true_image": "raw text"},
    ),
    (
        "True image found first",
        "among all rows held back; dashed: by the raw text embedding",
        ("recall_1", "recall_10"),
        {"text_recall_1": "raw text"},
    ),
    (
        "Similarity to captions",
        "to its own it should near that of true images, to others' stay low",
        ("similarity_own", "similarity_shuffled"),
        {"similarity_true_image": "true images"},
    ),
)
SETTINGS = ("arm", "init", "steps", "batch_size", "optimizer", "learning_rate", "lambda", "temperature", "precision")
SHOWN_POINTS = 12  # validations in the table
SHOWN_STEPS = 7  # and of which the samples are shown


def train_page(
    ws: Workspace,
    lines: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> Path:
    """Write the page. lines: of metrics.jsonl; samples: of samples.jsonl; summary: the stage's."""
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    last = validation[-1] if validation else {}
    # What stood on the command line goes before the card.
    options = ws.card.train.model_dump(mode="json", by_alias=True) | {
        key: summary[key] for key in ("arm", "init", "steps") if key in summary
    }
    return stage_page(
        ws,
        "train",
        "train.html.j2",
        title="How the training went",
        lead=f"{summary['steps']:,} steps on {summary['train_rows']:,} rows; {summary['validation_rows']:,} held back.",
        warnings=[*summary.get("warnings", []), *_warnings(summary, training)],
        tiles=[
            tile(f"{last['cosine_image']:.3f}" if "cosine_image" in last else "–", "cosine to the true image", "good"),
            tile(percent(last["recall_1"]) if "recall_1" in last else "–", "true images found first"),
            tile(f"{summary['samples_per_second']:,.0f}", "samples per second"),
            tile(percent(summary["data_wait_share"]), "of the time waiting for data"),
            tile(f"{summary['seconds']:,.0f} s", "on " + str(summary["device"])),
            tile(int(summary["parameters"]), "parameters"),
        ],
        charts=[*_validation_charts(validation), *_training_charts(training)],
        samples=_samples(ws, samples),
        settings=[(key.replace("_", " "), options[key]) for key in SETTINGS if options.get(key) is not None],
        table=_table(validation),
    )


def _training_charts(training: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    drawn = []
    for name, (title, note) in TRAINING.items():
        steps, values = _series(training, name)
        if not len(values):
            continue
        flat = name == "learning_rate"
        svg = charts.lines({name.replace("_", " "): (steps, values)}, label="step", smooth=not flat, fair=not flat)
        drawn.append(chart(title, note, svg))
    return drawn


def _validation_charts(validation: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    drawn = []
    for title, note, names, beside in VALIDATION:
        series = {_words(name): _series(validation, name) for name in names}
        series = {name: points for name, points in series.items() if len(points[1])}
        marks = {label: validation[-1].get(name) for name, label in beside.items()} if validation else {}
        if series:
            levels = {label: float(value) for label, value in marks.items() if value is not None}
            drawn.append(chart(title, note, charts.lines(series, label="step", levels=levels)))
    return drawn


def _samples(ws: Workspace, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A strip a caption: its own picture, then the one nearest to what the prior predicted, validation by validation.

    None where pictures lie on other machines, or are gone: a training of hours must not end on its page.
    """
    chosen = sorted({round(i * (len(samples) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}) if samples else []
    steps = [samples[i] for i in chosen if samples[i]["rows"] == samples[-1]["rows"]]
    try:
        if not steps or any(is_remote(getattr(shard, "address", "")) for shard in shards_of(ws).values()):
            return []
        shots = Shots(ws, Store.open(ws.embeddings), [row for step in steps for row in (*step["rows"], *step["found"])])
    except (EclipseError, OSError, IndexError):
        return []
    if not shots.any:
        return []
    return [
        {
            "title": shots(own)["caption"],
            "note": "",
            "shots": [
                shots(own, "true picture", "good"),
                *(
                    shots(step["found"][i], f"step {step['step']:,}", "good" if step["found"][i] == own else "")
                    | {"caption": f"{step['cosine'][i]:.3f}"}
                    for step in steps
                ),
            ],
        }
        for i, own in enumerate(steps[-1]["rows"])
    ]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def _table(validation: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The validations, thinned to a dozen: columns and rows of text."""
    shown = ("cosine_image", "similarity_own", "recall_1", "recall_10", "norm_ratio")
    names = [name for name in shown if validation and name in validation[-1]]
    chosen = sorted({round(i * (len(validation) - 1) / (SHOWN_POINTS - 1)) for i in range(SHOWN_POINTS)})
    lines = [validation[i] for i in chosen] if validation else []
    rows = [[f"{line['step']:,}", *(_number(line.get(name)) for name in names)] for line in lines]
    return {"columns": ["step", *(_words(name) for name in names)], "rows": rows}


def _warnings(summary: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a look at the figures should not miss."""
    found = []
    if skipped := summary.get("skipped_steps"):
        found.append(f"{skipped:,} steps were skipped, because their loss or gradient was not finite or far from usual")
    if summary["data_wait_share"] > 0.2:
        share = percent(summary["data_wait_share"])
        found.append(f"the network waited {share} of the time for data: a faster disk, or train.resident, would help")
    losses = [line["loss"] for line in training if line.get("loss") is not None]
    tenth = len(losses) // 10
    if tenth and np.mean(losses[-tenth:]) > np.mean(losses[tenth : 2 * tenth]):
        found.append("the loss at the end is above that after a tenth of the steps: the learning rate may be too high")
    return found


def _words(name: str) -> str:
    return {"recall_1": "found first", "recall_10": "among the first 10"}.get(name, name.replace("_", " "))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
