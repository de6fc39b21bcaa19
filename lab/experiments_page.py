"""The page of an experiment: its setting, a plot, the table, and for `separation` the pictures. For `experiments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..pipeline.report.charts import dots
from ..pipeline.report.page import data_uri, write_page
from .shapes import CATEGORIES

ARM_NAMES = {
    "oracle": "oracle",
    "eclipse": "ECLIPSE prior",
    "projection": "projection prior",
    "text": "text embedding",
    "shuffled": "prior of shuffled captions",
}
SPLITS = ("seen", "unseen")
_SHOWN = 2  # unseen prompts per category


def write_experiment_page(path: Path, summary: dict[str, Any]) -> None:
    """Write the page of a summary from `experiments`; separation's holds pictures besides."""
    content = {"separation": _separation, "reduction": _reduction, "sweep": _sweep}[summary["experiment"]](summary)
    setting = {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in summary["setting"].items()
    }
    write_page(
        path,
        "experiment.html.j2",
        folders=[Path(__file__).parent / "templates"],
        footer="Mean ± standard deviation over seeds: each draws its own scenes, held-out compositions and weights",
        setting=setting,
        **{"strips": [], "arms": [], **content},
    )


def _separation(summary: dict[str, Any]) -> dict[str, Any]:
    accuracy, cosine = summary["accuracy"], summary["cosine"]
    arms = [arm for arm in ARM_NAMES if arm in accuracy]
    chart = dots(
        {ARM_NAMES[arm]: {split: _pair(accuracy[arm][split]["mean"]) for split in SPLITS} for arm in arms},
        label="share of what was asked that is in the picture",
    )
    tables = [
        {
            "title": f"{split.capitalize()} compositions",
            "note": "Share of what was asked that the checker finds, and the cosine to the true image embedding.",
            "head": ["arm", *CATEGORIES, "mean", "cosine"],
            "rows": [
                [
                    ARM_NAMES[arm],
                    *(_text(accuracy[arm][split][category]) for category in (*CATEGORIES, "mean")),
                    _text(cosine[arm][split]),
                ]
                for arm in arms
            ],
        }
        for split in SPLITS
    ]
    tables.append(
        {
            "title": "Are they told apart?",
            "note": "Differences on unseen compositions, seed by seed. Clear: of one sign under every seed, and two "
            "standard errors from zero.",
            "head": ["pair", "difference", "clear"],
            "rows": [
                [
                    f"{ARM_NAMES[pair['better']]} over {ARM_NAMES[pair['worse']]}",
                    _text(pair["difference"]),
                    "yes" if pair["clear"] else "no",
                ]
                for pair in summary["told_apart"]
            ],
        }
    )
    ratio = _text(summary["projection_of_oracle"])
    return {
        "title": "Can this world tell priors apart?",
        "lead": "Five embeddings of the same prompts, made into pictures by one decoder with the same noise, and read "
        f"back by pixel. On unseen compositions the projection prior reaches {ratio} of the oracle"
        + ("; this setting is too easy." if summary["too_easy"] else "."),
        "charts": [{"title": "All categories", "note": "mean and deviation over seeds", "svg": chart}],
        "tables": tables,
        "arms": [ARM_NAMES[arm] for arm in arms],
        "strips": _strips(summary["pictures"], arms),
    }


def _strips(pictures: dict[str, Any], arms: list[str]) -> list[dict[str, Any]]:
    """The first unseen prompts of every category, one picture an arm."""
    prompts = pictures["prompts"]
    strips = []
    for category in CATEGORIES:
        chosen = [i for i, p in enumerate(prompts) if (p.category, p.split) == (category, "unseen")][:_SHOWN]
        for i in chosen:
            sources = [data_uri(Image.fromarray(pictures[arm][i]))[0] for arm in arms]
            strips.append({"category": category, "prompt": prompts[i].text, "sources": sources})
    return strips


def _reduction(summary: dict[str, Any]) -> dict[str, Any]:
    embedding, differences = summary["embedding"], summary["sum_less_mean"]
    columns = {
        "cosine": "cosine to true image",
        "recall_1": "R@1",
        "similarity_own": "similarity to own caption",
        "norm_ratio": "norm ratio",
        "similarity_true": "true images' similarity",
        "text_recall_1": "text embedding's R@1",
    }
    charts = [
        {
            "title": columns[figure],
            "note": "mean and deviation over seeds",
            "svg": dots(
                {name: {split: _pair(embedding[name][split][figure]) for split in SPLITS} for name in embedding}
            ),
        }
        for figure in ("cosine", "recall_1", "similarity_own")
    ]
    tables = [
        {
            "title": f"{split.capitalize()} compositions",
            "note": "Fresh scenes with full captions.",
            "head": ["reduction over D", *columns.values()],
            "rows": [
                *([name, *(_text(embedding[name][split][figure]) for figure in columns)] for name in embedding),
                [
                    "sum − mean",
                    *(_text(differences[split][figure]) if figure in differences[split] else "" for figure in columns),
                ],
            ],
        }
        for split in SPLITS
    ]
    return {
        "title": "Projection loss: mean or sum?",
        "lead": "The paper does not say whether the squared error is averaged or summed over the D dimensions of an "
        f"embedding. With λ = {summary['lambda']:g} and all else equal, this is what each does.",
        "charts": charts,
        "tables": tables,
    }


def _sweep(summary: dict[str, Any]) -> dict[str, Any]:
    grid = summary["grid"]
    names = [f"{row['held_out']:g} held out, {row['pairs']:,} pairs" for row in grid]
    chart = dots(
        {
            name: {arm: (row[f"{arm}_unseen"], None) for arm in ("oracle", "projection")}
            for name, row in zip(names, grid, strict=True)
        },
        label="share of what was asked that is in the picture",
    )
    columns = ("cosine", "recall_1", "oracle", "projection", "of_oracle")
    tables = [
        {
            "title": f"{split.capitalize()} compositions",
            "note": "Cosine and R@1 of the projection prior on fresh scenes; oracle and projection by pixel.",
            "head": ["setting", *(column.replace("_", " ") for column in columns)],
            "rows": [
                [name, *(f"{row[f'{column}_{split}']:.3f}" for column in columns)]
                for name, row in zip(names, grid, strict=True)
            ],
        }
        for split in SPLITS
    ]
    return {
        "title": "Which setting leaves room?",
        "lead": "The projection prior beside the oracle over two dials: the share of compositions held out, "
        "and the number of training pairs. Near the oracle, no prior can be told from a better one.",
        "charts": [{"title": "Unseen compositions", "note": "all categories", "svg": chart}],
        "tables": tables,
    }


def _pair(value: dict[str, float | None]) -> tuple[float, float | None]:
    assert value["mean"] is not None
    return value["mean"], value["sd"]


def _text(value: dict[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")
