"""What people look at after a rendering: one contact sheet and one HTML gallery. Called by `render`."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..pipeline.core.files import atomic_path
from ..pipeline.report.page import PIXEL_ART, write_page

MAX_SHEET_PROMPTS = 24
REFERENCE_COLUMN = ", reference prior"
MAX_GALLERY_PICTURES = 4000
EMBED_BYTES = 24 * 2**20  # pictures up to this sum travel inside the page, larger sets stay files beside it
DOTS = " A dot says whether a checker, reading pixels, found all that was asked: green yes, red no."
SCORE = (
    " The table's figures are shares of pictures in which nothing asked is missing; eclipse evaluate gives the mean"
    " share of what was asked, which is never lower."
)
REFERENCE = " The framed one of each prompt is by the reference prior that the card names: what training on gives."
TILE = 132  # pixels of one picture on the sheet
RIGHT, WRONG, INK, FAINT, PAPER = "#2e9e5b", "#d4493f", "#1c2024", "#6b7480", "#ffffff"


@dataclass(frozen=True)
class Shot:
    """One picture of a prompt. `right` and `facts` (what was checked, whether it holds) where a checker read it."""

    file: Path
    seed: str
    right: bool | None = None
    facts: tuple[tuple[str, bool], ...] = ()

    @property
    def verdict(self) -> str:
        return "" if self.right is None else ("right" if self.right else "wrong")


@dataclass(frozen=True)
class Entry:
    """One prompt with its pictures; `reference`: the reference prior's, which counts for nothing but itself."""

    prompt: str
    shots: tuple[Shot, ...]
    category: str = ""
    split: str = ""
    reference: Shot | None = None

    @property
    def all_shots(self) -> tuple[Shot, ...]:
        return (*self.shots, *((self.reference,) if self.reference else ()))

    @property
    def verdict(self) -> str:
        verdicts = {shot.verdict for shot in self.shots}
        return "" if "" in verdicts else ("mixed" if len(verdicts) > 1 else verdicts.pop())


def contact_sheet(entries: Sequence[Entry], path: Path) -> None:
    """Write a PNG: a block for each prompt (at most 24, spread over all), pictures side by side, marked by verdict."""
    chosen = [entries[i * len(entries) // MAX_SHEET_PROMPTS] for i in range(MAX_SHEET_PROMPTS)]
    chosen = chosen if len(entries) > MAX_SHEET_PROMPTS else list(entries)
    per_block = max(1, min(4, max(len(entry.all_shots) for entry in chosen)))
    columns = max(1, min(len(chosen), 12 // per_block))
    width, height, gap = per_block * (TILE + 4) - 4, TILE + 52, 20
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for i, entry in enumerate(chosen):
        row, column = divmod(i, columns)
        _block(sheet, entry, gap + column * (width + gap), gap + row * (height + gap), per_block, width)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def html_gallery(entries: Sequence[Entry], path: Path, *, title: str, settings: Sequence[tuple[str, Any]]) -> None:
    """Write the gallery page; pictures travel inside it while they are few, else it links the files.

    settings: (name, value) pairs for the head of the page.
    """
    shown = _first(entries, MAX_GALLERY_PICTURES)
    embed = sum(shot.file.stat().st_size for entry in shown for shot in entry.all_shots) <= EMBED_BYTES
    judged = any(shot.verdict for entry in shown for shot in entry.shots)
    left_out = len(entries) - len(shown)
    write_page(
        path,
        "gallery.html.j2",
        folders=[Path(__file__).parent / "templates"],
        title=title,
        lead="Each picture was made from its text alone."
        + (REFERENCE if any(entry.reference for entry in shown) else "")
        + (DOTS + SCORE if judged else ""),
        footer=f"{left_out:,} more prompts are among the files." if left_out else "Click a picture to see it large.",
        settings=settings,
        entries=shown,
        scores=(scores := _scores(shown)),
        columns=_in_order(column for row in scores for column in row if column != "category"),
        categories=_in_order(entry.category for entry in shown),
        splits=_in_order(entry.split for entry in shown),
        verdicts=[name for name in ("right", "mixed", "wrong") if any(entry.verdict == name for entry in shown)],
        widest=max(len(entry.all_shots) for entry in shown),
        pixel=_is_small(shown),
        source=lambda shot: _source(shot.file, path.parent, embed),
    )


def _first(entries: Sequence[Entry], pictures: int) -> list[Entry]:
    """As many entries as hold at most this many pictures, and at least one."""
    shown: list[Entry] = []
    for entry in entries:
        pictures -= len(entry.all_shots)
        if pictures < 0 and shown:
            break
        shown.append(entry)
    return shown


def _source(file: Path, folder: Path, embed: bool) -> str:
    if embed:
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    from urllib.parse import quote

    return quote(file.relative_to(folder).as_posix())


def _scores(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Share of right pictures for each category and split, in order of appearance; the reference prior's beside it."""
    groups: dict[tuple[str, str], list[bool]] = {}
    for entry in entries:
        for shot in entry.all_shots:
            if shot.verdict:
                column = f"{entry.split}{REFERENCE_COLUMN}" if shot is entry.reference else entry.split
                groups.setdefault((entry.category, column), []).append(shot.verdict == "right")
    table: dict[str, dict[str, Any]] = {}
    for (category, split), right in groups.items():
        table.setdefault(category, {"category": category})[split] = sum(right) / len(right)
    return list(table.values())


def _in_order(values: Any) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _is_small(entries: Sequence[Entry]) -> bool:
    with Image.open(entries[0].shots[0].file) as image:
        return image.width <= PIXEL_ART


def _block(sheet: Image.Image, entry: Entry, left: int, top: int, per_block: int, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    shown = (*entry.shots[: per_block - 1], entry.reference) if entry.reference else entry.shots[:per_block]
    for k, shot in enumerate(shown):
        x = left + k * (TILE + 4)
        with Image.open(shot.file) as image:
            smooth = Image.Resampling.LANCZOS if image.width > TILE else Image.Resampling.NEAREST
            sheet.paste(image.convert("RGB").resize((TILE, TILE), smooth), (x, top))
        if shot.verdict:
            color = RIGHT if shot.verdict == "right" else WRONG
            draw.rectangle((x, top + TILE + 2, x + TILE - 1, top + TILE + 5), fill=color)
    font, small = _font(13), _font(11)
    lines = textwrap.wrap(entry.prompt, max(12, int(width / 7.4)))
    if len(lines) > 2:
        lines = [lines[0], lines[1][:-1] + "…"]
    for n, line in enumerate(lines):
        draw.text((left, top + TILE + 9 + 15 * n), line, font=font, fill=INK)
    last = "last: reference prior" if entry.reference else ""
    note = " · ".join(part for part in (entry.category, entry.split, last) if part)
    draw.text((left, top + TILE + 10 + 15 * len(lines)), note, font=small, fill=FAINT)


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows more than Latin letters."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
