"""A data card: what to fetch, which encoder, which rules, which prior and decoder. Read by every stage.

A section says which stage's output its keys decide (`decides`), and a key that decides none is marked NOTHING where it
is defined: how fast something is made, or how often it is looked at. What a changed key makes stale follows from that.
A key added later gets the default under which everything stays as it was made before; renamed ones are in RENAMED.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import UsageError
from .files import atomic_path
from .section import MANY, MAX_DENOISING_STEPS, MAX_IMAGE_SIZE, MAX_SEED, NOTHING, Decides, Section
from .source import PLACES, SOURCES, Source

CARD_NAME = "eclipse.yaml"  # the resolved card in a workspace
INSTALLATION = Path(__file__).resolve().parents[2]
CARDS = INSTALLATION / "data_cards"
MODELS = INSTALLATION / "lab" / "models"

LARGEST_CARD = 1 << 20  # bytes; a card that spells out every key takes about 6,000
SHOWN_KEYS = 12  # of those that are wrong
MOST_NODES = 20_000  # of a card's YAML, each alias counted as what it stands for

Scheduler = Literal["ddpm", "ddim", "dpm++", "dpm++-karras", "dpm++-sde"]

# Whose outputs a stage's own are made from. Rendering and evaluating do not depend on each other.
BUILT_ON: dict[str, str | None] = {
    "download": None,
    "embed": "download",
    "filter": "embed",
    "train": "filter",
    "render": "train",
    "evaluate": "train",
}
STAGES = tuple(BUILT_ON)

# Keys that once had other names, by section. They are still read, with a note; a workspace made before is recognised.
RENAMED: dict[str, dict[str, str]] = {
    "train": {"warmup": "warmup_steps", "ema": "ema_decay", "clip_gradient": "grad_clip_norm"},
}


class EncoderSection(Section):
    """Which CLIP makes the features."""

    decides = ("embed",)

    model: str = Field(description="open_clip model name, hf-hub:… or local-dir:…; {models} is the installation's own")
    pretrained: str | None = Field(None, description="open_clip weights tag; null where the model name says it all")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of a GPU's forward pass; a CPU uses fp32"
    )
    text_states: bool = Field(True, description="store token states, or run the text tower again while training")
    aesthetic: str | None = Field(
        None, description="linear head on the unit image embedding: laion, PATH or URL#sha256=HEX"
    )
    safety: str | None = Field(None, description="the same for a safety score, the higher the less safe; PATH or URL")


FILTER_PRESETS: dict[str, dict[str, Any]] = {
    # DataComp's (arXiv 2304.14108, appendix). basic: English, more than two words and five characters, shorter side
    # above 200 px, aspect ratio below 3. clip: the 30 % with the highest CLIP score. image_clip: the same among the
    # rows whose cluster is nearest to a picture of `targets` (there ImageNet's training pictures).
    "datacomp_basic": {
        "min_side": 201,
        "max_aspect_ratio": 3.0,
        "min_caption_length": 6,
        "min_caption_words": 3,
        "languages": ["en"],
    },
    "datacomp_clip": {"min_clip_score_quantile": 0.7},
    "datacomp_image_clip": {"min_clip_score_quantile": 0.7},
}


class FilterSection(Section):
    """Rules that decide which embedded rows are trained on, applied in this order; null switches a rule off."""

    decides = ("filter",)

    preset: Literal["datacomp_basic", "datacomp_clip", "datacomp_image_clip"] | None = Field(
        None, description="DataComp's rules for what this section leaves out; what it names itself stands"
    )
    min_side: int | None = Field(None, ge=1, le=MANY, description="least width and height in pixels, as stored")
    max_aspect_ratio: float | None = Field(None, ge=1, description="largest ratio of the longer to the shorter side")
    min_caption_length: int | None = Field(None, ge=1, le=MANY, description="fewest characters of a caption")
    max_caption_length: int | None = Field(None, ge=1, le=MANY, description="most characters of a caption")
    min_caption_words: int | None = Field(None, ge=1, le=MANY, description="fewest words of a caption")
    max_caption_words: int | None = Field(None, ge=1, le=MANY, description="most words of a caption")
    min_caption_tokens: int | None = Field(
        None, ge=2, le=MANY, description="fewest tokens of a caption, start and end included"
    )
    max_caption_tokens: int | None = Field(None, ge=2, le=MANY, description="most tokens of a caption")
    drop_captions: list[str] | None = Field(
        None, description="regular expressions (RE2): captions with a match for one are dropped"
    )
    drop_urls: list[str] | None = Field(None, description="the same for URLs")
    languages: list[str] | None = Field(
        None, description="codes of the languages that captions may be in, such as en; needs the extra `language`"
    )
    keep_where: str | None = Field(
        None, description="condition in SQL over a part's columns, such as width >= 200 AND caption NOT LIKE '%http%'"
    )
    min_aesthetic_score: float | None = Field(None, description="least aesthetic score, where the encoder has a head")
    max_safety_score: float | None = Field(None, description="largest safety score, where the card names a head")
    min_clip_score: float | None = Field(None, ge=-1, le=1, description="least cosine of picture and caption")
    min_clip_score_quantile: float | None = Field(
        None, ge=0, lt=1, description="share of the remaining rows with the lowest picture–caption cosine to drop"
    )
    targets: list[str] | None = Field(
        None, description="parts or folders of pictures: only clusters of pictures nearest to one of these are kept"
    )
    wrong_caption: float | None = Field(
        None, gt=0, le=1, description="drop captions that belong elsewhere with at least this probability"
    )
    evaluation_sets: list[str] | None = Field(
        None, description="parts, folders of pictures, or lists of captions and URLs that must not be trained on"
    )
    max_caption_uses: int | None = Field(
        None, ge=1, le=MANY, description="pictures that may have the same caption; further ones are dropped"
    )
    exact_copies: Literal["image", "pair"] | None = Field(
        "image", description="image: same bytes at another URL are copies; pair: only if the caption is the same too"
    )
    near_copy_cosine: float | None = Field(0.92, gt=0, le=1, description="near copies: least image-embedding cosine")
    near_copy_thumbnail: float = Field(0.8, gt=0, le=1, description="near copies: least concordance of thumbnails")
    near_copy_picture: float | None = Field(
        0.95, gt=0, le=1, description="near copies: least correlation of the pictures laid over each other; null: skip"
    )
    semantic_cosine: float | None = Field(
        None, gt=0, le=1, description="least image-embedding cosine of pictures that show the same; published: 0.95"
    )
    semantic_keep: float | None = Field(
        None, gt=0, lt=1, description="share of the pictures that semantic duplicates leave; finds semantic_cosine"
    )
    keep: Literal["first", "best"] = Field("first", description="which copy stays: first row, or best clip_score")
    largest_drop: Annotated[float | None, NOTHING] = Field(
        None, gt=0, le=1, description="share of the rows from which a rule is stopped as implausible; null: 0.75"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """What a preset says of the keys that are not there."""
        if isinstance(data, dict) and isinstance(name := data.get("preset"), str):
            return {**FILTER_PRESETS.get(name, {}), **data}
        return data

    @model_validator(mode="after")
    def _agree(self) -> FilterSection:
        if self.semantic_cosine is not None and self.semantic_keep is not None:
            raise ValueError("semantic_cosine and semantic_keep: name one, the other follows from it")
        if self.preset == "datacomp_image_clip" and not self.targets:
            raise ValueError("the preset datacomp_image_clip needs targets: parts or a folder of ImageNet's pictures")
        return self


class PriorSection(Section):
    """Which network is trained."""

    decides = ("train",)

    preset: Literal["tiny", "small", "karlo", "kandinsky22", "large"] = Field(
        "small", description="size of the prior; karlo and kandinsky22 are the published ones"
    )


class TrainSection(Section):
    """How the prior is trained."""

    decides = ("train",)

    arm: Literal["eclipse", "projection", "diffusion"] = Field(
        "eclipse", description="eclipse, or a baseline of the same size: projection is lambda 0; diffusion"
    )
    init: str | None = Field(
        None, description="prior to start from: an export, another workspace or a hub id; null: random weights"
    )
    steps: int = Field(60_000, ge=1, le=MANY, description="optimizer steps; more of them go on from a finished run")
    batch_size: int = Field(
        1024, ge=2, le=10_000_000, description="rows in the global batch; all are contrasted with each other"
    )
    microbatch: Annotated[int | None, NOTHING] = Field(
        None,
        ge=1,
        le=10_000_000,
        description="rows a device takes at once, where a batch does not fit; changes no result",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised updates for the matrices (arXiv 2502.16982), AdamW for the rest"
    )
    learning_rate: float = Field(5e-5, gt=0, description="peak of the schedule")
    warmup_steps: int = Field(500, ge=0, le=MANY, description="steps of linear warm-up before the cosine")
    restarts: int = Field(0, ge=0, le=MANY, description="warm restarts: the cosine runs restarts + 1 times")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, on matrices only")
    lambda_: float = Field(0.2, ge=0, alias="lambda", description="weight of the contrastive loss; 0 is the projection")
    temperature: float = Field(0.01, gt=0, description="of the contrastive loss")
    draws: int = Field(
        1, ge=1, le=24, description="predictions a caption and step, on one reading of the caption; their losses' mean"
    )
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of captions replaced by the empty one")
    projection_reduction: Literal["mean", "sum"] = Field(
        "mean", description="squared error over the D dimensions: sum makes lambda's effect D times smaller"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the exported moving average of the weights")
    grad_clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="on GPUs from Ampere on; all else uses fp32")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of weights, order and noise")
    validation: float = Field(0.01, gt=0, lt=1, description="fraction of image groups held back for validation")
    validate_every: Annotated[int, NOTHING] = Field(1000, ge=1, le=MANY, description="steps between validations")
    checkpoint_every: Annotated[int, NOTHING] = Field(1000, ge=1, le=MANY, description="steps between checkpoints")
    resident: Annotated[bool, NOTHING] = Field(
        False, description="hold the selected cache on the device; refused where it does not fit"
    )
    block_rows: int = Field(
        1,
        ge=1,
        le=MANY,
        description="above 1: shuffle blocks of so many rows, where the cache is far larger than memory",
    )
    wandb: Annotated[str | None, NOTHING] = Field(
        None, description="project on Weights & Biases that gets the metrics too"
    )


class DecoderSection(Section):
    """What turns image embeddings into pictures."""

    decides = ("render", "evaluate")

    kind: Literal["kandinsky22", "karlo"] = Field("kandinsky22", description="family of the decoder")
    path: str = Field(description="directory or hub id; {models} is the installation's own")
    steps: int = Field(50, ge=1, le=MAX_DENOISING_STEPS, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance; 1 is none")
    image_size: int = Field(512, ge=16, le=MAX_IMAGE_SIZE, description="side of the pictures in pixels")
    scheduler: Scheduler | None = Field(None, description="null: the one that comes with the decoder")
    batch_size: Annotated[int | None, NOTHING] = Field(
        None, ge=1, le=MANY, description="pictures at a time; null: what suits the device, halved where memory is short"
    )


class RenderSection(Section):
    """What `eclipse render` makes when no prompts file is named."""

    decides = ("render",)

    prompts: list[str] = Field(default_factory=list, description="prompts rendered by default")
    samples: int = Field(4, ge=1, le=10_000, description="pictures a prompt")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the noise; prompt and sample number are mixed in")


class EvaluateSection(Section):
    """How much `eclipse evaluate` measures."""

    decides = ("evaluate",)

    prompts_per_category: int = Field(
        20, ge=1, le=10_000, description="prompts a category and split, for sources with categories"
    )
    rows: int = Field(2000, ge=2, le=MANY, description="validation rows for the metrics in embedding space, at most")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of prompts and noise")
    reference: Annotated[str | None, Decides(("render", "evaluate"))] = Field(
        None,
        min_length=1,
        description="a trained prior of this encoder shown beside the workspace's own by sources with categories:"
        " directory or hub id; {models} is the installation's own",
    )


class Card(Section):
    """Everything a workspace needs to know before it starts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="short name")
    title: str = Field("", description="one line for `eclipse cards`")
    description: str = Field("", description="what it is, where the list comes from, what to expect")
    licence: str = Field("", description="licence of the list and of the pictures")
    source: Source
    encoder: EncoderSection
    filter: FilterSection = FilterSection()  # type: ignore[call-arg]
    prior: PriorSection = PriorSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    decoder: DecoderSection
    render: RenderSection = RenderSection()  # type: ignore[call-arg]
    evaluate: EvaluateSection = EvaluateSection()  # type: ignore[call-arg]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Card:
        """Read a card by its name (`shapes`) or its path. UsageError names file, key and the allowed values."""
        return cls.read(name_or_path)[0]

    @classmethod
    def read(cls, name_or_path: str | Path) -> tuple[Card, list[str]]:
        """The same, with a note for each key that goes by another name now."""
        path = find_card(name_or_path)
        try:
            if path.stat().st_size > LARGEST_CARD:
                raise UsageError(f"this is no card: it is larger than {LARGEST_CARD:,} bytes", where=str(path))
            loader = _Loader(path.read_text(encoding="utf-8"))
            loader.name = path.name  # what the messages call it
            data = loader.get_single_data()
        except OSError as error:
            raise UsageError(f"cannot read the card: {error.strerror}", where=str(path)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"the card is not valid YAML: {error}", where=str(path)) from error
        except RecursionError:
            raise UsageError("the card is nested too deeply", where=str(path)) from None
        if not isinstance(data, dict):
            raise UsageError(
                "the card is empty or no mapping", where=str(path), hint="`eclipse cards --keys` shows every key"
            )
        data, notes = renamed(_absolute_urls(data, path))
        try:
            return cls.model_validate(data), [f"{path.name}: {note}" for note in notes]
        except ValidationError as error:
            raise UsageError(_explain(error), where=str(path), hint="`eclipse cards --keys` shows every key") from error

    def fingerprint(self, stage: str) -> str:
        """SHA-256 over every key that decides what `stage` makes, its own and those of the stages it is built on.

        Keys that are null do not count: an option added later, and left out, changes no fingerprint.
        """
        return digest(self._deciding(lambda stages: bool(set(stages) & set(lineage(stage)))))

    def section_fingerprint(self, section: str) -> str:
        """The same over the deciding keys of one section."""
        return digest({section: self._deciding(bool)[section]})

    def _deciding(self, wanted: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
        """The keys of each section, as in a file, whose decided stages are `wanted`; sections without any left out."""
        data = self.model_dump(mode="json", by_alias=True)
        chosen: dict[str, Any] = {}
        for key in keys(self):
            if wanted(key.decides):
                chosen.setdefault(key.section, {})[key.name] = data[key.section][key.name]
        return chosen

    def differences(self, other: Card) -> list[str]:
        """`train.steps: 100 → 200` for every key of the sections in which `other` differs."""
        return differences(self.model_dump(mode="json", by_alias=True), other.model_dump(mode="json", by_alias=True))

    def dump(self, path: Path) -> None:
        """Write the resolved card, every key spelled out."""
        text = yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110
        )
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Safe YAML that also refuses a key given twice, and names the line of a value that is none."""

    def get_single_node(self) -> yaml.Node | None:
        """The whole card as nodes, checked before anything is built: aliases can stand for more than any memory."""
        node = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and self._size(node, sizes) > MOST_NODES:
            raise _at(node, f"aliases multiply this to more than {MOST_NODES:,} values")
        return node

    def _size(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """How many values a node stands for; `sizes` holds those known, by identity."""
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES  # an alias within its own anchor has no end
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                inner = [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            sizes[id(node)] = 1 + sum(self._size(each, sizes) for each in inner)
        return sizes[id(node)]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _at(key, f"the key {key.value} stands here a second time")
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError) as error:
            # How PyYAML fails on what looks like a date or a number and is none: 2020-13-45, 5,000 digits, !!int "".
            raise _at(node, f"this is no value: {str(error).partition(';')[0]}") from None
        if isinstance(value, str) and (odd := next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)):
            raise _at(node, f"a character that cannot be written (U+{ord(odd):04X})")
        return value


def _at(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


SECTIONS = ("source", "encoder", "filter", "prior", "train", "decoder", "render", "evaluate")


def resolve(text: str) -> str:
    """Replace `{models}` by the directory of the weights that ship with the installation."""
    return text.replace("{models}", str(MODELS))


def card_names() -> list[str]:
    """Names of the cards that ship with the installation."""
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def every_key() -> Iterator[tuple[str, dict[str, str]]]:
    """Each key of a card: type, default, the first stages that it decides, meaning. For `eclipse cards --keys`."""
    decides = {(key.section, key.name): key.decides for key in keys()}
    for section in SECTIONS:
        for model in _models_of(section):
            kind = f" (kind: {model.model_fields['kind'].default})" if section == "source" else ""
            for name, field in model.model_fields.items():
                required = field.is_required()
                default = (
                    "required" if required else json.dumps(field.get_default(call_default_factory=True), default=str)
                )
                yield (
                    f"{section}.{field.alias or name}{kind}",
                    {
                        "type": _type_text(field.annotation),
                        "default": default,
                        "decides": ", ".join(decides[section, field.alias or name]) or "nothing",
                        "meaning": field.description or "",
                    },
                )


def _type_text(annotation: Any) -> str:
    """`int | null`, `adamw | muon`: a key's type as somebody who writes YAML would say it."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(annotation)))
    if annotation is NoneType:
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def find_card(name_or_path: str | Path) -> Path:
    """The file of a card. UsageError suggests the nearest name."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError("no such card file", where=text, hint=f"cards known by name: {', '.join(card_names())}")
        return path
    if text in card_names():
        return CARDS / f"{text}.yaml"
    near = difflib.get_close_matches(text, card_names(), n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown card {text!r}", hint=f"{meant}cards: {', '.join(card_names())}, or the path of a file")


@dataclass(frozen=True)
class Key:
    """One key of a card: where it stands, what it is, and the first stages whose outputs it decides."""

    section: str
    name: str
    field: FieldInfo
    decides: tuple[str, ...]


def keys(card: Card | None = None) -> Iterator[Key]:
    """Every key that a card has; None: that any card can have, those of each kind of source among them."""
    for section in SECTIONS:
        models = [type(getattr(card, section))] if card is not None else _models_of(section)
        seen: set[str] = set()
        for model in models:
            for attribute, field in model.model_fields.items():
                name = field.alias or attribute
                marks = [mark.stages for mark in field.metadata if isinstance(mark, Decides)]
                if name not in seen:
                    yield Key(section, name, field, marks[0] if marks else model.decides)
                seen.add(name)


def lineage(stage: str) -> list[str]:
    """The stage and those it is built on, itself first."""
    stages: list[str] = []
    while stage:
        stages.append(stage)
        stage = BUILT_ON[stage] or ""
    return stages


def digest(data: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of sections; keys that are null do not count."""
    plain = {
        section: {key: value for key, value in values.items() if value is not None}
        if isinstance(values, dict)
        else values
        for section, values in data.items()
    }
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def renamed(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A card as read, with today's names in place of former ones, and a note for each; both at once are left alone."""
    notes, result = [], dict(data)
    for section, names in RENAMED.items():
        values = result.get(section)
        if not isinstance(values, dict):
            continue
        for old, new in names.items():
            if old in values and new not in values:
                values = {new if key == old else key: value for key, value in values.items()}
                notes.append(f"{section}.{old} is called {section}.{new} now")
        result[section] = values
    return result, notes


def differences(before: dict[str, Any], after: dict[str, Any], stage: str | None = None) -> list[str]:
    """`train.steps: 100 → 200` for each key of two dumped cards that differs; with `stage`, of those that decide it.

    Names, titles and descriptions do not count.
    """
    old, new = (_flatten({key: renamed(card)[0].get(key) for key in SECTIONS}) for card in (before, after))
    idle = {f"{key.section}.{key.name}" for key in keys() if stage and not set(key.decides) & set(lineage(stage))}
    names = [name for name in dict.fromkeys([*old, *new]) if name not in idle]
    names.sort(key=lambda name: not name.endswith(".kind"))  # what explains most of the others
    return [f"{name}: {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _absolute_urls(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """A user's card names its files relative to itself; a shipped card, to the workspace, whose own card lies there."""
    source = data.get("source")
    if path.parent == CARDS or path.name == CARD_NAME or not isinstance(source, dict):
        return data
    folder, source = path.absolute().parent, dict(source)
    for key in PLACES:
        if key in source:
            names = source[key]
            source[key] = [_beside(folder, n) for n in names] if isinstance(names, list) else _beside(folder, names)
    return {**data, "source": source}


def _beside(folder: Path, name: Any) -> Any:
    """The full path of a file named relative to `folder`; what is no file name stays, for validation to refuse."""
    if not isinstance(name, str) or not name.strip() or "://" in name:
        return name
    try:
        return str(folder / Path(name).expanduser())
    except RuntimeError:  # ~ of a user that is not there
        return name


def _shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _explain(error: ValidationError) -> str:
    """One line for each wrong key, with what is allowed there."""
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in _without_tag(detail["loc"]))
        if detail["type"] == "extra_forbidden":
            allowed = _keys_beside(detail["loc"])
            near = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            lines.append(f"unknown key {key} ({meant}allowed: {', '.join(allowed)})")
        elif detail["type"] == "missing":
            lines.append(f"missing key {key}")
        else:
            lines.append(f"{key}: {detail['msg'].removeprefix('Value error, ')}, not {_shown(detail['input'])}")
    count, more = len(lines), [f"and {len(lines) - SHOWN_KEYS} more"] if len(lines) > SHOWN_KEYS else []
    return lines[0] if count == 1 else "\n  - ".join([f"{count} keys are wrong:", *lines[:SHOWN_KEYS], *more])


def _without_tag(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts the tag of a discriminated union into the location: source.shapes.rows is source.rows."""
    return loc[:1] + loc[2:] if loc[:1] == ("source",) else loc


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    section = str(loc[0])
    if section == "source" and len(loc) > 2:
        models = [SOURCES[str(loc[1])]]
    else:
        models = [Card] if len(loc) == 1 else _models_of(section)
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _models_of(section: str) -> list[type[Section]]:
    """The classes that a section can be of: one, but for the source."""
    if section == "source":
        return list(SOURCES.values())
    annotation = Card.model_fields[section].annotation
    return [model for model in (annotation, *get_args(annotation)) if isinstance(model, type)]
