"""Aesthetic heads: by name, path, URL and hash; the score in the parts is the head's."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from eclipse.pipeline.cache.store import Store
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.embed.heads import LAION, find_head, load_head
from eclipse.pipeline.embed.stage import embed
from eclipse.pipeline.filter.stage import filter_cache
from shards import good_samples, make_workspace, write_shard
from tiny_clip import make_clip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A linear head in LAION's format for embeddings of 32 dimensions."""
    torch.manual_seed(0)
    path = tmp_path / "served" / "head.pth"
    path.parent.mkdir()
    torch.save(torch.nn.Linear(32, 1).state_dict(), path)
    return path


@pytest.fixture
def served(head: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(head.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/head.pth"
    server.shutdown()


def test_scores_are_the_heads_of_the_unit_embedding(tmp_path: Path, head: Path) -> None:
    ws = make_workspace(tmp_path / "ws", make_clip(tmp_path / "clip"), aesthetic=str(head), safety=str(head))
    write_shard(ws.images / "00000.tar", good_samples(0, 6))
    embed(ws, Progress(quiet=True), gpus=0)
    store, linear = Store.open(ws.embeddings), torch.nn.Linear(32, 1)
    linear.load_state_dict(torch.load(head, weights_only=True))
    images = torch.from_numpy(store.image_embeddings(np.arange(6)).astype(np.float32))
    expected = linear(torch.nn.functional.normalize(images, dim=-1))[:, 0].detach()
    for name in ("aesthetic_score", "safety_score"):
        np.testing.assert_allclose(store.column(name).to_numpy(), expected.numpy(), atol=2e-3)


def test_the_filter_rejects_by_the_scores_of_heads(tmp_path: Path, head: Path) -> None:
    """Aesthetic scores have a floor, safety scores a ceiling; rows beyond both are counted once."""
    ws = make_workspace(tmp_path / "ws", make_clip(tmp_path / "clip"), aesthetic=str(head), safety=str(head))
    write_shard(ws.images / "00000.tar", good_samples(0, 9))
    embed(ws, Progress(quiet=True), gpus=0)
    scores = Store.open(ws.embeddings).column("safety_score").to_numpy()
    low, high = np.sort(scores)[[2, 6]].tolist()
    rules = {"min_aesthetic_score": low, "max_safety_score": high, "wrong_caption": None, "near_copy_cosine": None}
    card = ws.card.model_copy(update={"filter": ws.card.filter.model_copy(update=rules)})
    card.dump(ws.card_path)
    filter_cache(ws := Workspace.open(ws.root), Progress(quiet=True))
    reasons = ["low_aesthetic_score" if s < low else "high_safety_score" if s > high else None for s in scores]
    assert len(set(reasons)) == 3 and pq.read_table(ws.selection)["reason"].to_pylist() == reasons
    page = (ws.reports / "filter.html").read_text()
    assert "high safety score" in page


def test_laions_heads_belong_to_openais_weights() -> None:
    """Their width fits other weights too, for which their numbers mean nothing."""
    assert find_head("laion", "ViT-L-14", "openai") == LAION["ViT-L-14"]
    assert find_head("laion", "ViT-L-14-quickgelu", "openai") == LAION["ViT-L-14"]
    assert find_head("laion", "ViT-B/32", "openai") == LAION["ViT-B-32"]
    assert find_head("laion", "ViT-L-14", "laion2b_s32b_b82k") is None
    assert find_head("laion", "ViT-bigG-14", "laion2b_s39b_b160k") is None


def test_an_encoder_without_a_head_gets_no_scores_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    ws = make_workspace(tmp_path / "ws", make_clip(tmp_path / "clip"), aesthetic="laion")
    write_shard(ws.images / "00000.tar", good_samples(0, 2))
    embed(ws, Listening(quiet=True), gpus=0)
    assert any("no aesthetic head" in message for message in said)
    assert not Store.open(ws.embeddings).meta.aesthetic_score


def test_fetched_once_and_checked(tmp_path: Path, head: Path, served: str, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(head.read_bytes()).hexdigest()
    first = load_head("aesthetic", f"{served}#sha256={digest}", 32)
    head.unlink()
    again = load_head("aesthetic", f"{served}#sha256={digest}", 32)  # from the cache: the server has it no more
    assert torch.equal(first.weight, again.weight)
    with pytest.raises(EclipseError, match="cannot fetch"):
        load_head("aesthetic", f"{served}#sha256={'0' * 64}", 32)
    head.write_bytes(b"something else")
    with pytest.raises(EclipseError, match="not the file that its hash says"):
        load_head("aesthetic", f"{served}#sha256={'0' * 64}", 32)
    with pytest.raises(UsageError, match="needs its hash"):
        load_head("aesthetic", served, 32)


def test_wrong_files_are_explained(tmp_path: Path, head: Path) -> None:
    with pytest.raises(UsageError, match="reads 32 dimensions, the encoder makes 768"):
        load_head("aesthetic", str(head), 768)
    with pytest.raises(UsageError, match="no such aesthetic head"):
        load_head("aesthetic", str(tmp_path / "none.pth"), 32)
    for shape in ((), (32,), (2, 32)):
        torch.save({"weight": torch.zeros(shape), "bias": torch.zeros(1)}, head)
        with pytest.raises(EclipseError, match="not a linear aesthetic head"):
            load_head("aesthetic", str(head), 32)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(EclipseError, match="not a regular file"):
        load_head("aesthetic", str(tmp_path / "pipe.pth"), 32)
    head.write_bytes(b"junk")
    with pytest.raises(EclipseError, match="not a linear aesthetic head"):
        load_head("aesthetic", str(head), 32)
