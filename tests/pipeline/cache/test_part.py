"""The part writer: one raw page a column and row group, whole or not at all, and nothing that is not a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.cache.parquet_map import find_page, map_file
from eclipse.pipeline.cache.part import PartWriter, part_name, part_number, read_part
from eclipse.pipeline.core.errors import EclipseError
from random_cache import META, random_rows, write_cache


def test_every_column_is_one_raw_page_a_row_group(tmp_path: Path) -> None:
    # More rows than the library's defaults would put on a page, and more bytes.
    rows = random_rows(11_000, np.random.default_rng(0))
    with PartWriter(tmp_path / part_name(0), META) as writer:
        writer.write(rows.columns)
        writer.write(rows.columns)
    part = read_part(tmp_path / part_name(0))
    assert len(part.groups) == 1 and part.groups[0].rows == 22_000
    mapped = map_file(part.path)
    for chunk in part.groups[0].chunks.values():
        assert find_page(mapped, chunk).crc is not None  # raises unless one page fills the chunk


def test_metadata_says_what_made_it(tmp_path: Path) -> None:
    write_cache(tmp_path, {12: 9})
    metadata = pq.read_metadata(tmp_path / part_name(12)).metadata[b"eclipse"].decode()
    for fact in ('"format_version": 1', '"encoder": "random"', '"card": "cccc', '"rows": 9', '"part": 12'):
        assert fact in metadata


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / part_name(0)
    rows = random_rows(10, np.random.default_rng(0)).columns
    with pytest.raises(RuntimeError, match="stop"), PartWriter(path, META) as writer:
        writer.write(rows)
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_writer_keeps_nothing_of_the_callers_buffers(tmp_path: Path) -> None:
    rows = random_rows(10, np.random.default_rng(0)).columns
    before = {name: np.array(value) for name, value in rows.items() if isinstance(value, np.ndarray)}
    with PartWriter(tmp_path / part_name(0), META) as writer:
        writer.write(rows)
        for name in before:
            rows[name][...] = 1
    table = pq.read_table(tmp_path / part_name(0))
    for name, value in before.items():
        written = table[name].combine_chunks()
        flat = written.values if name == "text_states" else written
        width = value.itemsize * (value.shape[1] if value.ndim == 2 and name != "text_states" else 1)
        data = flat.buffers()[1].to_pybytes()[: len(flat) * width]
        expected = value.astype(np.int16) if name == "n_tokens" else value
        if name not in ("width", "height", "n_tokens"):
            assert data == expected.tobytes(), name


def refused(**change: Any) -> dict[str, Any]:
    rows = random_rows(5, np.random.default_rng(0)).columns
    return {**rows, **{name: make(rows[name]) for name, make in change.items()}}


def poke(value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (refused(image_embedding=poke(np.nan)), "image_embedding is not finite.*key 000000003"),
        (refused(text_embedding=poke(1e6)), "text_embedding is not finite in float16.*key 000000003"),
        (refused(text_states=poke(np.inf)), "text_states is not finite.*key 000000000"),
        (refused(clip_score=poke(np.nan)), "clip_score is not finite.*key 000000003"),
        (refused(n_tokens=lambda n: n * [1, 1, 0, 1, 1]), "caption without tokens.*key 000000002"),
        (refused(n_tokens=lambda n: n + 1), "text_states has shape"),
        (refused(image_embedding=lambda x: x[:, :-1]), "image_embedding has shape"),
        (refused(caption=lambda c: [*c[:4], None]), "caption has no value.*key 000000004"),
        (refused(url=lambda u: u[:3]), "url has 3 rows"),
        (refused(image_sha256=lambda d: [*d[:4], b"short"]), "image_sha256"),
        ({"uid": ["a"]}, "missing or too many"),
    ],
)
def test_what_is_not_a_row_is_refused_by_key(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(EclipseError) as error, PartWriter(tmp_path / part_name(0), META) as writer:
        writer.write(columns)
    assert re.search(message, str(error.value), re.DOTALL) and part_name(0) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_part_names_carry_numbers() -> None:
    assert part_number(Path("x") / part_name(123456)) == 123456
    with pytest.raises(EclipseError, match="not the name"):
        part_number(Path("part-1.parquet"))
