"""HTML pages in the shared look, and pictures to put on them; called by pipeline.report, decode.gallery and lab."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import atomic_path
from .words import in_words

if TYPE_CHECKING:
    from PIL import Image

    from ..core.workspace import Workspace

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
    """Render `template` (looked up in `folders`, then in pipeline/report/templates) to `path`, whole or not at all.

    base.html.j2 reads title, lead, footer and links: pairs of name and address, None for the page itself.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from ... import __version__

    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    text = environment.get_template(template).render(version=__version__, **context)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def stage_page(ws: Workspace, stage: str, template: str, **context: Any) -> Path:
    """Write the page of a stage, reports/STAGE.html, with its place in the navigation and the footer they share."""
    links, path = stage_links(stage.capitalize()), ws.reports / f"{stage}.html"
    return write_page(path, template, footer=f"card {ws.card.name} · workspace {ws.root.name}", links=links, **context)


def stage_links(current: str) -> list[tuple[str, str | None]]:
    """The navigation of a page: a stage's up to itself, since those of later stages may not be there yet; of any other
    page the overview and itself.
    """
    names = [name for name, _ in STAGES]
    if current not in names:
        return [STAGES[0], (current, None)]
    return [(name, None if name == current else file) for name, file in STAGES[: names.index(current) + 1]]


def tile(value: float | str, label: str, tone: str = "") -> dict[str, str]:
    """One large figure of a page's head."""
    return {"value": f"{value:,}" if isinstance(value, int) else str(value), "label": label, "tone": tone}


def chart(title: str, note: str, svg: str) -> dict[str, str]:
    """One chart with its heading and one line of explanation."""
    return {"title": title, "note": note, "svg": svg}


def shares(reasons: dict[str, int], total: int) -> list[dict[str, Any]]:
    """Rows of a table of counts by reason, in words and with their shares of `total`, largest first."""
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    most = max(reasons.values(), default=1)
    return [
        {"name": in_words(code), "code": code, "count": n, "share": n / max(total, 1), "length": n / most}
        for code, n in ordered
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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
