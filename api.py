"""What a notebook uses: `load` a prior, `open` a workspace. Read by the first use of either name of `eclipse`.

With cli.py the one module that reaches into every room; nothing here is more than a door.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pipeline.core.card import STAGES
from .pipeline.core.workspace import Workspace

if TYPE_CHECKING:
    import polars

    from .decode.pretrained import TextToImagePrior
    from .pipeline.core.card import Card

__all__ = ["OpenWorkspace", "load", "open"]


def load(
    dir_or_hub_id: Path | str, *, encoder: str | None = None, device: str | None = None, precision: str = "fp32"
) -> TextToImagePrior:
    """A trained prior with its encoder, from an export's directory or from the hub: call it with text.

        prior = eclipse.load("owner/name")
        embeds = prior("a blue bench and a green bowl", draws=4).image_embeds   # (4, D), for KandinskyV22Pipeline

    See `eclipse.decode.pretrained.load` for the arguments and what it raises.
    """
    from .decode import pretrained

    return pretrained.load(dir_or_hub_id, encoder=encoder, device=device, precision=precision)


def open(workspace: Path | str = ".") -> OpenWorkspace:
    """What a workspace holds, as polars frames. Raises UsageError where there is no workspace."""
    return OpenWorkspace(Workspace.open(Path(workspace).expanduser()))


class OpenWorkspace:
    """A workspace to look at: nothing here writes. Frames are read when first asked for."""

    def __init__(self, ws: Workspace) -> None:
        self._ws = ws
        self.root = ws.root

    def __repr__(self) -> str:
        done = [stage for stage in STAGES if self._ws.stage(stage).finished is not None]
        return f"<workspace {self.root}: card {self.card.name}, done: {', '.join(done) or 'nothing yet'}>"

    @property
    def card(self) -> Card:
        """The resolved data card."""
        return self._ws.card

    @property
    def parts(self) -> polars.LazyFrame:
        """One row per picture–caption pair, vectors as typed arrays; a lazy frame, since features are large."""
        from .pipeline.cache.store import scan

        return scan(self._ws.embeddings)

    @cached_property
    def selection(self) -> polars.DataFrame:
        """One row an embedded row: keep or not, reason, what it is a copy of, scores."""
        return self._parquet(self._ws.selection, "filter")

    @cached_property
    def rejected(self) -> polars.DataFrame:
        """One row an input that got no row: stage, shard, key, reason, url, caption."""
        return self._parquet(self._ws.rejected, "download")

    @cached_property
    def metrics(self) -> polars.DataFrame:
        """One row a logged step: step, kind ("train" or "validation"), and the figures of that kind."""
        import polars as pl

        from .pipeline.core.errors import EclipseError
        from .trainer.log import FILE, read_metrics

        path = self._ws.prior / FILE
        if not path.is_file():
            raise EclipseError("nothing was trained here yet", where=str(path), hint="run `eclipse train`")
        return pl.from_dicts(read_metrics(path), infer_schema_length=None)

    @cached_property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """The summary of each stage that is done."""
        states = {stage: self._ws.stage(stage).finished for stage in STAGES}
        return {stage: state.summary for stage, state in states.items() if state is not None}

    def prior(self, *, device: str | None = None) -> TextToImagePrior:
        """The workspace's trained prior with the card's encoder, to call with text."""
        from .decode.conditioning import load_encoder, pick_device
        from .decode.pretrained import TextToImagePrior
        from .trainer.model.prior import load_prior

        self._ws.stage("train").require_intact()
        device = device or pick_device()
        final = self._ws.prior / "final"
        return TextToImagePrior(load_prior(final, device), load_encoder(self.card, device), str(final), None)

    def _parquet(self, path: Path, stage: str) -> polars.DataFrame:
        import polars as pl

        from .pipeline.core.errors import EclipseError

        if not path.is_file():
            raise EclipseError("there is no such file yet", where=str(path), hint=f"run `eclipse {stage}`")
        return pl.read_parquet(path)
