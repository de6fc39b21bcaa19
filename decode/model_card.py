"""The README.md of an export: front matter that the hub reads, and a page for people. Called by `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REASONS = {
    "exact_copy": "exact copies",
    "near_copy": "near copies",
    "semantic_duplicate": "semantic duplicates",
    "wrong_caption": "captions that belong to other pictures",
    "small_picture": "pictures too small",
    "aspect_ratio": "pictures too long or too wide",
    "caption_length": "captions too short or too long",
    "low_aesthetic_score": "low aesthetic scores",
    "high_safety_score": "high safety scores",
    "low_clip_score": "low CLIP scores",
}
# What a reader of the card wants first of the many keys of the train section.
RECIPE = (
    "arm", "init", "steps", "batch_size", "optimizer", "learning_rate", "warmup", "warmup_steps", "restarts",
    "weight_decay", "lambda", "temperature", "caption_dropout", "projection_reduction", "ema",
    "ema_decay", "precision", "seed",
)  # fmt: skip


def model_card(record: dict[str, Any], parameters: int, *, repo: str, picture: str | None) -> str:
    """The text of README.md for what `export.describe` says of a prior.

    repo: its id on the hub, where it is known; picture: the file of its contact sheet, if there is one.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    card, stages = record["card"], record["stages"]
    train, evaluation = stages.get("train", {}), stages.get("evaluate", {})
    data = ModelCardData(
        library_name="eclipse-prior",
        pipeline_tag="text-to-image",
        license="other",
        license_name="see-below",
        tags=["eclipse", "unclip", "text-to-image-prior", card["decoder"]["kind"]],
        base_model=_base(card),
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,  # this is Markdown; `line` takes care of what could break it
    )
    environment.filters["line"] = _line
    environment.filters["number"] = _number
    return environment.get_template("model_card.md.j2").render(
        front_matter=data.to_yaml(),
        record=record,
        card=card,
        parameters=parameters,
        repo=repo,
        picture=picture,
        place=repo or "path/of/this/directory",
        encoder=_model(record["encoder"]["model"], record["encoder"]["pretrained"]),
        decoder=_model(card["decoder"]["path"]),
        recipe=[(key, card["train"][key]) for key in RECIPE if card["train"].get(key) is not None],
        train=train,
        rows=_data_rows(stages),
        accuracy=_accuracy(evaluation.get("accuracy", {})),
        embedding=_embedding(evaluation, train),
    )


def _model(name: str, tag: str | None = None) -> str:
    """An encoder's or a decoder's name for people."""
    if "{models}" in name:
        return "the small one that ships with eclipse"
    return f"`{_line(name)}`" + (f" with the weights `{_line(tag)}`" if tag else "")


def _base(card: dict[str, Any]) -> str | None:
    """The decoder's repository: what the hub links as the model that this one builds on."""
    path = card["decoder"]["path"]
    return path if "{models}" not in path and path.count("/") == 1 else None


def _data_rows(stages: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
    """What became of the rows of the list, stage by stage, down to what was trained on."""
    download, embed, chosen = (stages.get(stage, {}) for stage in ("download", "embed", "filter"))
    rows = []
    if "rows" in download:
        rows.append(("rows of the list", download["rows"]))
        rows += [(f"without a picture: {_words(name)}", -n) for name, n in download.get("rejected", {}).items()]
    if "rows" in embed:
        rows += [(f"not embedded: {_words(name)}", -n) for name, n in embed.get("rejected", {}).items()]
        rows.append(("picture–caption pairs embedded", embed["rows"]))
    if "kept" in chosen:
        rows += [(f"filtered: {REASONS.get(name, _words(name))}", -n) for name, n in chosen.get("rejected", {}).items()]
        rows.append(("pairs kept", chosen["kept"]))
    train = stages.get("train", {})
    if "train_rows" in train:
        rows.append(("held back for validation", -train.get("validation_rows", 0)))
        rows.append(("pairs trained on", train["train_rows"]))
    return rows


def _accuracy(table: dict[str, Any]) -> dict[str, Any]:
    """Accuracy a category by pixel as columns and rows, where the card's world can be judged."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    return {
        "columns": columns,
        "rows": [(name, [row.get(column) for column in columns]) for name, row in table.items()],
    }


def _embedding(evaluation: dict[str, Any], train: dict[str, Any]) -> list[tuple[str, float]]:
    """Figures in embedding space: those of `eclipse evaluate`, else of the last validation."""
    found: list[tuple[str, float]] = []
    for group, row in evaluation.get("embedding", {}).items():
        found += [(f"{_words(name)}, {_words(group)}", value) for name, value in row.items() if name != "scenes"]
    if found:
        return found
    plain = evaluation if "cosine_image" in evaluation else train.get("validation", {})
    return [(_words(name), value) for name, value in plain.items() if name not in ("rows", "step")]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _line(value: Any) -> str:
    """Free text of a card as one line of Markdown: what would begin a tag or a table cell is taken apart."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
