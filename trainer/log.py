"""Figures of a run as metrics.jsonl and in trackers, and their curves as a picture. Called by loop.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..pipeline.core.files import atomic_path
from .trackers import EVERY, Tracker

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # what the prior makes of a few fixed captions, a line a validation


class MetricsLog:
    """Appends one JSON object a line: step, kind ("train" or "validation") and figures. Use as a context manager.

    What was written after `from_step`, which a resumed run makes again, is removed first. Inactive: writes nothing.
    trackers: get the figures as well, and are closed at the end.
    """

    def __init__(
        self, directory: Path, from_step: int, *, active: bool = True, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = directory / FILE
        self._from_step = from_step
        self._active = active
        self._trackers = trackers
        self._latest: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Self:
        if self._active:
            samples = self.path.with_name(SAMPLES)
            for path, lines in ((self.path, read_metrics(self.path)), (samples, read_samples(samples.parent))):
                kept = [line for line in lines if line["step"] <= self._from_step]
                with atomic_path(path) as temporary:
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._file = self.path.open("a", buffering=1 << 16)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._active:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def add(self, kind: str, step: int, figures: dict[str, float]) -> dict[str, Any]:
        """Record the figures after this step: the line written. What is not finite is null, which JSON can hold."""
        self._latest[kind] = figures
        line = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        line = {"step": step, "kind": kind, **line}
        if self._active:
            self._file.write(json.dumps(line) + "\n")
            if kind == "validation" or step % EVERY == 0:
                finite = {f"{kind}/{name}": value for name, value in figures.items() if math.isfinite(value)}
                for tracker in self._trackers:
                    tracker.add(step, finite)
        return line

    def flush(self) -> None:
        """Bring metrics.jsonl up to date on disk."""
        if self._active:
            self._file.flush()

    def summary(self) -> str:
        """A short remark beside the progress bar."""
        loss = self._latest.get("train", {}).get("loss", math.nan)
        validation = self._latest.get("validation", {})
        if not validation:
            return f"loss {loss:.3g}"
        cosine, constant = (validation.get(name, math.nan) for name in ("cosine_image", "mean_cosine_image"))
        return f"loss {loss:.3g}, cosine to the true image {cosine:.3f} (a constant: {constant:.3f})"


def add_sample(directory: Path, step: int, captions: np.ndarray, found: np.ndarray, cosine: np.ndarray) -> None:
    """Note the rows whose pictures are nearest (n,) to what is predicted for the captions of rows (n,)."""
    line = {"step": step, "rows": captions.tolist(), "found": found.tolist(), "cosine": cosine.round(4).tolist()}
    with (directory / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """The lines of `add_sample` by step; of a step that was made again, after a resume, the later one."""
    lines: dict[int, dict[str, Any]] = {}
    with suppress(FileNotFoundError), (directory / SAMPLES).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            # What a kill left half-written, or a bad disk damaged.
            with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                record = json.loads(line)
                rows, found = (list(map(int, record[name])) for name in ("rows", "found"))
                if len(rows) == len(found) == len(list(map(float, record["cosine"]))):
                    lines[int(record["step"])] = record
    return [lines[step] for step in sorted(lines)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a killed process or a bad disk left damaged."""
    lines = []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                if _is_line(record := json.loads(line)):
                    lines.append(record)
    return lines


def _is_line(record: Any) -> bool:
    """Whether this is what `MetricsLog.add` writes: a step, a kind, and numbers or nulls."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("kind"), str):
        return False
    return all(value is None or type(value) in (int, float) for name, value in record.items() if name != "kind")


def draw_curves(metrics: Path, picture: Path) -> None:
    """A PNG of the losses, the learning rate, and the validation figures over the steps of a metrics.jsonl."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    for name, panel in zip(("loss", "projection", "contrastive"), axes[0], strict=True):
        _plot(panel, training, [name], smooth=True)
        panel.set_title(f"{name} (training)")
    _plot(axes[1][0], validation, ["cosine_image", "mean_cosine_image"])
    axes[1][0].set_title("cosine to the true image")
    _plot(axes[1][1], validation, ["similarity_own", "similarity_true_image", "similarity_shuffled"])
    axes[1][1].set_title("similarity to captions")
    _plot(axes[1][2], validation, ["recall_1", "recall_5", "recall_10", "text_recall_1"])
    axes[1][2].set_title("true image among the k nearest")
    axes[1][2].set_ylim(-0.03, 1.03)
    for panel in axes.flat:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _plot(panel: Any, lines: Iterable[dict[str, Any]], names: list[str], *, smooth: bool = False) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else None
        panel.plot(steps, values, lw=1, alpha=0.3 if smooth else 1, marker=None if smooth else marker, ms=3, label=name)
        if smooth:
            panel.plot(steps, _smoothed(values), lw=1.5, color=panel.lines[-1].get_color())
    if len(names) > 1 and panel.lines:
        panel.legend(frameon=False, fontsize=8)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean over a fiftieth of the run around each value."""
    window = np.ones(max(1, len(values) // 50))
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")
