"""`embed --cluster ray` on a real Ray cluster of two nodes on this machine."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.embed.stage import embed
from shards import good_samples, make_workspace, write_shard
from tiny_clip import make_clip

pytest.importorskip("ray", reason="an optional dependency: eclipse-prior[ray]")


def test_two_nodes_share_the_shards(tmp_path: Path) -> None:
    """Every part once and whole, the same as on one machine; without a cluster, one clear message."""
    from ray.cluster_utils import Cluster

    ws = make_workspace(tmp_path / "ws", make_clip(tmp_path / "clip"))
    tars = [ws.images / f"{number:05d}.tar" for number in range(6)]
    ws.images.mkdir(parents=True, exist_ok=True)
    for number, tar in enumerate(tars):
        if number in (0, 4):
            tar.touch()
            continue
        write_shard(tar, [*good_samples(number, 10), ("bad", b"junk", "caption")])
    with pytest.raises(EclipseError, match="ray start --head"):
        embed(ws, Progress(quiet=True), cluster="ray")
    embed(ws, Progress(quiet=True), gpus=0, batch_size=4)
    alone = {path.name: path.read_bytes() for path in ws.embeddings.iterdir()}

    # Whichever node starts first could finish so few shards alone. It gets stuck in shard 0, so the other makes 1 to 3
    # and gets stuck in 4, which leaves 5 to the first.
    for stuck, until in ((0, 3), (4, 5)):
        part = ws.embeddings / f"part-{until:05d}.parquet"
        part.unlink()
        threading.Thread(target=_let_go, args=(_hold(tars[stuck]), part), daemon=True).start()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    try:
        cluster.add_node(num_cpus=1, num_gpus=0)
        summary = embed(ws, Progress(quiet=True), cluster=cluster.address, overwrite=True, batch_size=4)
    finally:
        cluster.shutdown()
    assert (summary["rows"], summary["inputs"], summary["rejected"]) == (40, 44, {"unreadable": 4})
    assert summary["devices"] == ["node 0", "node 1"]
    assert {path.name: path.read_bytes() for path in ws.embeddings.iterdir()} == alone
    Store.open(ws.embeddings).verify()


def _hold(file: Path) -> int:
    """Make whoever opens `file` wait until `_let_go`: the kernel asks the holder of a lease first, for 45 s at most."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # how it asks
    descriptor = os.open(file, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    return descriptor


def _let_go(descriptor: int, after: Path) -> None:
    """Give the lease back once the part `after` is there."""
    deadline = time.monotonic() + 120
    while not after.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(descriptor)
