"""reports/download.html: what came back, how large it is, why the rest did not; called by the download stage."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.workspace import Workspace
from ..images.rejects import rejected_of
from ..images.shards import picture_files
from ..images.sources import shards_of
from . import charts
from .page import chart, percent, shares, stage_page, tile
from .pictures import shot, some_of
from .words import in_words

if TYPE_CHECKING:
    import pyarrow as pa

HOST = r"^https?://(?P<host>[^/?#]+)"  # with its port: two servers of one machine are two
HOSTS, REASONS = 20, 4  # hosts listed, and reasons named of each
SHARDS_SHOWN = 4  # whose pictures are shown at random


def download_page(ws: Workspace, rejected: dict[str, int]) -> Path:
    """reports/download.html: what came back, how large it is, why the rest did not, pictures at random.

    Reads img2dataset's metadata beside the shards. rejected: reason → number of inputs without a picture.
    """
    table = _fetched(ws)
    side = np.minimum(table["width"].to_numpy(), table["height"].to_numpy()).astype(np.float64)
    original = np.minimum(table["original_width"].to_numpy(), table["original_height"].to_numpy()).astype(np.float64)
    inputs = len(table) + sum(rejected.values())
    keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    shards = [int(shard) for shard in table["shard"].to_pylist()]
    few = some_of(np.unique(shards), SHARDS_SHOWN)  # a tar is read from its start to the picture
    some = some_of(np.flatnonzero(np.isin(shards, few))).tolist()
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
        hosts=failed_hosts(ws),
        some=[shot(files.get((shards[i], keys[i])), captions[i] or "") for i in some],
    )


def failed_hosts(ws: Workspace) -> list[dict[str, Any]]:
    """The hosts that most fetches failed at: how many, for which reasons, and one such URL of each.

    URLs are from anywhere, and often dead: the page shows them as text, never as links.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    counted = []
    for failed in rejected_of(ws, ["download"]):
        # What has no host, such as a malformed URL, was never asked for anywhere.
        named = pc.call_function("extract_regex", [failed["url"]], pc.ExtractRegexOptions(HOST))
        host = pc.call_function("struct_field", [named], pc.StructFieldOptions("host"))
        failed = failed.append_column("host", host).filter(pc.field("host").is_valid())
        counted.append(failed.group_by(["host", "reason"]).aggregate([("url", "count"), ("url", "min")]))
    if not counted:  # a list without a failure
        return []
    total: dict[str, list[dict[str, Any]]] = defaultdict(list)
    sums = pa.concat_tables(counted).group_by(["host", "reason"]).aggregate([("url_count", "sum"), ("url_min", "min")])
    for row in sums.sort_by([("url_count_sum", "descending"), ("host", "ascending")]).to_pylist():
        total[row["host"]].append(row)
    worst = sorted(total.items(), key=lambda item: -sum(row["url_count_sum"] for row in item[1]))[:HOSTS]
    return [
        {
            "host": host,
            "count": sum(row["url_count_sum"] for row in rows),
            "reasons": ", ".join(f"{in_words(row['reason'])} ({row['url_count_sum']:,})" for row in rows[:REASONS]),
            "example": rows[0]["url_min_min"],
        }
        for host, rows in worst
    ]


def _fetched(ws: Workspace) -> pa.Table:
    """The metadata rows of every picture that was stored, with the number of its shard."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["key", "caption", "width", "height", "original_width", "original_height"]
    tables = []
    for path in sorted(ws.images.glob("*.parquet")):
        table = pq.read_table(path, columns=[*names, "status"], page_checksum_verification=True)
        table = table.filter(pc.field("status") == "success")
        tables.append(table.select(names).append_column("shard", pa.array([path.stem] * len(table), pa.string())))
    return (
        pa.concat_tables(tables, promote_options="permissive")
        if tables
        else pa.table({n: [] for n in [*names, "shard"]})
    )


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
