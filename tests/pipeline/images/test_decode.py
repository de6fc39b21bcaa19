"""Image shards: samples in order, pictures of every kind right, and 500 malformed inputs each accounted for."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.images.decode import (
    BadPictureError,
    Reject,
    Sample,
    fit_picture,
    open_picture,
    read_shard,
    thumbnail,
    uid_of,
)
from PIL import Image
from shards import picture, write_tar


def rgb(width: int = 48, height: int = 32) -> Image.Image:
    """Left half red, top right green, bottom right blue: every turn of it looks different."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = 220, 30, 30
    pixels[: height // 2, width // 2 :] = 30, 200, 30
    pixels[height // 2 :, width // 2 :] = 30, 30, 220
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.mode == b.mode == "RGB" and a.size == b.size
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(turn: int):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation → the transpose that makes a file of it
    image = rgb()
    stored = image if turn == 1 else image.transpose(Image.Transpose(undo[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    assert difference(open_picture(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)), image) < 3


def test_grey_palette_cmyk_16_bit_and_alpha_come_out_right():
    image = rgb()
    grey = image.convert("L").convert("RGB")
    deep = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    assert difference(open_picture(encoded(image.convert("L"), "PNG")), grey) == 0
    assert difference(open_picture(encoded(deep, "PNG")), grey) == 0
    assert difference(open_picture(encoded(deep, "TIFF")), grey) == 0
    assert difference(open_picture(encoded(image.quantize(16), "PNG")), image) < 3
    assert difference(open_picture(encoded(image.convert("CMYK"), "JPEG", quality=95)), image) < 6
    assert difference(open_picture(encoded(image.convert("1"), "PNG")), image.convert("1").convert("RGB")) == 0

    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 24).astype(np.uint8), (32, 1))))
    shown = np.asarray(open_picture(encoded(clear, "PNG")))
    assert (shown[:, :24] == 255).all(), "what is transparent is white"
    assert (shown[:, 24:] == np.asarray(image)[:, 24:]).all()

    palette = image.quantize(4)
    transparent = palette.getpixel((0, 0))
    assert isinstance(transparent, int)
    assert (np.asarray(open_picture(encoded(palette, "PNG", transparency=transparent)))[:, :20] == 255).all()


def test_animations_give_their_first_frame_and_tiny_pictures_are_pictures():
    frames = [rgb(), Image.new("RGB", (48, 32), (0, 0, 0))]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        assert difference(open_picture(data), frames[0]) < 6
    assert open_picture(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_says_why():
    jpeg = picture(1, (300, 200))
    huge, large = bomb(60_000), bomb(10_000)
    for data, reason in [
        (b"", "unreadable"), (b"<html>404</html>", "unreadable"), (jpeg[: len(jpeg) // 2], "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"), (huge, "too_large"), (large, "too_large"),
    ]:  # fmt: skip
        with pytest.raises(BadPictureError) as caught:
            open_picture(data)
        assert caught.value.reason == reason and "0x" not in str(caught.value)  # the same in every run
    sample = Sample("00000", "k", b"nothing", ("one", "two"), "http://u", bytes(32))
    assert sample.rejects("unreadable") == [Reject("00000", "k", "unreadable", "http://u", c) for c in ("one", "two")]


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side² pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_pictures_are_fitted_upright_and_never_enlarged():
    image = rgb(480, 320)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    data, *sizes = fit_picture(turned, 100, "keep_ratio", "jpg")
    assert sizes == [150, 100, 480, 320]
    assert difference(open_picture(data), image.resize((150, 100))) < 4
    assert fit_picture(encoded(image, "JPEG"), 100, "center_crop", "jpg")[1:3] == (100, 100)
    bordered = open_picture(fit_picture(encoded(image, "PNG"), 120, "border", "png")[0])
    assert bordered.size == (120, 120) and bordered.getpixel((60, 2)) == (255, 255, 255)
    small = encoded(image, "JPEG")
    assert fit_picture(small, 1000, "keep_ratio", "jpg") == (small, 480, 320, 480, 320), "the same bytes"
    assert fit_picture(small, 100, "no", "jpg")[0] == small
    png, *_ = fit_picture(small, 1000, "keep_ratio", "png")
    assert difference(open_picture(png), open_picture(small)) == 0
    with pytest.raises(BadPictureError):
        fit_picture(small[:-200], 100, "keep_ratio", "jpg")


def test_thumbnail_holds_the_layout_and_survives_a_small_crop():
    level = thumbnail(Image.new("RGB", (300, 200), (90, 90, 90)))
    assert level.dtype == np.uint8 and level.shape == (256,) and (level == 90).all()
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (100, 1)))
    rows = thumbnail(ramp.convert("RGB")).reshape(16, 16).astype(int)
    assert (rows == rows[0]).all() and abs(rows[0, 4:12] - (np.arange(4, 12) * 16 + 8)).max() <= 1
    stripes = (np.arange(64) // 3 % 2 * 255).astype(np.uint8)
    picture = Image.fromarray(np.minimum(np.tile(stripes, (64, 1)), np.arange(64, dtype=np.uint8)[:, None] * 4))
    cropped = picture.crop((1, 0, 64, 63))
    assert np.corrcoef(thumbnail(picture), thumbnail(cropped))[0, 1] > 0.97
    box, cropped_box = (np.asarray(p.resize((16, 16), Image.Resampling.BOX)).ravel() for p in (picture, cropped))
    assert np.corrcoef(box, cropped_box)[0, 1] < 0.97, "what the blur is for"


def test_samples_come_in_tar_order_with_caption_url_and_hash(tmp_path: Path):
    data = [picture(i) for i in range(3)]
    recorded = hashlib.sha256(b"as downloaded").hexdigest()
    tar = write_tar(
        tmp_path / "00007.tar",
        [
            ("b.jpg", data[0]), ("b.json", json.dumps({"url": "http://u/b", "sha256": recorded}).encode()),
            ("b.txt", "ein blauer Würfel".encode()),
            ("dir/a.png", data[1]), ("dir/a.json", b'{"caption": "from json"}'),
            ("c.jpeg", data[2]), ("c.txt", b"broken json"), ("c.json", b"{"),
        ],
    )  # fmt: skip
    samples = [item for item in read_shard(tar) if isinstance(item, Sample)]
    assert [sample.key for sample in samples] == ["b", "dir/a", "c"]
    assert [sample.caption for sample in samples] == ["ein blauer Würfel", "from json", "broken json"]
    assert [sample.url for sample in samples] == ["http://u/b", "", ""]
    assert samples[0].image_sha256.hex() == recorded and samples[0].shard == "00007"
    assert samples[1].image_sha256 == hashlib.sha256(data[1]).digest()
    expected = hashlib.sha256(samples[0].image_sha256 + "ein blauer Würfel".encode()).hexdigest()
    assert samples[0].uids[0] == uid_of(samples[0].image_sha256, samples[0].caption) == expected


def test_several_captions_are_one_sample(tmp_path: Path):
    """The list in the JSON counts where it belongs to the text; every caption is a pair with an identity and a fate."""
    data = picture(1)
    metas = {
        "all": {"url": "http://u", "captions": ["one", "two", "one"]},
        "stale": {"captions": ["another", "two"]},
        "odd": {"captions": ["one", 2]},
        "blank": {"captions": ["one", " ", "three"]},
        "torn": {"captions": ["one", "two"]},
    }
    files = []
    for key, meta in metas.items():
        files += [] if key == "torn" else [(f"{key}.jpg", data)]
        files += [(f"{key}.txt", b"one"), (f"{key}.json", json.dumps(meta).encode())]
    files += [("listed.jpg", data), ("listed.json", b'{"captions": ["three", "four"]}')]
    found = list(read_shard(write_tar(tmp_path / "00000.tar", files)))
    samples = {item.key: item for item in found if isinstance(item, Sample)}
    assert {key: sample.captions for key, sample in samples.items()} == {
        "all": ("one", "two", "one"), "stale": ("one",), "odd": ("one",), "blank": ("one", "three"),
        "listed": ("three", "four"),
    }  # fmt: skip
    digest = hashlib.sha256(data).digest()
    assert samples["all"].uids == [uid_of(digest, caption) for caption in ("one", "two", "one")]
    rejects = [(item.key, item.reason, item.caption) for item in found if isinstance(item, Reject)]
    assert rejects == [("blank", "no_caption", ""), ("torn", "no_picture", "one"), ("torn", "no_picture", "two")]


def test_a_lost_picture_is_rejected_once_for_each_caption(tmp_path: Path):
    path = write_tar(tmp_path / "00000.tar", [("a.jpg", picture(1)), ("a.txt", b"one")])
    columns = {"key": ["a", "b"], "url": ["http://a", "http://b"], "status": ["success"] * 2}
    columns |= {"captions": [["one"], ["two", "three"]], "caption": ["one", "two"]}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    sample, *lost = read_shard(path)
    assert sample.key == "a"
    assert lost == [Reject("00000", "b", "lost_from_tar", "http://b", caption) for caption in ("two", "three")]


def test_odd_members_get_a_reason_and_good_ones_beside_them_survive(tmp_path: Path):
    good = picture(1)
    path = write_tar(
        tmp_path / "00000.tar",
        [
            ("../../etc/x.jpg", good), ("/abs.jpg", good), ("noextension", good), ("a\nb.jpg", good),
            ("lonely.txt", b"no picture"), ("silent.jpg", good), ("blank.jpg", good), ("blank.txt", b"  \n"),
            ("good.jpg", good), ("good.txt", b"a caption"),
        ],
    )  # fmt: skip
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = list(read_shard(path))
    assert [item.key for item in found if isinstance(item, Sample)] == ["good"]
    assert sorted((item.key, item.reason) for item in found if isinstance(item, Reject)) == [
        ("../../etc/x.jpg", "unsafe_name"), ("/abs.jpg", "unsafe_name"), ("a\nb.jpg", "unsafe_name"),
        ("blank", "no_caption"), ("link.jpg", "not_a_file"), ("lonely", "no_picture"),
        ("noextension", "odd_name"), ("silent", "no_caption"),
    ]  # fmt: skip


def shard_with_metadata(path: Path, data: list[bytes]) -> bytes:
    """A shard as `download` writes it, its metadata Parquet beside it; returns the tar's bytes."""
    keys = [f"{i:04d}" for i in range(len(data))]
    write_tar(
        path, [(f"{k}.{e}", b) for k, d in zip(keys, data, strict=True) for e, b in (("jpg", d), ("txt", b"words"))]
    )
    columns = {"key": keys, "url": keys, "caption": ["words"] * len(keys), "status": ["success"] * len(keys)}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    return path.read_bytes()


def test_rows_of_a_truncated_tar_are_not_lost(tmp_path: Path):
    path = tmp_path / "00000.tar"
    whole = shard_with_metadata(path, [picture(i) for i in range(8)])
    for cut in (0, 100, 512, 1000, 5000, len(whole) // 2):
        path.write_bytes(whole[:cut])
        found = list(read_shard(path))
        keys = {item.key for item in found}
        assert {f"{i:04d}" for i in range(8)} <= keys, f"cut at {cut}"
    with pytest.raises(EclipseError, match="cannot read"):
        list(read_shard(tmp_path / "missing.tar"))


def test_a_damaged_header_loses_its_own_sample_only(tmp_path: Path):
    path = tmp_path / "00000.tar"
    whole = bytearray(shard_with_metadata(path, [picture(i) for i in range(6)]))
    start = whole.index(b"0002.jpg")
    whole[start + 20] ^= 255  # its checksum does not agree any more
    path.write_bytes(whole)
    found = list(read_shard(path))
    assert {item.key for item in found if isinstance(item, Sample)} == {"0000", "0001", "0003", "0004", "0005"}
    assert {"damaged_tar", "no_picture"} <= {item.reason for item in found if isinstance(item, Reject)}


def flipped(data: bytes, rng: np.random.Generator, flips: int) -> bytes:
    out = bytearray(data)
    for place in rng.integers(0, len(out), size=flips):
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_300_bit_flipped_pictures_are_each_a_picture_or_a_reject(tmp_path: Path):
    rng = np.random.default_rng(4)
    kinds = [picture(i, kind=kind) for i in range(5) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    broken = [flipped(kinds[i % len(kinds)], rng, 1 + i % 20) for i in range(300)]
    tar = shard_with_metadata(tmp_path / "00000.tar", broken)
    assert tar
    fates: dict[str, str] = {}
    for item in read_shard(tmp_path / "00000.tar"):
        assert isinstance(item, Sample)
        assert item.key not in fates
        try:
            image = open_picture(item.data)
        except BadPictureError as error:
            fates[item.key] = error.reason
            continue
        fates[item.key] = image.mode
        assert thumbnail(image).shape == (256,)
    assert len(fates) == 300
    assert set(fates.values()) <= {"RGB", "unreadable", "too_large"}
    assert 30 < sum(value == "RGB" for value in fates.values()) < 270


def test_200_malformed_tars_are_read_to_their_end(tmp_path: Path):
    rng = np.random.default_rng(5)
    path = tmp_path / "00000.tar"
    whole = shard_with_metadata(path, [picture(i) for i in range(4)])
    headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    for i in range(200):
        data = bytearray(whole)
        if i % 4 == 0:
            data = bytearray(whole[: int(rng.integers(0, len(whole)))])
        elif i % 4 == 1:
            data = bytearray(flipped(whole, rng, 40))
        else:  # a header that is whole but lies: about its size, or its kind
            at = headers[int(rng.integers(len(headers)))]
            if i % 4 == 2:
                data[at + 124 : at + 136] = huge_size(rng)
            else:
                data[at + 156] = b"LKxgSV12567"[int(rng.integers(11))]
            data[at + 148 : at + 156] = b"%06o\0 " % checksum(data[at : at + 512])
        path.write_bytes(data)
        keys = {item.key for item in read_shard(path)}
        assert {f"{k:04d}" for k in range(4)} <= keys, f"input {i} lost a row"


def checksum(header: bytearray) -> int:
    return sum(header[:148]) + 8 * 32 + sum(header[156:])


def huge_size(rng: np.random.Generator) -> bytes:
    """Eight gigabytes in octal, nearly 2^88 bytes or a negative number in base 256."""
    sizes = (b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 11 + bytes([int(rng.integers(256))]))
    return sizes[int(rng.integers(3))]


@pytest.mark.parametrize(
    "table",
    [
        {"key": [5], "url": [1], "caption": [None], "status": ["success"]},
        {"key": [None], "url": [""], "caption": [""], "status": ["success"]},
        {"key": [[1]], "url": [""], "caption": [""], "status": ["success"]},
        {"key": pa.array([b"\xff"]).view(pa.string()), "url": [""], "caption": [""], "status": ["success"]},
    ],
)
def test_any_parquet_may_lie_beside_a_tar_and_any_url_in_its_json(tmp_path: Path, table: dict):
    meta = json.dumps({"url": "http://a.org/\ud800"}).encode()
    path = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.txt", b"a cat"), ("a.json", meta)])
    pq.write_table(pa.table(table), path.with_suffix(".parquet"))
    sample, *lost = read_shard(path)
    assert isinstance(sample, Sample) and sample.url == "http://a.org/?"
    assert lost == ([Reject("0", "5", "lost_from_tar", "1", "")] if table["key"] == [5] else [])
