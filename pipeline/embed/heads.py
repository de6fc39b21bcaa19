"""Linear heads on the image embedding: aesthetic by name (LAION's), both by path or URL and hash. Used by embed.py."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import EclipseError, UsageError
from ..core.files import atomic_path, require_regular

LAION_URL = "https://github.com/LAION-AI/aesthetic-predictor/raw/main"
# Trained on the normalised embeddings of OpenAI's weights: of no meaning for others of the same width.
LAION = {
    "ViT-B-32": f"{LAION_URL}/sa_0_4_vit_b_32_linear.pth"
    "#sha256=c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
    "ViT-L-14": f"{LAION_URL}/sa_0_4_vit_l_14_linear.pth"
    "#sha256=2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
}
FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LinearHead:
    """A score of the normalised image embedding: weight (D,), bias (), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, unit_embedding: Tensor) -> Tensor:
        """(B, D) unit vectors → (B,) float32 scores; LAION's aesthetic ones run from about 1 to 10."""
        return unit_embedding @ self.weight + self.bias


def find_head(name: str, model: str, pretrained: str | None) -> str | None:
    """The file of the head `name`: `laion` is LAION's for this encoder, None if there is none; all else is the file."""
    if name != "laion":
        return name
    plain = model.replace("/", "-").removesuffix("-quickgelu")
    return LAION.get(plain) if pretrained == "openai" else None


def load_head(kind: str, source: str, embedding_dim: int, device: torch.device | str = "cpu") -> LinearHead:
    """Load a head from a path or from URL#sha256=HEX, fetched once. kind: its name in messages, and in `encoder.KIND`.

    The file is a state dict of Linear(D, 1). Raises UsageError for a head of another width and a URL without hash,
    EclipseError for a file that cannot be fetched or is not what its hash says.
    """
    path = _fetch(kind, source) if "://" in source else Path(source)
    try:
        require_regular(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = state["weight"].float(), state["bias"].float()
        if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
            raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, not (1, D) and (1,)")
    except FileNotFoundError as error:
        hint = f"encoder.{kind}: PATH, URL#sha256=HEX or null"
        raise UsageError(f"no such {kind} head", where=source, hint=hint) from error
    except Exception as error:  # torch.load raises whatever a broken file makes it raise
        raise EclipseError(f"not a linear {kind} head: {error}", where=source) from error
    if weight.shape[1] != embedding_dim:
        raise UsageError(
            f"the {kind} head reads {weight.shape[1]} dimensions, the encoder makes {embedding_dim}",
            where=source,
            hint=f"set encoder.{kind} to a head of this encoder, or to null",
        )
    return LinearHead(weight[0].to(device), bias[0].to(device))


def _fetch(kind: str, source: str) -> Path:
    url, _, digest = source.partition("#sha256=")
    if len(digest) != 64:
        raise UsageError(f"the {kind} head from the network needs its hash", where=source, hint="URL#sha256=HEX")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eclipse" / f"{digest}.pth"
    if cache.is_file() and hashlib.sha256(cache.read_bytes()).hexdigest() == digest:
        return cache
    try:
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as response:
            data = response.read(64 << 20)
    except (OSError, ValueError) as error:
        raise EclipseError(
            f"cannot fetch the {kind} head: {error}", where=url, hint="fetch it elsewhere and name its path"
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise EclipseError(f"the {kind} head is not the file that its hash says", where=url)
    with atomic_path(cache) as temporary:
        temporary.write_bytes(data)
    return cache
