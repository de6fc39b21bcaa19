"""`eclipse why`: the whole story of one row, from the list to the training batch that reads it. Called by cli.py.

It reads what the stages have written and decides nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .pipeline.core.errors import UsageError
from .pipeline.core.progress import Progress
from .pipeline.core.workspace import Workspace

MOST = 20  # rows told of, where a URL or a key stands for many
SHORTEST_UID = 8  # hex digits that may stand for a whole uid
FETCHED = ("status", "error_message", "original_width", "original_height", "width", "height")


def tell(ws: Workspace, what: str, progress: Progress) -> dict[str, Any]:
    """Every row with this uid (or its beginning), key or URL → {"asked": …, "rows": [{"stage": {…}, …}, …]}.

    A row's stages: list, download, embed, filter, train; one that it did not reach is missing, and the last there is
    says why. Raises UsageError if nothing here is called that.
    """
    from .pipeline.images.rejects import read_rejected

    rows = _embedded(ws, what)
    stories = [_follow(ws, row, progress) for row in rows[:MOST].tolist()]
    for reject in read_rejected(ws).to_pylist():
        if what in (reject["key"], reject["url"]):
            story: dict[str, Any] = {"list": {"url": reject["url"], "caption": reject["caption"]}}
            if reject["stage"] != "download":
                story["download"] = _fetched(ws, reject["shard"], reject["key"])
            story[reject["stage"]] = {"rejected": reject["reason"], "shard": reject["shard"], "key": reject["key"]}
            stories.append(story)
    if not stories:
        raise UsageError(
            "no row is called that: neither embedded nor rejected",
            where=what[:200],
            hint="name a uid or its first 8 digits, a key, or a URL as it stands in the list",
        )
    return {"asked": what, "found": len(rows) + len(stories) - min(len(rows), MOST), "rows": stories[:MOST]}


def _embedded(ws: Workspace, what: str) -> np.ndarray:
    """The rows of the cache whose uid begins with, or whose key or URL is `what`."""
    if not any(ws.embeddings.glob("part-*.parquet")):
        return np.empty(0, np.int64)
    import pyarrow.compute as pc

    from .pipeline.cache.store import Store

    store = Store.open(ws.embeddings)
    hit = np.zeros(len(store), bool)
    for name in ("key", "url"):
        hit |= pc.call_function("equal", [store.column(name), what]).to_numpy()
    if len(what) >= SHORTEST_UID and set(what) <= set("0123456789abcdef"):
        hit |= pc.call_function("starts_with", [store.column("uid")], pc.MatchSubstringOptions(what)).to_numpy()
    return np.flatnonzero(hit)


def _follow(ws: Workspace, row: int, progress: Progress) -> dict[str, Any]:
    """The story of a row that was embedded."""
    from .pipeline.cache.store import Store, part_name

    store = Store.open(ws.embeddings)
    at = np.array([row])
    (part,), (within,) = (numbers.tolist() for numbers in store.part_of(at))
    value = {n: store.column(n, at)[0].as_py() for n in ("uid", "key", "url", "caption", "width", "height", "n_tokens")}
    scores = {n: round(store.column(n, at)[0].as_py(), 4) for n in ("clip_score", *store.meta.head_scores)}
    story: dict[str, Any] = {
        "list": {"url": value["url"], "caption": value["caption"]},
        "download": _fetched(ws, f"{part:05d}", value["key"]) | {"shard": f"{part:05d}", "key": value["key"]},
        "embed": {
            "uid": value["uid"],
            "part": part_name(part),
            "row": within,
            "size": f"{value['width']}×{value['height']}",
            "tokens": value["n_tokens"],
            **scores,
        },
    }
    if ws.selection.is_file():
        verdict = story["filter"] = _verdict(ws, store, row, part, within)
        if verdict["verdict"] == "kept":
            story["train"] = _batch(ws, store, row)
    return story


def _fetched(ws: Workspace, shard: str, key: str) -> dict[str, Any]:
    """What the download noted of a key in its shard's metadata, if it is there."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        path = ws.images / f"{Path(shard).name}.parquet"
        table = pq.read_table(path, filters=pc.field("key") == key, page_checksum_verification=True)
    except (OSError, pa.ArrowException, KeyError):
        return {}
    noted = table.slice(0, 1).to_pylist()
    return {name: noted[0][name] for name in FETCHED if noted and noted[0].get(name) is not None}


def _verdict(ws: Workspace, store: Any, row: int, part: int, within: int) -> dict[str, Any]:
    """The filter's verdict with what decided it, what the row copies, and what copies it."""
    import pyarrow.compute as pc

    from .pipeline.filter.verdicts import read_verdicts

    mine = (pc.field("part") == part) & (pc.field("row") == within)
    of_mine = (pc.field("duplicate_of", "part") == part) & (pc.field("duplicate_of", "row") == within)
    found = read_verdicts(ws, mine)
    if not found:
        return {"verdict": "not judged: embedded after the filter ran; run `eclipse filter --overwrite`"}
    (judged,) = found
    told: dict[str, Any] = {"verdict": "kept" if judged["keep"] else f"rejected: {judged['reason']}"}
    told |= {name: round(judged[name], 4) for name in ("score", "threshold") if judged.get(name) is not None}
    for name in ("wrong_probability", "caption_z", "copy_similarity", "caption_similarity"):
        if judged.get(name) is not None:
            told[name] = round(judged[name], 4)
    if (of := judged["duplicate_of"]) is not None:
        at = store.rows_of(np.array([of["part"]]), np.array([of["row"]]))
        told["copy of"] = f"{store.column('uid', at)[0].as_py()[:16]} ({store.column('url', at)[0].as_py()})"
    copies = read_verdicts(ws, of_mine, ["uid", "reason"])
    if copies:
        told["copies of it"] = ", ".join(f"{one['uid'][:16]} ({one['reason']})" for one in copies[:5])
        told["number of copies"] = len(copies)
    return told


def _batch(ws: Workspace, store: Any, row: int) -> dict[str, Any]:
    """Where training meets a kept row: held back, or in which step of the first epoch."""
    from .trainer.data.order import Order
    from .trainer.data.split import split

    options = ws.card.train
    rows, held_back = split(store, ws.selection, options.validation)
    if row in held_back:
        return {"side": "validation: held back with all captions of its picture"}
    index = int(np.searchsorted(rows, row))
    order = Order(len(rows), options.seed, options.block_rows)
    for start in range(0, len(rows), 1 << 20):
        met = np.flatnonzero(order.indices(np.arange(start, min(start + (1 << 20), len(rows)))) == index)
        if len(met):
            step = (start + int(met[0])) // options.batch_size
            times = options.steps * options.batch_size / len(rows)
            return {"side": "training", "first in step": step, "seen": f"{times:.1f} times in {options.steps:,} steps"}
    return {"side": "training"}
