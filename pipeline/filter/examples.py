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
    from .evidence import Evidence

CAPTIONS = ("caption", "text", "prompt", "sentence", "title")  # names of columns, in any case
URLS = ("url", "coco_url", "flickr_url", "image_url")
KINDS = "parts, a folder of pictures, COCO's .json, or a .txt, .csv, .tsv, .jsonl, .parquet list of caption or url"
ENCODED = 64  # pictures at once
PICTURES_A_CLUSTER = 100  # of the clusters that targets choose from, on average
MOST_CLUSTERS = 100_000


@dataclass
class Examples:
    """embedding (n, D) and thumbnail (n, 256) uint8 of the pictures; captions and URLs, as many as there are."""

    embedding: np.ndarray
    thumbnail: np.ndarray
    captions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


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
) -> Examples:
    """All of these sets together; paths relative to `root`. UsageError for what is no set, or of another encoder."""
    embedding: list[np.ndarray] = [np.empty((0, meta.embedding_dim), np.float16)]
    thumbnails: list[np.ndarray] = [np.empty((0, 256), np.uint8)]
    examples = Examples(embedding[0], thumbnails[0])
    for name in names:
        path = root / Path(name).expanduser()
        where = f"filter.{option}: {path}"
        if path.is_dir() and not any(path.glob("part-*.parquet")):
            vectors, levels = _encode_folder(path, where, meta, progress, encoder)
        elif path.is_dir() or (path.suffix == ".parquet" and path.name.startswith("part-")):
            vectors, levels = _read_parts(path, where, meta, examples)
        elif path.is_file():
            _read_list(path, where, examples)
            continue
        else:
            raise UsageError("there is no such set", where=where, hint=f"name {KINDS}")
        embedding.append(vectors)
        thumbnails.append(levels)
    wide = embedding if len({block.dtype for block in embedding}) == 1 else [x.astype(np.float32) for x in embedding]
    examples.embedding, examples.thumbnail = np.concatenate(wide), np.concatenate(thumbnails)
    return examples


def _read_parts(path: Path, where: str, meta: PartMeta, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    from ..cache.store import Store

    store = Store.open(path)
    if store.meta.encoder_fingerprint != meta.encoder_fingerprint:
        what = f"these parts are of the encoder {store.meta.encoder}, the workspace's of {meta.encoder}"
        raise UsageError(what, where=where, hint="embed the set with the workspace's encoder")
    rows = np.arange(len(store))
    examples.captions += store.column("caption").to_pylist()
    examples.urls += store.column("url").to_pylist()
    return store.image_embeddings(rows), store.thumbnails(rows)


def _encode_folder(
    path: Path, where: str, meta: PartMeta, progress: Progress, section: EncoderSection | None
) -> tuple[np.ndarray, np.ndarray]:
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower().lstrip(".") in EXTENSIONS]
    if not files or section is None:
        raise UsageError("neither parts nor pictures lie here", where=where, hint=f"name {KINDS}")
    import torch

    from ..embed.clip import Encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.load(resolve(section.model), section.pretrained, precision=section.precision, device=device)
    if encoder.fingerprint != meta.encoder_fingerprint:
        raise EclipseError("the card's encoder is not the one that made the embeddings", where=where)
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


def overlap(
    examples: Examples, evidence: Evidence, rows: np.ndarray, options: FilterSection
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which of `rows` an evaluation set holds too → (n,) bool, cosine to its nearest picture (NaN: by words), counts.

    A picture by embedding and thumbnail, at the thresholds of near copies; a caption by its words (see plain_words),
    where it has at least three; a URL as it stands.
    """
    store, found = evidence.store, {}
    cosine = np.full(len(rows), np.nan, np.float32)
    picture = np.zeros(len(rows), bool)
    if len(examples.embedding):
        pictures, place = np.unique(evidence.picture[rows], return_inverse=True)
        others = Vectors(len(examples.embedding), examples.embedding.__getitem__, examples.thumbnail.__getitem__)
        least = 0.92 if options.near_copy_cosine is None else options.near_copy_cosine
        at, _, near = find_across(
            evidence.vectors(pictures), others, least, options.near_copy_thumbnail, evidence.progress
        )
        best = np.full(len(pictures), np.nan, np.float32)
        np.fmax.at(best, at, near)
        cosine = best[place]
        picture = ~np.isnan(cosine)
        found["pictures"] = int(picture.sum())
    caption = np.zeros(len(rows), bool)
    if examples.captions:
        words = plain_words(store.column("caption", rows))
        theirs = plain_words(pa.chunked_array([examples.captions], pa.string())).unique()
        several = pc.call_function("count_substring_regex", [words], pc.MatchSubstringOptions(r"\S+")).to_numpy() >= 3
        caption = pc.call_function("is_in", [words], pc.SetLookupOptions(theirs)).to_numpy() & several
        found["captions"] = int(caption.sum())
    url = np.zeros(len(rows), bool)
    if examples.urls:
        url = pc.call_function(
            "is_in", [store.column("url", rows)], pc.SetLookupOptions(pa.array(examples.urls, pa.string()))
        ).to_numpy()
        found["urls"] = int(url.sum())
    return picture | caption | url, cosine, found


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
