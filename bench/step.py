"""A training step on the CPU: ours on packed captions, beside the plain way on padded ones.

The plain way is diffusers' own transformer blocks over captions padded to 77 tokens, fed by a DataLoader over a Hugging
Face dataset of padded rows. Both get the same rows, noise, weights, objective and optimizer, and take turns.
Run: uv run --with datasets python -m eclipse.bench.step
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.cache.store import Store
from ..trainer.data.batches import Batches
from ..trainer.loss import Draw, Objective
from ..trainer.model.prior import PRESETS, Prior
from ..trainer.model.transformer import PackedText
from .made_cache import make_cache
from .padded import PaddedPrior, pad
from .results import arguments, hardware, record, table

PRESET, ROWS = "kandinsky22", 1024
OBJECTIVE = Objective(0.2, 0.01, "mean")
CURVE_BATCH, CURVE_STEPS = 4, 50
ROUNDS = 3


class Contender:
    """A network, its optimizer and its feed; `step` is one whole training step."""

    def __init__(self, network: nn.Module, feed: Iterator[tuple[Tensor, Tensor, Any]], predict: Callable) -> None:
        self.network, self.feed, self.predict = network, feed, predict
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)
        self.taken = 0

    def step(self) -> float:
        """Feed, forward, backward, clip, update: the loss."""
        image, text, states = next(self.feed)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(self.taken))
        terms = OBJECTIVE(self.predict, image, text, states, Draw(noise, torch.empty(0)), text, 0)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        return terms["loss"].item()


def contenders(store: Store, batch_size: int, scratch: Path) -> tuple[Contender, Contender, Batches]:
    """Ours and the plain way, from the same start; and our feed, which is to be closed."""
    torch.manual_seed(0)
    prior = Prior(PRESETS[PRESET])
    padded = PaddedPrior.like(prior)
    batches = Batches(store, np.arange(len(store)), batch_size, seed=0)
    ours = Contender(prior, ((b.image_embedding, b.text_embedding, b.text) for b in batches), prior)
    plain = Contender(padded, padded_feed(store, batch_size, scratch), lambda e, t, states: padded(e, t, *states))
    return ours, plain, batches


def padded_feed(store: Store, batch_size: int, scratch: Path) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """The rows of our batches, through a DataLoader with one worker over a Hugging Face dataset of padded rows."""
    import datasets  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    folder = scratch / "padded"
    if not folder.exists():
        datasets.disable_progress_bars()
        shape = (77, store.text_width)
        features = datasets.Features(
            image=datasets.Array2D((1, store.embedding_dim), "float16"),
            text=datasets.Array2D((1, store.embedding_dim), "float16"),
            states=datasets.Array2D(shape, "float16"),
            n_tokens=datasets.Value("int64"),
        )
        made: Any = datasets.Dataset.from_generator(
            padded_rows, gen_kwargs={"folder": scratch / "cache"}, features=features, cache_dir=str(scratch / "hf")
        )
        made.save_to_disk(folder)
    rows: Any = datasets.load_from_disk(folder).with_format("torch")
    with Batches(store, np.arange(len(store)), batch_size, seed=0) as order:
        wanted = [next(order).rows.tolist() for _ in range(CURVE_STEPS)]
    for batch in DataLoader(rows, batch_sampler=wanted, num_workers=1):
        mask = torch.arange(77)[None] < batch["n_tokens"][:, None]
        image, text, states = (batch[name].float() for name in ("image", "text", "states"))
        yield image[:, 0], text[:, 0], (states, mask)


def padded_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every row as a padding trainer stores it."""
    store = Store.open(folder)
    for start in range(0, len(store), 128):
        rows = np.arange(start, min(start + 128, len(store)))
        states, offsets = store.token_states(rows)
        padded, _ = pad(PackedText(torch.from_numpy(states), torch.from_numpy(offsets)))
        images, texts = store.image_embeddings(rows), store.text_embeddings(rows)
        for i in range(len(rows)):
            n = int(offsets[i + 1] - offsets[i])
            yield {"image": images[i : i + 1], "text": texts[i : i + 1], "states": padded[i].numpy(), "n_tokens": n}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    machine = hardware()
    with tempfile.TemporaryDirectory() as scratch:
        store = make_cache(Path(scratch) / "cache", ROWS, PRESETS[PRESET].embedding_dim)
        ours, plain, batches = contenders(store, CURVE_BATCH, Path(scratch))
        with batches:
            curves = np.array([(ours.step(), plain.step()) for _ in range(CURVE_STEPS)])
        ours, plain, batches = contenders(store, options.batch, Path(scratch))
        seconds = {"packed": [], "padded": []}
        with batches:
            for _ in range(ROUNDS + 1):
                for name, contender in (("packed", ours), ("padded", plain)):
                    began, busy = time.perf_counter(), time.process_time()
                    contender.step()
                    seconds[name].append((time.perf_counter() - began, time.process_time() - busy))
    # The first turn warms up; the best of each kind counts.
    wall, cpu = (
        {name: options.batch / min(t[k] for t in times[1:]) for name, times in seconds.items()} for k in (0, 1)
    )
    difference = np.abs(curves[:, 0] - curves[:, 1]).max()
    tokens = float(store.token_counts().mean())
    body = table(
        ["34 M parameters, float32", "samples/s", "×", "samples per second of CPU time", "×"],
        [
            [
                name,
                f"{wall[key]:.2f}",
                f"{wall[key] / wall['padded']:.2f}",
                f"{cpu[key]:.2f}",
                f"{cpu[key] / cpu['padded']:.2f}",
            ]
            for name, key in (
                ("eclipse: packed captions, memory-mapped store", "packed"),
                ("diffusers' blocks, 77 tokens, DataLoader over datasets", "padded"),
            )
        ],
    )
    body += (
        f"\n\nCPU time leaves out the DataLoader's worker, and what other work on the machine took. Losses of the first"
        f" {CURVE_STEPS} steps at batch {CURVE_BATCH} go from {curves[0, 0]:.4f} to {curves[-1, 0]:.4f};"
        f" the two differ by at most {difference:.1e}. On a GPU: not measured."
    )
    settings = {"batch": options.batch, "tokens a caption": f"{tokens:.1f}", "threads": torch.get_num_threads()}
    record("python -m eclipse.bench.step", "Training step", body, settings, machine, options.results)


if __name__ == "__main__":
    main()
