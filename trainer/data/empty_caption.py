"""The empty caption's features, kept beside the parts: who drops captions needs no encoder. Called by run.py."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...pipeline.cache.packed_text import TextFeatures
from ...pipeline.cache.store import Store
from ...pipeline.core.files import atomic_path
from ..distributed import DistEnv

if TYPE_CHECKING:
    from ...pipeline.core.sections import EncoderSection

FILE = "empty-caption.safetensors"


def empty_caption(folder: Path, section: EncoderSection, store: Store, world: DistEnv) -> TextFeatures:
    """From the file in `folder`, on the world's device. The first time the main process makes it, on the CPU, with the
    encoder's text tower, which for Kandinsky is a matter of gigabytes; the other processes wait and read.
    """
    features = _read(folder / FILE, store)
    if features is None and world.is_main:
        from ...pipeline.embed.clip import Encoder

        encoder = Encoder.load(section.model, section.pretrained, text_only=True)
        made = encoder.encode_text(*encoder.tokenize([""]))
        features = made.embedding.clone(), made.states.clone()
        _write(folder / FILE, store, features)
    world.mean(torch.zeros(1, device=world.device))  # nobody goes on before the main process is here
    features = features or _read(folder / FILE, store)
    if features is None:
        raise RuntimeError(f"{folder / FILE} cannot be read by every process")
    embedding, states = (x.to(world.device) for x in features)
    return TextFeatures(states, torch.tensor([0, len(states)], device=world.device), embedding=embedding)


def _read(path: Path, store: Store) -> tuple[Tensor, Tensor] | None:
    """None where there is no such file, or not of this cache's encoder."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("encoder_fingerprint") != store.meta.encoder_fingerprint:
                return None
            return file.get_tensor("embedding"), file.get_tensor("states")
    except (OSError, SafetensorError):
        return None


def _write(path: Path, store: Store, features: tuple[Tensor, Tensor]) -> None:
    from safetensors.torch import save_file

    named = {"embedding": features[0], "states": features[1]}
    with suppress(OSError), atomic_path(path) as temporary:  # a cache that may only be read is one process's loss
        save_file(named, temporary, metadata={"encoder_fingerprint": store.meta.encoder_fingerprint})
