"""The download stage: real img2dataset against real HTTP servers; every row's fate, resume, interruption, failures."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.lab.server import list_path
from eclipse.lab.truth import planted, row_of
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.download import stage
from eclipse.pipeline.download.http import ClientSpec
from eclipse.pipeline.download.pool import Fetchers
from eclipse.pipeline.download.stage import download
from eclipse.pipeline.download.worker import FetchSpec, Order
from eclipse.pipeline.images.decode import Sample, read_shard
from eclipse.pipeline.images.rejects import read_rejected
from shards import good_samples, picture, write_shard
from web import Handler, drip, picture_answer, serving

ROWS, SHARD = 150, 25
QUIET = Progress(quiet=True)
LOCAL = {"allow_hosts": ["127.0.0.1"], "patience_s": 10.0}


def shapes_workspace(root: Path) -> Workspace:
    card = Card.load("shapes")
    source = card.source.model_copy(update={"rows": ROWS, "rows_per_shard": SHARD, "timeout_s": 3.0})
    return Workspace.create(root, card.model_copy(update={"source": source}))


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "RETRY_WAIT_S", 0.0)


def urls_workspace(root: Path, table: dict[str, list], **source: Any) -> Workspace:
    card = {
        "name": "test",
        "source": {
            "kind": "urls",
            "urls": "list.parquet",
            "timeout_s": 3.0,
            "retries": 1,
            "allow_hosts": ["127.0.0.1"],
            "patience_s": 10.0,
            **source,
        },
        "encoder": {"model": "none"},
        "decoder": {"path": "none"},
    }
    ws = Workspace.create(root, Card.model_validate(card))
    pq.write_table(pa.table(table), root / "list.parquet")
    return ws


def samples(ws: Workspace) -> list[Sample]:
    found = [item for path in sorted(ws.images.glob("*.tar")) for item in read_shard(path)]
    assert all(isinstance(item, Sample) for item in found)
    return [item for item in found if isinstance(item, Sample)]


def content(ws: Workspace) -> list[tuple[int, str, bytes, bytes]]:
    """What of the samples does not depend on the port: row, uid, hash, stored bytes."""
    return sorted((row_of(s.url), s.uids[0], s.image_sha256, s.data) for s in samples(ws))


def children(name: str, root: Path) -> list[int]:
    """Processes running the module `name` for the workspace at `root`, anywhere on this machine."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            log = str((folder / "fd/2").readlink())
        except OSError:
            continue
        if name.encode() in arguments and log.startswith(str(root)):
            pids.append(int(folder.name))
    return pids


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def nothing_runs(root: Path) -> bool:
    return not children("eclipse.pipeline.core.pool", root) and not children("eclipse.lab.server", root)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Any]]:
    ws = shapes_workspace(tmp_path_factory.mktemp("done") / "ws")
    with ws.lock("download"):
        return ws, download(ws, QUIET)


def test_every_row_of_the_dirty_list_has_the_fate_that_was_planted(done: tuple[Workspace, dict[str, Any]]):
    ws, summary = done
    plan = planted(0, ROWS)
    by_row = {row_of(sample.url): sample for sample in samples(ws)}
    dead = {entry.row: entry.fault for entry in plan if entry.kind == "dead"}
    assert set(by_row) == set(range(ROWS)) - set(dead)
    rejects = read_rejected(ws, "download").to_pylist()
    reasons = {"not_found": "http_404", "reset": "connection_failed", "truncated": "cut_short", "stall": "timed_out"}
    assert {row_of(reject["url"]): reject["reason"] for reject in rejects} == {
        row: reasons[str(fault)] for row, fault in dead.items()
    }
    assert all(len(reject["key"]) > 5 and reject["shard"].isdigit() and reject["caption"] for reject in rejects)
    captions = Card.load("shapes").source.captions  # type: ignore[union-attr]
    assert summary["rows"] == ROWS * captions == summary["pairs"] + sum(summary["rejected"].values())
    assert summary["images"] == len(by_row)

    table = pq.read_table(list_path(ws)).to_pydict()
    told: dict[int, list[str]] = {}
    for url, caption in zip(table["url"], table["caption"], strict=True):
        told.setdefault(row_of(url), []).append(caption)
    assert {row: list(sample.captions) for row, sample in by_row.items()} == {row: told[row] for row in by_row}
    for entry in plan:
        if entry.original is not None:
            same = by_row[entry.row].image_sha256 == by_row[entry.original].image_sha256
            assert same == (entry.kind == "exact_copy")
    clean = by_row[next(entry.row for entry in plan if entry.kind == "clean")]
    assert hashlib.sha256(clean.data).digest() == clean.image_sha256, "a good PNG is stored as it came"


def test_shards_are_in_list_order_and_carry_nothing_temporary(done: tuple[Workspace, dict[str, Any]]):
    ws, _ = done
    for path in sorted(ws.images.glob("*.tar"))[: ROWS // SHARD]:
        rows = [row_of(sample.url) for sample in read_shard(path) if isinstance(sample, Sample)]
        assert rows == sorted(rows)
        assert {row // SHARD for row in rows} == {int(path.stem)}
        assert len(pq.read_table(path.with_suffix(".parquet"))) == SHARD
    assert not [path for path in ws.images.iterdir() if path.name.startswith(".")]
    assert nothing_runs(ws.root)


def test_a_complete_download_answers_at_once_and_needs_no_img2dataset(done: tuple[Workspace, dict[str, Any]]):
    ws, summary = done
    code = (
        "import sys; from pathlib import Path; from eclipse.pipeline.core.workspace import Workspace\n"
        "from eclipse.pipeline.download.stage import download; from eclipse.pipeline.core.progress import Progress\n"
        "print(download(Workspace.open(Path(sys.argv[1])), Progress())['already_complete'])\n"
        "assert 'img2dataset' not in sys.modules and 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code, str(ws.root)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")
    assert download(Workspace.open(ws.root), QUIET) == {**summary, "already_complete": True}


def start(ws: Workspace, before: Callable[[], None] | None = None) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name("eclipse")), "download", "-w", str(ws.root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before)


def test_killed_half_way_it_ends_in_the_same_samples(done: tuple[Workspace, dict[str, Any]], tmp_path: Path):
    ws = shapes_workspace(tmp_path / "ws")
    process = start(ws)
    wait_for(lambda: len(list(ws.images.glob("*_stats.json"))) >= 2)
    process.kill()
    process.communicate()
    wait_for(lambda: nothing_runs(ws.root))
    finished = {path: path.stat().st_mtime_ns for path in ws.images.glob("*.tar") if stats_of(path).exists()}
    assert 2 <= len(list(ws.images.glob("*_stats.json"))) < ROWS // SHARD
    with ws.lock("download"):
        summary = download(ws, QUIET)
    assert content(ws) == content(done[0])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards are left alone"
    assert summary["images"] == done[1]["images"]
    assert not [path for path in ws.images.iterdir() if path.name.startswith(".")]


def stats_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def test_ctrl_c_ends_it_with_130_and_leaves_nothing_half_written(tmp_path: Path):
    ws = shapes_workspace(tmp_path / "ws")
    process = start(ws)
    wait_for(lambda: list(ws.images.glob(".tmp-fetch-*/*.tar")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert "interrupted" in err and "Traceback" not in err
    assert nothing_runs(ws.root)
    assert not [path for path in ws.images.iterdir() if path.name.startswith(".")]


def test_a_write_that_fails_ends_it_with_one_message(tmp_path: Path):
    ws = shapes_workspace(tmp_path / "ws")
    small = (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # no shard's tar fits, as on a full disk
    process = start(ws, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert "img2dataset failed: OSError" in err and "shard 0000" in err and "Traceback" not in err
    assert nothing_runs(ws.root)
    assert not list(ws.images.iterdir())


def test_failures_of_the_open_web_are_retried_replaced_or_named(tmp_path: Path):
    root = tmp_path / "ws"
    good = [picture(i, (300, 200)) for i in range(12)]

    def flaky(handler: Handler, before: int) -> None:
        first_pass_is_over = (root / "images/00000_stats.json").exists()
        handler.give(good[1]) if first_pass_is_over else handler.send_error(503)

    def kill_worker(handler: Handler, before: int) -> None:
        if before == 0:
            for pid in children("eclipse.pipeline.core.pool", root):
                os.kill(pid, signal.SIGKILL)
        handler.give(good[2])

    answers = {f"/{i}.jpg": picture_answer(good[i]) for i in range(12)}
    answers |= {
        "/flaky": flaky, "/kill": kill_worker, "/drip": drip,
        "/cut": picture_answer(good[3][:-300]), "/page": picture_answer(b"<html>gone</html>"),
        "/refused": lambda handler, before: handler.give(good[4], X_Robots_Tag="noai"),
    }  # fmt: skip
    with serving(answers) as web:
        paths = ["/flaky", "/kill", "/missing", "/drip", "/cut", "/page", "/refused", *(f"/{i}.jpg" for i in range(12))]
        urls = [web.url(path) for path in paths] + ["ftp://x/y", " "]
        captions = [f"caption {i}" for i in range(len(urls))]
        table = {"link": urls, "text": captions}
        ws = urls_workspace(root, table, url_column="link", caption_column="text", rows_per_shard=10, image_size=64)
        summary = download(ws, QUIET)
        assert web.hits["/missing"] <= 2 and web.hits["/flaky"] >= 2
    assert summary["rejected"] == Counter(
        {"unreadable": 2, "disallowed": 1, "empty_url": 1, "http_404": 1, "not_http": 1, "timed_out": 1}
    )
    assert summary["images"] == 14 and summary["recovered"] == 1 and summary["rows"] == 21
    found = {sample.url: sample for sample in samples(ws)}
    assert set(found) == {web.url(p) for p in ["/flaky", "/kill", *(f"/{i}.jpg" for i in range(12))]}
    assert found[web.url("/3.jpg")].image_sha256 == hashlib.sha256(good[3]).digest(), "of the bytes as downloaded"
    assert found[web.url("/flaky")].caption == "caption 0" and found[web.url("/flaky")].shard == "00002"
    rejected = read_rejected(ws).to_pylist()
    assert {r["key"] for r in rejected if not r["shard"]} == {"row 19", "row 20"}
    assert next(r["caption"] for r in rejected if r["reason"] == "timed_out") == "caption 3"

    lists = ws.root / "list.parquet"
    pq.write_table(pa.table({"link": urls[:5], "text": captions[:5]}), lists)
    shutil.rmtree(ws.logs / "state")  # as if it had been interrupted just before its end
    with pytest.raises(EclipseError, match="URL list changed"):
        download(ws, QUIET)


def test_a_shard_whose_worker_died_just_after_its_last_file_is_finished(tmp_path: Path):
    client = ClientSpec(timeout_s=1, concurrency=1, per_host=1, patience_s=1)
    spec = FetchSpec(str(tmp_path), str(tmp_path / "log"), 64, "keep_ratio", "jpg", 10, client)
    (tmp_path / "00003_stats.json").write_text("{}")
    done: list[int] = []
    with Fetchers(spec, print) as fetchers:
        fetchers.fetch([Order(3, {})], workers=1, advance=lambda *_: done.append(1))
    assert not done and not list(tmp_path.glob("00003.*"))


def test_nothing_to_fetch_nothing_fetched_and_no_place_are_explained(tmp_path: Path):
    empty = urls_workspace(tmp_path / "a", {"url": ["", "ftp://x/y"], "caption": ["a", "b"]})
    with pytest.raises(UsageError, match="nothing to fetch: empty_url, not_http"):
        download(empty, QUIET)
    (empty.root / "list.parquet").unlink()
    with pytest.raises(UsageError, match="cannot read the URL list"):
        download(empty, QUIET)

    with serving({"/1.jpg": picture_answer(picture(1))}) as web:
        urls = [web.url("/1.jpg"), web.url("/missing")]
        ws = urls_workspace(tmp_path / "b", {"url": urls, "caption": ["a", "b"]}, rows_per_shard=1, retries=0)
        blocked = ws.images / "00001.parquet"
        blocked.mkdir(parents=True)
        with pytest.raises(EclipseError, match="img2dataset failed") as caught:
            download(ws, QUIET)
        assert caught.value.where is not None and "shard 00001" in caught.value.where
        assert not [path for path in ws.images.iterdir() if path.name.startswith(".")]
        blocked.rmdir()
        assert download(ws, QUIET)["images"] == 1, "what was wrong is right, and it goes on"
        assert not (ws.images / "00001.tar").exists(), "no tar where nothing was downloaded"
        pq.write_table(pa.table({"url": urls[1:], "caption": ["b"]}), ws.root / "list.parquet")
        with pytest.raises(EclipseError, match="no picture could be downloaded: http_404 1"):
            download(ws, QUIET, overwrite=True)


def test_without_img2dataset_it_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: (name != "img2dataset" and find(name, *rest)) or None
    )
    with pytest.raises(UsageError, match="img2dataset is not installed"):
        download(shapes_workspace(tmp_path / "ws"), QUIET)


def test_a_picture_with_several_captions_is_fetched_and_stored_once(tmp_path: Path):
    with serving({"/a.jpg": picture_answer(picture(1)), "/b.jpg": picture_answer(picture(2))}) as web:
        a, b, gone = (web.url(path) for path in ("/a.jpg", "/b.jpg", "/gone.jpg"))
        rows = [(a, "first"), (gone, "x"), (b, "only"), (a, "second"), (gone, "y"), (a, "first"), (a, "third")]
        table = {"url": [url for url, _ in rows], "caption": [caption for _, caption in rows]}
        ws = urls_workspace(tmp_path / "ws", table, retries=0)
        summary = download(ws, QUIET)
        assert web.hits == {"/a.jpg": 1, "/b.jpg": 1, "/gone.jpg": 1}
    assert (summary["rows"], summary["images"], summary["pairs"]) == (7, 2, 4)
    assert summary["rejected"] == {"http_404": 2, "repeated_pair": 1}
    with tarfile.open(ws.images / "00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    (key,) = (name.partition(".")[0] for name, data in files.items() if data == b"first")
    assert json.loads(files[f"{key}.json"])["captions"] == ["first", "second", "third"]
    assert sum(name.endswith(".jpg") for name in files) == 2
    assert {(reject["reason"], reject["caption"]) for reject in read_rejected(ws).to_pylist()} == {
        ("http_404", "x"), ("http_404", "y"), ("repeated_pair", "first"),
    }  # fmt: skip


def test_credentials_of_a_url_are_used_and_appear_nowhere(tmp_path: Path):
    wanted = "Basic " + base64.b64encode(b"ann:swordfish").decode()

    def guarded(handler: Handler, before: int) -> None:
        fine = handler.headers["Authorization"] == wanted and before > 0
        handler.give(picture(1)) if fine else handler.send_error(503)

    with serving({"/a.jpg": guarded, "/refused.jpg": lambda handler, before: handler.send_error(403)}) as web:
        urls = [web.url(path).replace("http://", "http://ann:swordfish@") for path in ("/a.jpg", "/refused.jpg")]
        ws = urls_workspace(tmp_path / "ws", {"url": urls, "caption": ["a", "b"]}, retries=1)
        (ws.root / "list.parquet").rename(tmp_path / "list.parquet")
        (ws.root / "list.parquet").symlink_to(tmp_path / "list.parquet")
        summary = download(ws, QUIET)
    assert summary["images"] == 1 and summary["recovered"] == 1
    for path in ws.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"swordfish" not in path.read_bytes() and b"ann:" not in path.read_bytes(), path
    assert "swordfish" not in json.dumps(summary) and samples(ws)[0].url == web.url("/a.jpg")


def test_what_this_project_did_not_write_is_never_replaced(tmp_path: Path):
    with serving({"/a.jpg": picture_answer(picture(1))}) as web:
        ws = urls_workspace(tmp_path / "ws", {"url": [web.url("/a.jpg")], "caption": ["a"]})
        own = write_shard(ws.images / "00000.tar", good_samples(0, 3))
        before = own.read_bytes()
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="not written by `eclipse download`"):
                download(ws, QUIET, overwrite=overwrite)
            assert own.read_bytes() == before and not web.hits
        own.unlink()
        assert download(ws, QUIET)["images"] == 1
        notes = ws.images / "notes.txt"
        notes.write_text("mine")
        with pytest.raises(UsageError, match="1 files here were not written"):
            download(ws, QUIET, overwrite=True)
        assert notes.read_text() == "mine" and len(samples(ws)) == 1


def test_more_can_be_asked_for_and_what_failed_tried_again(tmp_path: Path):
    broken = {"on": True}

    def shaky(handler: Handler, before: int) -> None:
        handler.send_error(404) if broken["on"] else handler.give(picture(1000 + before))

    answers: dict[str, Any] = {f"/{n}.jpg": picture_answer(picture(n)) for n in range(40)}
    answers |= {f"/shaky{n}.jpg": shaky for n in range(10)}
    with serving(answers) as web:
        paths = [f"/{n}.jpg" for n in range(40)] + [f"/shaky{n}.jpg" for n in range(10)] + ["/gone.jpg"]
        table = {"url": [web.url(path) for path in paths], "caption": [f"caption {n}" for n in range(51)]}
        ws = urls_workspace(tmp_path / "ws", table, retries=0, rows_per_shard=8)
        assert download(ws, QUIET, limit=20)["images"] == 20
        assert download(ws, QUIET)["already_complete"], "what was asked for is remembered"
        first = {path.name: path.stat().st_mtime_ns for path in ws.images.iterdir()}
        summary = download(ws, QUIET, sample="100%")
        assert summary["images"] == 40 and summary["rejected"] == {"http_404": 11} and summary["rows"] == 51
        assert {name: (ws.images / name).stat().st_mtime_ns for name in first} == first, (
            "finished shards are left alone"
        )
        broken["on"] = False
        assert download(ws, QUIET, retry_failed="timed_out")["images"] == 40, "nothing failed for that"
        summary = download(ws, QUIET, retry_failed="http_404,timed_out")
        assert summary["images"] == 50 and summary["recovered"] == 10 and summary["rejected"] == {"http_404": 1}
        assert max(web.hits[path] for path in paths if "shaky" not in path and "gone" not in path) == 1
    assert sorted(sample.caption for sample in samples(ws)) == sorted(f"caption {n}" for n in range(50))
    assert not any(path.name.startswith(".") for path in ws.images.iterdir())
    with pytest.raises(UsageError, match="no share"):
        download(ws, QUIET, sample="many")


def test_an_installed_package_brings_a_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What registry.py describes: a package with an entry point, and a card that names it."""
    package = tmp_path / "site"
    (package / "museum-1.dist-info").mkdir(parents=True)
    (package / "museum-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: museum\nVersion: 1\n")
    (package / "museum-1.dist-info/entry_points.txt").write_text("[eclipse.list]\nmuseum = museum:served\n")
    (package / "museum.py").write_text(
        "from contextlib import contextmanager\nfrom eclipse.pipeline.download.url_list import UrlList\n"
        "@contextmanager\ndef served(ws, *, anew):\n"
        "    path = ws.root / 'museum.csv'\n"
        "    path.write_text('link,words\\n' + ws.card.source.options['pictures'] + ',a vase\\n')\n"
        "    yield UrlList((path,), 'link', 'words')\n"
    )
    section = {"kind": "museum", "allow_hosts": ["127.0.0.1"]}
    card = {"name": "test", "encoder": {"model": "none"}, "decoder": {"path": "none"}}
    with serving({"/vase.jpg": picture_answer(picture(1))}) as web:
        section["options"] = {"pictures": web.url("/vase.jpg")}
        with pytest.raises(ValueError, match="installed package registers"):
            Card.model_validate({**card, "source": section})
        monkeypatch.syspath_prepend(package)
        ws = Workspace.create(tmp_path / "ws", Card.model_validate({**card, "source": section}))
        assert download(Workspace.open(ws.root), QUIET)["images"] == 1
    assert [sample.caption for sample in samples(ws)] == ["a vase"]


def test_published_hashes_are_verified(tmp_path: Path):
    with serving({f"/{n}.jpg": picture_answer(picture(n)) for n in range(3)}) as web:
        hashes = [hashlib.sha256(picture(0)).hexdigest(), hashlib.md5(picture(1)).hexdigest(), "0" * 64]
        urls = [web.url(f"/{n}.jpg") for n in range(3)]
        table = {"url": urls, "caption": ["a", "b", "c"], "digest": hashes}
        summary = download(urls_workspace(tmp_path / "ws", table, hash_column="digest"), QUIET)
    assert summary["images"] == 2 and summary["rejected"] == {"wrong_hash": 1}


def test_an_outage_is_waited_for_and_then_ends_the_stage_with_everything_kept(tmp_path: Path):
    answers = {f"/{n}.jpg": picture_answer(picture(n)) for n in range(60)}
    with serving(answers) as web:
        port, urls = web.server_port, [web.url(path) for path in answers]
        table = {"url": urls, "caption": [f"caption {n}" for n in range(60)]}
        ws = urls_workspace(tmp_path / "ws", table, rows_per_shard=20, retries=0, patience_s=1.0)
        assert download(ws, QUIET, limit=20)["images"] == 20
    with pytest.raises(EclipseError, match="nothing has answered for 1 s"):
        download(ws, QUIET, sample="100%")
    assert len(samples(ws)) == 20 and ws.stage("download").begun is not None
    with serving(answers, port) as web:
        summary = download(ws, QUIET)
        assert summary["images"] == 60 and summary["rejected"] == {}, "an outage is no result"
        assert all(web.hits[f"/{n}.jpg"] == 0 for n in range(19)), "finished shards are kept"
