"""The shapes world's dirty list: what is planted, and what the server answers for it over real HTTP."""

from __future__ import annotations

import http.client
import io
import queue
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from eclipse.lab.drawing import draw
from eclipse.lab.server import Pictures, list_path, near_copy, serve
from eclipse.lab.shapes import World
from eclipse.lab.truth import FAULTS, caption_of, evaluation_texts, planted, row_of
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.source import expected_rows
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.download.http import Client, ClientSpec, FetchError
from eclipse.pipeline.images.decode import thumbnail
from PIL import Image

ROWS = 400
WORLD = World(0, 0.15)
PLAN = planted(0, ROWS)


def workspace(root: Path, rows: int = ROWS, captions: int = 1) -> Workspace:
    card = Card.load("shapes")
    source = card.source.model_copy(update={"rows": rows, "captions": captions})
    return Workspace.create(root, card.model_copy(update={"source": source}))


def get(url: str, timeout_s: float = 20.0) -> bytes:
    client = Client(ClientSpec(timeout_s, concurrency=1, per_host=1, patience_s=1.0, allow_hosts=("127.0.0.1",)))
    answers: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
    client.start(url, "", answers.put)
    answer = answers.get(timeout=60)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def test_the_plan_is_a_function_of_the_seed_with_the_stated_shares():
    assert planted(0, ROWS) == PLAN != planted(1, ROWS)
    assert Counter(entry.kind for entry in PLAN) == {
        "clean": 332, "exact_copy": 20, "near_copy": 20, "wrong_caption": 16, "dead": 12
    }  # fmt: skip
    copies = [entry for entry in PLAN if entry.original is not None]
    originals = [PLAN[entry.original] for entry in copies if entry.original is not None]
    assert all(original.kind == "clean" for original in originals)
    assert len({original.row for original in originals}) == len(copies) == 40
    assert all(entry.scene == entry.original for entry in copies)
    assert {entry.fault for entry in PLAN if entry.kind == "dead"} == set(FAULTS)
    dirty = [entry.row for entry in PLAN if entry.kind != "clean"]
    assert sum(row < ROWS // 2 for row in dirty) in range(20, 49), "spread over the list"
    assert len(planted(0, 1)) == 1


def test_wrong_captions_do_not_match_and_copies_keep_theirs():
    for entry in PLAN:
        caption = caption_of(WORLD, entry, ROWS)
        named = [thing for thing in WORLD.scene(entry.scene).things if f"{thing.color} {thing.shape}" in caption]
        if entry.kind == "wrong_caption":
            assert not named, (caption, WORLD.scene(entry.scene))
        else:
            assert named, caption
    copies = [entry for entry in PLAN if entry.original is not None]
    same = sum(caption_of(WORLD, e, ROWS) == caption_of(WORLD, PLAN[e.scene], ROWS) for e in copies)
    assert 8 < same < 36, "some have the original's caption, some another"


def test_near_copies_look_alike_without_being_the_same():
    pictures = Pictures(WORLD, PLAN)
    thumbs = []
    for entry in PLAN:
        if entry.kind != "near_copy":
            continue
        copy = Image.open(io.BytesIO(pictures.encoded(entry.row)))
        assert copy.format == "JPEG" and copy.size != (64, 64) and min(copy.size) >= 62
        original = Image.fromarray(draw([WORLD.scene(entry.scene)])[0])
        thumbs.append(np.corrcoef(thumbnail(copy), thumbnail(original))[0, 1])
    assert len(thumbs) == 20 and np.quantile(thumbs, 0.1) > 0.97
    picture = draw([WORLD.scene(0)])[0]
    assert near_copy(picture, np.random.default_rng(1)) == near_copy(picture, np.random.default_rng(1))


def test_every_kind_of_row_is_served_as_planned(tmp_path: Path):
    ws = workspace(tmp_path / "ws")
    with serve(ws) as urls:
        table = pq.read_table(urls.paths[0]).to_pydict()
        assert [row_of(url) for url in table["url"]] == list(range(ROWS))
        assert table["caption"] == [caption_of(WORLD, entry, ROWS) for entry in PLAN]
        pictures = Pictures(WORLD, PLAN)
        clean = next(entry for entry in PLAN if entry.kind == "clean")
        shown = np.asarray(Image.open(io.BytesIO(get(table["url"][clean.row]))))
        assert (shown == draw([WORLD.scene(clean.row)])[0]).all()
        exact = next(entry for entry in PLAN if entry.kind == "exact_copy")
        assert exact.original is not None
        assert get(table["url"][exact.row]) == get(table["url"][exact.original])
        near = next(entry for entry in PLAN if entry.kind == "near_copy")
        assert get(table["url"][near.row]) == pictures.encoded(near.row)
        expected = {
            "not_found": "http_404",
            "reset": "connection_failed",
            "truncated": "cut_short",
            "stall": "timed_out",
        }
        for fault, reason in expected.items():
            dead = next(entry for entry in PLAN if entry.fault == fault)
            with pytest.raises(FetchError) as caught:
                get(table["url"][dead.row], timeout_s=1.0 if fault == "stall" else 20.0)
            assert caught.value.reason == reason
        with pytest.raises(FetchError, match="http_404"):
            get(table["url"][0].rpartition("/")[0] + "/../etc/passwd")
    with pytest.raises(ConnectionRefusedError):  # it stops with the block
        socket.create_connection(("127.0.0.1", int(table["url"][0].split(":")[2].partition("/")[0])))


def test_a_connection_is_kept_for_the_next_picture_until_the_client_has_enough(tmp_path: Path):
    clean = [entry.path for entry in PLAN if entry.kind == "clean"][:3]
    with serve(workspace(tmp_path / "ws")) as urls:
        port = int(pq.read_table(urls.paths[0])["url"][0].as_py().split(":")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        held = None
        for path in clean[:2]:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200 and Image.open(io.BytesIO(answer.read())).size == (64, 64)
            held = held or connection.sock
            assert held is not None and connection.sock is held
        connection.request("GET", clean[2], headers={"Connection": "close"})
        assert connection.getresponse().read() and connection.sock is None


def test_a_picture_has_several_captions_all_true_and_none_that_is_asked_of_a_prior(tmp_path: Path):
    ws = workspace(tmp_path / "ws", captions=5)
    with serve(ws) as urls:
        table = pq.read_table(urls.paths[0]).to_pydict()
    told: dict[int, list[str]] = {}
    for url, caption in zip(table["url"], table["caption"], strict=True):
        told.setdefault(row_of(url), []).append(caption)
    assert list(told) == list(range(ROWS)), "pictures in order, the captions of one together"
    counts = Counter(len(some) for some in told.values())
    assert max(counts) == 5 and len(table["url"]) == pytest.approx(expected_rows(ws.card.source), rel=0.05)
    asked = evaluation_texts(WORLD)
    for entry in PLAN:
        captions = told[entry.row]
        assert len(set(captions)) == len(captions)
        assert not asked & set(captions) or captions == [caption_of(WORLD, entry, ROWS)]
        named = [t for t in WORLD.scene(entry.scene).things if any(f"{t.color} {t.shape}" in c for c in captions)]
        if entry.kind == "wrong_caption":
            assert not named, "every caption of such a picture is wrong"
        else:
            everything = [f"{t.color} {t.shape}" for t in WORLD.scene(entry.scene).things]
            assert all(any(name in caption for name in everything) for caption in captions)
    assert {p.text for p in WORLD.prompts("complex", 100, "unseen")} < asked


def test_the_port_stays_and_a_taken_one_is_named(tmp_path: Path):
    ws = workspace(tmp_path / "ws", rows=20)
    with serve(ws) as urls:
        before = urls.paths[0].read_bytes()
    with serve(ws) as urls:
        assert urls.paths[0].read_bytes() == before
    url = pq.read_table(list_path(ws))["url"][0].as_py()
    port = int(url.split(":")[2].partition("/")[0])
    taken = pytest.raises(EclipseError, match=f"port {port} is taken")
    with socket.create_server(("127.0.0.1", port)), taken as caught, serve(ws):
        pass
    assert caught.value.hint is not None and "--overwrite" in caught.value.hint
