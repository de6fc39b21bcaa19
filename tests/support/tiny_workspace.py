"""A workspace with untrained models of the real classes, trained stage included; called by render and score tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.workspace import Workspace
from eclipse.trainer.model.prior import Prior, PriorConfig, save_prior
from tiny_clip import make_clip
from tiny_decoders import save_tiny_kandinsky, save_tiny_karlo

DIM = 32  # of TINY in tiny_clip


def make_workspace(root: Path, *, kind: str = "kandinsky22", source: dict[str, Any] | None = None) -> Workspace:
    """CLIP, prior and decoder lie in `root`/models; the workspace in `root`/ws. Pictures are 64 px."""
    models = root / "models"
    encoder = make_clip(models / "clip")
    save_decoder = save_tiny_karlo if kind == "karlo" else save_tiny_kandinsky
    save_decoder(models / "decoder", embedding_dim=DIM)
    card = Card.model_validate(
        {
            "name": "tiny",
            "source": source or {"kind": "shapes", "rows": 100},
            "encoder": {"model": encoder},
            "decoder": {
                "kind": kind,
                "path": str(models / "decoder"),
                "steps": 2,
                "guidance_scale": 2.0,
                "image_size": 64,
            },
            "render": {"samples": 1},
            "evaluate": {"prompts_per_category": 2, "rows": 12},
        }
    )
    ws = Workspace.create(root / "ws", card)
    save_tiny_prior(ws.prior / "final")
    return ws


def save_tiny_prior(directory: Path, *, dim: int = DIM, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(PriorConfig(dim, num_layers=1, num_attention_heads=2, attention_head_dim=16))
    save_prior(prior, directory)
    return directory
