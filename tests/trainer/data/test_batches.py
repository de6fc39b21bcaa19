"""The batches: every selected row once an epoch, whatever the ranks and wherever resumed, with that row's features."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from eclipse.pipeline.cache.store import Store, part_name
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.trainer.data.batches import Batch, Batches, read_batch
from eclipse.trainer.model.transformer import PackedText
from random_cache import META, Rows, states_of, write_cache

SIZES = {0: 120, 1: 80, 2: 100}
SELECTED = np.flatnonzero(np.random.default_rng(0).random(300) < 0.7)
STEP = 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Rows]:
    directory = tmp_path_factory.mktemp("cache")
    truth = write_cache(directory, SIZES)
    return Store.open(directory), truth


def rows_of(store: Store, steps: int, batch_size: int = STEP, **options: object) -> list[np.ndarray]:
    with Batches(store, SELECTED, batch_size, seed=7, **options) as batches:
        return [batch.rows for batch in itertools.islice(batches, steps)]


def assert_holds(batch: Batch, truth: Rows) -> None:
    expected = states_of(truth, batch.rows)
    assert batch.image_embedding.dtype == torch.float32
    assert (batch.image_embedding.numpy() == truth["image_embedding"][batch.rows]).all()
    assert (batch.text_embedding.numpy() == truth["text_embedding"][batch.rows]).all()
    assert batch.text.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert (batch.text.states.float().numpy() == np.concatenate(expected)).all()


@pytest.mark.parametrize("resident", [False, True])
def test_batches_in_bins_hold_the_same_as_stored_and_come_in_few_shapes(
    cache: tuple[Store, Rows], resident: bool
) -> None:
    store, truth = cache
    shapes = set()
    with Batches(store, SELECTED, STEP, seed=7, resident=resident, bins_for=(3, 77, 1)) as batches:
        for batch in itertools.islice(batches, 12):
            states, bins = batch.text.states, batch.text.bins
            assert states.dtype == batch.image_embedding.dtype == torch.float16
            assert (states.numpy() == np.concatenate(states_of(truth, batch.rows))).all()
            lengths = truth["n_tokens"][batch.rows]
            # What a caption owns in its bin: its tokens in order, then its special ones.
            order = torch.argsort(torch.where(bins.caption < 0, STEP, bins.caption), stable=True)[
                : lengths.sum() + 3 * STEP
            ]
            owned = bins.source[order].split((lengths + 3).tolist())
            first = np.cumsum(lengths) - lengths
            for k, rows in enumerate(owned):
                text = list(range(first[k], first[k] + lengths[k]))
                assert rows.tolist() == text + [bins.texts + 3 * k + j for j in range(3)]
            shapes.add((bins.texts, len(bins.source)))
    assert len(shapes) == 1


@pytest.mark.parametrize("options", [{}, {"resident": True}, {"block_rows": 16}, {"threads": 1, "prefetch": 1}])
def test_batches_hold_the_features_of_their_rows(cache: tuple[Store, Rows], options: dict) -> None:
    store, truth = cache
    with Batches(store, SELECTED, STEP, seed=7, **options) as batches:
        held = list(itertools.islice(batches, 30))  # all kept: a buffer that is reused must not show
    for batch in held:
        assert_holds(batch, truth)
    seen = np.concatenate([batch.rows for batch in held])
    assert set(seen.tolist()) == set(SELECTED.tolist())


def test_memory_is_used_again_but_not_while_any_view_of_it_is_held(cache: tuple[Store, Rows]) -> None:
    store, truth = cache
    addresses, held = [], []
    with Batches(store, SELECTED, STEP, seed=7) as batches:
        for batch in itertools.islice(batches, 40):
            addresses.append(batch.text.states.data_ptr())
            if len(held) < 4:
                held.append((batch.rows, batch.text.states[2:5], batch.image_embedding.numpy()[-1]))
    assert len(set(addresses)) < 20
    for rows, some_states, last_image in held:
        assert (some_states.numpy() == np.concatenate(states_of(truth, rows))[2:5]).all()
        assert (last_image == truth["image_embedding"][rows[-1]]).all()


@pytest.mark.parametrize("block_rows", [1, 16])
def test_epochs_are_complete_and_batches_full(cache: tuple[Store, Rows], block_rows: int) -> None:
    # Two epochs are 2·n samples; n is no multiple of the batch, so one batch belongs to both.
    n = len(SELECTED)
    assert n % STEP
    stream = rows_of(cache[0], -(-2 * n // STEP), block_rows=block_rows)
    assert all(len(rows) == STEP for rows in stream)
    counts = np.bincount(np.concatenate(stream), minlength=300)
    assert (counts[SELECTED] >= 2).all() and counts.sum() == counts[SELECTED].sum()
    whole = np.concatenate(stream[: n // STEP])
    assert len(set(whole.tolist())) == len(whole)


def test_the_seed_decides_the_order(cache: tuple[Store, Rows]) -> None:
    first, again = rows_of(cache[0], 5), rows_of(cache[0], 5, threads=3, prefetch=6)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    with Batches(cache[0], SELECTED, STEP, seed=8) as batches:
        assert (next(batches).rows != first[0]).any()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_each_global_batch(cache: tuple[Store, Rows], world_size: int) -> None:
    alone = rows_of(cache[0], 20)
    ranks = [rows_of(cache[0], 20, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, rows in enumerate(alone):
        assert (np.concatenate([rank[step] for rank in ranks]) == rows).all()


def test_resumes_with_the_next_sample_under_any_number_of_ranks_and_batch_size(cache: tuple[Store, Rows]) -> None:
    store, n = cache[0], len(SELECTED)
    with Batches(store, SELECTED, STEP, seed=7, world_size=2) as batches:
        list(itertools.islice(batches, 5))
        position = batches.position
    assert position == 5 * STEP
    whole = rows_of(store, 12)
    for world_size in (1, 2, 4):
        ranks = [rows_of(store, 7, rank=r, world_size=world_size, position=position) for r in range(world_size)]
        for step in range(7):
            assert (np.concatenate([rank[step] for rank in ranks]) == whole[5 + step]).all()
    # With another batch size the epoch is still completed exactly.
    done = np.concatenate(whole[:5]).tolist()
    rest = np.concatenate(rows_of(store, n - position, batch_size=1, position=position)).tolist()
    assert sorted(done + rest) == SELECTED.tolist()


def test_states_are_made_on_the_fly_where_none_are_stored(tmp_path: Path) -> None:
    truth = write_cache(tmp_path, {0: 60}, meta=dataclasses.replace(META, text_states=False))
    store = Store.open(tmp_path)
    with pytest.raises(EclipseError, match="no token states"):
        Batches(store, np.arange(60), 8, seed=0)

    def states_from(rows: np.ndarray) -> PackedText:
        return PackedText(torch.from_numpy(rows).repeat_interleave(2)[:, None].float(), 2 * torch.arange(len(rows) + 1))

    with Batches(store, np.arange(60), 8, seed=0, states_from=states_from) as batches:
        batch = next(batches)
    assert (batch.text.states[::2, 0].numpy() == batch.rows).all() and len(batch.text) == 8
    assert (batch.image_embedding.numpy() == truth["image_embedding"][batch.rows]).all()
    with pytest.raises(UsageError, match="cannot be held"):
        Batches(store, np.arange(60), 8, seed=0, states_from=states_from, resident=True)


def test_states_come_in_the_dtype_asked_for(cache: tuple[Store, Rows]) -> None:
    for options in ({}, {"resident": True}):
        with Batches(cache[0], SELECTED, STEP, seed=7, dtype=torch.bfloat16, **options) as batches:
            assert next(batches).text.states.dtype == torch.bfloat16


def test_a_part_damaged_after_opening_is_named_from_the_thread(tmp_path: Path) -> None:
    write_cache(tmp_path, SIZES)
    store = Store.open(tmp_path)
    path = tmp_path / part_name(1)
    chunk = store.parts[1].groups[0].chunks["image_embedding"]
    data = bytearray(path.read_bytes())
    data[chunk.offset : chunk.offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    with Batches(store, np.arange(300), 64, seed=0) as batches, pytest.raises(EclipseError, match="image_") as error:
        list(itertools.islice(batches, 10))
    assert part_name(1) in str(error.value)


def test_any_failure_in_a_thread_is_one_message(cache: tuple[Store, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: np.ndarray, out: np.ndarray) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(cache[0], "text_embeddings", broken, raising=False)
    with Batches(cache[0], SELECTED, STEP, seed=0) as batches, pytest.raises(EclipseError, match="no more") as error:
        next(batches)
    assert "rows " in str(error.value)


def test_reads_ahead_a_bounded_number_of_batches(cache: tuple[Store, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Semaphore(0)
    real = Store.text_embeddings

    def counted(self: Store, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        asked.release()
        return real(self, rows, out)

    monkeypatch.setattr(Store, "text_embeddings", counted)
    with Batches(cache[0], SELECTED, STEP, seed=0, prefetch=3) as batches:
        next(batches)
        for _ in range(4):  # the one handed out, and three ahead of it
            assert asked.acquire(timeout=10)
        assert not asked.acquire(timeout=0.2)
        assert batches.wait_seconds > 0
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_impossible_settings_are_refused(cache: tuple[Store, Rows]) -> None:
    with pytest.raises(UsageError, match="evenly"):
        Batches(cache[0], SELECTED, 10, seed=0, world_size=3)
    with pytest.raises(EclipseError, match="no rows"):
        Batches(cache[0], SELECTED[:0], 10, seed=0)
    with pytest.raises(IndexError):
        Batches(cache[0], np.array([300]), 10, seed=0)


def test_named_rows_come_in_their_order(cache: tuple[Store, Rows]) -> None:
    rows = np.array([250, 3, 3, 170])
    batch = read_batch(cache[0], rows)
    assert batch.rows.tolist() == rows.tolist()
    assert_holds(batch, cache[1])


def test_feeding_imports_nothing_beyond_torch_numpy_and_arrow() -> None:
    others = {"polars", "open_clip", "PIL", "yaml", "pydantic", "rich", "diffusers"}
    script = f"import sys, eclipse.trainer.data.batches; print({others} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
