"""The filter's rules: which of the rows still kept go, why, and in whose favour; run in order by stage.py.

Quality comes before copies: a row that is thrown out for its caption or size must not take its good twin along.
A rule is one function, named like the reason it gives; it returns None where the card has it switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from ..cache.vectors import codes
from ..core.errors import EclipseError, UsageError
from . import dedup
from .evidence import Evidence
from .neighbours import Pairs, find_pairs

if TYPE_CHECKING:
    import pyarrow as pa

    from ..core.sections import EncoderSection, FilterSection
    from .examples import Examples

MOST_WRONG = 0.65  # share of wrong captions beyond which it is the encoder that is doubted
LEAST_POWER = 0.85  # how often a right caption must beat one dealt at random; below, the encoder tells too little
THUMBNAILS_LOOKED_AT = 1000  # rows; if all these are blank, the rows were made without pictures


@dataclass(frozen=True)
class Finding:
    """What one rule found: global rows to reject, the row each one copies, and scores of some or all rows."""

    rejected: np.ndarray
    duplicate_of: np.ndarray | None = None
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # name → rows, float32 values
    decided_by: np.ndarray | None = None  # the number of each rejected row that the rule judged, float32 …
    threshold: float | None = None  # … and what it was compared with
    notes: dict[str, Any] = field(default_factory=dict)  # figures for the stage's summary
    warning: str = ""  # why the rule held back
    stated: bool = False  # any share may go: the card states it itself, or what goes is left in an equal row
    thresholds: np.ndarray | None = None  # what each rejected row was compared with, float32, where that differs


@dataclass(frozen=True)
class Inputs:
    """What every rule sees. rows: global rows still kept, ascending; root: what paths in the card are relative to."""

    evidence: Evidence
    rows: np.ndarray
    options: FilterSection
    encoder: EncoderSection
    root: Path

    def column(self, name: str) -> pa.ChunkedArray:
        return self.evidence.store.column(name, self.rows)

    def numbers(self, name: str) -> np.ndarray:
        """A numeric column as float32 (n,)."""
        return np.asarray(self.column(name).to_numpy(), np.float32)

    @cached_property
    def rank(self) -> np.ndarray:
        """(n,) which of two copies stays: the lower rank."""
        order = np.arange(len(self.rows))
        if self.options.keep == "best":
            order = np.lexsort((order, -self.numbers("clip_score")))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return rank


Rule = Callable[[Inputs], Finding | None]


def not_finite(inputs: Inputs) -> Finding | None:
    """A number of the row is none, or an embedding all zeros: no other rule can judge it, no statistic may see it."""
    unsound = inputs.evidence.unsound
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *unsound.values()]))
    notes = {"not_finite": {name: len(rows) for name, rows in unsound.items()}} if len(rows) else {}
    return Finding(np.intersect1d(rows, inputs.rows), notes=notes)


def small_picture(inputs: Inputs) -> Finding | None:
    """Shorter side below `min_side` pixels."""
    if inputs.options.min_side is None:
        return None
    side = np.minimum(inputs.numbers("width"), inputs.numbers("height"))
    small = side < inputs.options.min_side
    return Finding(inputs.rows[small], decided_by=side[small], threshold=inputs.options.min_side)


def aspect_ratio(inputs: Inputs) -> Finding | None:
    """Longer side more than `max_aspect_ratio` times the shorter."""
    if inputs.options.max_aspect_ratio is None:
        return None
    width, height = inputs.numbers("width"), inputs.numbers("height")
    ratio = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    most = inputs.options.max_aspect_ratio
    return Finding(inputs.rows[ratio > most], decided_by=ratio[ratio > most], threshold=most)


def caption_length(inputs: Inputs) -> Finding | None:
    """Fewer or more characters, words (between spaces) or tokens (start and end included) than allowed."""
    options = inputs.options
    bounds = {
        "characters": (options.min_caption_length, options.max_caption_length),
        "words": (options.min_caption_words, options.max_caption_words),
        "tokens": (options.min_caption_tokens, options.max_caption_tokens),
    }
    if all(limit is None for pair in bounds.values() for limit in pair):
        return None
    trimmed = pc.call_function("utf8_trim_whitespace", [inputs.column("caption")])
    counts = {
        "characters": pc.call_function("utf8_length", [trimmed]).to_numpy(),
        "words": pc.call_function("count_substring_regex", [trimmed], pc.MatchSubstringOptions(r"\S+")).to_numpy(),
        "tokens": inputs.evidence.store.token_counts(inputs.rows),
    }
    bad = np.zeros(len(inputs.rows), bool)
    for name, (least, most) in bounds.items():
        bad |= (counts[name] < (least or 0)) | (counts[name] > (np.inf if most is None else most))
    return Finding(inputs.rows[bad])


def caption_pattern(inputs: Inputs) -> Finding | None:
    """The caption has a match for one of `drop_captions`, regular expressions in RE2's syntax, which cannot blow up."""
    return _matching(inputs, "caption", "drop_captions", inputs.options.drop_captions)


def url_pattern(inputs: Inputs) -> Finding | None:
    """The URL has a match for one of `drop_urls`."""
    return _matching(inputs, "url", "drop_urls", inputs.options.drop_urls)


def _matching(inputs: Inputs, column: str, option: str, patterns: list[str] | None) -> Finding | None:
    if not patterns:
        return None
    import pyarrow as pa

    bad, values = np.zeros(len(inputs.rows), bool), inputs.column(column)
    for pattern in patterns:
        try:
            bad |= pc.call_function("match_substring_regex", [values], pc.MatchSubstringOptions(pattern)).to_numpy()
        except pa.ArrowInvalid as error:
            raise UsageError(f"no regular expression: {error}", where=f"filter.{option}: {pattern}") from error
    return Finding(inputs.rows[bad])


def other_language(inputs: Inputs) -> Finding | None:
    """The caption is most likely in another language than `languages` (ISO 639-1), told by lingua."""
    wanted = inputs.options.languages
    if not wanted:
        return None
    from .language import languages_of

    told = languages_of(inputs.column("caption"), inputs.evidence.progress)
    return Finding(inputs.rows[~np.isin(told, [code.lower() for code in wanted])])


def expression(inputs: Inputs) -> Finding | None:
    """`keep_where`, a condition in SQL over the columns of a part, is not true for the row."""
    if inputs.options.keep_where is None:
        return None
    from .condition import holds

    return Finding(inputs.rows[~holds(inputs.options.keep_where, inputs.evidence.store, inputs.rows)])


def low_aesthetic_score(inputs: Inputs) -> Finding | None:
    """Below `min_aesthetic_score`. EclipseError where the parts have no such score."""
    least = inputs.options.min_aesthetic_score
    return None if least is None else _beyond(inputs, "aesthetic", "min_aesthetic_score", least, 1)


def high_safety_score(inputs: Inputs) -> Finding | None:
    """Above `max_safety_score`: less safe. EclipseError where the parts have no such score."""
    most = inputs.options.max_safety_score
    return None if most is None else _beyond(inputs, "safety", "max_safety_score", most, -1)


def _beyond(inputs: Inputs, kind: str, option: str, limit: float, sign: int) -> Finding:
    if f"{kind}_score" not in inputs.evidence.store.meta.head_scores:
        raise EclipseError(
            f"the filter asks for {kind} scores that the embeddings do not have",
            where=f"filter.{option}",
            hint=f"set it to null, or name a head in encoder.{kind} and embed again",
        )
    score = inputs.numbers(f"{kind}_score")
    fails = ~(sign * score >= sign * limit)
    return Finding(inputs.rows[fails], decided_by=score[fails], threshold=limit)


def low_clip_score(inputs: Inputs) -> Finding | None:
    """Cosine of picture and caption below `min_clip_score`, or among the lowest share of the remaining rows."""
    least, share = inputs.options.min_clip_score, inputs.options.min_clip_score_quantile
    if least is None and share is None:
        return None
    score = inputs.numbers("clip_score")
    low, threshold = score < (-np.inf if least is None else least), least
    if share:
        order = np.argsort(np.where(low, np.inf, score), kind="stable")
        drop = int(share * np.count_nonzero(~low))
        if drop < np.count_nonzero(~low):
            threshold = float(score[order[drop]])  # the lowest score that stays
        low[order[:drop]] = True
    stated = share is not None
    return Finding(inputs.rows[low], decided_by=score[low], threshold=threshold, stated=stated)


def off_target(inputs: Inputs) -> Finding | None:
    """In a cluster of pictures that is nearest to no picture of `targets`: DataComp's image-based filter."""
    if not inputs.options.targets or not len(inputs.rows):
        return None
    from .examples import off_target as find

    targets = _examples(inputs, "targets", inputs.options.targets)
    off, chosen, clusters = find(targets, inputs.evidence, inputs.rows)
    return Finding(inputs.rows[off], notes={"target_clusters": f"{chosen:,} of {clusters:,}"}, stated=True)


def _examples(inputs: Inputs, option: str, names: list[str]) -> Examples:
    from .examples import read_examples

    evidence, spoken = inputs.evidence, inputs.options.evaluation_caption_cosine is not None
    about = (option, inputs.root, evidence.store.meta, evidence.progress, inputs.encoder)
    return read_examples(names, *about, embed_captions=spoken and option == "evaluation_sets")


def wrong_caption(inputs: Inputs) -> Finding | None:
    """Caption belongs to another picture with at least this probability (see caption_mismatch.py).

    Where most captions look wrong, or right ones hardly differ from random ones, it is the encoder that is wrong: the
    rule then holds back, and says so.
    """
    limit = inputs.options.wrong_caption
    if limit is None or not len(inputs.rows):
        return None
    found = inputs.evidence.captions()
    scores = {"wrong_probability": (inputs.rows, found.wrong[inputs.rows])}
    scores["caption_z"] = (inputs.rows, found.z[inputs.rows])
    notes = {"wrong_caption_share": round(found.wrong_share, 4), "caption_separation": round(found.separation, 4)}
    if found.wrong_share > MOST_WRONG or found.power < LEAST_POWER:
        warning = (
            f"wrong_caption held back: to this encoder {found.wrong_share:.0%} of the captions fit no better than ones "
            f"dealt at random, and what is left beats a random one in {found.power:.0%} of cases (chance: 50 %). It "
            "cannot tell which are wrong; is it the encoder for this language and these pictures?"
        )
        return Finding(inputs.rows[:0], scores=scores, threshold=limit, notes=notes, warning=warning)
    rejected = inputs.rows[found.wrong[inputs.rows] >= limit]
    return Finding(rejected, scores=scores, decided_by=found.wrong[rejected], threshold=limit, notes=notes)


def evaluation_overlap(inputs: Inputs) -> Finding | None:
    """Picture, caption or URL of an evaluation set: near by embedding (and thumbnail), or the same words."""
    if not inputs.options.evaluation_sets:
        return None
    from .examples import overlap

    options = inputs.options
    examples = _examples(inputs, "evaluation_sets", inputs.options.evaluation_sets)
    found = overlap(examples, inputs.evidence, inputs.rows, options)
    rows, at = inputs.rows[found.found], found.found
    return Finding(
        rows,
        scores={"copy_similarity": (rows, found.picture[at]), "caption_similarity": (rows, found.caption[at])},
        decided_by=found.score[at],
        threshold=options.near_copy_cosine,
        thresholds=found.limit[at],
        notes={"evaluation_overlap": found.counts},
    )


def repeated_caption(inputs: Inputs) -> Finding | None:
    """The same words stand under more than `max_caption_uses` pictures: all rows beyond those go."""
    most = inputs.options.max_caption_uses
    if most is None:
        return None
    from .examples import plain_words

    caption = codes(plain_words(inputs.column("caption")))
    picture = inputs.evidence.picture[inputs.rows]
    order = np.lexsort((inputs.rank, caption))
    pair, first = np.unique(np.stack([caption, picture])[:, order], axis=1, return_index=True)
    by_rank = np.lexsort((inputs.rank[order[first]], pair[0]))
    place = np.arange(len(by_rank)) - np.searchsorted(pair[0][by_rank], pair[0][by_rank])
    over = pair[:, by_rank[place >= most]]
    width = int(inputs.evidence.picture.max(initial=0)) + 1
    return Finding(inputs.rows[np.isin(caption * width + picture, over[0] * width + over[1])], threshold=most)


def exact_copy(inputs: Inputs) -> Finding | None:
    """Same bytes as an earlier row, at another URL or with the same caption (see dedup.exact_copies)."""
    scope = inputs.options.exact_copies
    if scope is None:
        return None
    uid, url = (codes(inputs.column(name)) for name in ("uid", "url"))
    keeper = dedup.exact_copies(inputs.evidence.picture[inputs.rows], uid, url, inputs.rank, scope=scope)
    copies = np.flatnonzero(keeper != np.arange(len(keeper)))
    similarity = {"copy_similarity": (inputs.rows[copies], np.ones(len(copies), np.float32))}
    return Finding(inputs.rows[copies], inputs.rows[keeper[copies]], similarity, stated=True)


def near_copy(inputs: Inputs) -> Finding | None:
    """Embedding and thumbnail both like another picture's, and (if asked) one picture a crop of the other."""
    options, evidence = inputs.options, inputs.evidence
    cosine, concordance, limit = options.near_copy_cosine, options.near_copy_thumbnail, options.near_copy_picture
    if cosine is None or not len(inputs.rows):
        return None
    if not evidence.store.thumbnails(inputs.rows[:THUMBNAILS_LOOKED_AT]).any():
        warning = (
            "near_copy held back: rows of embeddings that somebody else made have no thumbnails to compare; "
            "semantic_cosine compares their embeddings alone"
        )
        return Finding(inputs.rows[:0], threshold=cosine, warning=warning)
    best_first = options.keep == "best"
    alike = evidence.alike(cosine, concordance, best_first)
    pictures, rank = _pictures(inputs)
    pairs, number = _among(alike.pairs, pictures)
    vectors = evidence.vectors(pictures)

    def similar(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        near, agree = vectors.compare(i, j)
        return (near >= cosine - dedup.DRIFT) & (agree >= concordance - dedup.DRIFT)

    before = np.isnan(alike.overlay)
    confirm = None if limit is None else lambda which: evidence.overlay(alike, number[which], limit)
    keeper = dedup.near_keepers(pairs, rank, similar, confirm)
    if (before & ~np.isnan(alike.overlay)).any():
        evidence.remember(alike, cosine, concordance, best_first)
    dropped = np.flatnonzero(keeper != np.arange(len(keeper)))
    similarity = np.full(len(keeper), np.nan, np.float32)
    similarity[dropped] = vectors.compare(dropped, keeper[dropped])[0]
    return _fates(inputs, pictures, rank, keeper, similarity, cosine, _recall(alike.pairs, "near_copy"))


def semantic_duplicate(inputs: Inputs) -> Finding | None:
    """Embedding at least `semantic_cosine` to a kept picture's, or the cosine that keeps `semantic_keep` of them."""
    options, evidence = inputs.options, inputs.evidence
    if (options.semantic_cosine is None and options.semantic_keep is None) or not len(inputs.rows):
        return None
    pictures, rank = _pictures(inputs)
    cosine = options.semantic_cosine
    if options.semantic_keep is not None:
        from .semantic import cosine_that_keeps

        cosine = cosine_that_keeps(options.semantic_keep, evidence, pictures, rank, options.keep == "best")
    assert cosine is not None
    every = evidence.similar(cosine, options.keep == "best")
    vectors = evidence.vectors(pictures)

    def find(some: np.ndarray) -> Pairs:
        if len(some) == len(pictures):
            return _among(every, pictures)[0]
        return find_pairs(vectors.among(some), cosine, None, evidence.progress, rank=rank[some])

    keeper, similarity = dedup.semantic_keepers(rank, find)
    notes = _recall(every, "semantic_duplicate") | {"semantic_cosine": round(cosine, 4)}
    return replace(_fates(inputs, pictures, rank, keeper, similarity, cosine, notes), stated=True)


def _pictures(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Rules about pictures: all captions of one share its fate. → the pictures left, and their ranks, both (m,)."""
    pictures, place = np.unique(inputs.evidence.picture[inputs.rows], return_inverse=True)
    best = np.full(len(pictures), len(inputs.rows), np.int64)
    np.minimum.at(best, place, inputs.rank)
    return pictures, best


def _among(pairs: Pairs, pictures: np.ndarray) -> tuple[Pairs, np.ndarray]:
    """The pairs of which both pictures are left, numbered by their places in `pictures`, and which pairs these are."""
    place = np.full(len(pairs.full), -1, np.int64)
    place[pictures] = np.arange(len(pictures))
    number = np.flatnonzero((place[pairs.i] >= 0) & (place[pairs.j] >= 0))
    i, j = place[pairs.i[number]], place[pairs.j[number]]
    return Pairs(i, j, pairs.cosine[number], pairs.concordance[number], pairs.full[pictures]), number


def _fates(
    inputs: Inputs,
    pictures: np.ndarray,
    rank: np.ndarray,
    keeper: np.ndarray,
    similarity: np.ndarray,
    threshold: float,
    notes: dict[str, Any],
) -> Finding:
    """The rows of dropped pictures, each a duplicate of the first row, by rank, of the picture that stays."""
    place = np.searchsorted(pictures, inputs.evidence.picture[inputs.rows])
    first = np.empty(len(inputs.rows), np.int64)
    first[inputs.rank] = inputs.rows
    copies = np.flatnonzero(keeper[place] != place)
    rejected, of = inputs.rows[copies], first[rank[keeper[place[copies]]]]
    cosine = similarity[place[copies]]
    return Finding(rejected, of, {"copy_similarity": (rejected, cosine)}, cosine, threshold, notes)


def _recall(pairs: Pairs, reason: str) -> dict[str, Any]:
    """What the summary says of a search that did not compare every pair."""
    if not pairs.lists:
        return {}
    recall = None if pairs.recall is None else round(pairs.recall, 4)
    return {f"{reason}_search": {"recall": recall, "sampled_pairs": pairs.sampled, "lists": pairs.lists + 1}}


RULES: tuple[Rule, ...] = (
    not_finite,
    small_picture,
    aspect_ratio,
    caption_length,
    caption_pattern,
    url_pattern,
    other_language,
    expression,
    low_aesthetic_score,
    high_safety_score,
    low_clip_score,
    off_target,
    wrong_caption,
    evaluation_overlap,
    repeated_caption,
    exact_copy,
    near_copy,
    semantic_duplicate,
)


def apply(
    evidence: Evidence, options: FilterSection, encoder: EncoderSection, root: Path, *, alone: bool = False
) -> Iterator[tuple[str, int, Finding]]:
    """Run every rule that the card has switched on; yields its reason, how many rows it saw, and its finding.

    Each rule sees what the rules before it left; alone: each sees every sound row.
    """
    left = np.ones(len(evidence.store), bool)
    for rule in RULES:
        rows = np.flatnonzero(left)
        finding = rule(Inputs(evidence, rows, options, encoder, root))
        if finding is not None:
            if not alone or rule is not_finite:
                left[finding.rejected] = False
            yield rule.__name__, len(rows), finding
