"""A download killed at random moments, again and again, beside one that is left alone: the same set, no row twice.

    python -m eclipse.bench.kills --kills 20

The shapes world with its planted dirt; between two kills its list, its shards and its passes stay as they are. Exits
with 1 if the samples or the rejects differ from those of the undisturbed download.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ..lab.truth import row_of
from ..pipeline.core.card import Card
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..pipeline.download.stage import download
from ..pipeline.images.decode import Sample, read_shard
from ..pipeline.images.rejects import read_rejected

QUIET = Progress(quiet=True)


def workspace(root: Path, rows: int) -> Workspace:
    card = Card.load("shapes")
    source = card.source.model_copy(update={"rows": rows, "rows_per_shard": 100, "retries": 2})
    return Workspace.create(root, card.model_copy(update={"source": source}))


def outcome(ws: Workspace) -> tuple[Counter[tuple[int, str]], Counter[tuple[int, str]]]:
    """(row, uid) of every pair and (row, reason) of every reject, with how often each stands there."""
    pairs: Counter[tuple[int, str]] = Counter()
    for tar in sorted(ws.images.glob("*.tar")):
        for item in read_shard(tar):
            if isinstance(item, Sample):
                pairs.update((row_of(item.url), uid) for uid in item.uids)
    return pairs, Counter((row_of(reject["url"]), reject["reason"]) for reject in read_rejected(ws).to_pylist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, shaken = workspace(Path(folder) / "calm", options.rows), workspace(Path(folder) / "shaken", options.rows)
        started = time.monotonic()
        download(calm, QUIET)
        whole = time.monotonic() - started
        killed = finished = 0
        moments = []
        while killed < options.kills and not finished:
            command = [sys.executable, "-P", "-m", "eclipse.cli", "download", "-w", str(shaken.root), "--quiet"]
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            # One in four dies while it starts; the others at some moment after their first shard is under way.
            early = rng.random() < 0.25
            while not early and process.poll() is None and not any(shaken.images.glob(".tmp-fetch-*")):
                time.sleep(0.01)
            until = time.monotonic() + rng.uniform(0, 0.1) * whole
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            finished = process.poll() == 0
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                moments.append(len(list(shaken.images.glob("*_stats.json"))))
        download(Workspace.open(shaken.root), QUIET)
        same = outcome(calm) == outcome(shaken)
        twice = max(outcome(shaken)[0].values())
        litter = [path.name for path in shaken.images.iterdir() if path.name.startswith(".")]
    print(f"{killed} kills; finished shards at each: {moments}; undisturbed {whole:.1f} s")
    print(f"same samples and rejects: {same}; a pair stands there at most {twice} times; litter: {litter}")
    sys.exit(0 if same and twice == 1 and not litter else 1)


if __name__ == "__main__":
    main()
