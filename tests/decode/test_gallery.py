"""Contact sheet and gallery: every picture, its prompt and verdict; large sets are linked, not embedded."""

from __future__ import annotations

from pathlib import Path

import pytest
from eclipse.decode import gallery
from eclipse.decode.gallery import Entry, Shot, contact_sheet, html_gallery
from PIL import Image

HOSTILE = '<script>alert("x")</script> & "quotes"'


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    made = []
    for i, color in enumerate(("red", "green", "blue")):
        path = tmp_path / "samples" / f"{i} ?#.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), color).save(path)
        shot = Shot(path, str(i), right=i != 1, facts=((f"{color} </script>", i != 1),))
        made.append(Entry(HOSTILE if i == 0 else f"prompt {i}", (shot,), "color", "unseen" if i else "seen"))
    return made


def test_gallery_holds_pictures_filters_and_scores(entries: list[Entry], tmp_path: Path) -> None:
    html_gallery(entries, tmp_path / "index.html", title="Test", settings=[("seed", 7)])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert "<script>alert" not in page and "red </script>" not in page
    assert 'data-filter="split"' in page and 'data-filter="verdict"' in page
    assert 'data-filter="category"' not in page  # there is only one
    assert "shares of pictures in which nothing asked is missing" in page and "the mean share of what was asked" in page
    assert ">1.00<" in page.replace("</td>", "<") and ">0.50<" in page.replace("</td>", "<")


def test_large_sets_are_linked_and_capped(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "EMBED_BYTES", 10)
    monkeypatch.setattr(gallery, "MAX_GALLERY_PICTURES", 2)
    entries = [Entry(e.prompt, tuple(Shot(s.file, s.seed) for s in e.shots)) for e in entries]
    html_gallery(entries, tmp_path / "index.html", title="Test", settings=[])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "nothing asked is missing" not in page  # no checker read these
    assert "base64" not in page and 'src="samples/1%20%3F%23.png"' in page
    assert "prompt 2" not in page and "1 more prompts" in page


def test_contact_sheet_shows_pictures_and_verdicts(entries: list[Entry], tmp_path: Path) -> None:
    contact_sheet(entries, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colors
    assert {tuple(bytes.fromhex(c[1:])) for c in (gallery.RIGHT, gallery.WRONG)} <= colors


def test_a_contact_sheet_of_many_prompts_is_spread_over_all(entries: list[Entry], tmp_path: Path) -> None:
    contact_sheet(entries[:1] * 200 + entries[2:] * 200, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 2000
        counts = {color: n for n, color in sheet.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 12 * gallery.TILE**2
