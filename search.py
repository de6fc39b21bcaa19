"""`eclipse search`: the pictures of a workspace's cache that are nearest to a text, and a page of them. For cli.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from .pipeline.core.errors import EclipseError, UsageError
from .pipeline.core.progress import Progress
from .pipeline.core.workspace import Workspace

BLOCK = 65_536  # rows read at a time


def search(ws: Workspace, text: str, progress: Progress, *, top: int = 24) -> dict[str, Any]:
    """Rank every embedded picture by the cosine of its embedding to that of `text`; write reports/search.html.

    Features are streamed from the cache, nothing of the pictures but the `top` shown is read. A picture with several
    captions counts once. Rows that the filter rejected are among them, and say so.

    Raises:
        UsageError: no text. EclipseError: no features, damaged ones, or an encoder other than theirs.
    """
    if not text.strip():
        raise UsageError("an empty text", hint='say what to look for: eclipse search "a red cube"')
    from .decode.conditioning import encode_texts, load_encoder, pick_device
    from .pipeline.cache.store import Store
    from .pipeline.cache.vectors import codes, unit
    from .pipeline.report.search import search_page

    store = Store.open(ws.embeddings)
    encoder = load_encoder(ws.card, pick_device())
    if encoder.fingerprint != store.meta.encoder_fingerprint:
        raise EclipseError(
            "the card's encoder is not the one that these features come from",
            where=str(ws.embeddings),
            hint="`eclipse embed --overwrite` embeds with the card's",
        )
    query = unit(encode_texts(encoder, [text], progress).embedding.float().cpu().numpy())[0]
    nearest: dict[bytes, tuple[float, int]] = {}  # by the picture's hash: cosine and row
    with progress.task("search", len(store), "rows") as task:
        for start in range(0, len(store), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(store)))
            digests = store.column("image_sha256", rows)
            _, first = np.unique(codes(digests), return_index=True)
            cosine = np.nan_to_num(unit(store.image_embeddings(rows[first])) @ query, nan=-1.0)
            for best in np.argsort(-cosine, kind="stable")[:top].tolist():
                at = int(first[best])
                nearest.setdefault(digests[at].as_py(), (float(cosine[best]), start + at))
            nearest = dict(sorted(nearest.items(), key=lambda item: -item[1][0])[:top])
            task.advance(len(rows))
    cosines, rows = (np.array(values) for values in zip(*nearest.values(), strict=True))
    verdicts = _verdicts(ws, store, rows)
    columns = {name: store.column(name, rows).to_pylist() for name in ("key", "caption", "url")}
    found = [
        {"cosine": round(cosine, 4), "verdict": verdict, **{name: values[i] for name, values in columns.items()}}
        for i, (cosine, verdict) in enumerate(zip(cosines.tolist(), verdicts, strict=True))
    ]
    page = search_page(ws, store, text, rows, found)
    return {"text": text, "rows": len(store), "found": found, "page": str(page)}


def _verdicts(ws: Workspace, store: Any, rows: np.ndarray) -> list[str]:
    """The filter's verdict on each row: `kept`, the reason, or nothing where it has not judged them."""
    if not ws.selection.is_file():
        return [""] * len(rows)
    import pyarrow.compute as pc

    from .pipeline.filter.verdicts import read_verdicts

    parts, within = store.part_of(rows)
    mine = pc.field("part").isin(parts.tolist()) & pc.field("row").isin(within.tolist())
    found = read_verdicts(ws, mine, ["part", "row", "keep", "reason"])
    said = {(row["part"], row["row"]): "kept" if row["keep"] else str(row["reason"]) for row in found}
    return [said.get(place, "") for place in zip(parts.tolist(), within.tolist(), strict=True)]
