"""Look-alikes among millions of embeddings on one GPU, with torch alone: seconds, memory, recall of planted pairs.

Run: python -m eclipse.bench.gpu_duplicates   (on a CPU it runs a small case, to show that it works)
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from ..pipeline.core.progress import Progress
from ..pipeline.filter.neighbours import Vectors, find_pairs

DIM, COSINE, PLANTED_SHARE = 768, 0.92, 0.05
SIZES = (1_000_000, 10_000_000)
SECONDS_PER_ROW = 4e-6  # a case is left out where the budget has less than this left for it


def clustered(size: int, device: str, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows like CLIP's: one cone, Zipf-sized clusters of a decaying spectrum, mean cosine 0.45, 0.75 within a cluster.

    → embeddings (size, DIM) float16; originals and planted neighbours (n,) each, and their cosines as float16 stores
    them, (n,), within ±0.01 of COSINE on both sides.
    """
    torch.manual_seed(seed)
    spectrum = torch.arange(1, DIM + 1, device=device).pow(-0.35)
    spectrum /= spectrum.square().mean().sqrt()
    clusters = max(size // 200, 2)
    cone = torch.randn(DIM, device=device) * 0.45**0.5
    centre = torch.randn(clusters, DIM, device=device) * spectrum * 0.3**0.5
    out, planted = np.empty((size, DIM), np.float16), int(PLANTED_SHARE * size)
    for start in range(0, size, 250_000):
        n = min(250_000, size - start)
        which = ((torch.rand(n, device=device) ** 2) * clusters).long()
        rows = cone + centre[which] + 0.5 * spectrum * torch.randn(n, DIM, device=device)
        out[start : start + n] = rows.half().cpu().numpy()
    rng = np.random.default_rng(seed)
    original, copy = rng.permutation(size)[: 2 * planted].reshape(2, planted)
    cosine = np.empty(planted)
    for start in range(0, planted, 65_536):
        some = slice(start, start + 65_536)
        of = torch.from_numpy(out[original[some]]).to(device).double()
        length = of.norm(dim=1, keepdim=True)
        aside = torch.randn(of.shape, device=device, dtype=torch.float64)
        aside -= (aside * of).sum(1, keepdim=True) * of / length**2
        aside /= aside.norm(dim=1, keepdim=True)
        target = COSINE + 0.01 * (2 * torch.rand(len(of), 1, device=device, dtype=torch.float64) - 1)
        rows = (length * (target * of / length + (1 - target**2).sqrt() * aside)).half()
        out[copy[some]] = rows.cpu().numpy()
        cosine[some] = torch.cosine_similarity(of, rows.double(), dim=1).cpu().numpy()
    return out, original, copy, cosine


def reader(rows: np.ndarray) -> Vectors:
    """Vectors over an array; a run of rows is no copy."""

    def read(positions: np.ndarray) -> np.ndarray:
        if len(positions) and positions[-1] - positions[0] + 1 == len(positions):
            return rows[positions[0] : positions[-1] + 1]
        return rows[positions]

    return Vectors(len(rows), read)


def main(out: Path, seconds_budget: float = 60.0) -> dict:
    """Write out/gpu_duplicates.json: for each size seconds, GPU and host memory, pairs, recall and precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began, cases = time.perf_counter(), []
    for size in SIZES if device == "cuda" else (70_000,):
        left = seconds_budget - (time.perf_counter() - began)
        if device == "cuda" and left < size * SECONDS_PER_ROW:
            cases.append({"rows": size, "left out": f"{left:.0f} s of the budget left"})
            continue
        start = time.perf_counter()
        rows, original, copy, cosine = clustered(size, device)
        made = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pairs = find_pairs(reader(rows), COSINE, None, Progress(), device=device)
        seconds = time.perf_counter() - start
        low, high = np.minimum(original, copy), np.maximum(original, copy)
        found = np.isin(low * size + high, pairs.i * size + pairs.j)
        above, below = cosine >= COSINE + 1e-6, cosine < COSINE - 1e-6
        near, _ = reader(rows).compare(pairs.i, pairs.j, device)
        case = {
            "rows": size,
            "seconds": round(seconds, 2),
            "rows per second": round(size / seconds),
            "made in seconds": round(made, 1),
            "every pair compared": pairs.recall is None and pairs.lists == 0,
            "lists looked into": pairs.lists,
            "pairs": len(pairs),
            "planted above the threshold": int(above.sum()),
            "recall of planted": round(float(found[above].mean()), 5),
            "recall measured by the search itself": pairs.recall,
            "planted below, yet found": int(found[below].sum()),
            "least cosine of a pair found": round(float(near.min()), 6) if len(near) else None,
        }
        if device == "cuda":
            case["GPU memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        cases.append(case)
        print(json.dumps(case), flush=True)
        del rows
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result = {"device": name, "torch": torch.__version__, "dim": DIM, "cosine": COSINE, "cases": cases}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_duplicates.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(Path("gpu-duplicates"))
