"""`eclipse`: from image URLs to a text-to-image prior, and from a prior to pictures.

`eclipse.load(DIR or hub id)` gives a prior to call with text; `eclipse.open(workspace)` gives what a workspace holds as
polars frames. Importing this package imports nothing else: both live in `api`, which is read when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load, open

    __version__: str

__all__ = ["__version__", "load", "open"]


def __getattr__(name: str) -> Any:
    """PEP 562: torch, polars and the rest are imported by the first use, not by `import eclipse`."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("eclipse-prior")
        except PackageNotFoundError:  # a tree that is only on the path, as on a machine of a cluster
            return "0+not.installed"
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
