"""HTML pages in the shared look, and pictures to put on them; called by pipeline.report, decode.gallery and lab."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
LARGEST_SIDE = 256  # pixels of a picture on a page; smaller ones are embedded as they are
PIXEL_ART = 128  # up to this side pictures are enlarged without smoothing
STAGES = (
    ("Overview", "index.html"),
    ("Download", "download.html"),
    ("Embed", "embed.html"),
    ("Filter", "filter.html"),
    ("Train", "train.html"),
    ("Evaluate", "evaluate.html"),
)


def write_page(path: Path, template: str, *, folders: Iterable[Path] = (), **context: Any) -> Path:
    """Render `template` (looked up in `folders`, then in pipeline/templates) to `path`, whole or not at all.

    base.html.j2 reads title, lead, footer and links: pairs of name and address, None for the page itself.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    text = environment.get_template(template).render(**context)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def stage_links(current: str) -> list[tuple[str, str | None]]:
    """The navigation of a stage's page, up to itself: those of later stages may not be there yet."""
    names = [name for name, _ in STAGES]
    return [(name, None if name == current else file) for name, file in STAGES[: names.index(current) + 1]]


def data_uri(image: Image.Image | bytes) -> tuple[str, bool]:
    """A PIL image or the bytes of a picture file → data URI, and whether it is pixel art. Large pictures are shrunk.

    Raises OSError if the bytes are no picture.
    """
    from PIL import Image

    raw = image if isinstance(image, bytes) else b""
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    pixel = max(picture.size) <= PIXEL_ART
    kind = (picture.format or "").lower()
    if not raw or not kind or max(picture.size) > LARGEST_SIDE:
        picture = picture.convert("RGB")
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        kind = "png" if pixel else "jpeg"
        picture.save(out := io.BytesIO(), kind, quality=88)
        raw = out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}", pixel
