"""Pictures that are there already: the same parts from tars, folders, tables; nothing of them touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.download.propose import propose
from eclipse.pipeline.download.stage import download
from eclipse.pipeline.embed.stage import embed
from eclipse.pipeline.filter.stage import filter_cache
from eclipse.pipeline.images.decode import Sample
from eclipse.pipeline.images.rejects import Reject, read_rejected
from eclipse.pipeline.images.shards import picture_files
from eclipse.pipeline.images.sources import look, shards_of
from shards import picture, write_tar
from web import picture_answer, serving

QUIET = Progress(quiet=True)
PICTURES = [(f"{n:04d}", picture(n), [f"caption {n} of {k}" for k in range(1 + n % 3)]) for n in range(30)]


def workspace(root: Path, source: dict[str, Any]) -> Workspace:
    base = Card.load("shapes").model_dump(mode="json", by_alias=True)
    return Workspace.create(root, Card.model_validate({**base, "source": source}))


def tars(folder: Path, pictures: list = PICTURES, each: int = 12, first: int = 0) -> Path:
    for start in range(0, len(pictures), each):
        files = []
        for key, data, captions in pictures[start : start + each]:
            meta = json.dumps({"caption": captions[0], "captions": captions}).encode()
            files += [(f"{key}.jpg", data), (f"{key}.txt", captions[0].encode()), (f"{key}.json", meta)]
        write_tar(folder / f"cc-{first + start // each:05d}.tar", files)
    return folder


def folder_of(folder: Path) -> Path:
    lines = []
    for key, data, captions in PICTURES:
        path = folder / f"deep/{int(key) % 2}/{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if len(captions) == 1:
            path.with_suffix(".txt").write_text(captions[0])
        else:
            lines += [{"file_name": f"deep/{int(key) % 2}/{key}.jpg", "text": caption} for caption in captions]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def table_of(path: Path) -> Path:
    table = {"image": [{"bytes": d, "path": k} for k, d, _ in PICTURES], "text": [c for _, _, c in PICTURES]}
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path


def contents(ws: Workspace) -> list[tuple]:
    """Everything of the parts that does not depend on where a picture lay."""
    store = Store.open(ws.embeddings)
    names = ["uid", "caption", "image_sha256", "thumbnail", "width", "height", "n_tokens"]
    columns: list[Sequence] = [store.column(name).to_pylist() for name in names]
    columns += [
        [row.tobytes() for row in read(np.arange(len(store)))]
        for read in (store.image_embeddings, store.text_embeddings)
    ]
    states, offsets = store.token_states(np.arange(len(store)))
    columns.append([states[start:end].tobytes() for start, end in pairwise(offsets)])
    return sorted(zip(*columns, strict=True))


def test_the_same_pictures_from_lists_tars_folders_and_tables_give_the_same_parts(tmp_path: Path):
    places = {
        "webdataset": {"shards": str(tars(tmp_path / "tars"))},
        "folder": {"folder": str(folder_of(tmp_path / "photos")), "rows_per_shard": 12},
        "table": {"table": str(table_of(tmp_path / "table.parquet")), "rows_per_shard": 12},
    }
    with serving({f"/{key}.jpg": picture_answer(data) for key, data, _ in PICTURES}) as web:
        rows = [(web.url(f"/{key}.jpg"), caption) for key, _, captions in PICTURES for caption in captions]
        listed = tmp_path / "list.parquet"
        pq.write_table(pa.table({"url": [url for url, _ in rows], "caption": [caption for _, caption in rows]}), listed)
        urls = {"kind": "urls", "urls": str(listed), "rows_per_shard": 12}
        fetched = workspace(tmp_path / "urls", {**urls, "allow_hosts": ["127.0.0.1"]})
        assert download(fetched, QUIET)["pairs"] == 60
        assert max(web.hits.values()) == 1, "a picture with several captions is fetched once"
    embed(fetched, QUIET, gpus=0)
    expected = contents(fetched)
    assert len(expected) == 60
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    for kind, place in places.items():
        ws = workspace(tmp_path / f"ws-{kind}", {"kind": kind, **place})
        summary = embed(ws, QUIET, gpus=0)
        assert contents(ws) == expected and summary["parts"] == 3, kind
        assert not ws.images.exists(), "no picture is copied"
        store = Store.open(ws.embeddings)
        part, _ = store.part_of([0, 30, 59])
        keys = store.column("key", [0, 30, 59]).to_pylist()
        assert len(dict(picture_files(shards_of(ws), zip(part.tolist(), keys, strict=True)))) == 3
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in before}
    assert after == before, "nothing that was there is touched"


def test_shards_that_appear_later_are_found_and_the_others_stay(tmp_path: Path):
    folder = tars(tmp_path / "tars", PICTURES[:24], first=5)
    ws = workspace(tmp_path / "ws", {"kind": "webdataset", "shards": str(folder / "cc-*.tar")})
    assert download(ws, QUIET)["shards"] == 2
    assert embed(ws, QUIET, gpus=0)["parts"] == 2
    assert embed(ws, QUIET, gpus=0)["already_complete"]
    stamps = {path: path.stat().st_mtime_ns for path in ws.embeddings.glob("part-*")}
    tars(folder, PICTURES[24:], first=1)  # sorts before the others
    summary = embed(ws, QUIET, gpus=0)
    assert summary["parts"] == 3 and summary["rows"] == 60
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert [shard.name for shard in shards_of(ws).values()] == ["cc-00005.tar", "cc-00006.tar", "cc-00001.tar"]
    (folder / "cc-00005.tar").unlink()
    (ws.logs / "state" / "embed.json").unlink()
    with pytest.raises(EclipseError, match=r"cc-00005\.tar"):
        embed(ws, QUIET, gpus=0)


def test_a_download_made_anew_leaves_the_parts_of_unchanged_shards(tmp_path: Path):
    with serving({f"/{key}.jpg": picture_answer(data) for key, data, _ in PICTURES}) as web:
        listed, rows = tmp_path / "list.parquet", [(web.url(f"/{key}.jpg"), c[0]) for key, _, c in PICTURES]

        def write(count: int) -> None:
            pq.write_table(
                pa.table({"url": [u for u, _ in rows[:count]], "caption": [c for _, c in rows[:count]]}), listed
            )

        source = {"kind": "urls", "urls": str(listed), "rows_per_shard": 8, "allow_hosts": ["127.0.0.1"]}
        ws = workspace(tmp_path / "ws", source)
        write(24)
        download(ws, QUIET)
        assert embed(ws, QUIET, gpus=0)["parts"] == 3
        stamps = {path.name: path.stat().st_mtime_ns for path in ws.embeddings.glob("part-*")}
        write(12)
        download(ws, QUIET, overwrite=True)
    summary = embed(ws, QUIET, gpus=0)
    assert (summary["parts"], summary["rows"]) == (2, 12)
    now = {path.name: path.stat().st_mtime_ns for path in ws.embeddings.glob("part-*")}
    changed = {name for name in stamps if now.get(name) != stamps[name]}
    assert changed == {"part-00001.parquet", "part-00002.parquet"} and len(now) == 2


def test_braces_lists_keys_of_json_and_memory_are_understood(tmp_path: Path):
    import fsspec

    folder = tars(tmp_path / "tars")
    shards = [str(folder / "cc-{00000..00001}.tar"), str(folder)]
    braced = workspace(tmp_path / "a", {"kind": "webdataset", "shards": shards})
    assert look(braced) == 3 and look(braced) == 0
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.glob("*.tar")):
        memory.pipe_file(f"/eclipse/{path.name}", path.read_bytes())
    address = "memory://eclipse/cc-*.tar"
    remote = workspace(tmp_path / "b", {"kind": "webdataset", "shards": address, "caption_key": "caption"})
    assert look(remote) == 3
    found = [item for shard in shards_of(remote).values() for item in shard.samples()]
    assert [item.caption for item in found if isinstance(item, Sample)] == [captions[0] for _, _, captions in PICTURES]
    shard = shards_of(remote)[0]
    assert dict(shard.files({"0003"})) == {"0003": PICTURES[3][1]} and len(shard.content()) == 64
    memory.rm("/eclipse", recursive=True)
    with pytest.raises(EclipseError, match="cannot read the image shard"):
        list(shard.samples())


def test_what_is_missing_or_odd_is_said_or_set_aside(tmp_path: Path):
    folder = folder_of(tmp_path / "photos")
    (folder / "deep/0/0000.txt").unlink()
    (folder / "deep/0/broken.jpg").write_bytes(b"no picture")
    (folder / "deep/0/broken.txt").write_text("a caption")
    ws = workspace(tmp_path / "ws", {"kind": "folder", "folder": str(folder)})
    summary = embed(ws, QUIET, gpus=0)
    assert summary["inputs"] == 61 and summary["rejected"] == {"no_caption": 1, "unreadable": 1}
    assert {reject["key"] for reject in read_rejected(ws).to_pylist()} == {"deep/0/0000.jpg", "deep/0/broken.jpg"}
    shutil.rmtree(folder)
    (shard,) = shards_of(ws).values()
    assert {item.reason for item in shard.samples() if isinstance(item, Reject)} == {"no_picture"}

    table_of(tmp_path / "t.parquet")
    for place, (source, match) in enumerate(
        [
            ({"kind": "folder", "folder": str(tmp_path / "nowhere")}, "no such folder"),
            ({"kind": "webdataset", "shards": str(tmp_path / "nowhere.tar")}, "no such file"),
            ({"kind": "webdataset", "shards": "{1..2"}, "braces that do not match"),
            ({"kind": "table", "table": str(tmp_path / "t.parquet"), "caption_column": "words"}, "no column words"),
            ({"kind": "table", "table": str(tmp_path / "t.parquet"), "image_column": "text"}, "not pictures"),
            ({"kind": "table", "table": str(tmp_path / "none*.parquet")}, "no pictures were found"),
        ]
    ):
        with pytest.raises(UsageError, match=match):
            embed(workspace(tmp_path / f"ws-{place}", source), QUIET, gpus=0)


def test_embeddings_made_elsewhere_become_the_same_parts_without_a_picture(tmp_path: Path):
    """clip-retrieval's output and DataComp's, as the shipped CLIP would have written them, lengths made 1."""
    made = workspace(tmp_path / "made", {"kind": "webdataset", "shards": str(tars(tmp_path / "tars"))})
    embed(made, QUIET, gpus=0)
    store = Store.open(made.embeddings)
    everything = np.arange(len(store))
    image, text = (read(everything).astype(np.float32) for read in (store.image_embeddings, store.text_embeddings))
    norm = float(np.linalg.norm(image, axis=1).mean())
    digests = [digest.hex() for digest in store.column("image_sha256").to_pylist()]
    columns = {
        "image_path": store.column("key").to_pylist(), "caption": store.column("caption").to_pylist(),
        "sha256": digests, "width": store.column("width").to_pylist(), "original_height": [300] * len(store),
    }  # fmt: skip
    cache = tmp_path / "cache"
    for name in ("img_emb", "text_emb", "metadata"):
        (cache / name).mkdir(parents=True)
    for number, rows in enumerate([slice(0, 25), slice(25, 60)]):
        for name, array in (("img_emb", image), ("text_emb", text)):
            unit = array[rows] / np.linalg.norm(array[rows], axis=1, keepdims=True)
            np.save(cache / name / f"{name}_{number}.npy", unit.astype(np.float16))
        some = {name: values[rows] for name, values in columns.items()}
        pq.write_table(pa.table(some), cache / f"metadata/metadata_{number}.parquet")
    card = propose(str(cache), "shapes", "x")
    assert card.source.kind == "clip-retrieval" and card.source.folder == str(cache)

    source = {"kind": "clip-retrieval", "folder": str(cache), "rows_per_shard": 20}
    with pytest.raises(EclipseError, match="made to have length 1"):
        embed(workspace(tmp_path / "a", source), QUIET, gpus=0)
    one_tar = {"pictures": str(tmp_path / "tars/cc-00000.tar")}
    with pytest.raises(EclipseError, match=r"set source.image_norm: \d"):
        embed(workspace(tmp_path / "b", {**source, **one_tar}), QUIET, gpus=0)
    ws = workspace(tmp_path / "ws", {**source, **one_tar, "image_norm": norm})
    assert embed(ws, QUIET, gpus=0)["parts"] == 4  # 20 + 5 and 20 + 15 rows
    found = Store.open(ws.embeddings)
    for name in ("uid", "caption", "image_sha256", "width", "n_tokens"):
        assert found.column(name).to_pylist() == store.column(name).to_pylist(), name
    assert set(found.column("height").to_pylist()) == {300} and not found.thumbnails(everything).any()
    again = found.image_embeddings(everything).astype(np.float32)
    assert np.allclose(np.linalg.norm(again, axis=1), norm, rtol=0.01)
    assert ((again * image).sum(1) / np.linalg.norm(again, axis=1) / np.linalg.norm(image, axis=1)).min() > 0.999
    assert np.allclose(found.text_embeddings(everything), text, atol=0.02), "of CLIP's own length"
    assert np.allclose(found.token_states(everything)[0], store.token_states(everything)[0], atol=0.02)
    assert dict(picture_files(shards_of(ws), [(0, "000000000")])), "pictures at hand are shown"

    np.save(cache / "text_emb/text_emb_0.npy", np.roll(np.load(cache / "text_emb/text_emb_0.npy"), 1, axis=1))
    with pytest.raises(EclipseError, match="did not make these text embeddings"):
        embed(workspace(tmp_path / "c", {**source, "image_norm": norm}), QUIET, gpus=0)
    np.save(cache / "img_emb/img_emb_0.npy", np.roll(np.load(cache / "img_emb/img_emb_0.npy"), 1, axis=1))
    with pytest.raises(EclipseError, match="did not make these image embeddings"):
        embed(workspace(tmp_path / "d", {**source, **one_tar, "image_norm": norm}), QUIET, gpus=0)

    np.save(cache / "text_emb/text_emb_0.npy", text[:24])
    with pytest.raises(EclipseError, match="25 rows, but 25 and 24 embeddings"):
        embed(workspace(tmp_path / "e", {**source, "image_norm": norm}), QUIET, gpus=0)

    datacomp = tmp_path / "datacomp"
    datacomp.mkdir()
    np.savez(datacomp / "0a1b.npz", l14_img=image.astype(np.float16), l14_txt=text.astype(np.float16))
    pq.write_table(pa.table({"text": columns["caption"], "sha256": digests}), datacomp / "0a1b.parquet")
    proposed = propose(str(datacomp), "shapes", "x")
    assert proposed.source.kind == "clip-retrieval" and proposed.source.caption_column == "text"
    raw = Workspace.create(tmp_path / "raw", proposed)
    embed(raw, QUIET, gpus=0)
    assert np.array_equal(Store.open(raw.embeddings).image_embeddings(everything), image.astype(np.float16))
    report = filter_cache(raw, QUIET)
    assert any("no thumbnails" in str(value) for value in report.values())


def test_arrow_streams_and_dataset_folders_are_read(tmp_path: Path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    table = pa.table({"image": [data for _, data, _ in PICTURES], "text": [c[0] for _, _, c in PICTURES]})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "dataset_info.json").write_text("{}")
    ws = workspace(tmp_path / "ws", {"kind": "table", "table": str(folder), "rows_per_shard": 13})
    assert look(ws) == 3
    found = [item for shard in shards_of(ws).values() for item in shard.samples()]
    assert [(item.key, item.caption) for item in found if isinstance(item, Sample)] == [
        (f"{n:09d}", captions[0]) for n, (_, _, captions) in enumerate(PICTURES)
    ]


def test_a_card_is_proposed_for_what_is_there(tmp_path: Path):
    tars(tmp_path / "tars")
    folder_of(tmp_path / "photos")
    table_of(tmp_path / "table.parquet")
    pq.write_table(pa.table({"URL": ["http://a.org/1"], "TEXT": ["a"], "md5": ["0" * 32]}), tmp_path / "list.parquet")
    (tmp_path / "list.tsv").write_text("caption\turl\na\thttp://a.org/1\n")
    expected = {
        "tars": ("webdataset", {}), "tars/cc-{00000..00002}.tar": ("webdataset", {}),
        "photos": ("folder", {"caption_column": "text"}), "table.parquet": ("table", {"image_column": "image"}),
        "list.parquet": ("urls", {"url_column": "URL", "caption_column": "TEXT", "hash_column": "md5"}),
        "list.tsv": ("urls", {"url_column": "url", "caption_column": "caption"}),
        "*.tsv": ("urls", {"urls": str(tmp_path / "*.tsv"), "caption_column": "caption"}),
        "s3://bucket/cc-*.tar": ("webdataset", {"shards": "s3://bucket/cc-*.tar"}),
    }  # fmt: skip
    for place, (kind, keys) in expected.items():
        card = propose(place if "://" in place else str(tmp_path / place), "coco", "my prior!")
        assert (card.source.kind, card.name, card.prior.preset) == (kind, "my-prior", "kandinsky22")
        assert {name: getattr(card.source, name) for name in keys} == keys
    (tmp_path / "bare.tsv").write_text("a cat\thttp://a.org/1\n")
    (tmp_path / "empty").mkdir()
    for place, match in [
        ("bare.tsv", "no header line"),
        ("empty", "no tars, pictures or tables"),
        ("x.zip", "neither"),
    ]:
        with pytest.raises(UsageError, match=match):
            propose(str(tmp_path / place), "coco", "x")
