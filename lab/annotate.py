"""The checker's reading drawn on a picture, as SVG at four times its size. Called by `page`."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from ..pipeline.report.page import data_uri
from .reading import Reading, Seen
from .shapes import IMAGE_SIZE

SCALE = 4
_SIDE = IMAGE_SIZE * SCALE
_LINE = 11  # pixels between the two lines of a label


def annotated(picture: np.ndarray, reading: Reading, wrong: Collection[int] = ()) -> Markup:
    """An <svg> of the picture, uint8 (64, 64, 3), with a box and a label on each object; those in `wrong` are red."""
    source, _ = data_uri(Image.fromarray(picture))
    marks = [_mark(seen, "bad" if i in wrong else "good") for i, seen in enumerate(reading.things)]
    return Markup(
        f'<svg class="read" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{escape(_in_words(reading))}">'
        f'<image href="{source}" width="{_SIDE}" height="{_SIDE}"/>{"".join(marks)}</svg>'
    )


def _mark(seen: Seen, tone: str) -> str:
    left, top, right, bottom = (SCALE * edge for edge in seen.box)
    lines = (f"{seen.size} {seen.texture}", f"{seen.color} {seen.shape}")
    first = _first_line(top, bottom)
    half = max(map(len, lines)) * 2.9
    middle = min(max((left + right) / 2, half), _SIDE - half)
    text = "".join(
        f'<tspan x="{middle}" y="{first + i * _LINE}">{escape(line)}</tspan>' for i, line in enumerate(lines)
    )
    box = f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
    cross = f'<path d="M{SCALE * seen.x - 4} {SCALE * seen.y}h8m-4 -4v8"/>'
    return f'<g class="{tone}">{box}{cross}<text>{text}</text></g>'


def _first_line(top: int, bottom: int) -> int:
    """The baseline of a label's first line: towards the picture's edge, so that labels of neighbours never meet."""
    room = 2 * _LINE + 4
    if top + bottom <= _SIDE:
        return top - _LINE - 4 if top >= room else top + _LINE + 1
    return bottom + _LINE + 1 if _SIDE - bottom >= room else bottom - _LINE - 4


def _in_words(reading: Reading) -> str:
    things = ", ".join(f"{s.size} {s.texture} {s.color} {s.shape}" for s in reading.things)
    return f"{things or 'nothing'} on a {reading.background} background"
