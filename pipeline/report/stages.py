"""What people look at: one self-contained HTML page for download and for embed; called by those stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from ..images.shards import picture_files
from ..images.sources import shards_of
from . import charts
from . import page as pages

if TYPE_CHECKING:
    import pyarrow as pa

    from ..cache.store import Store

SHOWN = 24  # pictures or groups in one section of a page
RETRIEVAL = 1_000  # pairs among which captions look for their picture
NEIGHBOURHOOD = 20_000  # rows among which pictures look for their neighbours
NEIGHBOURS = 3  # of each picture shown
QUERIES = 8
SCORE_NOTES = {
    "aesthetic_score": ("Aesthetic score", "of the picture, by the card's head"),
    "safety_score": ("Safety score", "of the picture, by the card's head; the higher the less safe"),
}


class Shots:
    """Pictures of a store's rows as the templates want them, read from the shards once for a whole page."""

    def __init__(self, ws: Workspace, store: Store, rows: Iterable[int]) -> None:
        self.rows = np.unique(np.asarray(list(rows), np.int64))
        part, _ = store.part_of(self.rows)
        keys = store.column("key", self.rows).to_pylist()
        captions = store.column("caption", self.rows).to_pylist()
        files = dict(picture_files(shards_of(ws), zip(part.tolist(), keys, strict=True)))
        self._shots: dict[int, dict[str, Any]] = {}
        for row, shard, key, caption in zip(self.rows.tolist(), part.tolist(), keys, captions, strict=True):
            self._shots[row] = shot(files.get((shard, key)), caption)

    def __call__(self, row: int, tag: str = "", tone: str = "", lines: Sequence[str] = ()) -> dict[str, Any]:
        return {**self._shots[int(row)], "tag": tag, "tone": tone, "lines": [line for line in lines if line]}


def shot(picture: bytes | None, caption: str) -> dict[str, Any]:
    """One picture with its caption; without a readable picture an empty frame."""
    src, pixel = "", False
    if picture is not None:
        try:
            src, pixel = pages.data_uri(picture)
        except OSError:
            caption = f"(unreadable) {caption}"
    return {"src": src, "pixel": pixel, "caption": caption, "tag": "", "tone": "", "lines": []}


def tile(value: float | str, label: str, tone: str = "") -> dict[str, str]:
    """One large figure of a page's head."""
    return {"value": f"{value:,}" if isinstance(value, int) else str(value), "label": label, "tone": tone}


def chart(title: str, note: str, svg: str) -> dict[str, str]:
    """One chart with its heading and one line of explanation."""
    return {"title": title, "note": note, "svg": svg}


def shares(counts: dict[str, int], total: int) -> list[dict[str, Any]]:
    """Rows of a table of counts with their shares of `total`, largest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    most = max(counts.values(), default=1)
    return [{"name": k, "count": n, "share": n / max(total, 1), "length": n / most} for k, n in ordered]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _some(rows: np.ndarray, n: int = SHOWN) -> np.ndarray:
    """n of the rows at random, the same ones every time, in order."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:n])


def _footer(ws: Workspace) -> str:
    return f"card {ws.card.name} · workspace {ws.root.name}"


# --- download


def download_page(ws: Workspace, rejected: dict[str, int]) -> Path:
    """reports/download.html: what came back, how large it is, why the rest did not, pictures at random.

    Reads img2dataset's metadata beside the shards. rejected: reason → number of inputs without a picture.
    """
    table = _fetched(ws)
    side = np.minimum(table["width"].to_numpy(), table["height"].to_numpy()).astype(np.float64)
    original = np.minimum(table["original_width"].to_numpy(), table["original_height"].to_numpy()).astype(np.float64)
    inputs = len(table) + sum(rejected.values())
    some = _some(np.arange(len(table))).tolist()
    keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    shards = [int(shard) for shard in table["shard"].to_pylist()]
    files = dict(picture_files(shards_of(ws), ((shards[i], keys[i]) for i in some)))
    return pages.write_page(
        ws.reports / "download.html",
        "download.html.j2",
        title="What came back",
        lead=f"{len(table):,} of {inputs:,} pictures on the list were fetched.",
        footer=_footer(ws),
        links=pages.stage_links("Download"),
        tiles=[
            tile(len(table), "pictures fetched", "good"),
            tile(sum(rejected.values()), "without a picture"),
            tile(percent(len(table) / max(inputs, 1)), "of the list"),
            tile(len(set(shards)), "shards"),
            tile(_size(ws.images), "on disk"),
        ],
        charts=[
            chart(
                "As served",
                "shorter side in pixels",
                charts.histogram({"pictures": original}, label="pixels", integer=True),
            ),
            chart(
                "As stored",
                "shorter side in pixels",
                charts.histogram({"pictures": side}, label="pixels", integer=True),
            ),
        ],
        rejected=shares(rejected, inputs),
        some=[shot(files.get((shards[i], keys[i])), captions[i] or "") for i in some],
    )


def _fetched(ws: Workspace) -> pa.Table:
    """The metadata rows of every picture that was stored, with the number of its shard."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["key", "caption", "width", "height", "original_width", "original_height"]
    tables = []
    for path in sorted(ws.images.glob("*.parquet")):
        table = pq.read_table(path, columns=[*names, "status"]).filter(pc.field("status") == "success")
        tables.append(table.select(names).append_column("shard", pa.array([path.stem] * len(table), pa.string())))
    return (
        pa.concat_tables(tables, promote_options="permissive")
        if tables
        else pa.table({n: [] for n in [*names, "shard"]})
    )


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# --- embed


def embed_page(ws: Workspace, store: Store, rejected: dict[str, int]) -> Path:
    """reports/embed.html: scores, token counts, norms and geometry of the embeddings, neighbours, best and worst pairs.

    rejected: reason → number of inputs that got no row.
    """
    every = np.arange(len(store))
    score = np.asarray(store.column("clip_score").to_numpy(), np.float32)
    sample = _some(every, RETRIEVAL)
    recall, gap = _geometry(store, sample)
    order = np.argsort(score, kind="stable")
    best, worst = order[::-1][:12], order[:12]
    near, likeness = _neighbours(store, every)
    shots = Shots(ws, store, [*best, *worst, *(some := _some(every)), *near.ravel()])
    encoder = store.meta.encoder.replace("local-dir:{models}/", "the shipped ")

    def scored(rows: np.ndarray) -> list[dict[str, Any]]:
        return [shots(row, f"{score[row]:.3f}") for row in rows]

    return pages.write_page(
        ws.reports / "embed.html",
        "embed.html.j2",
        title="What the encoder sees",
        lead=f"{len(store):,} picture–caption pairs embedded by {encoder}.",
        footer=_footer(ws),
        links=pages.stage_links("Embed"),
        tiles=[
            tile(len(store), "rows embedded"),
            tile(sum(rejected.values()), "inputs set aside"),
            tile(f"{np.mean(score) if len(score) else 0:.3f}", "mean CLIP score"),
            tile(percent(recall), f"captions that find their picture among {len(sample):,}"),
            tile(f"{gap:.2f}", "modality gap (distance of the means)"),
        ],
        charts=[
            chart("CLIP score", "cosine of picture and caption", charts.histogram({"rows": score}, label="cosine")),
            chart(
                "Length of captions",
                "tokens, start and end included; no padding is stored",
                charts.histogram({"rows": store.token_counts()}, label="tokens", integer=True),
            ),
            *_norm_charts(store, _some(every, NEIGHBOURHOOD)),
            *(
                chart(*SCORE_NOTES[name], charts.histogram({"rows": store.column(name).to_numpy()}, label="score"))
                for name in store.meta.head_scores
            ),
        ],
        neighbours=[
            [shots(own, "picture", "good"), *(shots(r, f"{c:.3f}") for r, c in zip(others, cosines, strict=True))]
            for (own, *others), (_, *cosines) in zip(near.tolist(), likeness.tolist(), strict=True)
        ],
        rejected=shares(rejected, len(store) + sum(rejected.values())),
        best=scored(best),
        worst=scored(worst),
        some=scored(some),
    )


def _norm_charts(store: Store, rows: np.ndarray) -> list[dict[str, str]]:
    """How long the raw embeddings of these rows are: a cluster away from the rest is worth a look."""
    vectors = {"pictures": store.image_embeddings(rows), "captions": store.text_embeddings(rows)}
    return [
        chart(
            f"Length of the embeddings of {name}",
            "norm of the raw vector",
            charts.histogram({name: np.linalg.norm(some.astype(np.float32), axis=1)}, label="norm"),
        )
        for name, some in vectors.items()
    ]


def _neighbours(store: Store, every: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some rows, each followed by those whose pictures' embeddings are nearest, and the cosines: two (Q, 1 + k) arrays.

    The same picture under another caption is no neighbour. Fewer columns where the cache is that small.
    """
    from ..cache.vectors import codes, unit

    pool = _some(every, NEIGHBOURHOOD)
    queries = np.sort(np.random.default_rng(1).permutation(len(pool))[:QUERIES])
    vectors, picture = unit(store.image_embeddings(pool)), codes(store.column("image_sha256", pool))
    cosine = vectors[queries] @ vectors.T
    cosine[picture[queries][:, None] == picture] = -np.inf
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    found = np.isfinite(np.take_along_axis(cosine, nearest, axis=1)).all(axis=0)  # whole columns of real neighbours
    nearest = np.concatenate([queries[:, None], nearest[:, found]], axis=1)
    return pool[nearest], np.take_along_axis(cosine, nearest, axis=1)


def _geometry(store: Store, rows: np.ndarray) -> tuple[float, float]:
    """Caption → picture R@1 among these rows, and the distance of the two modalities' mean unit vectors."""
    from ..cache.vectors import unit

    if not len(rows):
        return 0.0, 0.0
    image, text = unit(store.image_embeddings(rows)), unit(store.text_embeddings(rows))
    found = np.argmax(text @ image.T, axis=1) == np.arange(len(rows))
    return float(found.mean()), float(np.linalg.norm(image.mean(0) - text.mean(0)))
