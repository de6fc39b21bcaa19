"""Pictures and captions from outside that rows are compared with: evaluation sets and targets; called by rules.py.

A set is a directory of embedding parts (or one part) of the same encoder; a folder of pictures, which are encoded on
the spot; or a list: .txt with a caption a line, .csv, .tsv, .jsonl, .parquet with captions, URLs or both, or .json as
COCO publishes its annotations (captions_val2017.json).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..cache.kmeans import kmeans, nearest
from ..cache.vectors import chunks
from ..core.card import resolve
from ..core.errors import EclipseError, UsageError
from ..core.progress import Progress
from ..images.decode import EXTENSIONS, BadPictureError, open_picture, thumbnail
from .neighbours import Vectors, find_across, unit

if TYPE_CHECKING:
    from ..cache.part import PartMeta
    from ..core.sections import EncoderSection, FilterSection
    from ..embed.clip import Encoder
    from .evidence import Evidence

CAPTIONS = ("caption", "text", "prompt", "sentence", "title")  # names of columns, in any case
URLS = ("url", "coco_url", "flickr_url", "image_url")
KINDS = "parts, a folder of pictures, COCO's .json, or a .txt, .csv, .tsv, .jsonl, .parquet list of caption or url"
ENCODED = 64  # pictures, or captions, at once
PICTURES_A_CLUSTER = 100  # of the clusters that targets choose from, on average
MOST_CLUSTERS = 100_000


@dataclass
class Examples:
    """embedding (n, D) and thumbnail (n, 256) uint8 of the pictures; captions and URLs, as many as there are.

    text: (m, D) embeddings of the captions, each at least once; none unless asked for.
    """

    embedding: np.ndarray
    thumbnail: np.ndarray
    captions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    text: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))


@dataclass
class Overlap:
    """What of (n,) rows an evaluation set holds too.

    found: (n,) bool. picture, caption: (n,) float32, cosine to the nearest of its pictures and captions where that is
    above the limit, NaN elsewhere. score, limit: (n,) float32, the one that decided and what it was compared with,
    pictures first; NaN for rows found by words or URL. counts: rows by what they were found by.
    """

    found: np.ndarray
    picture: np.ndarray
    caption: np.ndarray
    score: np.ndarray
    limit: np.ndarray
    counts: dict[str, int]


def plain_words(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lower case, nothing but letters and digits, single spaces: what makes two captions the same words."""
    lower = pc.call_function("utf8_lower", [captions])
    words = pc.call_function("replace_substring_regex", [lower], pc.ReplaceSubstringOptions(r"[^\pL\pN]+", " "))
    return pc.call_function("utf8_trim_whitespace", [words])


def read_examples(
    names: list[str],
    option: str,
    root: Path,
    meta: PartMeta,
    progress: Progress,
    encoder: EncoderSection | None = None,
    *,
    embed_captions: bool = False,
) -> Examples:
    """All of these sets together; paths relative to `root`. UsageError for what is no set, or of another encoder.

    embed_captions: have `text` as well: parts bring it along, captions of lists go through the encoder's text tower.
    """
    embedding: list[np.ndarray] = [np.empty((0, meta.embedding_dim), np.float16)]
    thumbnails: list[np.ndarray] = [np.empty((0, 256), np.uint8)]
    examples = Examples(embedding[0], thumbnails[0])
    text: list[np.ndarray] = [np.empty((0, meta.embedding_dim), np.float32)]
    listed: set[str] = set()
    for name in names:
        path = root / Path(name).expanduser()
        where = f"filter.{option}: {path}"
        if path.is_dir() and not any(path.glob("part-*.parquet")):
            vectors, levels = _encode_folder(path, where, meta, progress, encoder)
        elif path.is_dir() or (path.suffix == ".parquet" and path.name.startswith("part-")):
            vectors, levels, spoken = _read_parts(path, where, meta, examples)
            text.append(spoken.astype(np.float32))
        elif path.is_file():
            before = len(examples.captions)
            _read_list(path, where, examples)
            listed.update(examples.captions[before:])
            continue
        else:
            raise UsageError("there is no such set", where=where, hint=f"name {KINDS}")
        embedding.append(vectors)
        thumbnails.append(levels)
    wide = embedding if len({block.dtype for block in embedding}) == 1 else [x.astype(np.float32) for x in embedding]
    examples.embedding, examples.thumbnail = np.concatenate(wide), np.concatenate(thumbnails)
    if embed_captions:
        if listed and encoder is not None:
            text.append(_encode_captions(listed, f"filter.{option}", meta, progress, encoder))
        examples.text = np.concatenate(text)
    return examples


def _read_parts(
    path: Path, where: str, meta: PartMeta, examples: Examples
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from ..cache.store import Store

    store = Store.open(path)
    if store.meta.encoder_fingerprint != meta.encoder_fingerprint:
        what = f"these parts are of the encoder {store.meta.encoder}, the workspace's of {meta.encoder}"
        raise UsageError(what, where=where, hint="embed the set with the workspace's encoder")
    rows = np.arange(len(store))
    examples.captions += store.column("caption").to_pylist()
    examples.urls += store.column("url").to_pylist()
    return store.image_embeddings(rows), store.thumbnails(rows), store.text_embeddings(rows)


def _load_encoder(section: EncoderSection, where: str, meta: PartMeta, *, text_only: bool) -> Encoder:
    """The card's encoder. EclipseError if it did not make the embeddings."""
    import torch

    from ..embed.clip import Encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.load(
        resolve(section.model), section.pretrained, precision=section.precision, device=device, text_only=text_only
    )
    if encoder.fingerprint != meta.encoder_fingerprint:
        raise EclipseError("the card's encoder is not the one that made the embeddings", where=where)
    return encoder


def _encode_captions(
    captions: set[str], where: str, meta: PartMeta, progress: Progress, section: EncoderSection
) -> np.ndarray:
    """Text embeddings (n, D) float32, in no order that means anything."""
    encoder = _load_encoder(section, where, meta, text_only=True)
    ordered = sorted(captions, key=lambda caption: (len(caption), caption))  # like lengths together: less padding
    found = []
    with progress.task("encoding captions", len(ordered), "captions") as task:
        for start in range(0, len(ordered), ENCODED):
            found.append(encoder.encode_text(*encoder.tokenize(ordered[start : start + ENCODED])).embedding.cpu())
            task.advance(len(found[-1]))
    return np.concatenate(found)


def _encode_folder(
    path: Path, where: str, meta: PartMeta, progress: Progress, section: EncoderSection | None
) -> tuple[np.ndarray, np.ndarray]:
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower().lstrip(".") in EXTENSIONS]
    if not files or section is None:
        raise UsageError("neither parts nor pictures lie here", where=where, hint=f"name {KINDS}")
    encoder = _load_encoder(section, where, meta, text_only=False)
    vectors: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    with progress.task(f"encoding {path.name}", len(files), "pictures") as task:
        for start in range(0, len(files), ENCODED):
            pictures = []
            for file in files[start : start + ENCODED]:
                try:
                    pictures.append(open_picture(file.read_bytes()))
                except (BadPictureError, OSError):
                    task.advance(failures=1)
            if pictures:
                pixels = np.stack([encoder.preprocess(picture) for picture in pictures])
                vectors.append(encoder.encode_images(pixels).cpu().numpy())
                levels += [thumbnail(picture) for picture in pictures]
            task.advance(len(pictures))
    if not levels:
        raise UsageError("none of the pictures here can be read", where=where)
    return np.concatenate(vectors), np.stack(levels)


def _read_list(path: Path, where: str, examples: Examples) -> None:
    import polars as pl

    readers: dict[str, Any] = {
        ".csv": lambda: pl.read_csv(path, infer_schema=False),
        ".tsv": lambda: pl.read_csv(path, separator="\t", infer_schema=False),
        ".jsonl": lambda: pl.read_ndjson(path),
        ".parquet": lambda: pl.read_parquet(path, glob=False),
    }
    try:
        if path.suffix == ".txt":
            examples.captions += [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
            return
        if path.suffix == ".json":
            coco = json.loads(path.read_text("utf-8"))
            examples.captions += [str(entry["caption"]) for entry in coco["annotations"] if "caption" in entry]
            examples.urls += [str(image[name]) for image in coco["images"] for name in URLS if name in image]
            return
        if path.suffix not in readers:
            raise UsageError("this is no kind of set that is known", where=where, hint=f"name {KINDS}")
        frame = readers[path.suffix]()
    except (OSError, ValueError, TypeError, KeyError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"this list cannot be read: {error}", where=where, hint=f"name {KINDS}") from None
    columns = {name.lower(): name for name in frame.columns}
    captions = [columns[name] for name in CAPTIONS if name in columns]
    urls = [columns[name] for name in URLS if name in columns]
    if not captions and not urls:
        raise UsageError(f"no captions and no URLs among {', '.join(frame.columns)}", where=where, hint=f"name {KINDS}")
    for names, into in ((captions[:1], examples.captions), (urls, examples.urls)):
        for name in names:
            into += (
                [str(value) for value in frame[name].explode().to_list() if value is not None]
                if (frame[name].dtype == pl.List)
                else [str(value) for value in frame[name].to_list() if value is not None]
            )


def overlap(examples: Examples, evidence: Evidence, rows: np.ndarray, options: FilterSection) -> Overlap:
    """Which of `rows` an evaluation set holds too.

    A picture by embedding and thumbnail, at the thresholds of near copies; a caption by its words (see plain_words)
    and, if `evaluation_caption_cosine` is set, by its text embedding, where it has at least three words; a URL as it
    stands.
    """
    store, found = evidence.store, {}
    least = 0.92 if options.near_copy_cosine is None else options.near_copy_cosine
    least_said = options.evaluation_caption_cosine
    cosine = np.full(len(rows), np.nan, np.float32)
    picture = np.zeros(len(rows), bool)
    if len(examples.embedding):
        pictures, place = np.unique(evidence.picture[rows], return_inverse=True)
        others = Vectors(len(examples.embedding), examples.embedding.__getitem__, examples.thumbnail.__getitem__)
        at, _, near = find_across(
            evidence.vectors(pictures), others, least, options.near_copy_thumbnail, evidence.progress
        )
        best = np.full(len(pictures), np.nan, np.float32)
        np.fmax.at(best, at, near)
        cosine = best[place]
        picture = ~np.isnan(cosine)
        found["pictures"] = int(picture.sum())
    caption, said = np.zeros(len(rows), bool), np.full(len(rows), np.nan, np.float32)
    if examples.captions:
        words = plain_words(store.column("caption", rows))
        theirs = plain_words(pa.chunked_array([examples.captions], pa.string())).unique()
        several = pc.call_function("count_substring_regex", [words], pc.MatchSubstringOptions(r"\S+")).to_numpy() >= 3
        caption = pc.call_function("is_in", [words], pc.SetLookupOptions(theirs)).to_numpy() & several
        found["captions"] = int(caption.sum())
        if least_said is not None and len(examples.text):
            asked = np.flatnonzero(several)
            mine = Vectors(len(asked), lambda some: store.text_embeddings(rows[asked[some]]))
            others = Vectors(len(examples.text), examples.text.__getitem__)
            at, _, near = find_across(mine, others, least_said, None, evidence.progress)
            np.fmax.at(said, asked[at], near)
            found["near_captions"] = int((~np.isnan(said) & ~caption).sum())
    url = np.zeros(len(rows), bool)
    if examples.urls:
        url = pc.call_function(
            "is_in", [store.column("url", rows)], pc.SetLookupOptions(pa.array(examples.urls, pa.string()))
        ).to_numpy()
        found["urls"] = int(url.sum())
    near_caption = ~np.isnan(said)
    score = np.where(picture, cosine, said)
    limit = np.where(picture, least, np.where(near_caption, least_said or np.nan, np.nan)).astype(np.float32)
    return Overlap(picture | caption | near_caption | url, cosine, said, score, limit, found)


def off_target(targets: Examples, evidence: Evidence, rows: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Which rows lie in a cluster that is nearest to no target → (n,) bool, how many clusters are, how many there are.

    UsageError where the targets have no pictures.
    """
    if not len(targets.embedding):
        raise UsageError("no pictures among the targets", where="filter.targets", hint="name parts or a folder")

    def read(some: np.ndarray):
        return unit(evidence.store.image_embeddings(some))

    clusters = min(MOST_CLUSTERS, max(2, len(rows) // PICTURES_A_CLUSTER), len(rows))
    sample = np.sort(np.random.default_rng(0).permutation(rows)[: 64 * clusters])
    centre = kmeans(read, read(rows[:1]).dtype, sample, clusters, evidence.progress)
    chosen = np.zeros(clusters, bool)
    chosen[nearest(unit(targets.embedding), centre).numpy()] = True
    mine = np.concatenate([nearest(read(rows[some]), centre).numpy() for some in chunks(len(rows))])
    return ~chosen[mine], int(chosen.sum()), clusters
