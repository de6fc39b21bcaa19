"""The filter's rules: which of the rows still kept go, why, and in whose favour; run in order by pipeline.filter.

Quality comes before copies: a row that is thrown out for its caption or size must not take its good twin along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import EclipseError
from ..core.progress import Progress
from ..images.shards import ImageShard, small_pictures
from . import caption_mismatch as mismatch
from . import dedup

if TYPE_CHECKING:
    from ..cache.store import Store
    from ..core.card import FilterSection

OVERLAID = 256  # pairs of pictures in memory at once
PICTURES_A_CLUSTER = 1_000  # semantic duplicates are sought among this many pictures at once, on average


@dataclass(frozen=True)
class Finding:
    """What one rule found: global rows to reject, the row each one copies, and scores of some or all rows."""

    rejected: np.ndarray
    duplicate_of: np.ndarray | None = None
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # name → rows, float32 values
    notes: dict[str, float] = field(default_factory=dict)  # figures for the stage's summary


@dataclass(frozen=True)
class Inputs:
    """What every rule sees. `rows`: global rows still kept, ascending. `shards`: where the pictures lie."""

    store: Store
    shards: Mapping[int, ImageShard]
    rows: np.ndarray
    options: FilterSection
    progress: Progress

    def numbers(self, name: str) -> np.ndarray:
        """A numeric column as float32 (n,), NaN where it is null."""
        return np.asarray(self.store.column(name, self.rows).to_numpy(), np.float32)

    def codes(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Equal values of a column → equal integers."""
        return dedup.codes(self.store.column(name, self.rows if rows is None else rows))

    def rank(self) -> np.ndarray:
        """(n,) which of two copies stays: the lower rank."""
        order = np.arange(len(self.rows))
        if self.options.keep == "best":
            order = np.lexsort((order, -self.numbers("clip_score")))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return rank


Rule = Callable[[Inputs], Finding | None]  # None: the card has the rule switched off


def small_picture(inputs: Inputs) -> Finding | None:
    """Shorter side below `min_side` pixels."""
    if inputs.options.min_side is None:
        return None
    side = np.minimum(inputs.numbers("width"), inputs.numbers("height"))
    return Finding(inputs.rows[side < inputs.options.min_side])


def aspect_ratio(inputs: Inputs) -> Finding | None:
    """Longer side more than `max_aspect_ratio` times the shorter."""
    if inputs.options.max_aspect_ratio is None:
        return None
    width, height = inputs.numbers("width"), inputs.numbers("height")
    ratio = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    return Finding(inputs.rows[ratio > inputs.options.max_aspect_ratio])


def caption_length(inputs: Inputs) -> Finding | None:
    """Fewer or more characters than allowed; characters, because words need a language."""
    least, most = inputs.options.min_caption_length, inputs.options.max_caption_length
    if least is None and most is None:
        return None
    import pyarrow.compute as pc

    trimmed = pc.call_function("utf8_trim_whitespace", [inputs.store.column("caption", inputs.rows)])
    length = pc.call_function("utf8_length", [trimmed]).to_numpy()
    return Finding(inputs.rows[(length < (least or 0)) | (length > (most or np.inf))])


def low_aesthetic_score(inputs: Inputs) -> Finding | None:
    """Below `min_aesthetic_score`. EclipseError where the parts have no such score."""
    least = inputs.options.min_aesthetic_score
    return None if least is None else _beyond(inputs, "aesthetic", "min_aesthetic_score", lambda score: score >= least)


def high_safety_score(inputs: Inputs) -> Finding | None:
    """Above `max_safety_score`: less safe. EclipseError where the parts have no such score."""
    most = inputs.options.max_safety_score
    return None if most is None else _beyond(inputs, "safety", "max_safety_score", lambda score: score <= most)


def _beyond(inputs: Inputs, kind: str, option: str, passes: Callable[[np.ndarray], np.ndarray]) -> Finding:
    if f"{kind}_score" not in inputs.store.meta.head_scores:
        raise EclipseError(
            f"the filter asks for {kind} scores that the embeddings do not have",
            where=f"filter.{option}",
            hint=f"set it to null, or name a head in encoder.{kind} and embed again",
        )
    return Finding(inputs.rows[~passes(inputs.numbers(f"{kind}_score"))])


def low_clip_score(inputs: Inputs) -> Finding | None:
    """Cosine of picture and caption below `min_clip_score`, or among the lowest share of the remaining rows."""
    least, share = inputs.options.min_clip_score, inputs.options.min_clip_score_quantile
    if least is None and share is None:
        return None
    score = inputs.numbers("clip_score")
    low = score < (-np.inf if least is None else least)
    if share:
        order = np.argsort(np.where(low, np.inf, score), kind="stable")
        low[order[: int(share * np.count_nonzero(~low))]] = True
    return Finding(inputs.rows[low])


def wrong_caption(inputs: Inputs) -> Finding | None:
    """Caption belongs to another picture with at least this probability (see pipeline.mismatch)."""
    if inputs.options.wrong_caption is None or not len(inputs.rows):
        return None

    def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = inputs.rows[positions]
        return dedup.unit(inputs.store.text_embeddings(rows)), dedup.unit(inputs.store.image_embeddings(rows))

    evidence = mismatch.wrong_captions(len(inputs.rows), read, inputs.codes("image_sha256"), inputs.progress)
    scores = {"wrong_probability": (inputs.rows, evidence.wrong), "caption_z": (inputs.rows, evidence.z)}
    rejected = inputs.rows[evidence.wrong >= inputs.options.wrong_caption]
    return Finding(rejected, scores=scores, notes={"wrong_caption_share": round(evidence.wrong_share, 4)})


def exact_copy(inputs: Inputs) -> Finding | None:
    """Same bytes as an earlier row, at another URL or with the same caption (see dedup.exact_copies)."""
    scope = inputs.options.exact_copies
    if scope is None:
        return None
    keeper = dedup.exact_copies(
        inputs.codes("image_sha256"), inputs.codes("uid"), inputs.codes("url"), inputs.rank(), scope=scope
    )
    copies = np.flatnonzero(keeper != np.arange(len(keeper)))
    similarity = {"copy_similarity": (inputs.rows[copies], np.ones(len(copies), np.float32))}
    return Finding(inputs.rows[copies], inputs.rows[keeper[copies]], similarity)


def near_copy(inputs: Inputs) -> Finding | None:
    """Embedding and thumbnail both like another picture's (dedup.near_pairs), and one a crop of the other."""
    options, cosine = inputs.options, inputs.options.near_copy_cosine
    if cosine is None:
        return None

    def find(vectors: dedup.Vectors, rows: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dedup.near_keepers(
            vectors,
            rank,
            cosine=cosine,
            concordance=options.near_copy_thumbnail,
            progress=inputs.progress,
            confirm=None if options.near_copy_picture is None else lambda i, j: _overlay(inputs, rows, i, j),
        )

    return _pictures(inputs, find)


def _overlay(inputs: Inputs, rows: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Which of the pairs rows[i], rows[j] are crops of each other by `near_copy_picture`, (n,) bool."""
    import torch

    from .crop_match import SIDE, correlations

    limit = inputs.options.near_copy_picture
    assert limit is not None
    used, place = np.unique(np.concatenate([i, j]), return_inverse=True)
    pictures = small_pictures(inputs.shards, inputs.store, rows[used], SIDE, inputs.progress)
    first, second = place[: len(i)], place[len(i) :]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    passed = np.zeros(len(i), bool)
    with inputs.progress.task("laying pictures over each other", len(i), "pairs") as task:
        for start in range(0, len(i), OVERLAID):
            part = slice(start, start + OVERLAID)
            a, b = (
                torch.from_numpy(pictures[which[part]]).to(device).permute(0, 3, 1, 2).float() / 255
                for which in (first, second)
            )
            passed[part] = (correlations(a, b, limit) >= limit).cpu().numpy()
            task.advance(len(a))
    return passed


def semantic_duplicate(inputs: Inputs) -> Finding | None:
    """Embedding above `semantic_cosine` for another picture of the same cluster (see dedup.semantic_keepers)."""
    cosine = inputs.options.semantic_cosine
    if cosine is None:
        return None

    def find(vectors: dedup.Vectors, _: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        clusters = vectors.size // PICTURES_A_CLUSTER + 1
        return dedup.semantic_keepers(vectors, rank, cosine=cosine, clusters=clusters, progress=inputs.progress)

    return _pictures(inputs, find)


Find = Callable[[dedup.Vectors, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # vectors, rows, rank


def _pictures(inputs: Inputs, find: Find) -> Finding:
    """Run a rule about pictures: all captions of one share its fate, and are no copies of each other."""
    rank = inputs.rank()
    first = dedup.first_of(inputs.codes("image_sha256"), rank)
    pictures, picture_of = np.unique(first, return_inverse=True)
    rows = inputs.rows[pictures]
    keeper, similarity = find(_vectors(inputs.store, rows), rows, rank[pictures])
    copies = np.flatnonzero(keeper[picture_of] != picture_of)
    rejected = inputs.rows[copies]
    duplicate_of = inputs.rows[pictures[keeper[picture_of[copies]]]]
    return Finding(rejected, duplicate_of, {"copy_similarity": (rejected, similarity[picture_of[copies]])})


def _vectors(store: Store, rows: np.ndarray) -> dedup.Vectors:
    def read(positions: np.ndarray) -> dedup.Looks:
        some = rows[positions]
        return dedup.Looks.of(store.image_embeddings(some), store.thumbnails(some))

    return dedup.Vectors(len(rows), read)


RULES: tuple[Rule, ...] = (
    small_picture,
    aspect_ratio,
    caption_length,
    low_aesthetic_score,
    high_safety_score,
    low_clip_score,
    wrong_caption,
    exact_copy,
    near_copy,
    semantic_duplicate,
)


def apply(
    store: Store, shards: Mapping[int, ImageShard], options: FilterSection, progress: Progress
) -> Iterator[tuple[str, Finding]]:
    """Run every rule the card has switched on over what the rules before it left; yields reason and finding."""
    left = np.ones(len(store), bool)
    for rule in RULES:
        finding = rule(Inputs(store, shards, np.flatnonzero(left), options, progress))
        if finding is not None:
            left[finding.rejected] = False
            yield rule.__name__, finding
