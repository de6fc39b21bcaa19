"""URL lists in every format: rows in order, and a reason for each that cannot be fetched."""

from __future__ import annotations

import gzip
import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.download import url_list
from eclipse.pipeline.download.url_list import UrlList, UrlRow
from eclipse.pipeline.images.rejects import Reject

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
    broken.write_bytes(b"url\tcaption\nhttp://a.org/1\tone\nhttp://a.org/2\ttwo\textra\nhttp://a.org/3\tthree\n")
    rows = list(UrlList((broken,)).rows())
    assert [row.caption for row in rows if isinstance(row, UrlRow)] == ["one", "three"]
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
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"url": "http://a.org/1", "caption": "one"}\n')[:-12])
    with pytest.raises(UsageError, match="cannot read the URL list"):
        list(UrlList((tmp_path / "cut.jsonl.gz",)).rows())
    (tmp_path / "other.jsonl").write_text('\n{"link": "http://a.org/1", "caption": "one"}\n')
    with pytest.raises(UsageError, match="no column url; it has: link, caption"):
        list(UrlList((tmp_path / "other.jsonl",)).rows())
    (tmp_path / "header.csv").write_bytes(b"url,caption,l\xe4nge\nhttp://a.org/1,one,3\n")
    with pytest.raises(EclipseError, match="cannot read the URL list"):
        list(UrlList((tmp_path / "header.csv",)).rows())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_in_parquet_may_be_any_bytes(tmp_path: Path, kind: pa.DataType):
    captions = pa.array([b"dr\xfci", b"two"]).view(pa.string()).cast(pa.string())
    urls = pa.array([b"http://a.org/\xfc", b"http://a.org/2"]).view(pa.string())
    path = tmp_path / "list.parquet"
    table = pa.table({"url": urls, "caption": captions})
    if kind != pa.string():
        table = table.cast(pa.schema([("url", kind), ("caption", kind)]), safe=False)
    pq.write_table(table, path)
    rows = list(UrlList((path,)).rows())
    lost = Reject("", "row 0", "bad_encoding", "http://a.org/\ufffd", "dr\ufffdi")
    assert rows == [lost, UrlRow(1, "http://a.org/2", "two")], "nothing is stored with characters lost"


def test_a_bad_line_of_json_is_set_aside_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(url_list, "LINE_LIMIT", 200)
    monkeypatch.setattr(url_list, "BATCH", 3)
    lines = [
        b'\xef\xbb\xbf{"url": "http://a.org/0", "caption": "2020-01-01"}',
        b'{"url": \n',
        b'{"url": "http://a.org/1", "caption": 7, "more": [1]}',
        b"[1, 2]",
        b'{"url": "http://a.org/2", "caption": "dr\xc3\xbci \\ud800"}',
        b"{" + b"x" * 1000,
        b"[" * 190,
        b'{"caption": "no url"}',
        b'{"url": "http://a.org/4", "caption": null}',
        b'{"url": "http://a.org/5", "caption": "the last"}',
    ]
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = list(UrlList((path,)).rows())
    assert [row for row in rows if isinstance(row, UrlRow)] == [
        UrlRow(0, "http://a.org/0", "2020-01-01"), UrlRow(1, "http://a.org/1", "7"),
        UrlRow(2, "http://a.org/2", "drüi ?"), UrlRow(5, "http://a.org/5", "the last"),
    ]  # fmt: skip
    rejects = [row for row in rows if isinstance(row, Reject)]
    malformed = [(f"line {number}", "malformed_row") for number in (2, 5, 7, 8)]
    assert [(row.key, row.reason) for row in rejects] == [("row 3", "empty_url"), ("row 4", "no_caption"), *malformed]
    assert rejects[2].caption == '{"url": \n' and len(rejects[4].caption) <= 200


def test_columns_that_cannot_be_meant_are_refused(tmp_path: Path):
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["url", "url", "caption"]), twice)
    (tmp_path / "twice.csv").write_text("url,url,caption\na,b,c\n")
    for path in (twice, tmp_path / "twice.csv"):
        with pytest.raises(UsageError, match="2 columns url"):
            list(UrlList((path,)).rows())
    for values, kind in (([[1]], "list"), ([datetime(2020, 1, 1)], "timestamp")):
        path = tmp_path / "odd.parquet"
        pq.write_table(pa.table({"url": ["http://a.org/1"], "caption": values}), path)
        with pytest.raises(UsageError, match=f"column caption holds {kind}.*not text"):
            list(UrlList((path,)).rows())


@pytest.mark.parametrize("name", ["list.parquet", "list.tsv", "list.jsonl"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str):
    path = tmp_path / name
    for make in (os.mkfifo, os.mkdir):
        make(path)
        for read in (UrlList((path,)).digest, lambda: list(UrlList((path,)).rows())):
            with pytest.raises(UsageError, match="cannot read the URL list: not a regular file") as error:
                read()
            assert str(path) in str(error.value)
        path.unlink() if path.is_fifo() else path.rmdir()


LATIN = [("http://a.org/1.jpg", "Caf\u00e9 \u00fcber"), ("http://a.org/2.jpg", "na\u00efve")]


def text_of(rows: list[tuple[str, str]], kind: str) -> str:
    if kind == "jsonl":
        return "".join(json.dumps({"url": url, "caption": caption}, ensure_ascii=False) + "\n" for url, caption in rows)
    mark = "\t" if kind == "tsv" else ","
    return "".join(mark.join(row) + "\n" for row in [("url", "caption"), *rows])


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_an_encoding_is_named_or_marked_and_a_lossy_reading_refused(tmp_path: Path, kind: str):
    path = tmp_path / f"list.{kind}"
    expected = [UrlRow(number, url, caption) for number, (url, caption) in enumerate(LATIN)]
    path.write_bytes(text_of(LATIN, kind).encode("latin-1"))
    with pytest.raises(UsageError, match=r"not UTF-8.*would lose characters") as error:
        list(UrlList((path,)).rows())
    assert "source.encoding: " in str(error.value)
    assert list(UrlList((path,), encoding="latin-1").rows()) == expected
    path.write_bytes(text_of(LATIN, kind).encode("utf-16"))
    assert list(UrlList((path,)).rows()) == expected
    path.write_bytes(text_of(LATIN, kind).encode("utf-8-sig"))
    assert list(UrlList((path,)).rows()) == expected


def test_a_few_stray_bytes_cost_their_own_rows_alone(tmp_path: Path):
    path = tmp_path / "list.tsv"
    rows = [b"http://a.org/%d\t%s" % (n, b"dr\xfci" if n == 1500 else b"fine") for n in range(3000)]
    path.write_bytes(b"url\tcaption\n" + b"\n".join(rows))
    found = list(UrlList((path,)).rows())
    assert len(found) == 3000 and [row.key for row in found if isinstance(row, Reject)] == ["row 1500"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst", ".lz4"])
def test_compressed_lists(tmp_path: Path, ending: str):
    path = tmp_path / f"list.tsv{ending}"
    with pa.output_stream(str(path), compression=ending[1:].replace("gz", "gzip").replace("zst", "zstd")) as file:
        file.write(text_of(LATIN, "tsv").encode())
    assert [row.caption for row in UrlList((path,)).rows()] == [caption for _, caption in LATIN]


def test_quotes_in_tsv_are_a_choice_and_looked_out_for(tmp_path: Path):
    path = tmp_path / "list.tsv"
    rows = [(f"http://a.org/{n}", f'"a ""red"" cat\t{n}"') for n in range(50)]
    path.write_text(text_of(rows, "tsv"))
    assert not [row for row in UrlList((path,), quoting=True).rows() if row.caption != f'a "red" cat\t{row.number}']
    path.write_text(text_of([(url, caption.replace("\t", " ")) for url, caption in rows], "tsv"))
    (remark,) = UrlList((path,)).remarks()
    assert "fields in double quotes" in remark and "source.quoting" in remark
    path.write_text(text_of([(url, '12" records') for url, _ in rows], "tsv"))
    assert not list(UrlList((path,)).remarks()) and next(iter(UrlList((path,)).rows())).caption == '12" records'


def test_credentials_are_kept_apart(tmp_path: Path):
    path = tmp_path / "list.tsv"
    urls = ["http://ann:p%40w@a.org/1", "https://b.org/x@y", "http://c.org:8/", "http://ann:x@/no-host"]
    path.write_text(text_of([(url, "x") for url in urls], "tsv"))
    rows = list(UrlList((path,)).rows())
    assert [(row.url, getattr(row, "auth", "")) for row in rows] == [
        ("http://a.org/1", "ann:p@w"), ("https://b.org/x@y", ""), ("http://c.org:8/", ""), ("http:///no-host", ""),
    ]  # fmt: skip


def test_published_hashes_are_read_and_required(tmp_path: Path):
    path = tmp_path / "list.parquet"
    hashes = ["A" * 64, "b" * 32, None, "nonsense"]
    pq.write_table(pa.table({"url": [f"http://a.org/{n}" for n in range(4)], "caption": ["x"] * 4, "h": hashes}), path)
    rows = list(UrlList((path,), hash_column="h").rows())
    assert [getattr(row, "digest", row) for row in rows[:2]] == ["a" * 64, "b" * 32]
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["no_hash", "no_hash"]


def test_captions_of_nothing_that_shows_are_none(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    captions = [
        "\u200b\u200d",
        "\ufeff \u2060",
        "\x00",
        "\U0001f469\u200d\U0001f680",
        "\u0634\u062c\u0631\u0629",
        "x" * 10_000,
    ]
    path.write_text("".join(json.dumps({"url": "http://a.org/1", "caption": caption}) + "\n" for caption in captions))
    rows = list(UrlList((path,)).rows())
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["no_caption"] * 3
    assert [row.caption for row in rows if isinstance(row, UrlRow)] == captions[3:]
