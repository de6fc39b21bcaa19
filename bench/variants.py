"""The five-minute prior in other ways: trained on a workspace's selection, judged by pixel like `eclipse evaluate`.

Each variant is a JSON object: changes to the card's train section, and `shards`, of which alone it learns.
Run: python -m eclipse.bench.variants WORKSPACE '{}' '{"steps": 3400}' '{"shards": 8}'   (minutes each)
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..decode.conditioning import encode_texts, load_encoder, predict
from ..decode.decoder import Unconditional
from ..decode.layouts import picture_seed
from ..lab.score import SPLITS, category_means, decode_pictures, judge_pictures, world_of
from ..lab.shapes import CATEGORIES
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..trainer.stage import job_for, work
from .results import arguments, hardware, record, table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("workspace", type=Path, help="of the shapes world, filtered")
    parser.add_argument("variants", nargs="+", type=json.loads, help="one JSON object each")
    parser.add_argument("--prompts", type=int, default=24, help="a category and split")
    chosen = parser.parse_args()
    machine, ws, progress = hardware(), Workspace(chosen.workspace.resolve()), Progress()
    world, encoder = world_of(ws.card), load_encoder(ws.card, "cpu")
    prompts = [p for c in CATEGORIES for split in SPLITS for p in world.prompts(c, chosen.prompts, split)]
    texts = encode_texts(encoder, [p.text for p in prompts], progress)
    seeds = [picture_seed(0, p.text, 0) for p in prompts]
    selection, rows = pq.read_table(ws.selection), []
    for variant in chosen.variants:
        changes = dict(variant)
        keep = selection["keep"].to_numpy() & (selection["part"].to_numpy() < changes.pop("shards", 1 << 30))
        with tempfile.TemporaryDirectory() as scratch:
            found, pictures = _trained(ws, changes, selection, keep, Path(scratch), texts, seeds, progress)
        means = category_means(prompts, [shot.verdict.score for shot in judge_pictures(pictures, prompts)])
        scores = [f"{means['mean'][split]:.2f}" for split in SPLITS] + [f"{means[c]['seen']:.2f}" for c in CATEGORIES]
        pace = f"{1000 * found['training_seconds'] / found['steps']:.0f} ms"
        rows.append([json.dumps(variant), f"{keep.sum():,}", pace, *scores])
        print(rows[-1], flush=True)
    columns = ["changes", "pairs", "a step", *(f"mean, {split}" for split in SPLITS), *CATEGORIES]
    settings = {"prompts per category and split": chosen.prompts}
    body = table(columns, rows) + "\n\nThe columns of categories are of seen compositions. One seed each."
    record(
        "python -m eclipse.bench.variants", "Variants of the five-minute prior", body, settings, machine, chosen.results
    )


def _trained(
    ws: Workspace,
    changes: dict[str, Any],
    selection: pa.Table,
    keep: np.ndarray,
    folder: Path,
    texts: Any,
    seeds: list[int],
    progress: Progress,
) -> tuple[dict[str, Any], np.ndarray]:
    """The training's summary, and the prior's pictures (B, 64, 64, 3) uint8."""
    pq.write_table(selection.set_column(selection.schema.get_field_index("keep"), "keep", pa.array(keep)), folder / "s")
    job = dataclasses.replace(
        job_for(ws, changes, "variant"),
        directory=folder / "prior",
        selection=folder / "s",
        report=folder / "train.png",
    )
    found = work(job, on_cpu=not torch.cuda.is_available(), quiet=False, progress=progress)
    embeddings = {"prior": predict(str(folder / "prior" / "final"), texts, range(len(seeds)), seeds, "cpu")}
    pictures = decode_pictures(ws.card, embeddings, texts, seeds, Unconditional(), "cpu", progress)
    return found, pictures["prior"]


if __name__ == "__main__":
    main()
