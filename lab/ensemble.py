"""Trains several priors of one shape side by side: a step is one set of batched kernels, on a GPU one captured graph.

Called by `build_models` for the reference prior (one member) and for the table of levers (one member a seed). The
network, objective and optimizers are those of `trainer`, and the weights are exchanged with `trainer.model.prior`;
what differs is the layout: captions are padded to the width of their length class, since a captured graph's shapes are
fixed, where the trainer packs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..trainer.model.prior import Prior, PriorConfig
from ..trainer.optim import MOMENTUM, RMS, orthogonalised
from .graphs import captured

LENGTHS = (13, 21, 37, 53)  # longest caption of each class, in tokens: with the 3 special ones, multiples of 8
SPECIALS = 3
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Settings:
    """How an ensemble is trained; names and defaults as in a card's train section."""

    steps: int
    batch_size: int = 64
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 6e-3
    warmup: int = 50
    weight_decay: float = 0.01
    contrastive_weight: float = 0.2
    temperature: float = 0.01
    ema: float = 0.98
    clip_gradient: float = 1.0
    half: bool = False  # matrix products in bfloat16


@dataclass
class Pairs:
    """Pairs on the device, by length class. image (P, D) float16: one row per picture; text[c] (n, D) float16, pooled;
    states[c] (n, LENGTHS[c], W) float16, zero after the end; lengths[c] and picture[c] (n,) int64, rows of image.
    filled[c]: how many rows are there yet, on the device, so that a captured graph sees more arrive.
    """

    image: Tensor
    text: list[Tensor]
    states: list[Tensor]
    lengths: list[Tensor]
    picture: list[Tensor]
    filled: Tensor

    def shares(self, batch_size: int, counts: list[int] | None = None) -> list[int]:
        """Rows of each class in a batch, about proportional to the pairs there are; every class has one."""
        counts = counts or self.filled.tolist()
        rows = [max(1, round(batch_size * n / sum(counts))) if n else 0 for n in counts]
        rows[rows.index(max(rows))] += batch_size - sum(rows)
        return rows


class Ensemble:
    """K priors of one config under K seeds. All trained numbers of a member lie in one row of `flat` (K, P)."""

    def __init__(self, config: PriorConfig, seeds: list[int], device: str) -> None:
        self.config, self.seeds = config, seeds
        members = []
        for seed in seeds:
            torch.manual_seed(seed)
            members.append(Prior(config))
        self.shapes = {n: p.shape for n, p in members[0].named_parameters() if p.requires_grad}
        linear = {f"{n}.weight" for n, m in members[0].named_modules() if isinstance(m, torch.nn.Linear)}
        # Matrices of one shape lie side by side, so that Muon orthogonalises them in one product.
        order = sorted(self.shapes, key=lambda n: (n not in linear, tuple(self.shapes[n]) if n in linear else ()))
        self.shapes = {n: self.shapes[n] for n in order}
        self.matrices = [n for n in order if n in linear]
        self.flat = torch.stack(
            [torch.cat([dict(m.named_parameters())[n].detach().flatten() for n in order]) for m in members]
        )
        self.flat = self.flat.to(device)
        self.average = self.flat.clone()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """name → (K, *shape) views of rows (K, P)."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = flat.split(sizes, dim=1)
        return {n: part.unflatten(1, shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def load(self, prior: Prior) -> None:
        """Every member starts from these weights."""
        row = torch.cat([prior.state_dict()[n].flatten() for n in self.shapes]).to(self.flat)
        self.flat.copy_(row.expand_as(self.flat))
        self.average.copy_(self.flat)

    def member(self, k: int, average: Tensor | None = None) -> Prior:
        """Member k with its averaged weights, as the trainer's class, on the CPU."""
        prior = Prior(self.config)
        rows = {
            n: v[k].detach().cpu().clone() for n, v in self.views(self.average if average is None else average).items()
        }
        prior.load_state_dict(rows, strict=False)
        return prior.eval()


def forward(
    config: PriorConfig, p: dict[str, Tensor], noise: Tensor, text: Tensor, states: list[Tensor], lengths: list[Tensor]
) -> Tensor:
    """Predictions (K, B, D) of K members for K batches. noise, text (K, B, D); states[c] (K, b_c, L_c, W);
    lengths[c] (K, b_c); the b_c add up to B, in the order of the classes. `Prior.forward`, padded.
    """
    heads, k = config.num_attention_heads, len(noise)
    counts = [s.shape[1] for s in states]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.baddbmm(p[f"{name}.bias"][:, None], x, p[f"{name}.weight"].transpose(1, 2))

    def norm(x: Tensor, name: str) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        return normed * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

    positions = p["positional_embedding"][:, 0]
    prd = p["prd_embedding"][:, 0].expand(k, noise.shape[1], -1)
    special = torch.stack([linear(text, "embedding_proj"), linear(noise, "proj_in"), prd], 2)
    special = special + positions[:, None, config.num_embeddings : config.num_embeddings + SPECIALS]
    blocks, masks, widths = [], [], []
    for some, length, its in zip(states, lengths, special.split(counts, 1), strict=True):
        own = linear(some.flatten(1, 2), "encoder_hidden_states_proj").unflatten(1, some.shape[1:3])
        own = own + positions[:, None, : some.shape[2]]
        blocks.append(torch.cat([own, its], 2).flatten(1, 2))
        width = some.shape[2] + SPECIALS
        place = torch.arange(width, device=noise.device)
        real = (place < length[..., None]) | (place >= some.shape[2])
        masks.append((real[:, :, None] & (place <= place[:, None])).flatten(0, 1)[:, None])
        widths.append(width)
    x = torch.cat(blocks, 1)
    sizes = [n * w for n, w in zip(counts, widths, strict=True)]

    def attend(q: Tensor, key: Tensor, value: Tensor, last: bool) -> Tensor:
        queries = q.split(counts if last else sizes, 1)
        out = []
        for qs, ks, vs, mask, n in zip(queries, key.split(sizes, 1), value.split(sizes, 1), masks, counts, strict=True):
            qs, ks, vs = (t.reshape(k * n, -1, heads, config.attention_head_dim).transpose(1, 2) for t in (qs, ks, vs))
            mask = mask[:, :, -1:] if last else mask
            if not qs.is_cuda:  # torch's attention in bfloat16 is ten times slower on a CPU than in float32
                qs, ks, vs = qs.float(), ks.float(), vs.float()
            found = F.scaled_dot_product_attention(qs, ks, vs, mask).to(q.dtype)
            out.append(found.transpose(1, 2).reshape(k, -1, config.width))
        return torch.cat(out, 1)

    def ends(x: Tensor) -> Tensor:
        parts = x.split(sizes, 1)
        return torch.cat([t.unflatten(1, (n, -1))[:, :, -1] for t, n in zip(parts, counts, strict=True)], 1)

    for i in range(config.num_layers):
        at, last = f"transformer_blocks.{i}", i == config.num_layers - 1
        normed = norm(x, f"{at}.norm1")
        key, value = linear(normed, f"{at}.attn1.to_k"), linear(normed, f"{at}.attn1.to_v")
        query = linear(ends(normed) if last else normed, f"{at}.attn1.to_q")
        x = (ends(x) if last else x) + linear(attend(query, key, value, last), f"{at}.attn1.to_out.0")
        inner = F.gelu(linear(norm(x, f"{at}.norm3"), f"{at}.ff.net.0.proj"))
        x = x + linear(inner, f"{at}.ff.net.2")
    return linear(norm(x, "norm_out"), "proj_to_clip_embeddings")


class Training:
    """One ensemble in training. `step()` is captured once on a GPU and replayed; on a CPU it simply runs.

    orders: for each class (K, rows) int64, which pair comes next under each seed; None: drawn at random from all that
    are there. rows: of each class in a batch; None: in proportion to the pairs there are. The K batches of a step are
    drawn independently of each other.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        settings: Settings,
        pairs: Pairs,
        orders: list[Tensor] | None = None,
        rows: list[int] | None = None,
    ) -> None:
        self.ensemble, self.settings, self.pairs, self.orders = ensemble, settings, pairs, orders
        flat = ensemble.flat
        self.device = flat.device
        self.moments = [torch.zeros_like(flat) for _ in range(2)]
        self.rows = rows or pairs.shares(settings.batch_size)
        self.number, self.rate = (torch.zeros((), device=self.device) for _ in range(2))
        self.losses = torch.zeros(2, len(flat), device=self.device)
        self._replay: Callable[[], None] | None = None
        self.done = 0
        # Muon owns the matrices, which come first in a row; AdamW the rest.
        self.muon_size = (
            sum(ensemble.shapes[n].numel() for n in ensemble.matrices) if settings.optimizer == "muon" else 0
        )

    def rate_at(self, progress: float) -> float:
        """Learning rate at a share of the training, warm-up left out: the trainer's cosine."""
        warm = min(1.0, (self.done + 1) / max(1, self.settings.warmup))
        return self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, progress: float | None = None) -> None:
        """One update of every member. progress: share of the training done, 0..1; None: by the settings' steps."""
        progress = self.done / self.settings.steps if progress is None else progress
        flat = self.ensemble.flat
        self.rate.fill_(self.rate_at(progress))
        if self._replay is None:
            self._replay = captured(self._update, lambda: [self.number, flat, self.ensemble.average, *self.moments])
        self._replay()
        self.done += 1

    def _batch(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        k, pairs = len(self.ensemble.flat), self.pairs
        image, text, states, lengths = [], [], [], []
        for c, n in enumerate(self.rows):
            if n == 0:
                continue
            if self.orders is None:
                rows = (torch.rand(k, n, device=self.device) * pairs.filled[c]).long().clamp(max=len(pairs.text[c]) - 1)
            else:
                at = (self.number.long() * n + torch.arange(n, device=self.device)) % self.orders[c].shape[1]
                rows = self.orders[c][:, at]
            image.append(pairs.image[pairs.picture[c][rows]])
            text.append(pairs.text[c][rows])
            states.append(pairs.states[c][rows])
            lengths.append(pairs.lengths[c][rows])
        return torch.cat(image, 1).float(), torch.cat(text, 1).float(), states, lengths

    def _update(self) -> None:
        settings, flat = self.settings, self.ensemble.flat
        target, text, states, lengths = self._batch()
        dtype = torch.bfloat16 if settings.half else torch.float32
        weights = flat.detach().requires_grad_()
        views = {n: v.to(dtype) for n, v in self.ensemble.views(weights).items()}
        noise = torch.randn_like(target)
        states = [s.to(dtype) for s in states]
        guess = forward(self.ensemble.config, views, noise.to(dtype), text.to(dtype), states, lengths).float()
        projection = (guess - target).square().mean((1, 2))
        logits = torch.bmm(F.normalize(guess, dim=2), F.normalize(text, dim=2).transpose(1, 2)) / settings.temperature
        own = torch.arange(logits.shape[1], device=self.device).expand(logits.shape[:2])
        contrastive = F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none").view_as(own).mean(1)
        self.losses.copy_(torch.stack([projection.detach(), contrastive.detach()]))
        (gradient,) = torch.autograd.grad((projection + settings.contrastive_weight * contrastive).sum(), weights)
        with torch.no_grad():
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (settings.clip_gradient / norm.clamp(min=settings.clip_gradient))
            self.number += 1
            self._adamw(gradient)
            if self.muon_size:
                self._muon(gradient)
            decay = torch.minimum((1 + self.number) / (10 + self.number), torch.full_like(self.number, settings.ema))
            self.ensemble.average.lerp_(flat, 1 - decay)

    def _adamw(self, gradient: Tensor) -> None:
        first, second = (m[:, self.muon_size :] for m in self.moments)
        own, flat = gradient[:, self.muon_size :], self.ensemble.flat[:, self.muon_size :]
        matrices = sum(self.ensemble.shapes[n].numel() for n in self.ensemble.matrices) - self.muon_size
        flat[:, :matrices].mul_(1 - self.rate * self.settings.weight_decay)
        first.lerp_(own, 1 - _BETAS[0])
        second.lerp_(own.square(), 1 - _BETAS[1])
        corrected = first / (1 - _BETAS[0] ** self.number)
        spread = (second / (1 - _BETAS[1] ** self.number)).sqrt() + _EPS
        flat.sub_(self.rate * corrected / spread)

    def _muon(self, gradient: Tensor) -> None:
        """Orthogonalised Nesterov momentum, scaled as AdamW's (match_rms_adamw); like shapes in one product."""
        momentum = self.moments[0][:, : self.muon_size]
        own, flat = gradient[:, : self.muon_size], self.ensemble.flat[:, : self.muon_size]
        momentum.lerp_(own, 1 - MOMENTUM)
        ahead = own.lerp(momentum, MOMENTUM)
        flat.mul_(1 - self.rate * self.settings.weight_decay)
        start, names = 0, self.ensemble.matrices
        while start < self.muon_size:
            shape = self.ensemble.shapes[names[0]]
            count = sum(1 for n in names if self.ensemble.shapes[n] == shape)
            stop, names = start + count * shape.numel(), names[count:]
            matrices = ahead[:, start:stop].unflatten(1, (count, *shape)).flatten(0, 1)
            update = orthogonalised(matrices, torch.bfloat16 if self.settings.half else torch.float32)
            update = update.reshape(len(flat), -1)
            flat[:, start:stop].sub_(self.rate * RMS * math.sqrt(max(shape)) * update)
            start = stop


def orders(
    pairs: Pairs, seeds: list[int], steps: int, rows: list[int], keep: Callable[[int], Tensor] | None = None
) -> list[Tensor]:
    """Orders for `Training`: every epoch a fresh permutation of each class, under each seed. keep: rows of a class."""
    out = []
    for c, n in enumerate(rows):
        device = pairs.lengths[c].device
        if n == 0:
            out.append(torch.zeros(len(seeds), 1, dtype=torch.int64, device=device))
            continue
        usable = torch.arange(int(pairs.filled[c]), device=device) if keep is None else keep(c)
        each = []
        for seed in seeds:
            generator = torch.Generator(device).manual_seed(1000 * seed + c)
            epochs = -(-steps * n // max(1, len(usable)))
            each.append(
                torch.cat(
                    [usable[torch.randperm(len(usable), generator=generator, device=device)] for _ in range(epochs)]
                )[: steps * n]
            )
        out.append(torch.stack(each))
    return out
