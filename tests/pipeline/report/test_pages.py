"""What the stages' pages say: reasons in words, hosts that failed, pictures like each other, samples over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.images.rejects import Reject, write_rejected
from eclipse.pipeline.report.clusters import clusters
from eclipse.pipeline.report.download import download_page, failed_hosts
from eclipse.pipeline.report.embed import embed_page
from eclipse.pipeline.report.train import train_page
from eclipse.pipeline.report.words import in_words
from synthetic_cache import DIM, Maker, Row, write

KINDS = 4


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pictures of four kinds, 40 of each in turn, and every tenth of them once more under another caption."""
    maker = Maker(3)
    kinds = 6 * np.random.default_rng(0).standard_normal((KINDS, DIM))
    table = [maker.row(number) for number in range(160)]
    for number, row in enumerate(table):
        row.image = row.image + kinds[number % KINDS]
    again = [Row(row.image, row.text, row.grey, row.url, "told otherwise") for row in table[::10]]
    return write(tmp_path_factory.mktemp("pages") / "ws", [*table, *again])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("http_404", "HTTP 404, Not Found"),
        ("http_799", "HTTP 799"),
        ("timed_out", "no answer in time"),
        ("of_a_later_version", "of a later version"),
    ],
)
def test_reasons_in_words(code: str, words: str) -> None:
    assert in_words(code) == words


def test_failed_fetches_by_host(ws: Workspace) -> None:
    dead = [Reject("00000", str(i), "timed_out", f"https://dead.example/{i}.jpg") for i in range(3)]
    other = Reject("00000", "3", "http_404", "http://dead.example/x?y")
    rows = [*dead, other, Reject("", "row 7", "not_http", "javascript:alert(1)"), Reject("", "row 8", "empty_url")]
    rows += [Reject("00001", str(i), "http_403", f"http://b.example:8080/<{i}>") for i in range(2)]
    rejected = write_rejected(ws, "download", rows)
    hosts = failed_hosts(ws)
    assert [(one["host"], one["count"]) for one in hosts] == [("dead.example", 4), ("b.example:8080", 2)]
    assert hosts[0]["reasons"] == "no answer in time (3), HTTP 404, Not Found (1)"
    page = download_page(ws, rejected).read_text()
    assert "https://dead.example/0.jpg" in page and "&lt;0&gt;" in page and 'href="http' not in page
    assert "no http(s) URL" in page and "not_http" in page
    write_rejected(ws, "download", [])
    assert failed_hosts(ws) == []


def test_clusters_are_the_kinds_with_the_middle_first(ws: Workspace) -> None:
    store = Store.open(ws.embeddings)
    found = clusters(store, np.arange(160), KINDS)
    assert sorted(tuple(np.unique(rows % KINDS)) for rows in found) == [(kind,) for kind in range(KINDS)]
    assert sum(map(len, found)) == 160
    assert clusters(store, np.arange(5), KINDS) == []


def test_the_embed_page_shows_each_picture_of_a_cluster_once(ws: Workspace) -> None:
    page = embed_page(ws, Store.open(ws.embeddings), {"timed_out": 3}).read_text()
    assert "no answer in time" in page
    section = page.split("Pictures like each other</h2>")[1].split("<h2>")[0]
    strips = section.split('class="strip"')[1:]
    assert len(strips) >= KINDS
    for strip in strips:
        sources = [part.split('"')[0] for part in strip.split('src="')[1:]]
        assert sources and len(sources) == len(set(sources))


def test_samples_over_time_stand_beside_the_true_picture(ws: Workspace) -> None:
    samples = [{"step": s, "rows": [1, 2], "found": [f, 2], "cosine": [0.5, 0.75]} for s, f in ((10, 9), (20, 1))]
    summary = {
        "steps": 20,
        "train_rows": 9,
        "validation_rows": 3,
        "samples_per_second": 1.0,
        "data_wait_share": 0.0,
        "seconds": 1.0,
        "device": "1 × CPU",
        "parameters": 1,
    }
    page = train_page(ws, [], samples, summary).read_text()
    section = page.split("Samples over time</h2>")[1].split("<h2>")[0]
    assert section.count("<figure") == 6 and "step 10" in section and "step 20" in section and "0.750" in section
    assert section.count("tag good") == 2 + 3, "the true pictures, and where the prior found them"
    gone = [{**samples[0], "found": [10**6, 2]}]
    assert "Samples over time" not in train_page(ws, [], gone, summary).read_text()
    assert "Samples over time" not in train_page(ws, [], [], summary).read_text()


def test_a_page_does_without_pictures_that_are_gone(tmp_path: Path) -> None:
    maker = Maker(4)
    ws = write(tmp_path / "ws", [maker.row(number) for number in range(6)])
    for tar in ws.images.glob("*.tar"):
        tar.unlink()
    assert "<figure" in embed_page(ws, Store.open(ws.embeddings), {}).read_text()
