"""A cache a small prior can learn from, with its selection and a workspace around it: called by the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from eclipse.pipeline.cache.store import PartMeta, PartWriter, part_name
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.workspace import Workspace
from random_cache import random_rows

DIM = 16
META = PartMeta("learnable", "e" * 16, "none", "fp32", DIM, DIM, "c" * 16)


def make_workspace(root: Path, *, pictures: int = 120, seed: int = 0, **train: Any) -> Workspace:
    """Two captions per picture, told by their first token; the picture's embedding follows from it. Every 10th row is
    filtered out. train: what differs from a small, quick setting.
    """
    settings = {
        "steps": 12,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "warmup_steps": 3,
        "validation": 0.2,
        "validate_every": 6,
        "checkpoint_every": 4,
        "precision": "fp32",
        "projection_reduction": "sum",
        "temperature": 0.1,
        "ema_decay": 0.9,
    }
    card = Card.model_validate(
        {
            "name": "learnable",
            "source": {"kind": "urls", "urls": "list.parquet"},
            "encoder": {"model": "learnable"},
            "prior": {"preset": "tiny"},
            "train": {**settings, **train},
            "decoder": {"kind": "kandinsky22", "path": "nowhere"},
            "evaluate": {"rows": 40},
        }
    )
    ws = Workspace.create(root, card)
    write_learnable(ws, pictures, seed)
    return ws


def write_learnable(ws: Workspace, pictures: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    to_image, to_text = rng.standard_normal((2, DIM, DIM)) / DIM**0.5
    columns = random_rows(2 * pictures, rng, META).columns
    content = rng.standard_normal((pictures, DIM)).repeat(2, axis=0)
    first = np.concatenate([[0], np.cumsum(columns["n_tokens"])[:-1]])
    columns["text_states"][first] = content
    columns["text_embedding"] = (content @ to_text).astype(np.float16)
    columns["image_embedding"] = (content @ to_image).astype(np.float16)
    columns["image_sha256"] = [digest for digest in columns["image_sha256"][::2] for _ in range(2)]
    half = pictures  # rows in each of two parts, a picture's captions in both
    order = np.concatenate([np.arange(0, 2 * pictures, 2), np.arange(1, 2 * pictures, 2)])
    bounds = np.concatenate([[0], np.cumsum(columns["n_tokens"])])
    for number in range(2):
        rows = order[number * half : (number + 1) * half]
        part = {
            name: values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
            for name, values in columns.items()
            if name != "text_states"
        }
        part["text_states"] = np.concatenate([columns["text_states"][bounds[i] : bounds[i + 1]] for i in rows])
        with PartWriter(ws.embeddings / part_name(number), META) as writer:
            writer.write(part)
    keep = np.arange(2 * pictures) % 10 != 0
    table = {
        "part": np.repeat([0, 1], half),
        "row": np.tile(np.arange(half), 2),
        "keep": keep,
    }
    pq.write_table(pa.table(table), ws.selection)
