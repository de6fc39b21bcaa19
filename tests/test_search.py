"""`eclipse search`: a real encoder's features, ranked by a text; each picture once, with the filter's verdict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse import search as module
from eclipse.cli import app
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.cache.vectors import unit
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.embed.clip import Encoder
from eclipse.pipeline.embed.stage import embed
from eclipse.search import search
from shards import make_workspace, picture, write_shard
from tiny_clip import make_clip
from typer.testing import CliRunner

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("search")
    ws = make_workspace(root / "ws", make_clip(root / "clip"))
    for shard in range(2):
        samples = [(f"{shard:05d}{i:04d}", picture(100 * shard + i), [f"red {shard} {i}", "blue"]) for i in range(9)]
        write_shard(ws.images / f"{shard:05d}.tar", [*samples, (f"{shard:05d}9999", picture(7), "the same picture")])
    embed(ws, QUIET, gpus=0)
    return ws


def test_the_nearest_pictures_in_order_each_once(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    found = search(ws, "a red cube", QUIET, top=5)["found"]
    store, encoder = Store.open(ws.embeddings), Encoder.load(ws.card.encoder.model)
    text = encoder.encode_text(*encoder.tokenize(["a red cube"])).embedding.numpy()
    cosine = (unit(store.image_embeddings(np.arange(len(store)))) @ unit(text)[0]).round(4)
    digests = store.column("image_sha256").to_pylist()
    each = {digest: float(value) for digest, value in zip(digests, cosine, strict=True)}
    assert [one["cosine"] for one in found] == pytest.approx(sorted(each.values(), reverse=True)[:5], abs=1e-4)
    assert len(each) == 18, "a picture has several captions, and one lies in both shards"
    assert len(search(ws, "a red cube", QUIET, top=1000)["found"]) == len(each)


def test_the_command_says_the_filters_verdict_and_shows_the_pictures(ws: Workspace) -> None:
    store = Store.open(ws.embeddings)
    part, row = store.part_of(np.arange(len(store)))
    keep = np.arange(len(store)) % 2 == 0
    reason = pa.array(np.where(keep, None, "near_copy"), pa.string()).dictionary_encode()  # type: ignore[arg-type]
    pq.write_table(pa.table({"part": part, "row": row, "keep": keep, "reason": reason}), ws.selection)
    result = CliRunner().invoke(app, ["search", "a red cube", "-w", str(ws.root), "--json", "--top", "30"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    keys = store.column("key").to_pylist()
    for one in answer["found"]:
        verdicts = {"kept" if keep[i] else "near_copy" for i, key in enumerate(keys) if key == one["key"]}
        assert one["verdict"] in verdicts
    assert {one["verdict"] for one in answer["found"]} == {"kept", "near_copy"}
    page = Path(answer["page"]).read_text()
    assert page.count("data:image/jpeg") == len(answer["found"]) and "near copy" in page
    assert 'href="search.html"' in (ws.reports / "index.html").read_text()
    ws.selection.unlink()


def test_what_cannot_be_searched_is_said(ws: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an empty text"):
        search(ws, "  ", QUIET)
    other = make_workspace(tmp_path / "ws", make_clip(tmp_path / "clip", seed=1))
    other.embeddings.symlink_to(ws.embeddings)
    with pytest.raises(EclipseError, match="not the one that these features come from"):
        search(other, "a red cube", QUIET)
