"""Real photographs through the whole embed stage, and ten of them again in disguise: turned, grey, CMYK, palette.

Run: python -m eclipse.bench.embed_photos --photos DIR [DIR …] [--model local-dir:{models}/clip | --random ViT-B-32]
     DIR: folders of JPEG pictures, searched to any depth; captions from *.jsonl files in them (`file`, `caption` or
     `captions`), or the picture's name
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from ..pipeline.cache.store import Store
from ..pipeline.core.errors import EclipseError
from ..pipeline.core.progress import Progress
from ..pipeline.core.workspace import Workspace
from ..pipeline.embed.clip import Encoder
from ..pipeline.embed.stage import BATCH_SIZES, embed
from .embed import make_workspace, random_clip
from .results import arguments, hardware, record, table

DISGUISED = 10
ROWS_PER_SHARD = 256
BOUND = 0.99  # cosine of a disguised photograph to what it shows
_EXIF = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # what to store


def photographs(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Every JPEG beneath the folders, ordered by path, with a caption. Raises EclipseError if there is none."""
    captions: dict[Path, str] = {}
    for listing in (path for folder in folders for path in sorted(folder.rglob("*.jsonl"))):
        for line in listing.read_text(encoding="utf-8").splitlines():
            entry: dict[str, Any] = json.loads(line)
            captions[listing.parent / entry["file"]] = entry.get("caption") or entry["captions"][0]
    found = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise EclipseError("no JPEG pictures", where=", ".join(map(str, folders)), hint="name other folders")
    return [(path, captions.get(path, path.stem)) for path in found]


def write_shard(path: Path, files: Iterable[tuple[str, str, bytes, str]]) -> None:
    """A WebDataset tar of (key, extension, picture, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, extension, picture, caption in files:
            for name, data in ((f"{key}.{extension}", picture), (f"{key}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def disguises(photo: Image.Image) -> Iterator[tuple[str, str, bytes, Image.Image]]:
    """(what was done, extension, file, the picture a viewer sees) for an upright RGB photograph."""
    for turn, transpose in _EXIF.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned, EXIF {turn}", "jpg", _file(photo.transpose(transpose), "JPEG", exif=exif), photo
    luma = np.asarray(photo, np.float64) @ [0.299, 0.587, 0.114]
    grey = Image.fromarray(np.repeat(np.rint(luma)[..., None], 3, axis=2).astype(np.uint8))
    yield "grey", "jpg", _file(photo.convert("L"), "JPEG"), grey
    yield "CMYK", "jpg", _file(photo.convert("CMYK"), "JPEG"), photo
    yield "palette of 256", "png", _file(photo.quantize(256), "PNG"), photo


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--model", default="local-dir:{models}/clip")
    parser.add_argument("--random", metavar="NAME", help="an architecture with random weights instead")
    parser.add_argument("--at-most", type=int, help="only the first photographs, for a try")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    machine = hardware()
    photos = photographs(options.photos)[: options.at_most]
    with tempfile.TemporaryDirectory() as scratch:
        model = random_clip(options.random, Path(scratch) / "clip") if options.random else options.model
        plain = make_workspace(Path(scratch) / "photos", model)
        for start in range(0, len(photos), ROWS_PER_SHARD):
            rows = enumerate(photos[start : start + ROWS_PER_SHARD], start)
            files = ((f"{i:06d}", "jpg", path.read_bytes(), caption) for i, (path, caption) in rows)
            write_shard(plain.images / f"{start // ROWS_PER_SHARD:05d}.tar", files)
        summary = embed(plain, Progress(), gpus=0)
        if summary["rows"] != len(photos):
            raise EclipseError(f"{summary['rows']} of {len(photos)} photographs were embedded: {summary['rejected']}")
        disguised = compare(make_workspace(Path(scratch) / "disguised", model), [path for path, _ in photos])
    if wrong := [name for name, least, _ in disguised if least < BOUND]:
        raise EclipseError(f"these come out wrong: {', '.join(wrong)}", where=str(disguised))
    rows = [(name, f"{least:.4f}", f"{other:.3f}") for name, least, other in disguised]
    record(
        "python -m eclipse.bench.embed_photos",
        f"Embed, real photographs, {options.random or 'the lab CLIP'}, CPU",
        f"All {len(photos):,} photographs embedded, {summary['images_per_s']:,.1f} a second.\n\n"
        + table(["ten photographs", "least cosine to what is shown", "to another photograph, mean"], rows),
        {"photographs": len(photos), "batch": BATCH_SIZES["cpu"], "precision": "float32"},
        machine,
        options.results,
    )


def compare(ws: Workspace, paths: Sequence[Path]) -> list[tuple[str, float, float]]:
    """Embed disguises of ten photographs: (what was done, least cosine to what it shows, mean cosine to others).

    What is shown goes through open_clip's own transforms, and nothing of the stage, to its reference embedding.
    """
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(DISGUISED, len(paths))).astype(int)]
    names, files, shown = [], [], []
    for path in chosen:
        with Image.open(path) as image:
            photo = ImageOps.exif_transpose(image).convert("RGB")
        for name, extension, data, picture in disguises(photo):
            files.append((f"{len(names):04d}", extension, data, name))
            names.append(name)
            shown.append(picture)
    write_shard(ws.images / "00000.tar", files)
    embed(ws, Progress(), gpus=0)
    store = Store.open(ws.embeddings)
    encoder = Encoder.load(ws.card.encoder.model)
    own: Any = image_transform_v2(PreprocessCfg(**json.loads(encoder.preprocessing)), is_train=False)
    got = _unit(store.image_embeddings(np.arange(len(names))).astype(np.float32))
    wanted = _unit(np.concatenate([encoder.encode_images(own(picture)[None]).numpy() for picture in shown]))
    kinds = list(dict.fromkeys(names))
    cosine = (got @ wanted.T).reshape(len(chosen), len(kinds), len(chosen), len(kinds))
    same = np.eye(len(chosen), dtype=bool)
    of_kind = [(kind, cosine[:, k, :, k]) for k, kind in enumerate(kinds)]
    return [(kind, float(values[same].min()), float(values[~same].mean())) for kind, values in of_kind]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
