"""What a picture costs the processor before the encoder sees it: decoding, resizing, thumbnail, beside peers.

Run: python -m eclipse.bench.pictures [--photos DIR] [--pictures 200]
     Processor time of one thread, the best of four rounds. --photos: JPEG files searched to any depth; without, scenes
     of the shapes world at 256 px. simplejpeg is measured where it is installed.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from ..pipeline.images.decode import FORMATS, Sample, open_picture, read_shard, thumbnail
from .embed import make_shards
from .results import arguments, hardware, record, table

ROUNDS = 4
SIZE = 224  # pixels, of the published encoders


def cost(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Microseconds of processor time an item, the best of ROUNDS."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for item in items:
            work(item)
        best = min(best, (time.process_time() - began) / len(items))
    return best * 1e6


def by_torchvision(data: bytes) -> Tensor:
    return cast(Tensor, decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = hardware()
    if options.photos:
        paths = sorted(options.photos.rglob("*.jpg"))[: options.pictures]
        data = [path.read_bytes() for path in paths]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            make_shards(Path(scratch) / "images", options.pictures, 256, options.pictures)
            shard = read_shard(Path(scratch) / "images" / "00000.tar")
            data = [item.data for item in shard if isinstance(item, Sample)]
    decoders: dict[str, Callable[[bytes], object]] = {
        "decode: ours (Pillow, checked, upright)": open_picture,
        "decode: the same, scaled in the DCT to 448 px or more": lambda x: open_picture(x, at_least=2 * SIZE),
        "decode: Pillow alone": lambda x: Image.open(io.BytesIO(x), formats=FORMATS).convert("RGB"),
        "decode: torchvision.io": by_torchvision,
    }
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]

        decoders["decode: simplejpeg"] = simplejpeg.decode_jpeg
    except ImportError:
        pass
    pictures = [open_picture(x) for x in data]
    transforms: Any = image_transform_v2(PreprocessCfg(), is_train=False)
    pillow = transforms.transforms[:2]

    def by_pillow(image: Image.Image) -> np.ndarray:
        for step in pillow:
            image = step(image)
        return np.array(image)

    def ours(image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = resize(pixels, [SIZE], InterpolationMode.BICUBIC, antialias=True)
        return center_crop(pixels, [SIZE]).permute(1, 2, 0).contiguous().numpy()

    difference = np.abs(np.stack([by_pillow(p).astype(int) - ours(p) for p in pictures]))
    rows = [(name, f"{cost(work, data):,.0f}") for name, work in decoders.items()]
    rows += [
        (f"resize to {SIZE}: ours (torchvision, uint8)", f"{cost(ours, pictures):,.0f}"),
        (f"resize to {SIZE}: open_clip's (Pillow)", f"{cost(by_pillow, pictures):,.0f}"),
        ("thumbnail", f"{cost(thumbnail, pictures):,.0f}"),
    ]
    width, height = np.mean([picture.size for picture in pictures], axis=0)
    record(
        "python -m eclipse.bench.pictures",
        f"A picture before the encoder, {'photographs' if options.photos else 'scenes'}",
        table(["", "µs of one thread"], rows)
        + f"\n\nThe resizes differ in {(difference > 0).mean():.2%} of values, by {difference.max()} of 256 at most.",
        {"pictures": len(data), "mean size": f"{width:.0f} × {height:.0f}", "best of": ROUNDS},
        machine,
        options.results,
    )


if __name__ == "__main__":
    main()
