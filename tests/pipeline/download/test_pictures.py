"""Rows with one URL are one picture with its captions; samples and limits are the same whenever they are taken."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.pipeline.core.errors import UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.download.pictures import PictureList, Target
from eclipse.pipeline.download.url_list import UrlList

QUIET = Progress(quiet=True)


def surveyed(path: Path, table: dict[str, list], **kwargs: bool) -> PictureList:
    pq.write_table(pa.table(table), path / "list.parquet")
    pictures = PictureList(UrlList((path / "list.parquet",)), **kwargs)
    pictures.survey(QUIET)
    return pictures


def test_rows_with_one_url_are_one_picture_wherever_they_stand(tmp_path: Path):
    rows = [(f"http://a.org/{n}.jpg", f"caption {n} {k}") for n in range(300) for k in range(5)]
    random.Random(0).shuffle(rows)
    rows[7:7] = [("http://a.org/0.jpg", " "), ("ftp://a.org", "x"), rows[0], ("http://a.org/single.jpg", "alone")]
    pictures = surveyed(tmp_path, {"url": [url for url, _ in rows], "caption": [caption for _, caption in rows]})
    everything = np.ones(len(pictures), bool)
    found = list(pictures.read(everything))
    assert len(found) == len(pictures) == 301 and pictures.pairs(everything) == 1501
    assert [picture.rows[0] for picture in found] == sorted(picture.rows[0] for picture in found)
    for picture in found:
        assert picture.rows == sorted(picture.rows)
        assert [rows[row] for row in picture.rows] == [(picture.url, caption) for caption in picture.captions]
    assert sorted(row for picture in found for row in picture.rows) == sorted(set(range(len(rows))) - {7, 8, 9})
    assert [(reject.key, reject.reason) for reject in pictures.unfit] == [
        ("row 7", "no_caption"), ("row 8", "not_http"), ("row 9", "repeated_pair"),
    ]  # fmt: skip


def test_a_row_may_hold_a_list_of_captions(tmp_path: Path):
    table = {
        "url": ["http://a.org/1", "http://a.org/2", "http://a.org/3"],
        "caption": [["a", "b"], [], ["c", None, "c"]],
    }
    pictures = surveyed(tmp_path, table)
    found = [(picture.rows, picture.captions) for picture in pictures.read(np.ones(2, bool))]
    assert found == [([0, 0], ["a", "b"]), ([2], ["c"])]
    assert [(reject.key, reject.reason) for reject in pictures.unfit] == [
        ("row 1", "no_caption"), ("row 2", "no_caption"), ("row 2", "repeated_pair"),
    ]  # fmt: skip


def test_downloads_begun_before_pictures_had_captions_keep_their_rows(tmp_path: Path):
    table = {"url": ["http://a.org/1"] * 3, "caption": ["a", "b", "a"]}
    pictures = surveyed(tmp_path, table, grouped=False)
    assert [picture.rows for picture in pictures.read(np.ones(3, bool))] == [[0], [1], [2]]


def test_targets_add_to_each_other(tmp_path: Path):
    urls = [f"http://a.org/{n}.jpg" for n in range(2000)]
    pictures = surveyed(tmp_path, {"url": urls, "caption": ["x"] * 2000})
    small, large, few = Target(None, 0.01), Target(None, 0.1), Target(50)
    one, ten = pictures.chosen(small, beside=[]), pictures.chosen(large, beside=[])
    assert 5 < one.sum() < 40 and 150 < ten.sum() < 250 and not (one & ~ten).any()
    assert (pictures.chosen(large, beside=[small]) == (ten & ~one)).all()
    assert pictures.chosen(few, beside=[])[:50].all() and pictures.chosen(few, beside=[]).sum() == 50
    assert pictures.chosen(Target(20, 0.1), beside=[]).sum() == 20
    by_url = {picture.url for picture in pictures.read(one)}
    again = surveyed(tmp_path, {"url": urls[::-1], "caption": ["x"] * 2000})
    assert {picture.url for picture in again.read(again.chosen(small, beside=[]))} == by_url, "whatever the order"


def test_a_list_with_nothing_to_fetch_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing to fetch: empty_url, not_http"):
        surveyed(tmp_path, {"url": ["", "ftp://x"], "caption": ["a", "b"]})
