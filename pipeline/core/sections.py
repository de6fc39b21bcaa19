"""A card's sections but for its source, one class each: what its keys mean and decide. Used by card.py, source.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Far above what anybody means, and below what the libraries behind a key break on.
MANY = 1_000_000_000
MAX_SEED = 2**32 - 1  # what torch's CPU generator reads of a seed
MAX_IMAGE_SIZE = 4096
MAX_DENOISING_STEPS = 1000  # the steps every published decoder was trained with


@dataclass(frozen=True)
class Decides:
    """Beside a key's type: the first stages whose outputs it decides. What is built on those follows."""

    stages: tuple[str, ...]


NOTHING = Decides(())  # speed, patience, records: whatever changes here, what was made stays as good as it was


class Section(BaseModel):
    """Base of every section: unknown keys and numbers that are not finite are refused; nothing changes once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    decides: ClassVar[tuple[str, ...]] = ()  # the first stages whose outputs keys of this section decide


Scheduler = Literal["ddpm", "ddim", "dpm++", "dpm++-karras", "dpm++-sde"]


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
    evaluation_caption_cosine: float | None = Field(
        None, gt=0, le=1, description="least text-embedding cosine to a caption of theirs; null: the same words alone"
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
        1, ge=1, le=24, description="predictions per caption and step, on one reading of it; their losses' mean"
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
    samples: int = Field(4, ge=1, le=10_000, description="pictures per prompt")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the noise; prompt and sample number are mixed in")


class EvaluateSection(Section):
    """How much `eclipse evaluate` measures."""

    decides = ("evaluate",)

    prompts_per_category: int = Field(
        20, ge=1, le=10_000, description="prompts per category and split, for sources with categories"
    )
    rows: int = Field(2000, ge=2, le=MANY, description="validation rows for the metrics in embedding space, at most")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of prompts and noise")
    reference: Annotated[str | None, Decides(("render", "evaluate"))] = Field(
        None,
        min_length=1,
        description="a trained prior of this encoder shown beside the workspace's own by sources with categories:"
        " directory or hub id; {models} is the installation's own",
    )
