"""Small charts as inline SVG that takes its colours from the page, light or dark; called by pipeline.report and lab."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

# matplotlib writes colours as literals; these stand-ins become the page's variables.
_INK, _SOFT, _LINE, _ACCENT, _MUTED = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _ACCENT: "--accent", _MUTED: "--muted-bar"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "eclipse",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _SOFT,
}


def histogram(
    series: Mapping[str, np.ndarray],
    *,
    label: str = "",
    bins: int = 48,
    integer: bool = False,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> Markup:
    """Stacked histogram of up to two named series (the second in the accent colour), with named vertical marks.

    Non-finite values are left out. integer: one bar a value. Returns an <svg> element for a page based on base.html.j2.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    values = [v[np.isfinite(v)] for v in (np.asarray(v, np.float64).ravel() for v in series.values())]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        colours = [_ACCENT] if len(values) == 1 else [_MUTED, _ACCENT]
        edges = _edges(values, bins, integer).tolist()
        axes.hist(values, bins=edges, stacked=True, color=colours, label=list(series), rwidth=0.92)
        for name, at in (marks or {}).items():
            axes.axvline(at, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.text(at, 0.97, f" {name}", transform=axes.get_xaxis_transform(), va="top", color=_INK)
        if log:
            axes.set_yscale("log", nonpositive="clip")
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        if len(values) > 1:
            axes.legend(loc="best", fontsize=8.5)
        return _svg(figure)


def lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    label: str = "",
    levels: Mapping[str, float] | None = None,
    smooth: bool = False,
    fair: bool = False,
) -> Markup:
    """Up to two named curves (the second in the accent colour), each as its x and y; named horizontal levels beside.

    smooth: a running mean over a fiftieth of the points, the points themselves faint behind it. fair: the axis covers
    what comes after the first twentieth, so that the first steps' heights do not flatten all the rest; they run out at
    its top. Returns an <svg> element as `histogram` does.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        colours = [_ACCENT] if len(series) == 1 else [_ACCENT, _SOFT]
        for (name, (x, y)), colour in zip(series.items(), colours, strict=False):
            every = max(1, len(x) // 600)  # a page holds no more than the eye can tell apart
            if smooth and len(y) > 20:
                axes.plot(x[::every], y[::every], color=_MUTED, linewidth=0.7, alpha=0.7)
                window = np.ones(max(1, len(y) // 50))
                mean = np.convolve(y, window, mode="same") / np.convolve(np.ones(len(y)), window, mode="same")
                axes.plot(x[::every], mean[::every], color=colour, linewidth=1.6, label=name)
            else:
                marker = "o" if len(x) < 30 else None
                axes.plot(x[::every], y[::every], color=colour, linewidth=1.6, marker=marker, markersize=3, label=name)
        for name, level in (levels or {}).items():
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.text(0.01, level, name, transform=axes.get_yaxis_transform(), va="bottom", color=_INK, fontsize=8)
        settled = np.concatenate([y[len(y) // 20 :] for _, y in series.values()])
        settled = settled[np.isfinite(settled)]
        if fair and len(settled) and settled.max() > settled.min():
            low, high = float(settled.min()), float(np.quantile(settled, 0.99))
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        axes.set_xlabel(label)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8.5)
        return _svg(figure)


def dots(rows: Mapping[str, Mapping[str, tuple[float, float | None]]], *, label: str = "") -> Markup:
    """One line per row, and on it a dot for each of its (up to two) named series: mean and deviation, None: no bar.

    The second series is in the accent colour; rows run from the top. Returns an <svg> element as `histogram` does.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.2, 1.1 + 0.38 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        shift = 0.0 if len(names) == 1 else 0.14
        for offset, name, colour in zip((-shift, shift), names, (_SOFT, _ACCENT), strict=False):
            at = [(place, *row[name]) for place, row in enumerate(rows.values()) if name in row]
            places, means, deviations = zip(*at, strict=True)
            axes.errorbar(
                means,
                np.array(places) + offset,
                xerr=[deviation or 0.0 for deviation in deviations],
                fmt="o",
                markersize=5,
                elinewidth=1.6,
                color=colour,
                label=name,
            )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        if len(names) > 1:
            figure.legend(loc="outside upper center", ncols=len(names), fontsize=8.5)
        return _svg(figure)


def _edges(values: list[np.ndarray], bins: int, integer: bool) -> np.ndarray:
    every = np.concatenate(values) if values else np.empty(0)
    if not len(every):
        return np.linspace(0, 1, 3)
    low, high = float(every.min()), float(every.max())
    if integer and high - low < 200:
        return np.arange(min(low, high - 8) - 0.5, high + 1)
    if high > low:
        return np.linspace(low, high, bins + 1)
    return np.linspace(low - 1, high + 1, 14)  # one value: a bar among empty ones, not a block


def _svg(figure) -> Markup:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # would style the whole page
    text = re.sub(r"font-family: [^;]*;", "", text)  # the page's own
    for literal, variable in _VARIABLES.items():
        text = text.replace(literal, f"var({variable})")
    return Markup(text)
