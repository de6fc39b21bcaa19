"""URL lists in every format: rows in order, and a reason for each that cannot be fetched."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.errors import EclipseError, UsageError
from eclipse.pipeline.rejected import Reject
from eclipse.pipeline.url_list import UrlList, UrlRow

ROWS = [
    ("http://a.org/1.jpg", 'a "quoted" cat'),
    (" https://b.org/2.jpg ", "a dog"),
    ("", "nowhere"),
    ("ftp://c.org/3.jpg", "another protocol"),
    ("http:///4.jpg", "no host"),
    ("http://d.org:port/5.jpg", "no port"),
    ("http://e.org/6.jpg", "  "),
    ("HTTP://F.org/7 8.jpg", "übrig"),
]
CLEAN = [
    UrlRow(0, "http://a.org/1.jpg", 'a "quoted" cat'),
    UrlRow(1, "https://b.org/2.jpg", "a dog"),
    UrlRow(7, "HTTP://F.org/7 8.jpg", "übrig"),
]
REASONS = [
    ("row 2", "empty_url"), ("row 3", "not_http"), ("row 4", "malformed_url"), ("row 5", "malformed_url"),
    ("row 6", "no_caption"),
]  # fmt: skip


def write(path: Path) -> Path:
    urls, captions = map(list, zip(*ROWS, strict=True))
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({"other": [1] * len(ROWS), "url": urls, "caption": captions}), path)
    elif kind.startswith("tsv"):
        text = "url\tcaption\n" + "".join(f"{url}\t{caption}\n" for url, caption in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    elif kind == "csv":
        quoted = [(url, caption.replace('"', '""')) for url, caption in ROWS]
        path.write_text("caption,url\n" + "".join(f'"{caption}","{url}"\n' for url, caption in quoted))
    else:
        path.write_text("".join(json.dumps({"url": url, "caption": caption}) + "\n" for url, caption in ROWS))
    return path


@pytest.mark.parametrize("name", ["list.parquet", "list.tsv", "list.tsv.gz", "list.csv", "list.jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str):
    rows = list(UrlList((write(tmp_path / name),)).rows())
    assert [row for row in rows if isinstance(row, UrlRow)] == CLEAN
    assert [(row.key, row.reason) for row in rows if isinstance(row, Reject)] == REASONS


def test_several_files_are_numbered_through(tmp_path: Path):
    both = UrlList((write(tmp_path / "a.parquet"), write(tmp_path / "b.tsv")))
    numbers = [row.number for row in both.rows() if isinstance(row, UrlRow)]
    assert numbers == [0, 1, 7, 8, 9, 15]
    assert both.digest() != UrlList(both.paths[:1]).digest()


def test_nulls_and_other_names_and_broken_lines(tmp_path: Path):
    nulls = tmp_path / "nulls.parquet"
    table = {"link": ["http://a.org/1", None, "http://a.org/3"], "text": ["one", "two", None]}
    pq.write_table(pa.table(table), nulls)
    rows = list(UrlList((nulls,), "link", "text").rows())
    assert [row.reason if isinstance(row, Reject) else row.number for row in rows] == [0, "empty_url", "no_caption"]

    broken = tmp_path / "broken.tsv"
    broken.write_bytes(b"url\tcaption\nhttp://a.org/1\tone\nhttp://a.org/2\ttwo\textra\nhttp://a.org/3\tdr\xfci\n")
    rows = list(UrlList((broken,)).rows())
    assert [row.caption for row in rows if isinstance(row, UrlRow)] == ["one", "dr�i"]
    assert [(row.key, row.reason) for row in rows if isinstance(row, Reject)] == [("line 3", "malformed_row")]


def test_what_is_wrong_with_a_list_is_said(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot read the URL list"):
        UrlList((tmp_path / "missing.tsv",)).digest()
    with pytest.raises(UsageError, match="no column text; it has: url, caption"):
        list(UrlList((write(tmp_path / "list.tsv"),), "url", "text").rows())
    with pytest.raises(UsageError, match="unknown kind"):
        list(UrlList((tmp_path / "list.xlsx",)).rows())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(EclipseError, match="cannot read the URL list"):
        list(UrlList((tmp_path / "broken.parquet",)).rows())
    (tmp_path / "broken.jsonl").write_text('{"url": "http://a.org/1", "caption": "one"}\n{"url": \n')
    with pytest.raises(EclipseError, match="cannot read the URL list"):
        list(UrlList((tmp_path / "broken.jsonl",)).rows())
