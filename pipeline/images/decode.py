"""Image shards → samples and decoded pictures; bad ones set aside with a reason. Called by `embed` and `download`.

The format is described in this package's __init__. Nothing of a shard is ever unpacked to disk: names in tars are
labels here, not paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..core.errors import EclipseError
from .rejects import Reject
from .tar import Damage, Member, is_remote, members

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# Readers that only decode pictures: others start programs (EPS) or open further files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
PIXEL_LIMIT = 1 << 26  # 200 MB as RGB; a header of a few bytes can claim more than the memory holds
TEXT_LIMIT = 1 << 20  # bytes of a caption or of a sample's JSON
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # WebDataset's convention: the key ends at the first dot
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ORIENTATION = 0x0112

warnings.filterwarnings("ignore", module=r"PIL\..*")  # remarks on odd EXIF and palettes; faults are raised anyway


@dataclass(frozen=True, slots=True)
class Embedded:
    """What CLIP made of a sample before: image (D,) float32 of CLIP's own length; text (D,) of any, or None; the
    picture's width and height, 0 where they are not known."""

    image: np.ndarray
    text: np.ndarray | None
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its captions (at least one), not decoded yet.

    image_sha256: 32 bytes, of the picture as it was downloaded. embedded: by whoever ran CLIP before; `data` is empty
    then, or there to check that encoder by.
    """

    shard: str
    key: str
    data: bytes
    captions: tuple[str, ...]
    url: str
    image_sha256: bytes
    embedded: Embedded | None = None

    @property
    def caption(self) -> str:
        """The first one."""
        return self.captions[0]

    @property
    def uids(self) -> list[str]:
        """The identity of each of its pairs."""
        return [uid_of(self.image_sha256, caption) for caption in self.captions]

    def rejects(self, reason: str) -> list[Reject]:
        """One for each caption, so that fates add up in pairs."""
        return [Reject(self.shard, self.key, reason, self.url, caption) for caption in self.captions]


class BadPictureError(Exception):
    """The bytes give no picture; `reason` is the code for rejected.parquet."""

    def __init__(self, reason: str, detail: str = "") -> None:
        # Pillow names the stream by its address in memory, and two runs would differ by it.
        detail = _ADDRESS.sub("", detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def uid_of(image_sha256: bytes, caption: str) -> str:
    """Identity of a pair: SHA-256 (64 hex digits) of the picture's SHA-256 followed by the caption's UTF-8."""
    return hashlib.sha256(image_sha256 + caption.encode("utf-8", "replace")).hexdigest()


def read_shard(address: Path | str, caption_key: str | None = None) -> Iterator[Sample | Reject]:
    """The samples of a WebDataset tar in tar order; a Reject for every other pair that is or should be there.

    address: a path, or a URL that fsspec knows. caption_key: where in a sample's JSON its caption stands, if not in a
    .txt. Beside a local tar, img2dataset's metadata Parquet (if there is one) tells which keys a damaged tar has lost.
    Raises EclipseError if the file itself cannot be read.
    """
    shard = str(address).rpartition("/")[2].partition(".")[0]
    seen: set[str] = set()
    try:
        for found in _groups(shard, address):
            outcomes = [found] if isinstance(found, Reject) else _outcomes(shard, *found, caption_key)
            seen.add(outcomes[0].key)
            yield from outcomes
    except OSError as error:
        raise EclipseError(f"cannot read the image shard: {error.strerror or error}", where=str(address)) from error
    if not is_remote(address):
        yield from _lost(shard, Path(address).with_suffix(".parquet"), seen)


def with_captions(
    shard: str, key: str, data: bytes, captions: Iterable[str], url: str = "", sha256: bytes | None = None
) -> list[Sample | Reject]:
    """A picture with every caption that says something; a Reject for each that does not, one if there is none at all.

    sha256: of the picture as it was downloaded, if that is not `data`.
    """
    captions = [_encodable(caption) for caption in captions] or [""]
    said = tuple(caption for caption in captions if caption.strip())
    outcomes: list[Sample | Reject] = [Reject(shard, key, "no_caption", url)] * (len(captions) - len(said))
    if said:
        outcomes.append(Sample(shard, key, data, said, url, sha256 or hashlib.sha256(data).digest()))
    return outcomes


def open_picture(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decode a picture to RGB, upright by EXIF; alpha is composited on white, animations give frame one.

    at_least: a JPEG may be decoded at a fraction of its size, as long as its shorter side keeps this many pixels.
    Raises BadPictureError (`unreadable`, `too_large`) for anything that cannot be decoded completely.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise BadPictureError("too_large", f"{image.width}×{image.height} pixels")
            if at_least is not None and image.format in ("JPEG", "MPO"):
                scale = at_least / max(min(image.size), 1)
                if scale < 1:
                    image.draft(image.mode, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            image.load()
            return _upright(_rgb(image), image)
    except BadPictureError:
        raise
    except Image.DecompressionBombError as error:
        raise BadPictureError("too_large", str(error)) from None
    except (MemoryError, RecursionError) as error:
        raise BadPictureError("too_large", type(error).__name__) from None
    except Exception as error:  # decoders raise whatever their parsing of broken bytes runs into
        raise BadPictureError("unreadable", str(error)) from None


def fit_picture(data: bytes, size: int, mode: str, encode_format: str) -> tuple[bytes, int, int, int, int]:
    """Bring a downloaded picture to its stored form: (bytes, width, height, original width, original height).

    mode, as img2dataset names them: `keep_ratio` and `center_crop` bring the shorter side to `size` pixels, `border`
    the longer one, padding with white; `no` keeps every size. Never enlarges. encode_format: jpg or png. The bytes
    stay as they are if that changes nothing. Raises BadPictureError.
    """
    picture = open_picture(data, at_least=None if mode in ("no", "border") else size)
    original, plain = _header(data, encode_format)
    side = max(original) if mode == "border" else min(original)
    if mode != "no" and side > size:
        picture = _resized(picture, size, mode)
    elif plain:
        return data, *picture.size, *original
    out = io.BytesIO()
    if encode_format == "png":
        picture.save(out, "PNG", compress_level=1)
    else:
        picture.save(out, "JPEG", quality=95)
    return out.getvalue(), *picture.size, *original


def _resized(picture: Image.Image, size: int, mode: str) -> Image.Image:
    scale = size / (max(picture.size) if mode == "border" else min(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if mode == "center_crop":
        left, top = (width - size) // 2, (height - size) // 2
        return picture.crop((left, top, left + size, top + size))
    if mode == "border":
        padded = Image.new("RGB", (size, size), (255, 255, 255))
        padded.paste(picture, ((size - width) // 2, (size - height) // 2))
        return padded
    return picture


def _header(data: bytes, encode_format: str) -> tuple[tuple[int, int], bool]:
    """(width, height) as an upright viewer sees them, and whether the file may be stored as it is."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        turn = _orientation(image)
        size = image.size if turn < 5 else (image.height, image.width)
        kept = ("PNG",) if encode_format == "png" else ("JPEG", "MPO")
        return size, image.format in kept and turn == 1 and image.mode in (
            "RGB",
            "L",
        ) and "transparency" not in image.info


def thumbnail(image: Image.Image) -> np.ndarray:
    """16×16 grey levels of the whole picture, blurred by three quarters of a cell: uint8 (256,).

    The blur keeps a shift by part of a cell from changing fine patterns: among 600 scenes of the shapes world, copies
    cropped by up to a pixel in 64 correlate above 0.97 in 99 % of cases, and without the blur in 60 %.
    """
    grey = image.convert("L").resize((64, 64), Image.Resampling.BILINEAR)
    cells = _BLUR @ np.asarray(grey, dtype=np.float32) @ _BLUR.T
    return np.rint(cells).astype(np.uint8).reshape(256)


def _blur_to_cells() -> np.ndarray:
    """(16, 64) float32: a Gaussian of three pixels with the edge repeated, then the mean of four. Rows sum to one."""
    gaussian = np.zeros((64, 64))
    for offset in range(-12, 13):
        gaussian[np.arange(64), np.clip(np.arange(64) + offset, 0, 63)] += np.exp(-(offset**2) / 18)
    gaussian /= gaussian.sum(axis=1, keepdims=True)
    return gaussian.reshape(16, 4, 64).mean(axis=1).astype(np.float32)


_BLUR = _blur_to_cells()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: Pillow's own conversion clips at 255, which leaves the picture white."""
    if image.mode == "F":
        raise BadPictureError("unreadable", "floating-point pixels")
    values = np.asarray(image).astype(np.int64)
    if values.max(initial=0) > 255 or image.mode.startswith("I;16"):
        values = (values + 128) // 257
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(source))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about how the picture stands
        return 1
    return turn if turn in _TURNS else 1


def _groups(shard: str, address: Path | str) -> Iterator[tuple[str, dict[str, bytes]] | Reject]:
    """Consecutive files with one key, as WebDataset groups them; a repeated extension begins the next sample."""
    key = ""
    files: dict[str, bytes] = {}
    for found in members(address):
        fault = found.reason if isinstance(found, Damage) else _name_fault(found.name)
        if fault is not None:
            yield Reject(shard, found.name or "?", fault)
            continue
        assert isinstance(found, Member)
        match = _NAME.fullmatch(found.name)
        assert match is not None
        name, extension = match[1], match[2].lower()
        if files and (name != key or extension in files):
            yield key, files
            files = {}
        key = name
        files[extension] = found.data
    if files:
        yield key, files


def _name_fault(name: str) -> str | None:
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
        return "unsafe_name"
    return None if _NAME.fullmatch(name) else "odd_name"


def _outcomes(shard: str, key: str, files: dict[str, bytes], caption_key: str | None) -> list[Sample | Reject]:
    """What the files of one key are; see the package's docstring."""
    meta = _meta(files.get("json", b""))
    url = _encodable(meta["url"]) if isinstance(meta.get("url"), str) else ""
    captions = _captions(files.get("txt"), meta, caption_key)
    pictures = [files[extension] for extension in EXTENSIONS if extension in files]
    if not pictures:
        return [Reject(shard, key, "no_picture", url, caption) for caption in captions]
    return with_captions(shard, key, pictures[0], captions, url, _sha256(meta.get("sha256"), pictures[0]))


def _meta(data: bytes) -> dict[str, Any]:
    """A sample's JSON; a broken one counts as empty, since the picture and the caption may still be good."""
    if len(data) > TEXT_LIMIT:
        return {}
    try:
        meta = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _captions(text: bytes | None, meta: dict[str, Any], caption_key: str | None) -> list[str]:
    """The captions of a sample, at least one, though it may be empty."""
    told = meta.get(caption_key or "captions")
    several = [_encodable(c) for c in told] if isinstance(told, list) and all(isinstance(c, str) for c in told) else []
    if caption_key is not None:
        return several or [_encodable(told) if isinstance(told, str) else ""]
    if text is not None:
        first = text[:TEXT_LIMIT].decode("utf-8", "replace")
        # A tar whose texts were rewritten elsewhere keeps the old list in its JSON: then the text alone counts.
        return several if several[:1] == [first] else [first]
    value = meta.get("caption")
    return several or [_encodable(value) if isinstance(value, str) else ""]


def _encodable(text: str) -> str:
    """JSON may hold lone surrogates, which no UTF-8 file can."""
    return text.encode("utf-8", "replace").decode()


def _sha256(recorded: Any, data: bytes) -> bytes:
    """img2dataset's hash of the bytes it fetched; for tars from elsewhere, the hash of the stored bytes."""
    if isinstance(recorded, str) and re.fullmatch(r"[0-9a-fA-F]{64}", recorded):
        return bytes.fromhex(recorded)
    return hashlib.sha256(data).digest()


def _lost(shard: str, metadata: Path, seen: set[str]) -> Iterator[Reject]:
    """Pairs of samples that were stored according to the metadata, and are in the tar no more."""
    if not metadata.is_file():
        return
    schema = pa.schema([(name, pa.string()) for name in ("key", "url", "caption", "status")])
    try:
        several = ["captions"] if "captions" in pq.read_schema(metadata).names else []
        table = pq.read_table(metadata, columns=[*schema.names, *several], page_checksum_verification=True)
        captions = table.column("captions").to_pylist() if several else [None] * len(table)
        rows = list(zip(*table.select(schema.names).cast(schema).to_pydict().values(), captions, strict=True))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return  # tars from elsewhere may have any Parquet beside them
    for key, url, caption, status, told in rows:
        if status == "success" and key is not None and key not in seen:
            for text in told if isinstance(told, list) and told else [caption]:
                yield Reject(shard, key, "lost_from_tar", url or "", str(text or ""))
