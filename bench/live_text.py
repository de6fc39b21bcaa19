"""What leaving token states out of the cache costs: the text tower's captions/s, and the disk rate at which reading
stored states takes as long.

Weights are random: they change no time. Run: python -m eclipse.bench.live_text
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from ..pipeline.cache.part import PartWriter, part_name
from ..pipeline.cache.store import PartMeta, Store
from ..pipeline.embed.clip import Encoder
from ..trainer.data.live_text import LiveText
from .made_cache import caption_lengths
from .results import arguments, hardware, record, table

ROWS, ROUNDS = 4096, 3
# Text towers as published; the picture tower, which nothing here runs, as small as it can be.
TOWERS = {
    "ViT-L/14 (Karlo)": {"width": 768, "heads": 12, "layers": 12},
    "ViT-bigG/14 (Kandinsky 2.2)": {"width": 1280, "heads": 20, "layers": 32},
}
PICTURES = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32, "head_width": 32}


def load_tower(text: dict[str, int], folder: Path, device: str) -> Encoder:
    """A CLIP with this text tower, through open_clip's directory format, as a user's own would come."""
    config = {"embed_dim": text["width"], "vision_cfg": PICTURES, "text_cfg": {"context_length": 77, **text}}
    folder.mkdir()
    weights = {name: x.contiguous() for name, x in open_clip.CLIP(**config).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    del weights
    return Encoder.load(f"local-dir:{folder}", precision="bf16" if device == "cuda" else "fp32", device=device)


def bare_cache(folder: Path, encoder: Encoder) -> Store:
    """A part without token states, its captions as long as COCO's."""
    dim, rng = encoder.embedding_dim, np.random.default_rng(0)
    fingerprint, width = encoder.fingerprint, encoder.text_width
    meta = PartMeta("generated", fingerprint, "none", encoder.precision, dim, width, "generated", text_states=False)
    counts = caption_lengths(ROWS, rng)
    columns = {name: [str(i) for i in range(ROWS)] for name in ("uid", "key", "url")}
    columns |= {"caption": [" ".join(["a"] * (n - 2)) for n in counts.tolist()], "n_tokens": counts}
    columns |= {"image_sha256": [b"\0" * 32] * ROWS, "thumbnail": np.zeros((ROWS, 256), np.uint8)}
    columns |= {"width": np.ones(ROWS), "height": np.ones(ROWS), "clip_score": np.zeros(ROWS)}
    columns |= {"image_embedding": np.zeros((ROWS, dim)), "text_embedding": np.zeros((ROWS, dim))}
    with PartWriter(folder / part_name(0), meta) as writer:
        writer.write(columns)
    return Store.open(folder)


def captions_rate(make: LiveText, batch: int, device: str) -> float:
    """Captions/s of batches as training asks for them: the best of ROUNDS after one that warms up."""
    rng, best = np.random.default_rng(1), 0.0
    for turn in range(ROUNDS + 1):
        rows = np.sort(rng.permutation(ROWS)[:batch])
        began = time.perf_counter()
        made = make(rows)
        if device == "cuda":
            torch.cuda.synchronize()
        if len(made) != batch:
            raise SystemExit("captions went missing")
        if turn:
            best = max(best, batch / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="ViT-L/14's tower alone: bigG's takes 6 GB of memory")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine, lines = hardware(), []
    for name, text in list(TOWERS.items())[: 1 if options.small else None]:
        with tempfile.TemporaryDirectory() as scratch:
            encoder = load_tower(text, Path(scratch) / "clip", device)
            store = bare_cache(Path(scratch), encoder)
            rate = captions_rate(LiveText(store, encoder), options.batch, device)
            stored = 2 * float(store.token_counts().mean()) * store.text_width
        lines.append([name, f"{stored / 1e3:.1f} KB", f"{rate:,.1f}", f"{rate * stored / 1e6:,.2f} MB/s"])
    columns = [
        "text tower",
        "states on disk, a sample",
        "captions/s when made live",
        "disk rate at which both are equal",
    ]
    body = table(columns, lines)
    body += (
        "\n\nA disk that reads at random faster than the last column feeds training sooner from stored states; below"
        " it, or where the disk has no room, `--no-text-states` is quicker. The tower shares the device with the prior,"
        " so that live states also take their time from every step."
    )
    settings = {"batch": options.batch, "mean tokens": 13, "device": device}
    record("python -m eclipse.bench.live_text", "Live text", body, settings, machine, options.results)


if __name__ == "__main__":
    main()
