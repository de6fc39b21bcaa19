"""Muon beside AdamW at several learning rates: the embedded card's prior, on fresh scenes of the closed world.

Run: python -m eclipse.bench.optimizers   (about five minutes on two cores)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ..decode.conditioning import load_encoder, pick_device
from ..lab.trial import Arm, Setting, Trial
from ..pipeline.core.card import Card
from ..pipeline.core.progress import Progress
from .results import arguments, hardware, record, table

CONTENDERS = (("muon", 6e-3), ("adamw", 1e-3), ("adamw", 2e-3), ("adamw", 4e-3), ("adamw", 8e-3))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=12_600, help="training pairs; the embedded default has as many")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; default: the card's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    machine, card = hardware(), Card.load("shapes")
    steps = options.steps or card.train.steps
    setting = Setting(0.15, options.pairs, steps, prompts=1, seed=options.seed, fresh=500)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), card, load_encoder(card, pick_device()), setting, Progress())
        for optimizer, rate in CONTENDERS:
            arm = Arm((("optimizer", optimizer), ("learning_rate", rate)))
            figures = trial.embedding(arm)
            summary = json.loads((trial.prior(arm).parent / "summary.json").read_text(encoding="utf-8"))
            cells = [f"{figures[split][name]:.3f}" for name in ("cosine", "recall_1") for split in ("seen", "unseen")]
            rows.append([f"{optimizer}, {rate:g}", f"{summary['seconds']:.0f} s", *cells])
    columns = ["optimizer, peak rate", "time", "cosine, seen", "cosine, unseen", "R@1, seen", "R@1, unseen"]
    settings = {"pairs": options.pairs, "steps": steps, "batch": card.train.batch_size, "seed": options.seed}
    record("python -m eclipse.bench.optimizers", "Optimizers", table(columns, rows), settings, machine, options.results)


if __name__ == "__main__":
    main()
