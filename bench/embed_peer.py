"""Embedding beside clip-retrieval: the same tars, the same weights, the same machine, taking turns.

Run: python -m eclipse.bench.embed_peer --peer-python PEER/bin/python [--architecture ViT-B-32] [--pictures 2048]
     [--rounds 2], where PEER is a virtual environment of its own (clip-retrieval needs numpy < 2):
     uv venv --python 3.11 PEER && uv pip install --python PEER/bin/python clip-retrieval "setuptools<81"
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ..pipeline.cache.store import Store
from ..pipeline.core.errors import EclipseError
from ..pipeline.core.workspace import Workspace
from ..pipeline.embed.lane import LaneSpec
from ..pipeline.embed.stage import BATCH_SIZES, plan
from .embed import make_shards, make_workspace, random_clip
from .results import arguments, hardware, record, table

SHARDS = 8  # clip-retrieval gives each of its reading processes whole shards: fewer would leave some without
OURS = "eclipse embed"
AGREEMENT = 0.999  # cosine of the two tools' embeddings of one picture or caption, both stored in float16

Contender = Callable[[], tuple[float, float]]  # → seconds, CPU seconds


def ours(ws: Workspace) -> Contender:
    """Tars on disk to committed parts on disk; loading the encoder is not counted."""
    spec = LaneSpec(ws.card.encoder.model, None, "fp32", (), text_states=True, card="")
    lane = spec.build("cpu")

    def run() -> tuple[float, float]:
        began, used = time.perf_counter(), time.process_time()
        lane.run(plan(ws, BATCH_SIZES["cpu"]), lambda event: None)
        return time.perf_counter() - began, time.process_time() - used

    return run


def theirs(python: Path, ws: Workspace, model: str, output: Path, batch: int, workers: int) -> Contender:
    """The same in clip-retrieval's own environment. Raises EclipseError with what it printed if it fails."""
    tars = [str(path) for path in sorted(ws.images.glob("*.tar"))]
    job = {"tars": tars, "output": str(output), "model": model, "batch": batch, "workers": workers}
    script = Path(__file__).with_name("embed_peer_run.py")

    def run() -> tuple[float, float]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [str(python), str(script), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise EclipseError(f"clip-retrieval failed:\n{done.stderr[-2000:]}", where=str(python))
        took = json.loads(done.stdout.strip().splitlines()[-1])
        return took["seconds"], took["cpu"]

    return run


def least_agreement(ws: Workspace, output: Path) -> float:
    """The smallest cosine between the two tools' embeddings of a picture or a caption.

    Raises EclipseError if clip-retrieval's rows are not the rows of our store.
    """
    store = Store.open(ws.embeddings)
    keys = pq.read_table(output / "metadata" / "metadata_0.parquet", columns=["image_path"])["image_path"].to_pylist()
    row_of = {key: row for row, key in enumerate(store.column("key").to_pylist())}
    if sorted(keys) != sorted(row_of):
        raise EclipseError(f"{len(keys)} rows of clip-retrieval are not our {len(row_of)}", where=str(output))
    rows = np.array([row_of[key] for key in keys])
    cosines = []
    for name, mine in (("img_emb", store.image_embeddings(rows)), ("text_emb", store.text_embeddings(rows))):
        peer = np.load(output / name / f"{name}_0.npy").astype(np.float32)
        unit = mine.astype(np.float32) / np.linalg.norm(mine.astype(np.float32), axis=1, keepdims=True)
        cosines.append((unit * peer).sum(1).min())
    return float(min(cosines))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peer-python", type=Path, required=True, help="the Python of clip-retrieval's environment")
    parser.add_argument("--architecture", default="ViT-B-32", help="with random weights: speed does not depend on them")
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    machine = hardware()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "clip"
        ws = make_workspace(Path(scratch) / "ws", random_clip(options.architecture, folder))
        make_shards(ws.images, options.pictures, 256, rows_per_shard=-(-options.pictures // SHARDS))
        model = f"open_clip:{options.architecture}/{folder / 'open_clip_model.safetensors'}"
        contenders = {OURS: ours(ws)}
        for batch, workers in ((256, 4), (64, len(os.sched_getaffinity(0)))):  # its defaults, and what ours uses
            output = Path(scratch) / f"peer-{batch}"
            name = f"clip-retrieval, batch {batch}, {workers} reading processes"
            contenders[name] = theirs(options.peer_python, ws, model, output, batch, workers)
        best = measure(contenders, options.pictures, options.rounds)
        agreement = least_agreement(ws, output)
    if agreement < AGREEMENT:
        raise EclipseError(f"the two tools computed different features: cosine {agreement:.4f}", where=model)
    fastest = max(rate for name, (rate, _) in best.items() if name != OURS)
    leanest = min(cost for name, (_, cost) in best.items() if name != OURS)
    rows = [
        (name, f"{rate:,.1f}", f"{rate / fastest:.2f}", f"{cost * 1e3:.1f}", f"{leanest / cost:.2f}")
        for name, (rate, cost) in best.items()
    ]
    record(
        "python -m eclipse.bench.embed_peer",
        f"Embed beside clip-retrieval, {options.architecture}, CPU",
        table(["", "pictures/s", "× the faster peer", "CPU ms per picture", "× the leaner peer"], rows)
        + f"\n\nSame rows; embeddings of the two agree to a cosine of {agreement:.5f} or better."
        + " Loading and warming up the model is counted for neither. Ours also stores token states and thumbnails.",
        {"pictures": options.pictures, "float32, best of": options.rounds},
        machine,
        options.results,
    )


def measure(contenders: dict[str, Contender], pictures: int, rounds: int) -> dict[str, tuple[float, float]]:
    """(pictures/s, CPU seconds per picture) of every contender, the best of its turns."""
    best = dict.fromkeys(contenders, (0.0, float("inf")))
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds, cpu = contender()
            rate, cost = best[name]
            best[name] = max(rate, pictures / seconds), min(cost, cpu / pictures)
    return best


if __name__ == "__main__":
    main()
