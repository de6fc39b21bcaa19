"""Token states made while training equal those a cache would hold, and training from them equals training from it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from eclipse.pipeline.cache.packed_text import PackedText
from eclipse.pipeline.cache.store import PartMeta, PartWriter, Store, part_name
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.embed.clip import Encoder
from eclipse.trainer.data import live_text
from eclipse.trainer.stage import train
from random_cache import random_rows
from tiny_clip import make_clip

ROWS, DIM = 90, 32
SENTENCE = "a red circle left of two small blue squares on striped green ground with many other things around"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip"))


def embed(directory: Path, encoder: Encoder, *, states: bool) -> Store:
    """Captions of 1 to 17 words through the encoder; pictures are random."""
    meta = PartMeta("tiny", encoder.fingerprint, "none", "fp32", DIM, DIM, "c", text_states=states)
    columns = random_rows(ROWS, np.random.default_rng(0), meta).columns
    columns["caption"] = [" ".join(WORDS[: 1 + (7 * i) % 17]) + f" {i}" for i in range(ROWS)]
    features = encoder.encode_text(*encoder.tokenize(columns["caption"]))
    columns |= {"text_embedding": features.embedding.numpy(), "n_tokens": features.n_tokens.numpy()}
    if states:
        columns["text_states"] = features.states.numpy()
    with PartWriter(directory / part_name(0), meta) as writer:
        writer.write(columns)
    return Store.open(directory)


def test_equals_what_a_cache_holds(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_text, "CHUNK", 16)
    encoder = Encoder.load(clip)
    stored, bare = (embed(tmp_path / name, encoder, states=name == "stored") for name in ("stored", "bare"))
    rows = np.random.default_rng(1).integers(0, ROWS, 50)
    states, offsets = stored.token_states(rows)
    made = live_text.LiveText(bare, encoder)(rows)
    assert made.offsets.tolist() == offsets.tolist()
    torch.testing.assert_close(made.states, torch.from_numpy(states), rtol=2e-3, atol=2e-3)
    weight = torch.ones(DIM, 1, requires_grad=True)
    (made.states.float() @ weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None


def test_another_encoder_is_refused(clip: str, tmp_path: Path) -> None:
    store = embed(tmp_path / "cache", Encoder.load(clip), states=False)
    other = Encoder.load(make_clip(tmp_path / "other", seed=1))
    with pytest.raises(EclipseError, match="not the one") as error:
        live_text.LiveText(store, other)
    assert part_name(0) in str(error.value)


def test_training_from_live_states_equals_training_from_stored_ones(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    real = live_text.LiveText.__call__

    def noted(self: live_text.LiveText, rows: np.ndarray) -> PackedText:
        pictures = any(True for _ in self._encoder._visual.parameters())
        seen.append((threading.current_thread().name, pictures))
        return real(self, rows)

    monkeypatch.setattr(live_text.LiveText, "__call__", noted)
    summaries = {}
    for name in ("stored", "bare"):
        card = Card.model_validate(
            {
                "name": name,
                "source": {"kind": "urls", "urls": "list.parquet"},
                "encoder": {"model": clip},
                "prior": {"preset": "tiny"},
                "train": {"steps": 4, "batch_size": 16, "validation": 0.2, "validate_every": 4, "precision": "fp32"},
                "decoder": {"kind": "kandinsky22", "path": "nowhere"},
            }
        )
        ws = Workspace.create(tmp_path / name, card)
        embed(ws.embeddings, Encoder.load(clip), states=name == "stored")
        pq.write_table(pa.table({"part": [0] * ROWS, "row": range(ROWS), "keep": [True] * ROWS}), ws.selection)
        summaries[name] = train(ws, Progress(quiet=True))
    # In the feed's threads, never in the one that trains; and without an image tower.
    assert seen and all(name.startswith("batches") and not pictures for name, pictures in seen)
    stored, bare = (summaries[name]["validation"] for name in ("stored", "bare"))
    assert stored.keys() == bare.keys()
    for key in ("cosine_image", "similarity_own", "norm_ratio"):
        assert bare[key] == pytest.approx(stored[key], abs=1e-3)
