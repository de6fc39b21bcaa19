"""Tiny random CLIPs in open_clip's directory format, for tests that need a real encoder but no trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_clip(directory: Path, config: dict[str, Any] | None = None, *, seed: int = 0) -> str:
    """Write a random CLIP of `config` (default: TINY) into `directory`; returns its `local-dir:` name."""
    config = config or TINY
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        model = model_class(**{key: value for key, value in config.items() if key != "custom_text"})
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{directory}"
