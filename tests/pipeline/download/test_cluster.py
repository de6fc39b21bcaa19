"""`download --cluster ray` on a real Ray cluster of two nodes on this machine, through img2dataset's distributor."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.download.stage import download
from shards import picture
from web import picture_answer, serving

pytest.importorskip("ray", reason="an optional dependency: eclipse-prior[ray]")
QUIET = Progress(quiet=True)


def workspace(root: Path, urls: list[str]) -> Workspace:
    source = {
        "kind": "urls", "urls": "list.parquet", "rows_per_shard": 6, "retries": 0, "allow_hosts": ["127.0.0.1"],
        "patience_s": 10,
    }  # fmt: skip
    card = {"name": "test", "source": source, "encoder": {"model": "none"}, "decoder": {"path": "none"}}
    ws = Workspace.create(root, Card.model_validate(card))
    table = {"url": urls, "caption": [f"caption {number}" for number in range(len(urls))]}
    pq.write_table(pa.table(table), root / "list.parquet")
    return ws


def stored(ws: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ws.images.glob("*.tar")}


def test_two_nodes_share_the_shards(tmp_path: Path):
    """Every shard once and whole, the same as on one machine; without a cluster, one clear message."""
    from ray.cluster_utils import Cluster

    with serving({f"/{number}.jpg": picture_answer(picture(number)) for number in range(23)}) as web:
        urls = [web.url(f"/{number}.jpg") for number in range(24)]
        alone, shared = workspace(tmp_path / "alone", urls), workspace(tmp_path / "shared", urls)
        expected = download(alone, QUIET)
        with pytest.raises(EclipseError, match="ray start --head"):
            download(shared, QUIET, cluster="ray")
        assert not list(shared.images.iterdir())
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        try:
            cluster.add_node(num_cpus=1, num_gpus=0)
            summary = download(shared, QUIET, cluster=cluster.address)
        finally:
            cluster.shutdown()
    counts = ("rows", "images", "pairs", "rejected", "shards")
    assert [summary[name] for name in counts] == [expected[name] for name in counts] == [24, 23, 23, {"http_404": 1}, 4]
    assert stored(shared) == stored(alone)
    assert all(json.loads(path.read_text())["count"] == 6 for path in shared.images.glob("*_stats.json"))


def test_a_cluster_without_its_package_is_said(tmp_path: Path):
    pytest.importorskip("img2dataset")
    try:
        import pyspark  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        ws = workspace(tmp_path / "ws", ["http://127.0.0.1:9/a.jpg"])
        with pytest.raises(UsageError, match="Spark is not installed"):
            download(ws, QUIET, cluster="spark")
