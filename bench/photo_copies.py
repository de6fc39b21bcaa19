"""Photographs and eight kinds of copies of each: which of them embedding, thumbnail and an overlay of pictures find,
and which other photographs they take for copies.

Run: python -m eclipse.bench.photo_copies --photos DIR [DIR …] [--at-most N] [--features FILE.npy]
     --features: (2, n, D), CLIP features of n different photographs and their captions: how alike are those?
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from ..pipeline.cache.vectors import chunks
from ..pipeline.core.progress import Progress
from ..pipeline.core.sections import FilterSection
from ..pipeline.embed.clip import Encoder
from ..pipeline.filter.crop_match import SIDE, correlations
from ..pipeline.filter.neighbours import Vectors, find_pairs
from ..pipeline.images.decode import thumbnail
from .embed_photos import photographs
from .results import arguments, hardware, record, table

STORED = 256  # px of the shorter side, as a download keeps them
ENCODED = 64  # pictures at once


def variants(photo: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """The eight kinds of copies of an RGB photograph."""
    width, height = photo.size
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=40)
    yield "re-encoded, JPEG 40", Image.open(out).convert("RGB")
    yield "half the size", photo.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    x, y = width // 20, height // 20
    yield "cropped, 5 % of each side", photo.crop((x, y, width - x, height - y))
    yield "brighter by 20 %", ImageEnhance.Brightness(photo).enhance(1.2)
    yield "grey", photo.convert("L").convert("RGB")
    yield "mirrored", ImageOps.mirror(photo)
    banner = photo.copy()
    ImageDraw.Draw(banner).rectangle((0, int(0.88 * height), width, height), fill=(250, 220, 40))
    yield "banner over the lowest eighth", banner
    turned = photo.rotate(3, Image.Resampling.BICUBIC)  # and the largest upright window without corners
    x, y = int(0.06 * width), int(0.06 * height)
    yield "turned by 3°, cropped to 88 %", turned.crop((x, y, width - x, height - y))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--at-most", type=int)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--model", default="local-dir:{models}/clip")
    options = parser.parse_args()
    machine, rules = hardware(), FilterSection.model_validate({})
    encoder = Encoder.load(options.model)
    paths = [path for path, _ in photographs(options.photos)][: options.at_most]
    pixels, levels, small, kinds = [], [], [], ["original"]
    embedded: list[np.ndarray] = []
    with Progress().task("photographs", len(paths), "photographs") as task:
        for path in paths:
            with Image.open(path) as image:
                photo = ImageOps.exif_transpose(image).convert("RGB")
            scale = STORED / min(photo.size)
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
            made = [("original", photo), *variants(photo)]
            kinds = [kind for kind, _ in made]
            for _, picture in made:
                pixels.append(encoder.preprocess(picture))
                levels.append(thumbnail(picture))
                small.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
            if len(pixels) >= ENCODED:
                embedded.append(encoder.encode_images(np.stack(pixels)).numpy())
                pixels = []
            task.advance()
    if pixels:
        embedded.append(encoder.encode_images(np.stack(pixels)).numpy())
    vectors = Vectors(len(levels), np.concatenate(embedded).__getitem__, np.stack(levels).__getitem__)
    pictures, count = np.stack(small), len(kinds)

    def overlay(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        assert rules.near_copy_picture is not None
        passed = np.empty(len(i), bool)
        for some in chunks(len(i), 1_024):
            a, b = (torch.from_numpy(pictures[side[some]]).permute(0, 3, 1, 2).float() / 255 for side in (i, j))
            passed[some] = (correlations(a, b, rules.near_copy_picture) >= rules.near_copy_picture).numpy()
        return passed

    assert rules.near_copy_cosine is not None
    alike = find_pairs(vectors, rules.near_copy_cosine, rules.near_copy_thumbnail, Progress())
    passed = overlay(alike.i, alike.j)
    foreign = alike.i // count != alike.j // count
    lines, original = [], np.arange(len(paths)) * count
    for number, kind in enumerate(kinds[1:], start=1):
        cosine, agree = vectors.compare(original, original + number)
        near, thumb = cosine >= rules.near_copy_cosine, agree >= rules.near_copy_thumbnail
        laid = overlay(original, original + number)
        # Of the pairs between an original and a copy of this kind, how many are of the same photograph?
        first, second = alike.i % count, alike.j % count
        ours = (np.minimum(first, second) == 0) & (np.maximum(first, second) == number)
        two, three = foreign & ours, foreign & ours & passed
        right2, right3 = int((near & thumb).sum()), int((near & thumb & laid).sum())
        lines.append(
            [
                kind,
                f"{near.mean():.3f}",
                f"{thumb.mean():.3f}",
                f"{laid.mean():.3f}",
                f"{(near & thumb).mean():.3f}",
                f"{(near & thumb & laid).mean():.3f}",
                f"{right2 / max(right2 + int(two.sum()), 1):.3f}",
                f"{right3 / max(right3 + int(three.sum()), 1):.3f}",
            ]
        )
    columns = ["copy", "embedding alone", "thumbnail alone", "overlay alone", "recall without overlay", "recall",
               "precision without overlay", "precision"]  # fmt: skip
    body = table(columns, lines) + (
        f"\n\nPairs of different photographs among all {len(levels):,} pictures: {int(foreign.sum()):,} pass embedding "
        f"and thumbnail, {int((foreign & passed).sum()):,} the overlay too. Without pictures at hand the stage refuses "
        "to guess; `near_copy_picture: null` lets thumbnails decide alone, at the columns without overlay."
    )
    if options.features:
        real = np.load(options.features, allow_pickle=False)[0].astype(np.float32)
        unit_real = real / np.linalg.norm(real, axis=1, keepdims=True)
        likest = np.sort((unit_real @ unit_real.T)[np.triu_indices(len(real), 1)])[::-1]
        reach = int((likest >= rules.near_copy_cosine).sum())
        body += (
            f" Of the {len(likest):,} pairs among {len(real):,} photographs of which real CLIP features are at hand, "
            f"{reach:,} reach the cosine; the likest has {likest[0]:.3f}."
        )
    settings = {
        "photographs": f"{len(paths):,}",
        "cosine": rules.near_copy_cosine,
        "thumbnail": rules.near_copy_thumbnail,
        "overlay": rules.near_copy_picture,
        "encoder": "the lab CLIP, which never saw a photograph",
    }
    title = "Copies of photographs"
    record("python -m eclipse.bench.photo_copies", title, body, settings, machine, options.results)


if __name__ == "__main__":
    main()
