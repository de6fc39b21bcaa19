"""The levers of the embedded card's prior, and what training on gives: tables of what `build_models further` measured.

The figures lie in bench/levers.json and lab/models/further.json, as two such runs wrote them on a GPU; this only lays
them out.
Run: python -m eclipse.bench.levers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..lab.captions import CATEGORIES
from ..lab.levers import PICTURES, SEEDS
from ..pipeline.core.card import MODELS
from .results import arguments, record, table

LEVERS, FURTHER = Path(__file__).with_name("levers.json"), MODELS / "further.json"
TITLE = "Levers of the five-minute prior"


def main() -> None:
    chosen = arguments(__doc__).parse_args()
    found, further = (json.loads(path.read_text(encoding="utf-8")) for path in (LEVERS, FURTHER))
    base = found["levers"]["base"]
    rows = [_lever(name, seeds, base) for name, seeds in found["levers"].items()]
    columns = ["lever", "seen", "unseen", "against base, seen", *CATEGORIES]
    reference = [[name, *_point(found["curves"][name][-1])] for name in _by_steps(found["curves"])]
    curves = further["curves"]
    names = [*_by_steps(curves), *(n for n in curves if n.startswith("end: ") and "guidance" not in n)]
    shipped = [[name.replace("shipped decoder", "decoder before it"), *_point(curves[name][-1])] for name in names]
    body = "\n\n".join([
        "Base: preset `tiny`, 2,000 steps of 64, Muon at 6e-3, λ 0.2, EMA 0.98, "
        f"{PICTURES:,} pictures of up to five captions. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, SEEDS))}, then the mean a category on seen compositions. Accuracy by pixel under the "
        "decoder as it shipped then, at a guidance scale of 2, on validation prompts: none is asked by "
        "`eclipse evaluate`, and none is a caption of the training.",
        table(columns, rows),
        "Two larger priors, `small` (4 layers of width 256) and `deep` (8 of 192, λ 0.05), 1,024 pairs a step, on "
        "scenes drawn while they trained, at so many steps under the same decoder.",
        table(["prior and steps", "seen", "unseen", *CATEGORIES], reference),
        f"What ships was trained in a run of its own, {further['seconds']:.0f} s on one {further['device']}: `small` "
        f"for {further['trained']['small']:,} steps, and the decoder's UNet and MoVQ further, "
        f"{further['trained']['unet']:,} and {further['trained']['movq']:,} steps. At a guidance scale of 2:",
        table(["prior and steps, or decoder", "seen", "unseen", *CATEGORIES], shipped),
        ])  # fmt: skip
    settings = {
        "prompts per category and split": found["prompts"],
        "scenes drawn": f"{found['scenes'][0]:,}",
        "pairs": f"{sum(found['pairs']):,}",
    }
    machine = (
        f"One {found['device']}, everything side by side on it for {found['seconds']:.0f} s; torch {found['torch']}"
    )
    record("python -m eclipse.bench.levers", TITLE, body, settings, machine, chosen.results)


def _lever(name: str, seeds: dict[str, Any], base: dict[str, Any]) -> list[str]:
    def of(tables: dict[str, Any], category: str, split: str) -> np.ndarray:
        return np.array([tables[seed][category][split] for seed in sorted(tables)])

    means = [f"{of(seeds, 'mean', s).mean():.3f} ± {of(seeds, 'mean', s).std(ddof=1):.3f}" for s in ("seen", "unseen")]
    gain = of(seeds, "mean", "seen").mean() - of(base, "mean", "seen").mean()
    return [name, *means, f"{gain:+.3f}", *(f"{of(seeds, c, 'seen').mean():.2f}" for c in CATEGORIES)]


def _by_steps(curves: dict[str, Any]) -> list[str]:
    """Points of the reference priors by steps."""
    return sorted((n for n in curves if " at " in n), key=lambda n: (n.split(" at ")[0], int(n.split(" at ")[1])))


def _point(found: dict[str, dict[str, float]]) -> list[str]:
    means = [f"{found['mean'][split]:.3f}" for split in ("seen", "unseen")]
    return [*means, *(f"{found[c]['seen']:.2f}" for c in CATEGORIES)]


if __name__ == "__main__":
    main()
