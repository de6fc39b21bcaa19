"""`eclipse.open`: what a workspace holds, as frames, and what it says where something is not there yet."""

from __future__ import annotations

from pathlib import Path

import eclipse
import pytest
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.trainer.stage import train
from learnable_cache import make_workspace
from tiny_workspace import make_workspace as make_rendering_workspace


def test_frames_of_a_trained_workspace(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path / "ws", steps=4, validate_every=2)
    opened = eclipse.open(ws.root)
    with pytest.raises(EclipseError, match="nothing was trained"):
        _ = opened.metrics
    with pytest.raises(EclipseError) as error:
        _ = opened.rejected
    assert error.value.hint == "run `eclipse download`"
    train(ws, Progress(quiet=True))
    opened = eclipse.open(str(ws.root))
    assert opened.metrics.filter(kind="train")["step"].to_list() == [1, 2, 3, 4]
    assert opened.metrics.filter(kind="validation")["cosine_image"].null_count() == 0
    rows = opened.parts.select("uid", "image_embedding").collect()
    assert len(rows) == len(opened.selection) and rows["image_embedding"].dtype.is_nested()
    assert opened.summaries["train"]["steps"] == 4 and "done: train" in repr(opened)


def test_the_prior_of_a_workspace_is_called_with_text(tmp_path: Path) -> None:
    ws = make_rendering_workspace(tmp_path)
    assert eclipse.open(ws.root).prior()("a red dog", draws=2).image_embeds.shape[0] == 2
    with pytest.raises(UsageError, match="a workspace, not an export"):
        eclipse.load(ws.root)
    with pytest.raises(UsageError, match="no workspace here"):
        eclipse.open(tmp_path)
