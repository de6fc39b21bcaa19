"""Small image shards in WebDataset's layout, and workspaces that hold them, for tests of what reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.workspace import Workspace
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 36), kind: str = "JPEG", **options: Any) -> bytes:
    """A smooth random picture, encoded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content), owned by nobody and dated 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, samples: Iterable[tuple[str, bytes | None, str | Sequence[str]]]) -> Path:
    """A shard of (key, picture bytes or None, caption or captions)."""
    files: list[tuple[str, bytes]] = []
    for key, data, captions in samples:
        meta: dict[str, Any] = {"key": key, "url": f"http://example.org/{key}"}
        if isinstance(captions, str):
            captions = [captions]
        else:
            meta["captions"] = list(captions)
        if data is not None:
            files.append((f"{key}.jpg", data))
        files.append((f"{key}.txt", captions[0].encode()))
        files.append((f"{key}.json", json.dumps(meta).encode()))
    return write_tar(path, files)


def good_samples(shard: int, count: int) -> list[tuple[str, bytes | None, str]]:
    """Pictures and captions of different lengths, all different."""
    words = [
        "a",
        "red",
        "square",
        "left",
        "of",
        "a",
        "small",
        "blue",
        "striped",
        "circle",
        "above",
        "two",
        "green",
        "stars",
    ]
    return [
        (f"{shard:05d}{i:04d}", picture(1000 * shard + i), f"{' '.join(words[: 1 + i % len(words)])} {shard} {i}")
        for i in range(count)
    ]


def make_workspace(root: Path, encoder: str, **encoder_section: Any) -> Workspace:
    """A workspace whose pictures come from elsewhere and whose encoder is `encoder`."""
    card = Card.model_validate(
        {
            "name": "test",
            "source": {"kind": "urls", "urls": "urls.parquet"},
            "encoder": {"model": encoder, **encoder_section},
            "decoder": {"path": "nowhere"},
        }
    )
    return Workspace.create(root, card)
