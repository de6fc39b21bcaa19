"""What the rules judge by: which rows are sound, which pictures look alike, which captions fit; called by rules.py.

It takes minutes at a million rows and does not depend on the rules, so it is found once, over all sound rows, and kept
in logs/filter/ with the identity of the embeddings it was found in: filtering again under other rules takes seconds.
Those files can be made again at any time; one that is missing, of other embeddings, or not as it was written is. A
SHA-256 beside each says so of all its bytes: the checksums of Parquet's pages leave out the names and figures around.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..cache.parquet_map import find_page, map_file
from ..cache.vectors import chunks, codes, unit
from ..core.files import atomic_path, file_sha256
from ..core.progress import Progress
from ..images.shards import ImageShard, small_pictures
from . import caption_mismatch
from .neighbours import Pairs, Vectors, find_pairs

if TYPE_CHECKING:
    from ..cache.store import Store

FORMAT = 1  # of the files in logs/filter/; raised when what they mean changes
VECTORS = ("image_embedding", "text_embedding")
MAPPED = (*VECTORS, "thumbnail")  # read through the map, which checks nothing; Arrow checks every other column itself


@dataclass
class Alike:
    """Pairs of look-alike pictures (see neighbours.Pairs), and what comparing the pictures themselves said of each.

    overlay: (n,) float32, correlation of the two pictures laid over each other; NaN: not asked yet. overlay_limit:
    the limit it was asked with; below it the values say no more than that.
    """

    pairs: Pairs
    overlay: np.ndarray
    overlay_limit: float = 0.0
    pictures: tuple[np.ndarray, np.ndarray] | None = None  # where each picture lies among the small ones, and those


class Evidence:
    """Of one store and the pictures behind it, each kind found when it is first asked for. folder: where it is kept."""

    def __init__(self, store: Store, shards: Mapping[int, ImageShard], folder: Path, progress: Progress) -> None:
        self.store, self.shards, self.folder, self.progress = store, shards, folder, progress

    def _fresh(self) -> Store:
        """The same store with nothing mapped: what was read for one kind of evidence need not stay for the next."""
        self.store = type(self.store)(self.store.parts)
        return self.store

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the rows of each part and the checksums of the pages that evidence is drawn from."""
        found = []
        for part in self.store.parts:
            mapped = map_file(part.path)
            pages = [find_page(mapped, group.chunks[name]) for group in part.groups for name in MAPPED]
            found.append([part.number, part.rows, [page.crc for page in pages]])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @cached_property
    def unsound(self) -> dict[str, np.ndarray]:
        """Rows (n,) by the column in which they hold something else than finite numbers, or nothing but zeros.

        What is read for this is compared with its checksums on the way. EclipseError names file, column and rows that
        are damaged.
        """
        kept = self._kept("sound", {}, self._find_unsound)
        columns = np.asarray(kept["column"].to_pylist(), dtype=object)
        rows = kept["row"].to_numpy()
        return {name: rows[columns == name] for name in sorted(set(columns.tolist()))}

    def _find_unsound(self) -> pa.Table:
        self._fresh().verify(self.progress, columns=MAPPED)
        rows: list[np.ndarray] = []
        names: list[str] = []
        scores = ["clip_score", *self.store.meta.head_scores]
        with self.progress.task("checking numbers", len(self.store), "rows") as task:
            for some in chunks(len(self.store)):
                for name, values in ((n, self._vectors(n, some)) for n in VECTORS):
                    # Finite and not all zero is what a dot product with itself says, in float32, in one pass.
                    power = np.einsum("nd,nd->n", values, values, dtype=np.float32)
                    bad = some[~(np.isfinite(power) & (power > 0))]
                    rows.append(bad)
                    names += [name] * len(bad)
                task.advance(len(some))
        for name in scores:
            bad = np.flatnonzero(~np.isfinite(self.store.column(name).to_numpy()))
            rows.append(bad)
            names += [name] * len(bad)
        found = np.concatenate([np.empty(0, np.int64), *rows])
        return pa.table({"row": pa.array(found, pa.int64()), "column": pa.array(names, pa.string())})

    def _vectors(self, name: str, rows: np.ndarray) -> np.ndarray:
        read = self.store.image_embeddings if name == "image_embedding" else self.store.text_embeddings
        return read(rows).astype(np.float32)

    @cached_property
    def sound(self) -> np.ndarray:
        """Rows without anything unsound, ascending, (n,) int64."""
        good = np.ones(len(self.store), bool)
        for rows in self.unsound.values():
            good[rows] = False
        return np.flatnonzero(good)

    @cached_property
    def picture(self) -> np.ndarray:
        """Which picture each row shows, (rows,) int64: equal bytes, equal number; by first appearance."""
        return codes(self.store.column("image_sha256"))

    @cached_property
    def row_of_picture(self) -> np.ndarray:
        """The first sound row of each picture, (pictures,) int64; −1 where there is none."""
        first = np.full(int(self.picture.max(initial=-1)) + 1, -1, np.int64)
        first[self.picture[self.sound[::-1]]] = self.sound[::-1]
        return first

    def vectors(self, pictures: np.ndarray) -> Vectors:
        """Embeddings and thumbnails of these pictures."""
        rows, store = self.row_of_picture[pictures], self.store
        return Vectors(
            len(rows), lambda some: store.image_embeddings(rows[some]), lambda some: store.thumbnails(rows[some])
        )

    def captions(self) -> caption_mismatch.Evidence:
        """How well each sound row's caption fits its picture; NaN for the others."""
        kept = self._kept("captions", {}, self._weigh_captions)
        about = json.loads(kept.schema.metadata[b"figures"])
        columns = {name: kept[name].to_numpy() for name in ("z", "wrong")}
        return caption_mismatch.Evidence(**columns, **about)

    def _weigh_captions(self) -> pa.Table:
        rows, store = self.sound, self._fresh()

        def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            some = rows[positions]
            return unit(store.text_embeddings(some)), unit(store.image_embeddings(some))

        found = caption_mismatch.wrong_captions(len(rows), read, self.picture[rows], self.progress)
        z, wrong = np.full((2, len(store)), np.nan, np.float32)
        z[rows], wrong[rows] = found.z, found.wrong
        figures = {"wrong_share": found.wrong_share, "separation": found.separation}
        return pa.table({"z": z, "wrong": wrong}).replace_schema_metadata({b"figures": json.dumps(figures).encode()})

    def alike(self, cosine: float, concordance: float, best_first: bool) -> Alike:
        """Look-alikes by embedding and thumbnail, over all pictures, numbered as in `picture`.

        best_first: pictures in the order of their best clip_score, not of their rows, decide which are listed where
        there are too many.
        """
        wanted = {"cosine": cosine, "concordance": concordance, "best_first": best_first}

        def enough(known: dict[str, Any]) -> bool:
            if known.get("best_first") != best_first or not known["cosine"] <= cosine:
                return False
            same = known["cosine"] == cosine and known["concordance"] == concordance
            return same or (known["concordance"] <= concordance and not known["cut_short"])

        def find() -> pa.Table:
            pairs = self.search(cosine, concordance, best_first=best_first)
            return self._table(Alike(pairs, np.full(len(pairs), np.nan, np.float32)), wanted)

        kept = self._kept("near", wanted, find, enough)
        alike = self._alike(kept)
        pairs = alike.pairs
        meets = (pairs.cosine >= cosine) & (pairs.concordance >= concordance)
        if not meets.all():
            alike = Alike(pairs.at(meets), alike.overlay[meets], alike.overlay_limit)
        return alike

    def similar(self, cosine: float, best_first: bool) -> Pairs:
        """Look-alikes by embedding alone, over all pictures."""
        wanted = {"cosine": cosine, "best_first": best_first}

        def enough(known: dict[str, Any]) -> bool:
            higher = known["cosine"] < cosine and not known["cut_short"]
            return known.get("best_first") == best_first and (known["cosine"] == cosine or higher)

        def find() -> pa.Table:
            pairs = self.search(cosine, None, best_first=best_first)
            return self._table(Alike(pairs, np.full(len(pairs), np.nan, np.float32)), wanted)

        pairs = self._alike(self._kept("semantic", wanted, find, enough)).pairs
        return pairs.at(pairs.cosine >= cosine)

    def search(self, cosine: float, concordance: float | None, *, best_first: bool) -> Pairs:
        """Look-alikes among all pictures that have a sound row."""
        self._fresh()
        pictures = np.flatnonzero(self.row_of_picture >= 0)
        rank = self.rank(best_first)[pictures]
        found = find_pairs(self.vectors(pictures), cosine, concordance, self.progress, rank=rank)
        full = np.zeros(len(self.row_of_picture), bool)
        full[pictures] = found.full
        columns = (pictures[found.i], pictures[found.j], found.cosine, found.concordance)
        return Pairs(*columns, full, found.recall, found.sampled, found.lists)

    def rank(self, best_first: bool) -> np.ndarray:
        """Order of the pictures, (pictures,) int64: by the best clip_score of their rows, or by their first row."""
        order = np.arange(len(self.row_of_picture))
        if best_first:
            best = np.full(len(order), -np.inf, np.float32)
            score = np.asarray(self.store.column("clip_score").to_numpy(), np.float32)
            np.maximum.at(best, self.picture[self.sound], score[self.sound])
            order = np.lexsort((order, -best))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return rank

    def overlay(self, alike: Alike, which: np.ndarray, limit: float) -> np.ndarray:
        """Whether the pairs at `which` (n,) are crops of each other by at least `limit`; asks the pictures once."""
        if limit < alike.overlay_limit:  # what was given up below the old limit may pass the new one
            alike.overlay[alike.overlay < alike.overlay_limit] = np.nan
        alike.overlay_limit = limit
        new = which[np.isnan(alike.overlay[which])]
        if len(new):
            import torch

            from .crop_match import PAIRS, SIDE, correlations

            pairs, device = alike.pairs, "cuda" if torch.cuda.is_available() else "cpu"
            place, pictures = self._small_pictures(alike, SIDE)

            def lay(some: np.ndarray) -> np.ndarray:
                a, b = (
                    torch.from_numpy(pictures[place[side[some]]]).to(device).permute(0, 3, 1, 2).float() / 255
                    for side in (pairs.i, pairs.j)
                )
                return correlations(a, b, limit).cpu().numpy()

            batches = [new[some] for some in chunks(len(new), PAIRS[device])]
            # On a CPU each core works on batches of its own: cores that share one operation wait for each other.
            threads, workers = torch.get_num_threads(), len(os.sched_getaffinity(0)) if device == "cpu" else 1
            torch.set_num_threads(1)
            try:
                with (
                    self.progress.task("laying pictures over each other", len(new), "pairs") as task,
                    ThreadPoolExecutor(workers) as pool,
                ):
                    for some, found in zip(batches, pool.map(lay, batches), strict=True):
                        alike.overlay[some] = found
                        task.advance(len(some))
            finally:
                torch.set_num_threads(threads)
        return alike.overlay[which] >= limit

    def _small_pictures(self, alike: Alike, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Every picture of a pair that was not asked about yet, read from its shard once, and where it is found."""
        if alike.pictures is None:
            open_ = np.isnan(alike.overlay)
            used = np.unique(np.concatenate([alike.pairs.i[open_], alike.pairs.j[open_]]))
            place = np.full(len(self.row_of_picture), -1, np.int64)
            place[used] = np.arange(len(used))
            rows = self.row_of_picture[used]
            alike.pictures = place, small_pictures(self.shards, self.store, rows, side, self.progress)
        return alike.pictures

    def remember(self, alike: Alike, cosine: float, concordance: float, best_first: bool) -> None:
        """Keep what the pictures said, beside the pairs."""
        wanted = {"cosine": cosine, "concordance": concordance, "best_first": best_first}
        self._write("near", self._table(alike, wanted))

    def near_misses(self, most: int) -> list[tuple[int, int, float]]:
        """Pairs of rows whose pictures, laid over each other, just failed, and their correlation; likest first."""
        if (kept := self._read("near")) is None:
            return []
        alike = self._alike(kept)
        failed = np.flatnonzero(alike.overlay < alike.overlay_limit)
        failed = failed[np.argsort(-alike.overlay[failed], kind="stable")[:most]]
        rows = (self.row_of_picture[side[failed]].tolist() for side in (alike.pairs.i, alike.pairs.j))
        return [(i, j, float(value)) for i, j, value in zip(*rows, alike.overlay[failed], strict=True) if value > -1]

    def _table(self, alike: Alike, about: dict[str, Any]) -> pa.Table:
        """A picture with more look-alikes than are listed stands as a pair with itself."""
        pairs = alike.pairs
        full = np.flatnonzero(pairs.full)
        none = np.full(len(full), np.nan, np.float32)
        columns = {
            "first": np.concatenate([pairs.i, full]),
            "second": np.concatenate([pairs.j, full]),
            "cosine": np.concatenate([pairs.cosine, none]),
            "concordance": np.concatenate([pairs.concordance, none]),
            "overlay": np.concatenate([alike.overlay, none]),
        }
        figures = {"recall": pairs.recall, "sampled": pairs.sampled, "lists": pairs.lists}
        known = {**about, **figures, "overlay_limit": alike.overlay_limit, "cut_short": bool(len(full))}
        return pa.table(columns).replace_schema_metadata({b"about": json.dumps(known).encode()})

    def _alike(self, table: pa.Table) -> Alike:
        about = json.loads(table.schema.metadata[b"about"])
        i, j = table["first"].to_numpy(), table["second"].to_numpy()
        listed = i != j
        full = np.zeros(len(self.row_of_picture), bool)
        full[i[~listed]] = True
        cosine, concordance, overlay = (
            np.array(table[name].to_numpy(), np.float32)[listed] for name in ("cosine", "concordance", "overlay")
        )
        figures = {name: about[name] for name in ("recall", "sampled", "lists")}
        pairs = Pairs(i[listed], j[listed], cosine, concordance, full, **figures)
        return Alike(pairs, overlay, about["overlay_limit"])

    def _kept(
        self,
        name: str,
        wanted: dict[str, Any],
        make: Callable[[], pa.Table],
        enough: Callable[[dict[str, Any]], bool] = lambda known: True,
    ) -> pa.Table:
        """The table kept under this name, if it is of this store and good `enough`; else made, and kept."""
        kept = self._read(name)
        if kept is not None and enough(json.loads(kept.schema.metadata.get(b"about", b"{}"))):
            return kept
        table = make()
        self._write(name, table)
        return table

    def _read(self, name: str) -> pa.Table | None:
        """The table kept under this name; None if there is none of this store, as it was written."""
        path = self.folder / f"{name}.parquet"
        try:
            if path.with_suffix(".sha256").read_text() != file_sha256(path):
                return None
            table = pq.read_table(path)
        except (OSError, ValueError, pa.ArrowException):
            return None
        return table if (table.schema.metadata or {}).get(b"identity") == self._stamp() else None

    def _write(self, name: str, table: pa.Table) -> None:
        stamped = table.replace_schema_metadata({**(table.schema.metadata or {}), b"identity": self._stamp()})
        path = self.folder / f"{name}.parquet"
        with atomic_path(path) as temporary:
            pq.write_table(stamped, temporary, compression="zstd")
        with atomic_path(path.with_suffix(".sha256")) as temporary:  # killed before it, the table is made once more
            temporary.write_text(file_sha256(path))

    def _stamp(self) -> bytes:
        return f"{FORMAT} {self.identity}".encode()
