"""What comes in by name: sources, prompts and judges that go with a kind of source. Looked up by stages and `run`.

A name leads to "module:function", which is imported when it is first wanted: the stages know what such a function takes
and gives, and nothing of where it lives. The closed world of shapes comes in here like anybody's own; an installed
package adds to it, or takes a name over, through an entry point of the group `eclipse.WHAT`:

    [project.entry-points."eclipse.judge"]
    urls = "my_package.faces:judge"        # judges the pictures of workspaces whose card says source.kind: urls

list        (ws, *, anew: bool) -> context manager of a UrlList, served for as long as the block runs; anew: made again.
            Makes its name a source.kind of cards; what the card says beside it is in ws.card.source.options
prompts     (card, per_category: int) -> list of decode.prompts.Prompt, which `eclipse render` takes by default
judge       (picture: PIL.Image, prompt: Prompt) -> decode.prompts.Verdict | None; None: nothing can be said
evaluation  (ws, progress, *, overwrite: bool) -> summary; `eclipse evaluate` in place of the metrics in embedding space
audit       (ws, *, measure_it: bool) -> figures | None; what is known of a run's data beside what its stages say
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from .errors import EclipseError

SHIPPED = {
    "list": {"shapes": "eclipse.lab.server:served_list"},
    "prompts": {"shapes": "eclipse.lab.prompts:default_prompts"},
    "judge": {"shapes": "eclipse.lab.prompts:judge_picture"},
    "evaluation": {"shapes": "eclipse.lab.score:evaluate_shapes"},
    "audit": {"shapes": "eclipse.lab.precision:audit"},
}


def registered(what: str, kind: str) -> str | None:
    """The "module:function" registered for sources of this kind, or None."""
    place = SHIPPED[what].get(kind)
    for point in entry_points(group=f"eclipse.{what}", name=kind):
        place = point.value
    return place


def find(what: str, kind: str) -> Callable[..., Any] | None:
    """The function registered for sources of this kind, or None. EclipseError if it cannot be imported."""
    if (place := registered(what, kind)) is None:
        return None
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        hint = "install what it belongs to again, or uninstall it"
        raise EclipseError(f"the {what} registered for {kind} is not there: {error}", where=place, hint=hint) from error
