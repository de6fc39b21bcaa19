"""reports/download.html: what came back, how large it is, why the rest did not; called by the download stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.workspace import Workspace
from ..images.shards import picture_files
from ..images.sources import shards_of
from . import charts
from .page import chart, percent, shares, stage_page, tile
from .pictures import shot, some_of

if TYPE_CHECKING:
    import pyarrow as pa


def download_page(ws: Workspace, rejected: dict[str, int]) -> Path:
    """reports/download.html: what came back, how large it is, why the rest did not, pictures at random.

    Reads img2dataset's metadata beside the shards. rejected: reason → number of inputs without a picture.
    """
    table = _fetched(ws)
    side = np.minimum(table["width"].to_numpy(), table["height"].to_numpy()).astype(np.float64)
    original = np.minimum(table["original_width"].to_numpy(), table["original_height"].to_numpy()).astype(np.float64)
    inputs = len(table) + sum(rejected.values())
    some = some_of(np.arange(len(table))).tolist()
    keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    shards = [int(shard) for shard in table["shard"].to_pylist()]
    files = dict(picture_files(shards_of(ws), ((shards[i], keys[i]) for i in some)))
    return stage_page(
        ws,
        "download",
        "download.html.j2",
        title="What came back",
        lead=f"{len(table):,} of {inputs:,} pictures on the list were fetched.",
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
