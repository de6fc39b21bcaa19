"""A small embedding cache with planted copies and wrong captions, made without any model: for tests of the filter."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from eclipse.pipeline.cache.store import PartMeta, PartWriter, part_name
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.workspace import Workspace
from PIL import Image
from records import finish

DIM, WIDTH, ROWS_A_PART = 64, 8, 500
META = PartMeta("synthetic", "f" * 16, "none", "fp32", DIM, WIDTH, "c" * 16)


@dataclass
class Row:
    """One row before it is written: what its picture and its caption are of, and the picture's 16×16 grey levels."""

    image: np.ndarray
    text: np.ndarray
    grey: np.ndarray
    url: str
    caption: str
    data: bytes = b""
    n_tokens: int = 3
    size: tuple[int, int] = (64, 64)


@dataclass
class Truth:
    """Positions of planted rows: copy → original; captions that belong elsewhere; look-alikes that are no copies."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)
    wrong: set[int] = field(default_factory=set)
    alike: set[int] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)  # further captions of a picture under the same URL


class Maker:
    """Draws rows whose picture and caption share a meaning, with CLIP's geometry: two cones and much left unsaid."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.image_cone, self.text_cone = np.eye(DIM)[0] * 8, np.eye(DIM)[1] * 8

    def row(self, number: int) -> Row:
        meaning, unsaid = self.rng.normal(size=(2, DIM))
        grey = np.kron(self.rng.integers(20, 235, (8, 8)), np.ones((2, 2))) + self.rng.normal(0, 6, (16, 16))
        return Row(
            self.image_cone + meaning + 0.5 * unsaid,
            self.text_cone + meaning + 0.3 * self.rng.normal(size=DIM),
            grey,
            f"http://127.0.0.1/{number}.jpg",
            f"picture number {number} and what it shows",
        )

    def like(self, row: Row, number: int, *, embedding: float, grey: float) -> Row:
        """Another picture near this one: standard deviations of the noise on its embedding and its grey levels."""
        noise, levels = self.rng.normal(0, embedding, DIM), self.rng.normal(0, grey, (16, 16))
        other = self.row(number)
        return Row(row.image + noise, row.text, row.grey + levels, other.url, other.caption)


def plant(rows: int = 900, seed: int = 0) -> tuple[list[Row], Truth]:
    """`rows` honest rows, then 40 each of exact copies, near copies, look-alikes and further captions; 40 wrong."""
    maker, truth = Maker(seed), Truth()
    table = [maker.row(i) for i in range(rows)]
    chosen = maker.rng.permutation(rows)
    for kind, start in (("exact", 0), ("near", 40), ("alike", 80), ("groups", 120)):
        for original in chosen[start : start + 40].tolist():
            source, position = table[original], len(table)
            if kind == "near":
                table.append(maker.like(source, position, embedding=0.1, grey=4))
                truth.near[position] = original
            elif kind == "alike":
                other = maker.like(source, position, embedding=0.1, grey=0)
                other.grey = maker.row(position).grey
                table.append(other)
                truth.alike.add(position)
            else:
                url = source.url if kind == "groups" else f"http://127.0.0.1/{position}.jpg"
                table.append(Row(source.image, source.text, source.grey, url, f"{source.caption} ({position})"))
                if kind == "groups":
                    truth.groups.add(position)
                else:
                    truth.exact[position] = original
    shuffled = chosen[160:200]
    for position, other in zip(shuffled.tolist(), np.roll(shuffled, 1).tolist(), strict=True):
        table[position].caption = f"wrong {position}"
        truth.wrong.add(position)
        table[position].n_tokens = other  # carried until every text is moved
    texts = {p: table[table[p].n_tokens].text for p in truth.wrong}
    for position, text in texts.items():
        table[position].text, table[position].n_tokens = text, 3
    return table, truth


def write(root: Path, table: list[Row], meta: PartMeta = META, /, **filter_options: object) -> Workspace:
    """A workspace with image shards and embedding parts of these rows, as if download and embed were complete."""
    card = Card.load("shapes")
    card = card.model_copy(update={"filter": card.filter.model_copy(update=filter_options)})
    ws = Workspace.create(root, card)
    ws.images.mkdir()
    for number, start in enumerate(range(0, len(table), ROWS_A_PART)):
        _write_part(ws, number, table[start : start + ROWS_A_PART], meta)
    finish(ws, "embed", summary={})
    return ws


def _write_part(ws: Workspace, number: int, rows: list[Row], meta: PartMeta) -> None:
    keys = [f"{number:05d}{i:04d}" for i in range(len(rows))]
    data = [row.data or _png(row) for row in rows]
    with tarfile.open(ws.images / f"{number:05d}.tar", "w") as tar:
        for key, file in zip(keys, data, strict=True):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    digests = [hashlib.sha256(file).digest() for file in data]
    image = np.stack([row.image for row in rows])
    text = np.stack([row.text for row in rows])
    score = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    counts = np.array([row.n_tokens for row in rows])
    captions = [row.caption for row in rows]
    with PartWriter(ws.embeddings / part_name(number), meta) as part:
        part.write(
            {
                "uid": [hashlib.sha256(d + c.encode()).hexdigest() for d, c in zip(digests, captions, strict=True)],
                "key": keys,
                "url": [row.url for row in rows],
                "caption": captions,
                "image_sha256": digests,
                "thumbnail": np.stack([np.clip(row.grey, 0, 255).astype(np.uint8).ravel() for row in rows]),
                "width": [row.size[0] for row in rows],
                "height": [row.size[1] for row in rows],
                "image_embedding": image,
                "text_embedding": text,
                "n_tokens": counts,
                "text_states": np.zeros((int(counts.sum()), WIDTH)),
                "clip_score": score,
            }
        )


def _png(row: Row) -> bytes:
    levels = np.clip(row.grey, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).resize((64, 64)).save(out, "PNG")
    return out.getvalue()
