"""The memory-mapped reader: it answers as plain arrays do, other tools read the same files, damaged files are named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.cache.store import PartWriter, Store, part_name, read_selection, scan
from eclipse.pipeline.core.errors import EclipseError
from random_cache import DIM, META, WIDTH, Rows, random_rows, states_of, write_cache

SIZES = {0: 150, 2: 1, 3: 220, 7: 90}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    directory = tmp_path_factory.mktemp("cache")
    return directory, write_cache(directory, SIZES)


@pytest.fixture
def copy(cache: tuple[Path, Rows], tmp_path: Path) -> Path:
    shutil.copytree(cache[0], tmp_path / "copy")
    return tmp_path / "copy"


def some_rows() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    n = sum(SIZES.values())
    ascending = np.sort(rng.integers(0, n, 50))
    return [np.arange(n), rng.integers(0, n, 300), ascending, np.array([n - 1]), np.array([], int)]


def test_rows_come_back_bit_for_bit(cache: tuple[Path, Rows]) -> None:
    store, truth = Store.open(cache[0]), cache[1]
    assert len(store) == len(truth["uid"]) and (store.embedding_dim, store.text_width) == (DIM, WIDTH)
    assert max(pq.read_metadata(part.path).num_row_groups for part in store.parts) > 2
    for rows in some_rows():
        for name, read in (("image_embedding", store.image_embeddings), ("text_embedding", store.text_embeddings)):
            got = read(rows)
            assert got.dtype == np.float16 and got.tobytes() == truth[name][rows].tobytes()
        assert (store.thumbnails(rows) == truth["thumbnail"][rows]).all()
        assert (store.token_counts(rows) == truth["n_tokens"][rows]).all()
        states, offsets = store.token_states(rows)
        expected = states_of(truth, rows)
        assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        assert states.tobytes() == b"".join(part.tobytes() for part in expected)
    assert (store.token_counts() == truth["n_tokens"]).all()


def test_values_lie_at_odd_addresses_somewhere(cache: tuple[Path, Rows]) -> None:
    # If they never did, the test above would not show that odd addresses work.
    store = Store.open(cache[0])
    views = [store._view("image_embedding", s) for s in range(len(store._segments))]
    assert any(view.ctypes.data % 2 for view in views)


def test_gathers_into_a_given_buffer(cache: tuple[Path, Rows]) -> None:
    store, truth = Store.open(cache[0]), cache[1]
    rows = some_rows()[1]
    out = np.zeros((len(rows), DIM), np.float16)
    assert store.image_embeddings(rows, out=out) is out and (out == truth["image_embedding"][rows]).all()
    room = np.zeros((int(truth["n_tokens"][rows].sum()) + 5, WIDTH), np.float16)
    states, _ = store.token_states(rows, out=room)
    assert np.shares_memory(states, room) and (room[len(states) :] == 0).all()
    for wrong in (out[1:], out.T, out.astype(np.float32)):
        with pytest.raises(ValueError, match="contiguous"):
            store.image_embeddings(rows, out=wrong)


@pytest.mark.parametrize("rows", [[-1], [sum(SIZES.values())], [[0]]])
def test_rows_that_do_not_exist_are_refused(cache: tuple[Path, Rows], rows: list) -> None:
    store = Store.open(cache[0])
    for read in (store.image_embeddings, store.token_states, store.part_of):
        with pytest.raises(IndexError):
            read(np.array(rows))


def test_rows_and_parts_translate(cache: tuple[Path, Rows]) -> None:
    store = Store.open(cache[0])
    parts, rows = store.part_of(np.array([0, 149, 150, 151, 371, 460]))
    assert parts.tolist() == [0, 0, 2, 3, 7, 7] and rows.tolist() == [0, 149, 0, 0, 0, 89]
    assert store.rows_of(parts, rows).tolist() == [0, 149, 150, 151, 371, 460]
    for part, row in ((1, 0), (9, 0), (2, 1), (0, -1)):
        with pytest.raises(EclipseError, match=r"part-0000[19]|1 rows|150 rows"):
            store.rows_of(np.array([part]), np.array([row]))


def test_columns_are_arrow_values_in_the_order_asked(cache: tuple[Path, Rows]) -> None:
    store, truth = Store.open(cache[0]), cache[1]
    assert store.column("caption").to_pylist() == truth["caption"]
    for rows in some_rows():
        assert store.column("uid", rows).to_pylist() == [truth["uid"][i] for i in rows]
    with pytest.raises(EclipseError, match="no column shoe_size"):
        store.column("shoe_size")


def test_pyarrow_pandas_polars_and_duckdb_read_the_same_file(cache: tuple[Path, Rows]) -> None:
    directory, truth = cache
    path, n = directory / part_name(0), SIZES[0]
    vectors = [bytes(row) for row in truth["image_embedding"][:n].view(np.uint8)]
    states = [state.ravel().tolist() for state in states_of(truth, np.arange(n))]

    table = pq.ParquetFile(path, page_checksum_verification=True).read()
    assert not any(field.nullable for field in table.schema)
    frame, lazy = pd.read_parquet(path), pl.read_parquet(path)
    sql = duckdb.read_parquet(str(path)).arrow().read_all()
    for read in (lambda name: table[name].to_pylist(), lambda name: lazy[name].to_list(), lambda n: sql[n].to_pylist()):
        assert read("image_embedding") == vectors and read("text_states") == states
        assert read("caption") == truth["caption"][:n] and read("n_tokens") == truth["n_tokens"][:n].tolist()
    assert frame["image_embedding"].tolist() == vectors and frame["uid"].tolist() == truth["uid"][:n]
    assert [list(map(float, row)) for row in frame["text_states"]] == states


def test_scan_gives_polars_typed_arrays(cache: tuple[Path, Rows]) -> None:
    directory, truth = cache
    lazy = scan(directory)
    assert lazy.collect_schema()["image_embedding"] == pl.Array(pl.Float16, DIM)
    got = lazy.filter(pl.col("clip_score") > 0.5).select("text_embedding", "thumbnail").collect()
    kept = truth["clip_score"] > 0.5
    assert (got["text_embedding"].to_numpy() == truth["text_embedding"][kept]).all()
    assert (got["thumbnail"].to_numpy() == truth["thumbnail"][kept]).all()


def test_selection_is_a_list_of_rows(cache: tuple[Path, Rows], tmp_path: Path) -> None:
    store = Store.open(cache[0])
    part, row = store.part_of(np.arange(len(store)))
    keep = np.random.default_rng(3).random(len(store)) < 0.6
    shuffled = np.random.default_rng(4).permutation(len(store))
    table = pa.table({"part": pa.array(part, pa.int32()), "row": pa.array(row, pa.int32()), "keep": keep})
    path = tmp_path / "selection.parquet"
    pq.write_table(table.take(shuffled), path)
    assert read_selection(path, store).tolist() == np.flatnonzero(keep).tolist()

    pq.write_table(table.slice(0, len(store) - 1), path)
    with pytest.raises(EclipseError, match="judged 0 times") as error:
        read_selection(path, store)
    assert "part-00007.parquet row 89" in str(error.value)
    path.write_bytes(b"PAR1")
    with pytest.raises(EclipseError, match="no readable selection"):
        read_selection(path, store)


def selection_of(store: Store, **changes: Any) -> pa.Table:
    part, row = store.part_of(np.arange(len(store)))
    columns = {"part": part, "row": row, "uid": store.column("uid"), "keep": [True] * len(store)}
    return pa.table({**columns, **changes})


N = sum(SIZES.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": [None] + [True] * (N - 1)}, "column keep of the selection holds 1 nulls: every row needs true or"),
        ({"keep": ["yes"] * N}, "column keep of the selection holds string"),
        ({"keep": [1] * N}, "column keep of the selection holds int64"),
        ({"row": [None] * N}, "column row of the selection holds null"),
        ({"row": [None, *range(1, N)]}, "column row of the selection holds 1 nulls"),
        ({"row": ["0"] * N}, "column row of the selection holds string"),
        ({"part": ["0"] * N}, "column part of the selection holds string"),
        ({"part": [0.5] * N}, "column part of the selection holds double"),
        ({"row": [1000] * N}, "not of these embeddings: 150 rows, but row 1000 is asked for"),
        ({"row": [-1] * N}, "not of these embeddings: 150 rows, but row -1 is asked for"),
        ({"part": [1] * N}, "not of these embeddings: there is no part-00001.parquet"),
        ({"uid": ["0" * 64] * N}, "not of these embeddings: it names other pairs"),
        ({"uid": [None] * N}, "not of these embeddings: it names other pairs"),
        ({"uid": [[0]] * N}, "no readable selection"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(
    cache: tuple[Path, Rows], tmp_path: Path, changes: dict, message: str
) -> None:
    store, path = Store.open(cache[0]), tmp_path / "selection.parquet"
    pq.write_table(selection_of(store), path, row_group_size=100)
    assert read_selection(path, store).tolist() == list(range(N))
    pq.write_table(selection_of(store, **changes), path, row_group_size=100)
    with pytest.raises(EclipseError, match=message) as error:
        read_selection(path, store)
    assert str(path) in str(error.value) and "eclipse filter --overwrite" in str(error.value)


def test_one_foreign_pair_in_a_selection_is_named(cache: tuple[Path, Rows], tmp_path: Path) -> None:
    store, path = Store.open(cache[0]), tmp_path / "selection.parquet"
    uids = store.column("uid").to_pylist()
    uids[200] = "0" * 64
    pq.write_table(selection_of(store, uid=uids), path, row_group_size=100)
    with pytest.raises(EclipseError, match="names other pairs") as error:
        read_selection(path, store)
    assert "part-00003.parquet row 49" in str(error.value)


def test_what_is_no_file_is_refused_at_once(copy: Path, tmp_path: Path) -> None:
    store, pipe, folder = Store.open(copy), tmp_path / "pipe.parquet", tmp_path / "folder.parquet"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(EclipseError, match="not a regular file"):
            read_selection(path, store)
    part = copy / part_name(3)
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(EclipseError, match="not a regular file") as error:
        Store.open(copy)
    assert str(part) in str(error.value)
    with pytest.raises(EclipseError, match="not a regular file"):
        Store.open(part)


def test_a_damaged_column_is_named_when_it_is_read(copy: Path) -> None:
    store = Store.open(copy)
    chunk = store.parts[0].groups[0].chunks["caption"]
    flip(store.parts[0].path, chunk.offset + chunk.size - 1)
    with pytest.raises(EclipseError, match="column caption") as error:
        store.column("caption")
    assert "part-00000.parquet" in str(error.value)
    store.column("key")


@pytest.mark.parametrize("change", [{"embedding_dim": "24"}, {"text_width": 0}, {"encoder": []}, {"text_states": 1}])
def test_a_part_with_a_senseless_description_is_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / part_name(0)
    write_cache(tmp_path, {0: 10})
    record = json.loads(pq.read_metadata(path).metadata[b"eclipse"]) | change
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"eclipse": json.dumps(record)}), path)
    with pytest.raises(EclipseError, match="not an embedding part of eclipse"):
        Store.open(tmp_path)


def test_reading_ahead_changes_nothing(cache: tuple[Path, Rows]) -> None:
    store, truth = Store.open(cache[0]), cache[1]
    rows = np.unique(some_rows()[1])
    store.will_need(rows)
    store.will_need(rows[:0])
    assert (store.image_embeddings(rows) == truth["image_embedding"][rows]).all()


def test_a_cache_without_token_states_says_so(tmp_path: Path) -> None:
    meta = dataclasses.replace(META, text_states=False, aesthetic_score=True)
    truth = write_cache(tmp_path, {0: 40}, meta=meta)
    store = Store.open(tmp_path)
    assert not store.has_text_states and (store.token_counts() == truth["n_tokens"]).all()
    assert store.column("aesthetic_score").to_numpy().tolist() == truth["aesthetic_score"].tolist()
    store.will_need(np.arange(40))
    with pytest.raises(EclipseError, match="no token states"):
        store.token_states(np.array([0]))


def test_a_store_may_be_empty(tmp_path: Path) -> None:
    with PartWriter(tmp_path / part_name(0), META):
        pass
    store = Store.open(tmp_path)
    nothing = np.array([], int)
    assert len(store) == 0 and len(store.column("uid")) == 0 and len(store.token_counts()) == 0
    assert len(store.image_embeddings(nothing)) == 0 and len(store.token_states(nothing)[0]) == 0
    for nowhere in (tmp_path / "missing", tmp_path.parent):
        with pytest.raises(EclipseError, match="no embedding parts") as error:
            Store.open(nowhere)
        assert str(nowhere) in str(error.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_part_is_refused_by_name(copy: Path, keep: float) -> None:
    path = copy / part_name(3)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(EclipseError, match="not a whole Parquet file") as error:
        Store.open(copy)
    assert str(path) in str(error.value)


def test_swapped_and_foreign_parts_are_refused_by_name(copy: Path) -> None:
    (copy / part_name(0)).rename(copy / "kept")
    (copy / part_name(3)).rename(copy / part_name(0))
    with pytest.raises(EclipseError, match="written as part 3") as error:
        Store.open(copy)
    assert part_name(0) in str(error.value)
    pq.write_table(pa.table({"a": [1]}), copy / part_name(0))
    with pytest.raises(EclipseError, match="not an embedding part") as error:
        Store.open(copy)
    assert part_name(0) in str(error.value)


@pytest.mark.parametrize(
    "change", [{"encoder_fingerprint": "other"}, {"card": "other"}, {"text_width": 6}, {"precision": "bf16"}]
)
def test_a_part_of_another_kind_is_the_one_named(copy: Path, change: dict) -> None:
    path = copy / part_name(0)
    write_cache(copy, {0: 5}, meta=dataclasses.replace(META, **change))
    with pytest.raises(EclipseError, match=f"{next(iter(change))} .* instead of") as error:
        Store.open(copy)
    assert str(path) in str(error.value) and part_name(3) not in str(error.value)


def test_the_encoder_asked_for_is_required(cache: tuple[Path, Rows]) -> None:
    assert len(Store.open(cache[0], encoder=META.encoder_fingerprint))
    with pytest.raises(EclipseError, match="encoder_fingerprint"):
        Store.open(cache[0], encoder="another")


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    write_cache(tmp_path, {0: 5})
    path = tmp_path / part_name(0)
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(EclipseError, match="part format 2") as error:
        Store.open(tmp_path)
    assert "update eclipse" in str(error.value)


@pytest.mark.parametrize("name", [b"thumbnaiL", b"thumbnai\xff"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_damaged_name_in_the_footer_is_one_message(copy: Path, name: bytes, everywhere: bool) -> None:
    path = copy / part_name(0)
    content = path.read_bytes()
    at = content.rindex(b"thumbnail")
    path.write_bytes(
        content.replace(b"thumbnail", name) if everywhere else content[:at] + name + content[at + len(name) :]
    )
    with pytest.raises(EclipseError) as error:
        Store.open(copy)
    assert error.value.where == str(path) and "eclipse embed" in str(error.value.hint)


def test_verify_names_every_damaged_file_and_column(copy: Path) -> None:
    store = Store.open(copy)
    store.verify()
    for number, column in ((0, "image_embedding"), (7, "caption")):
        part = next(part for part in store.parts if part.number == number)
        chunk = part.groups[0].chunks[column]
        flip(part.path, chunk.offset + chunk.size - 3)
    with pytest.raises(EclipseError, match="checksums") as error:
        Store.open(copy).verify()
    message = str(error.value)
    last = next(part for part in store.parts if part.number == 7).groups[0].rows - 1
    assert f"{part_name(0)} (image_embedding, rows 0 to " in message
    assert f"{part_name(7)} (caption, rows 0 to {last})" in message and part_name(3) not in message
    with pytest.raises(EclipseError) as error:
        Store.open(copy).verify(columns=["caption"])
    assert part_name(0) not in str(error.value)
    Store.open(copy).verify(columns=["url"])
    shares = [index % 2 for index, part in enumerate(store.parts) if part.number in (0, 7)]
    for share in (0, 1):  # every part is in one share
        with pytest.raises(EclipseError) if share in shares else contextlib.nullcontext():
            Store.open(copy).verify(share=(share, 2))
    Store.open(copy).verify(stopped=lambda: True)


def test_a_damaged_page_header_is_refused_when_it_is_read(copy: Path) -> None:
    store = Store.open(copy)
    flip(store.parts[0].path, store.parts[0].groups[0].chunks["image_embedding"].offset)
    with pytest.raises(EclipseError, match="image_embedding") as error:
        store.image_embeddings(np.array([0]))
    assert part_name(0) in str(error.value)


def test_many_parts_open_without_memory_or_descriptors(tmp_path: Path) -> None:
    # 150 parts of one row group, in a process of its own that may hold 64 files and 64 MiB more than its imports.
    row = random_rows(4, np.random.default_rng(0))
    for number in range(150):
        with PartWriter(tmp_path / part_name(number), META) as writer:
            writer.write(row.columns)
    script = """
import resource, sys
import numpy as np
from eclipse.pipeline.cache.store import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
def held(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = held()
store = Store.open(sys.argv[1])
assert held() - before < 64 << 20, held() - before
everything = store.image_embeddings(np.arange(len(store)))
print(len(store), everything.shape[0])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["600", "600"], done.stderr
