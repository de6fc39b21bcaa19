"""What several draws on one reading of a caption cost, beside as many passes: forward, loss and backward on the CPU.

Run: python -m eclipse.bench.draws
"""

from __future__ import annotations

import time

import numpy as np
import torch

from ..trainer.loss import Draw, Objective
from ..trainer.model.prior import PRESETS, PackedText, Prior
from .made_cache import caption_lengths
from .results import arguments, hardware, record, table

PRESET, BATCH, ROUNDS = "kandinsky22", 8, 2
OBJECTIVE = Objective(0.2, 0.01, "mean")


def main() -> None:
    options, machine = arguments(__doc__).parse_args(), hardware()
    torch.manual_seed(0)
    prior = Prior(PRESETS[PRESET])
    trained = [p for p in prior.parameters() if p.requires_grad]
    dim, lengths = prior.config.embedding_dim, caption_lengths(BATCH, np.random.default_rng(0))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    text = PackedText(torch.randn(int(lengths.sum()), dim), offsets)
    image, pooled = torch.randn(2, BATCH, dim).unbind()

    def gradients(*noises: torch.Tensor) -> list[torch.Tensor]:
        """The mean over passes, left in the parameters' own memory and copied out."""
        prior.zero_grad()
        for noise in noises:
            (OBJECTIVE(prior, image, pooled, text, Draw(noise, noise), pooled, 0)["loss"] / len(noises)).backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    rows, one = [], 0.0
    for draws in (1, 4, 8):
        noise = torch.randn(BATCH, draws, dim)
        took, together, passes = {"together": 1e9, "passes": 1e9}, [], []
        for _ in range(ROUNDS):
            began = time.process_time()
            together = gradients(noise)
            middle = time.process_time()
            passes = gradients(*noise.unbind(1))
            took["together"] = min(took["together"], middle - began)
            took["passes"] = min(took["passes"], time.process_time() - middle)
        one = one or took["together"]
        off = max(float((a - b).abs().max()) for a, b in zip(together, passes, strict=True))
        cells = [f"{took[name] * 1e3:.0f} ms" for name in ("together", "passes")]
        rows.append([draws, *cells, f"{took['together'] / one:.2f}", f"{took['passes'] / one:.2f}", f"{off:.1e}"])
    columns = ["draws", "on one reading", "as many passes", "× one draw", "× one draw", "gradients differ by at most"]
    body = table(columns, rows) + "\n\nProcessor time, the best of two. On a GPU: not measured."
    settings = {"prior": PRESET, "batch": BATCH, "tokens a caption": f"{lengths.mean():.1f}", "precision": "float32"}
    record("python -m eclipse.bench.draws", "Draws", body, settings, machine, options.results)


if __name__ == "__main__":
    main()
