"""The embed stage on real shards with a real (tiny, random) CLIP: order, identity, rejects, resume, failures."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress, Task
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.embed import lane, reader, writer
from eclipse.pipeline.embed.clip import Encoder
from eclipse.pipeline.embed.reader import LaneReader
from eclipse.pipeline.embed.stage import embed
from eclipse.pipeline.embed.tasks import ShardTask
from eclipse.pipeline.embed.writer import Picture
from eclipse.pipeline.images.decode import Sample, open_picture, read_shard, uid_of
from eclipse.pipeline.images.rejects import Reject, read_rejected
from eclipse.pipeline.images.shards import TarShard
from records import forget
from shards import good_samples, make_workspace, picture, write_shard, write_tar
from tiny_clip import make_clip

QUIET = Progress(quiet=True)
BATCH = 8


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def ws(tmp_path: Path, clip: str) -> Workspace:
    """A shard of several batches, one smaller than a batch, an empty one, one with nothing but broken samples."""
    ws = make_workspace(tmp_path / "ws", clip)
    write_shard(ws.images / "00000.tar", good_samples(0, 3 * BATCH + 5))
    write_shard(ws.images / "00001.tar", good_samples(1, BATCH - 3))
    write_shard(ws.images / "00002.tar", [])
    write_shard(ws.images / "00003.tar", [("a", b"no picture", "caption"), ("b", None, "caption")])
    long = ("c", picture(1), "word " * 100)
    write_shard(ws.images / "00004.tar", [long, ("d", picture(2)[:200], "cut off"), *good_samples(4, 2)])
    return ws


def parts(ws: Workspace) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(ws.embeddings.iterdir())}


def every_sample(ws: Workspace) -> Iterator[Sample]:
    for tar in sorted(ws.images.glob("*.tar")):
        for item in read_shard(tar):
            if isinstance(item, Sample) and item.key not in ("a", "d"):
                yield item


def test_every_row_is_right_and_every_input_has_a_fate(ws: Workspace, clip: str, monkeypatch) -> None:
    """Rows in shard order; embeddings, states, identity and scores are those of each pair computed alone."""
    monkeypatch.setattr(lane, "CHUNK_ROWS", 2 * BATCH)  # several row groups' worth of chunks in one shard
    summary = embed(ws, QUIET, gpus=0, batch_size=BATCH)
    samples = list(every_sample(ws))
    assert (summary["rows"], summary["inputs"]) == (len(samples), len(samples) + 3)
    assert summary["rejected"] == {"unreadable": 2, "no_picture": 1}
    assert summary["truncated_captions"] == 1
    rejected = read_rejected(ws, "embed").to_pylist()
    assert [(r["shard"], r["key"], r["reason"]) for r in rejected] == [
        ("00003", "a", "unreadable"), ("00003", "b", "no_picture"), ("00004", "d", "unreadable"),
    ]  # fmt: skip

    store, encoder = Store.open(ws.embeddings), Encoder.load(clip)
    store.verify()
    rows = np.arange(len(store))
    assert [p.rows for p in store.parts] == [3 * BATCH + 5, BATCH - 3, 0, 0, 3]
    for name in ("key", "caption", "url"):
        assert store.column(name).to_pylist() == [getattr(sample, name) for sample in samples]
    assert store.column("uid").to_pylist() == [sample.uids[0] for sample in samples]
    images, texts = store.image_embeddings(rows), store.text_embeddings(rows)
    states, offsets = store.token_states(rows)
    scores, widths = store.column("clip_score").to_numpy(), store.column("width").to_numpy()
    for row, sample in enumerate(samples):
        image = open_picture(sample.data)
        alone = encoder.encode_images(encoder.preprocess(image)[None])[0]
        text = encoder.encode_text(*encoder.tokenize([sample.caption]))
        np.testing.assert_allclose(images[row], alone.numpy(), rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(texts[row], text.embedding[0].numpy(), rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(states[offsets[row] : offsets[row + 1]], text.states.numpy(), rtol=2e-3, atol=2e-3)
        assert scores[row] == pytest.approx(torch.cosine_similarity(alone, text.embedding[0], dim=0).item(), abs=1e-4)
        assert widths[row] == image.width


def test_a_picture_with_several_captions_is_encoded_once(tmp_path: Path, clip: str, monkeypatch) -> None:
    """One row per pair, equal in every column to the rows of a shard that holds the picture once for each caption."""
    captions = [["a red square", "a blue circle on the left of a tree", "red"], ["green"], ["a", "word " * 100]]
    once, each = make_workspace(tmp_path / "once", clip), make_workspace(tmp_path / "each", clip)
    broken = ("x", b"no picture", ["one", "two"])
    write_shard(once.images / "00000.tar", [*((f"{i}", picture(i), texts) for i, texts in enumerate(captions)), broken])
    pairs = [(f"{i}", picture(i), text) for i, texts in enumerate(captions) for text in texts]
    write_shard(each.images / "00000.tar", [(f"{key}-{n}", data, text) for n, (key, data, text) in enumerate(pairs)])
    encoded: list[int] = []
    plain = Encoder.encode_images

    def encode(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return plain(encoder, pixels)

    monkeypatch.setattr(Encoder, "encode_images", encode)
    monkeypatch.setattr(lane, "CHUNK_ROWS", 3)
    summary = embed(once, QUIET, gpus=0, batch_size=2)
    assert sum(encoded) == summary["embedded_now"] == len(captions)
    assert (summary["inputs"], summary["rows"], summary["truncated_captions"]) == (8, 6, 1)
    assert summary["rejected"] == {"unreadable": 2}
    assert read_rejected(once, "embed")["caption"].to_pylist() == ["one", "two"]

    embed(each, QUIET, gpus=0, batch_size=2)
    stores = [Store.open(ws.embeddings) for ws in (once, each)]
    assert stores[0].column("key").to_pylist() == [key for key, _, _ in pairs]
    for name in ("uid", "caption", "image_sha256", "thumbnail", "width", "n_tokens"):
        assert stores[0].column(name).to_pylist() == stores[1].column(name).to_pylist(), name
    rows = np.arange(6)
    for read in (Store.image_embeddings, Store.text_embeddings, lambda store, rows: store.token_states(rows)[0]):
        np.testing.assert_allclose(read(stores[0], rows), read(stores[1], rows), rtol=2e-3, atol=1e-3)
    scores = [store.column("clip_score").to_numpy() for store in stores]
    np.testing.assert_allclose(*scores, atol=1e-4)
    images = stores[0].image_embeddings(rows)
    assert (images[0] == images[1]).all() and (images[0] == images[2]).all() and (images[0] != images[3]).any()


def test_files_ahead_of_the_decoding_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in number alone: 40 pictures of 1 MB each, where 4 MB may wait."""
    monkeypatch.setattr(reader, "BYTES_AHEAD", 4 << 20)
    monkeypatch.setattr(reader, "GROUP_BYTES", 2 << 20)
    write_shard(tmp_path / "00000.tar", [(f"{i}", bytes(1 << 20), "a caption") for i in range(40)])
    task = ShardTask(0, TarShard(tmp_path / "00000.tar"), tmp_path / "part-00000.parquet", tmp_path / "0.json", 8)
    waiting, most = [0], [0]

    def start(items: list[Sample | Reject]) -> Future[list[Picture | Reject]]:
        size = sum(len(item.data) for item in items if isinstance(item, Sample))
        waiting[0] += size
        most[0] = max(most[0], waiting[0])
        return pool.submit(finish, size)

    def finish(size: int) -> list[Picture | Reject]:
        waiting[0] -= size
        return []

    with ThreadPoolExecutor(1) as pool, LaneReader([task], start, ahead=1000) as lane_reader:
        pool.submit(time.sleep, 0.3)  # decoding is slow to begin
        groups = [group for _, group in lane_reader if group is not None]
    assert len(groups) == 20
    assert 2 << 20 <= most[0] <= 4 << 20


@pytest.mark.parametrize("how", ["a part cannot be closed", "a message cannot be written"])
def test_a_full_disk_ends_the_stage_whatever_else_fails_with_it(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The encoder must not wait for shards that nobody will report on."""

    class Full(writer.PartWriter):
        def write(self, columns: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *error: Any) -> bool | None:
            super().__exit__(*error)
            if how == "a part cannot be closed":
                raise OSError(errno.ENOSPC, "No space left on device")
            return None

    class Mute(Progress):
        def say(self, message: str) -> None:
            if how == "a message cannot be written":
                raise OSError(errno.ENOSPC, "No space left on device")

    for shard in sorted(ws.images.glob("*.tar"))[1:]:  # with more, the next one would find out
        shard.unlink()
    monkeypatch.setattr(writer, "PartWriter", Full)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            embed(ws, Mute(quiet=True), gpus=0)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)  # which, should it hang, does not keep the tests from ending
    thread.start()
    thread.join(timeout=300)
    assert raised, "it hangs"
    assert "No space left on device" in str(raised[0])
    assert not [path for path in ws.embeddings.iterdir() if path.name.startswith(".tmp")]


def test_two_runs_and_a_resumed_one_are_identical(ws: Workspace, tmp_path: Path) -> None:
    """Byte for byte; a finished part is not computed again, a damaged or missing one is, and a changed shard too."""
    embed(ws, QUIET, gpus=0, batch_size=BATCH)
    first = parts(ws)
    assert embed(ws, QUIET, gpus=0)["already_complete"]
    assert embed(ws, QUIET, gpus=0, batch_size=BATCH, overwrite=True)["embedded_now"] == sum(
        1 for _ in every_sample(ws)
    )
    assert parts(ws) == first

    forget(ws, "embed")
    (ws.embeddings / "part-00001.parquet").unlink()
    whole = (ws.embeddings / "part-00004.parquet").read_bytes()
    (ws.embeddings / "part-00004.parquet").write_bytes(whole[:-100])
    summary = embed(ws, QUIET, gpus=0, batch_size=BATCH)
    assert summary["embedded_now"] == (BATCH - 3) + 3
    assert parts(ws) == first
    assert summary["inputs"] == summary["rows"] + 3

    forget(ws, "embed")
    write_shard(ws.images / "00001.tar", good_samples(9, 2))
    assert embed(ws, QUIET, gpus=0, batch_size=BATCH)["embedded_now"] == 2
    assert Store.open(ws.embeddings).parts[1].rows == 2


def test_interrupted_half_way_it_leaves_whole_parts_alone(ws: Workspace) -> None:
    """Ctrl-C in the middle of a shard: no half-written part, and the next run ends as an undisturbed one."""

    class Interrupted(Progress):
        interrupted = False

        def _start(self, title: str, total: int | None, unit: str) -> Task:
            task = Task(title, total, unit)
            task._changed = self._interrupt  # type: ignore[method-assign]
            return task

        def _interrupt(self) -> None:
            if not self.interrupted and len(list(ws.embeddings.glob("part-*"))) >= pieces:
                self.interrupted = True
                os.kill(os.getpid(), signal.SIGINT)

    embed(ws, QUIET, gpus=0, batch_size=BATCH)
    undisturbed = parts(ws)
    for pieces in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            embed(ws, Interrupted(quiet=True), gpus=0, batch_size=BATCH, overwrite=True)
        assert all(name.startswith("part-") for name in parts(ws))
        if ws.stage("embed").finished is None:
            assert parts(ws)
        else:  # nothing new was whole yet: the old came back
            assert not pieces and parts(ws) == undisturbed
        embed(ws, QUIET, gpus=0, batch_size=BATCH)
        assert parts(ws) == undisturbed


def test_sharding_does_not_change_identity(tmp_path: Path, clip: str) -> None:
    """The same pairs in one shard or three: same uids, embeddings equal within one float16 step."""
    one, three = (make_workspace(tmp_path / name, clip) for name in ("one", "three"))
    samples = good_samples(0, 12)
    write_shard(one.images / "00000.tar", samples)
    for i in range(3):
        write_shard(three.images / f"{i:05d}.tar", samples[4 * i : 4 * i + 4])
    stores = []
    for ws in (one, three):
        embed(ws, QUIET, gpus=0, batch_size=5)
        stores.append(Store.open(ws.embeddings))
    assert stores[0].column("uid").to_pylist() == stores[1].column("uid").to_pylist()
    sample = next(iter(read_shard(one.images / "00000.tar")))
    assert isinstance(sample, Sample)
    assert stores[0].column("uid").to_pylist()[0] == uid_of(hashlib.sha256(sample.data).digest(), sample.caption)
    for method in ("image_embeddings", "text_embeddings"):
        a, b = (getattr(store, method)(np.arange(12)) for store in stores)
        assert (np.abs(a.astype(np.float32) - b) <= np.spacing(np.maximum(np.abs(a), np.abs(b)))).all()


def test_another_encoder_is_refused_and_named(ws: Workspace, tmp_path: Path) -> None:
    """Other weights behind the same card, with parts present: nothing is mixed in."""
    embed(ws, QUIET, gpus=0, batch_size=BATCH)
    before = parts(ws)
    forget(ws, "embed")
    directory = Path(ws.card.encoder.model.removeprefix("local-dir:"))
    kept = tmp_path / "kept"
    shutil.copytree(directory, kept)
    try:
        make_clip(directory, seed=7)
        with pytest.raises(EclipseError, match="weights of the encoder") as error:
            embed(ws, QUIET, gpus=0)
        assert "--overwrite" in str(error.value) and "part-00000.parquet" in str(error.value)
        assert parts(ws) == before
    finally:
        shutil.copytree(kept, directory, dirs_exist_ok=True)


def test_states_are_left_out_on_request(ws: Workspace) -> None:
    embed(ws, QUIET, gpus=0, text_states=False)
    assert (
        "text_states" not in Store.open(ws.embeddings).meta.__dict__ or not Store.open(ws.embeddings).meta.text_states
    )
    with pytest.raises(EclipseError, match="--overwrite"):
        embed(ws, QUIET, gpus=0)


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_kept(ws: Workspace) -> None:
    (ws.images / "00005.tar").mkdir()
    with pytest.raises(EclipseError, match=r"1 of 6 shards could not be embedded") as error:
        embed(ws, QUIET, gpus=0)
    assert "00005.tar" in str(error.value)
    assert len(parts(ws)) == 5
    (ws.images / "00005.tar").rmdir()
    assert embed(ws, QUIET, gpus=0)["embedded_now"] == 0


def test_missing_or_foreign_files_are_explained(tmp_path: Path, clip: str) -> None:
    ws = make_workspace(tmp_path / "ws", clip)
    with pytest.raises(EclipseError, match="eclipse download"):
        embed(ws, QUIET, gpus=0)
    write_shard(ws.images / "00000.tar", [("a", b"junk", "caption")])
    with pytest.raises(EclipseError, match="none of 1 inputs"):
        embed(ws, QUIET, gpus=0)
    write_shard(ws.images / "00000.tar", good_samples(0, 1))
    (ws.embeddings / "part-00007.parquet").write_bytes((ws.embeddings / "part-00000.parquet").read_bytes())
    with pytest.raises(EclipseError, match=r"belongs to no image shard[\s\S]*part-00007"):
        embed(ws, QUIET, gpus=0)
    with pytest.raises(UsageError, match="GPUs asked for"):
        embed(ws, QUIET, gpus=99)


def test_shards_from_elsewhere_keep_the_order_of_their_names(tmp_path: Path, clip: str) -> None:
    ws = make_workspace(tmp_path / "ws", clip)
    for name, seed in (("train-b", 2), ("train-a", 1)):
        write_tar(ws.images / f"{name}.tar", [(f"{name}.png", picture(seed, kind="PNG")), (f"{name}.txt", b"a cat")])
    embed(ws, QUIET, gpus=0)
    assert Store.open(ws.embeddings).column("key").to_pylist() == ["train-a", "train-b"]


def test_a_row_that_overflows_half_precision_is_set_aside(tmp_path: Path) -> None:
    """One bad row neither sinks its shard nor vanishes."""
    name = make_clip(tmp_path / "clip")
    loud = _scaled(name, 3e6)
    ws = make_workspace(tmp_path / "ws", loud)
    write_shard(ws.images / "00000.tar", good_samples(0, 3))
    with pytest.raises(EclipseError, match="none of 3 inputs"):
        embed(ws, QUIET, gpus=0)
    assert read_rejected(ws, "embed")["reason"].to_pylist() == ["embedding_not_finite"] * 3


def test_a_shard_that_exhausts_the_memory_is_tried_with_half_the_batch(ws: Workspace, monkeypatch) -> None:
    """Once it fits, every row is there; if it never does, the shard is named and the others are kept."""
    plain, sizes = Encoder.encode_images, []
    room = BATCH // 2

    def encode(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(encoder, pixels)

    monkeypatch.setattr(Encoder, "encode_images", encode)
    summary = embed(ws, QUIET, gpus=0, batch_size=BATCH)
    assert summary["rows"] == sum(1 for _ in every_sample(ws))
    assert BATCH in sizes and BATCH // 2 in sizes

    room = 0
    with pytest.raises(EclipseError, match=r"3 of 5 shards could not be embedded[\s\S]*00000\.tar: CUDA out of memory"):
        embed(ws, QUIET, gpus=0, batch_size=BATCH, overwrite=True)
    assert {path.name for path in ws.embeddings.iterdir()} == {"part-00002.parquet", "part-00003.parquet"}


def test_500_malformed_inputs_through_the_whole_stage(tmp_path: Path, clip: str) -> None:
    """Broken pictures, names, and tars between good samples: every key ends in exactly one part or reject."""
    rng = np.random.default_rng(6)
    ws = make_workspace(tmp_path / "ws", clip)
    expected: dict[str, set[str]] = {}
    good = good_samples(90, 2)
    for number, kind in enumerate(("JPEG", "PNG")):
        whole = [picture(i, kind=kind) for i in range(5)]
        rows = [(f"{kind}{i:03d}", flipped(whole[i % 5], rng, 1 + i % 20), "words") for i in range(150)]
        write_shard(ws.images / f"{number:05d}.tar", [good[0], *rows, good[1]])
        expected[f"{number:05d}"] = {good[0][0], good[1][0], *(key for key, _, _ in rows)}
    for number in range(2, 102):
        path = ws.images / f"{number:05d}.tar"
        whole = tar_with_metadata(path, [(f"{number}-{i}", picture(i), "words") for i in range(3)])
        path.write_bytes(whole[: int(rng.integers(len(whole)))] if number % 2 else flipped(whole, rng, 30))
        expected[f"{number:05d}"] = {f"{number}-{i}" for i in range(3)}
    names = [name for i in range(25) for name in (f"../{i}/x.jpg", f"/etc/{i}.jpg", f"a\nb{i}.jpg", f"odd{i}")]
    write_tar(ws.images / "00102.tar", [*((name, picture(1)) for name in names), *pair(good[0])])
    expected["00102"] = {good[0][0], *names}

    summary = embed(ws, QUIET, gpus=0, batch_size=BATCH)
    fates: dict[str, list[str]] = {shard: [] for shard in expected}
    store = Store.open(ws.embeddings)
    keys = iter(store.column("key").to_pylist())
    for part in store.parts:
        fates[f"{part.number:05d}"] += [next(keys) for _ in range(part.rows)]
    for reject in read_rejected(ws, "embed").to_pylist():
        fates[reject["shard"]].append(reject["key"])
    assert sum(map(len, fates.values())) == summary["inputs"] == summary["rows"] + sum(summary["rejected"].values())
    for shard, keys_of_shard in expected.items():
        assert keys_of_shard <= set(fates[shard]), f"shard {shard} lost an input"
        if shard in ("00000", "00001", "00102"):
            assert sorted(fates[shard]) == sorted(keys_of_shard)
    assert not (tmp_path / "0").exists() and not (ws.root / "0").exists(), "names are labels, not paths"


def flipped(data: bytes, rng: np.random.Generator, flips: int) -> bytes:
    out = bytearray(data)
    for place in rng.integers(0, len(out), size=flips):
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def pair(sample: tuple[str, bytes | None, str]) -> list[tuple[str, bytes]]:
    key, data, caption = sample
    assert data is not None
    return [(f"{key}.jpg", data), (f"{key}.txt", caption.encode())]


def tar_with_metadata(path: Path, samples: list[tuple[str, bytes | None, str]]) -> bytes:
    """The bytes of a shard as `download` writes it, with its metadata Parquet, which tells what a broken tar held."""
    write_shard(path, samples)
    columns = {name: [key for key, _, _ in samples] for name in ("key", "url", "caption")}
    pq.write_table(pa.table({**columns, "status": ["success"] * len(samples)}), path.with_suffix(".parquet"))
    return path.read_bytes()


def test_a_killed_worker_is_replaced(ws: Workspace) -> None:
    """kill -9 in the middle of a shard: another takes over, and the parts are those of an undisturbed run."""
    embed(ws, QUIET, gpus=0, batch_size=BATCH)
    undisturbed = Store.open(ws.embeddings)
    uids = undisturbed.column("uid").to_pylist()
    images = undisturbed.image_embeddings(np.arange(len(undisturbed)))
    said: list[str] = []

    class Killer(Progress):
        killed = False

        def say(self, message: str) -> None:
            said.append(message)

        @contextmanager
        def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
            task = Task(title, total, unit)
            task._changed = self._kill_one  # type: ignore[method-assign]
            yield task

        def _kill_one(self) -> None:
            if not self.killed:
                self.killed = True
                os.kill(_children()[0], signal.SIGKILL)

    summary = embed(ws, Killer(), devices=["cpu", "cpu"], batch_size=BATCH, overwrite=True)
    assert any("SIGKILL" in message for message in said)
    store = Store.open(ws.embeddings)
    assert store.column("uid").to_pylist() == uids
    np.testing.assert_allclose(store.image_embeddings(np.arange(len(store))), images, rtol=2e-3, atol=1e-4)
    assert summary["inputs"] == summary["rows"] + 3
    assert not _children()


def _children() -> list[int]:
    """Worker processes of this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and b"eclipse.pipeline.core.pool" in command:
            found.append(int(status.parent.name))
    return found


def _scaled(name: str, factor: float) -> str:
    from safetensors.torch import load_file, save_file

    path = Path(name.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.proj"] = weights["visual.proj"] * factor
    save_file(weights, path)
    return name
