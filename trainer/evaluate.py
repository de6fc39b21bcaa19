"""How good a prior's image embeddings are, measured in embedding space. Called by loop.py, stages.py and the lab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipeline.cache.store import Store
from ..pipeline.core.errors import EclipseError
from ..pipeline.core.seeds import stream_seed
from .data.batches import read_batch
from .data.feeds import StatesFrom
from .data.live_text import live_text
from .data.split import split
from .data.verify import READ
from .distributed import DistEnv
from .model.prior import Prior, load_prior, sample

if TYPE_CHECKING:
    from ..pipeline.core.progress import Progress
    from ..pipeline.core.workspace import Workspace
    from .model.diffusion import DiffusionPrior

CHUNK = 256
SHOWN, SHOWN_NEAREST = 12, 4  # captions on the page, and the pictures that their predictions find
VERIFIED_BYTES = 16 << 30  # some seconds; what a larger cache holds was verified by `train`, and its sizes still are
FEWEST_ROWS = 20  # below, whether the true image is found says little about chance


def embedding_metrics(
    prior: Prior | DiffusionPrior,
    store: Store,
    rows: np.ndarray,
    seed: int,
    *,
    states_from: StatesFrom | None = None,
    world: DistEnv | None = None,
    half: bool = False,
) -> dict[str, float]:
    """Compare the prior's embeddings for the captions of rows (n,) with those of the true images.

    cosine_image: cosine of prediction and true image. similarity_own: of prediction and its caption's embedding, with
    that of the true images, similarity_true_image, and of the predictions with others' captions, similarity_shuffled,
    beside it. recall_k: how often the true image is among the k nearest of all n; text_recall_1: the same for the raw
    text embedding, whose cosine_image is similarity_true_image. mean_cosine_image: of the best constant, the mean of
    these very images' unit vectors. chance_recall_1: 1/n. norm_ratio: length of predictions over that of true images. A
    row's noise depends on seed and row alone.

    world: processes that share the rows out, every one of them calling; all get the same figures. half: predict in
    bfloat16, as training does.
    """
    device, world = prior.prd_embedding.device, world or DistEnv(0, 1, prior.prd_embedding.device)
    # Equal shares, so that they can be gathered: the last ones begin with the first rows again.
    share = -(-len(rows) // world.size)
    own = np.resize(rows, share * world.size)[world.rank * share : (world.rank + 1) * share]
    predictions, images, texts = [], [], []
    for chunk in np.array_split(own, max(1, -(-len(own) // CHUNK))):
        batch = read_batch(store, chunk, device=device, states_from=states_from)
        seeds = [stream_seed("validation noise", seed, row) for row in chunk]
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            predictions.append(sample(prior, batch.text_embedding, batch.text, seed=seeds))
        images.append(batch.image_embedding)
        texts.append(batch.text_embedding)
    prediction, image, text = (world.gather(torch.cat(x).float())[: len(rows)] for x in (predictions, images, texts))
    lengths = prediction.norm(dim=1) / image.norm(dim=1)
    prediction, image, text = (F.normalize(x, dim=1) for x in (prediction, image, text))
    ranks = _ranks(prediction, image)
    return {
        "cosine_image": (prediction * image).sum(1).mean().item(),
        "similarity_own": (prediction * text).sum(1).mean().item(),
        "similarity_true_image": (image * text).sum(1).mean().item(),
        "similarity_shuffled": (prediction * text[_others(len(rows), seed)]).sum(1).mean().item(),
        **{f"recall_{k}": (ranks < k).float().mean().item() for k in (1, 5, 10)},
        "text_recall_1": (_ranks(text, image) < 1).float().mean().item(),
        "mean_cosine_image": image.mean(0).norm().item(),  # of unit vectors, their mean's length is just that
        "chance_recall_1": 1 / len(rows),
        "norm_ratio": lengths.mean().item(),
    }


def beside_baselines(metrics: Mapping[str, float]) -> dict[str, Any]:
    """What `embedding_metrics` found as a table, prior and baselines, and a warning for each baseline not beaten.

    Three predictors need no training: one constant for every caption, the caption's own text embedding, and a guess.
    """
    table: dict[str, dict[str, float]] = {
        "prior": {"cosine_to_image": metrics["cosine_image"], "recall_at_1": metrics["recall_1"]},
        "constant mean embedding": {"cosine_to_image": metrics["mean_cosine_image"]},
        "raw text embedding": {
            "cosine_to_image": metrics["similarity_true_image"],
            "recall_at_1": metrics["text_recall_1"],
        },
        "chance": {"recall_at_1": metrics["chance_recall_1"]},
    }
    return {"beside_baselines": table, "warnings": unbeaten(table, round(1 / metrics["chance_recall_1"]))}


def unbeaten(table: Mapping[str, Mapping[str, float]], rows: int) -> list[str]:
    """A sentence for each baseline of the table that its row `prior` does not beat. rows: how many were measured."""
    named = {"cosine_to_image": "cosine to the true image", "recall_at_1": "share of true images found first"}
    prior, found = table["prior"], []
    for baseline in ("constant mean embedding", "raw text embedding"):
        for figure, theirs in table[baseline].items():
            if prior[figure] <= theirs:
                found.append(
                    f"the prior does not beat the {baseline}: its {named[figure]} is {prior[figure]:.3f}, not above"
                    f" {theirs:.3f}"
                )
    # By chance one of n is found on average, and one more or less is its standard deviation.
    if rows >= FEWEST_ROWS and prior["recall_at_1"] * rows <= 3:
        hits = round(prior["recall_at_1"] * rows)
        found.append(f"the prior finds the true image first in {hits} of {rows:,} rows, which is chance")
    return found


def evaluate(ws: Workspace, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """The stage for cards whose pictures cannot be read back: the trained prior on the rows held back from training."""
    with ws.stage("evaluate", overwrite=overwrite) as run:
        if not run.complete:
            run.begin()
            summary, page = _measure(ws, progress)
            run.finish(summary, report=page)
    return run.summary


def _measure(ws: Workspace, progress: Progress) -> tuple[dict[str, Any], Path]:
    final = ws.prior / "final"
    if not final.is_dir():
        raise EclipseError("there is no trained prior", where=str(final), hint="run `eclipse train` first")
    card, store = ws.card, Store.open(ws.embeddings)
    if store.page_bytes(READ) <= VERIFIED_BYTES:
        store.verify(progress, columns=READ)
    _, held_back = split(store, ws.selection, card.train.validation)
    chosen = np.sort(np.random.default_rng(card.evaluate.seed).permutation(held_back)[: card.evaluate.rows])
    progress.say(f"measuring on {len(chosen):,} rows that were not trained on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states_from = live_text(store, card.encoder, device)
    prior, seed = load_prior(final, device), card.evaluate.seed
    metrics = embedding_metrics(prior, store, chosen, seed, states_from=states_from)
    summary = {"rows": len(chosen), **metrics, **beside_baselines(metrics)}
    from ..pipeline.report.evaluate import evaluate_page

    some = np.sort(some_captions(chosen, seed, SHOWN))
    found, cosine = nearest_pictures(prior, store, some, chosen, seed, SHOWN_NEAREST, states_from=states_from)
    return summary, evaluate_page(ws, store, summary, some, found, cosine)


def some_captions(rows: np.ndarray, seed: int, most: int) -> np.ndarray:
    """At most so many of the rows (n,), at random, for showing what a prior makes of their captions."""
    return rows[np.random.default_rng(seed).permutation(len(rows))[:most]]


def nearest_pictures(
    prior: Prior | DiffusionPrior,
    store: Store,
    captions: np.ndarray,
    among: np.ndarray,
    seed: int,
    most: int,
    *,
    states_from: StatesFrom | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """For the captions of rows (n,): the rows of `among` whose true embeddings are nearest to what the prior predicts,
    the nearest first, and their cosines, (n, ≤ most) both. Noise is that of `embedding_metrics`.
    """
    batch = read_batch(store, captions, device=prior.prd_embedding.device, states_from=states_from)
    seeds = [stream_seed("validation noise", seed, row) for row in captions]
    predicted = F.normalize(sample(prior, batch.text_embedding, batch.text, seed=seeds).float().cpu(), dim=1)
    images = F.normalize(torch.from_numpy(store.image_embeddings(among)).float(), dim=1)
    cosine, nearest = (predicted @ images.T).topk(min(most, len(among)))
    return among[nearest.numpy()], cosine.numpy()


def _ranks(queries: Tensor, images: Tensor) -> Tensor:
    """(n,) images nearer to query i than image i is; copies of it do not count. Both normalised, (n, D)."""
    own = (queries * images).sum(1, keepdim=True)
    # A product of matrices rounds otherwise than a sum of products: without slack, a row could lose to itself.
    return torch.cat([(part @ images.T > mine + 1e-6).sum(1) for part, mine in _chunks(queries, own)])


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(1024) for tensor in tensors), strict=True))


def _others(n: int, seed: int) -> np.ndarray:
    """(n,) for each row another one, at random, every row once."""
    order = np.random.default_rng(stream_seed("others' captions", seed)).permutation(n)
    others = np.empty(n, np.int64)
    others[order] = np.roll(order, 1)
    return others
