"""Shards of a download on a cluster, by img2dataset's own distributors for Ray and Spark. Used by stage.py.

Not core/pool.py's actors: one for a node would leave its other cores idle, and Spark would still need this way.
The workspace must lie at the same path on every node (a shared file system): nodes write shards there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from ..core.errors import EclipseError, UsageError
from ..core.pool import ray_cluster
from .passes import read_stats
from .worker import FetchSpec, Order, ShardFetcher, shard_name, work_folder

LOOK_EVERY_S = 1.0
SUBJOB_SHARDS = 1000  # shards that Spark gets at a time; img2dataset's own default


def fetch_on_cluster(
    cluster: str, spec: FetchSpec, orders: Sequence[Order], advance: Callable[[int, int], None]
) -> None:
    """Download and commit shards whose rows lie in their work folders. cluster: ray, ray://HOST:PORT or spark.

    advance(rows, failures) is told as shards are finished. Raises UsageError where the cluster's package is missing,
    EclipseError if there is no cluster, or a shard fails.
    """
    images = Path(spec.images)
    shards = [order.shard for order in orders]
    fetcher = ShardFetcher(spec, {order.shard: order.auths for order in orders})
    tasks = [(shard, str(work_folder(images, shard) / "rows.arrow")) for shard in shards]
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(images, shards, advance, over))
    try:
        with redirect_stdout(sys.stderr):  # img2dataset and Spark print
            watcher.start()
            (_on_spark if cluster == "spark" else _on_ray)(cluster, fetcher, tasks)
    except (EclipseError, UsageError):
        raise
    except Exception as error:  # whatever a node ran into comes back through the cluster's own exceptions
        hint = "finished shards are kept; `eclipse download` goes on"
        why = _last_line(error)
        raise EclipseError(f"the download on the cluster failed: {why}", where=cluster, hint=hint) from error
    finally:
        over.set()
        watcher.join()
    if left := [shard for shard in shards if read_stats(images, shard) is None]:
        raise EclipseError(
            f"{len(left)} shards were not finished",
            where=f"shard {shard_name(left[0])}, in {images}",
            hint="every node must see the workspace at this path; finished shards are kept",
        )


def _on_ray(address: str, fetcher: ShardFetcher, tasks: list[tuple[int, str]]) -> None:
    from img2dataset.distributor import ray_distributor

    with ray_cluster(address):
        ray_distributor(1, fetcher, tasks, SUBJOB_SHARDS, 0)


def _on_spark(address: str, fetcher: ShardFetcher, tasks: list[tuple[int, str]]) -> None:
    try:
        import pyspark  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError("Spark is not installed", hint="install pyspark, and start this under spark-submit") from error
    from img2dataset.distributor import pyspark_distributor

    pyspark_distributor(1, fetcher, iter(tasks), SUBJOB_SHARDS, 0)


def _watch(images: Path, shards: list[int], advance: Callable[[int, int], None], over: threading.Event) -> None:
    """Tell of shards as their stats appear in the folder that all nodes share."""
    left = list(shards)
    while left:
        last = over.wait(LOOK_EVERY_S)
        for shard in list(left):
            try:
                stats = read_stats(images, shard)
            except EclipseError:  # a shared file system may show a file before its content
                continue
            if stats is not None:
                left.remove(shard)
                advance(stats["count"], stats["count"] - stats["successes"])
        if last:
            return


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
