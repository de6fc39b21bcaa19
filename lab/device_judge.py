"""Judges embeddings by pixel while a GPU trains: decodes them in one captured graph, checks on the machine's cores.

Called by `build_further`. The prompts are a validation set of their own: none of them is one that `evaluate` asks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import PriorConfig
from .bank import padded_states
from .build_movq import LATENT_CHANNELS, decode
from .build_unet import new_scheduler
from .checker import judge, read_all
from .ensemble import LENGTHS, Ensemble, forward
from .graphs import captured
from .score import SPLITS, category_means
from .shapes import CATEGORIES, VALIDATION, Prompt, World
from .truth import evaluation_texts

EVALUATED = 400  # prompts of a category and split that `evaluate` may ask and that nothing here is trained or tried on
STEPS, GUIDANCE = 10, 2.0  # of the card when the levers were tried
_NOISE = 41
_READ_AT_ONCE = 16


def validation_prompts(world: World, each: int) -> list[Prompt]:
    """`each` prompts of every category and split, from a stream of their own, without those of the evaluation."""
    asked = evaluation_texts(world, EVALUATED)
    found: list[Prompt] = []
    for category in CATEGORIES:
        for split in SPLITS:
            some = world.prompts(category, 4 * each + 40, split, VALIDATION)
            found += [p for p in some if p.text not in asked][:each]
    return found


class PromptTexts:
    """Features of prompts on the device, by length class. order: prompt numbers in the order of the classes."""

    def __init__(self, encoder: Encoder, prompts: Sequence[Prompt], device: str) -> None:
        tokens, lengths = encoder.tokenize([p.text for p in prompts])
        ids, n_tokens = tokens.numpy(), lengths.numpy()
        order, text, self.states, self.lengths = [], [], [], []
        for c, longest in enumerate(LENGTHS):
            rows = np.flatnonzero((n_tokens > (LENGTHS[c - 1] if c else 0)) & (n_tokens <= longest))
            if not len(rows):
                continue
            pooled, states = padded_states(encoder, ids[rows], n_tokens[rows], longest, device)
            order.append(rows)
            text.append(pooled)
            self.states.append(states)
            self.lengths.append(torch.from_numpy(n_tokens[rows]).to(device))
        self.text, self.order = torch.cat(text), torch.from_numpy(np.concatenate(order)).to(device)
        generator = torch.Generator().manual_seed(_NOISE)
        self.noise = torch.randn(len(prompts), encoder.embedding_dim, generator=generator).to(device)

    @torch.no_grad()
    def predicted(self, ensemble: Ensemble) -> Tensor:
        """(K, P, D) predictions of every member's averaged weights, in the order of the prompts."""
        k, config = len(ensemble.flat), ensemble.config
        views = ensemble.views(ensemble.average)
        out = torch.empty(k, *self.noise.shape, device=self.noise.device)
        out[:, self.order] = self._forward(config, views, k)
        return out

    def _forward(self, config: PriorConfig, views: dict[str, Tensor], k: int) -> Tensor:
        noise, text = self.noise[self.order].expand(k, -1, -1), self.text.float().expand(k, -1, -1)
        states = [s.float().expand(k, -1, -1, -1) for s in self.states]
        return forward(config, views, noise, text, states, [n.expand(k, -1) for n in self.lengths])


class Sampler:
    """P embeddings → P pictures, every picture's noise the same each time: Kandinsky's pipeline with its DDPM steps."""

    def __init__(self, unet: Any, movq: Any, negative: Tensor, count: int, steps: int = STEPS) -> None:
        device = negative.device
        self.unet, self.movq, self.negative = unet, movq, negative
        generator = torch.Generator().manual_seed(_NOISE)
        self.noise = torch.randn(steps + 1, count, LATENT_CHANNELS, 16, 16, generator=generator).to(device)
        self.condition = torch.zeros(count, negative.shape[-1], device=device)
        self.pictures = torch.zeros(count, 64, 64, 3, dtype=torch.uint8, device=device)
        self.guidance = torch.tensor(GUIDANCE, device=device)
        scheduler = new_scheduler()
        scheduler.set_timesteps(steps)
        self._kept = scheduler.alphas_cumprod.double()
        self._times = [int(t) for t in scheduler.timesteps]
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def __call__(self, embedding: Tensor, guidance: float = GUIDANCE) -> Tensor:
        """`pictures` (P, 64, 64, 3) uint8, to be copied before the next call."""
        self.condition.copy_(embedding)
        self.guidance.fill_(guidance)
        if self._replay is None:
            self._replay = captured(self._sample, lambda: [self.pictures])
        self._replay()
        return self.pictures

    def _sample(self) -> None:
        with torch.no_grad():
            dtype = next(self.unet.parameters()).dtype
            condition = torch.cat([self.negative.expand_as(self.condition), self.condition]).to(dtype)
            x = self.noise[0]
            for i, t in enumerate(self._times):
                both = torch.cat([x, x]).to(dtype).contiguous(memory_format=torch.channels_last)
                time = torch.full((len(both),), t, device=x.device)
                guess = self.unet(both, time, None, added_cond_kwargs={"image_embeds": condition}).sample
                without, given = guess[:, :LATENT_CHANNELS].float().chunk(2)
                velocity = without + self.guidance * (given - without)
                # DDPM (Ho et al. 2020, eqs. 6 and 7) from time t to the next one, of v-prediction.
                now = self._kept[t].item()
                then = self._kept[self._times[i + 1]].item() if i + 1 < len(self._times) else 1.0
                share = now / then
                clean = now**0.5 * x - (1 - now) ** 0.5 * velocity
                x = then**0.5 * (1 - share) / (1 - now) * clean + share**0.5 * (1 - then) / (1 - now) * x
                if i + 1 < len(self._times):
                    x = x + (max((1 - then) / (1 - now) * (1 - share), 1e-20)) ** 0.5 * self.noise[i + 1]
            shown = decode(self.movq, x.to(dtype).contiguous(memory_format=torch.channels_last)).float()
            self.pictures.copy_((shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


_PROMPTS: Sequence[Prompt]


def judges(prompts: Sequence[Prompt], processes: int) -> Pool:
    """Processes that read pictures and judge them. Start them before anything runs on a GPU."""
    global _PROMPTS
    _PROMPTS = prompts
    return multiprocessing.get_context("fork").Pool(processes)


def _judged(job: tuple[int, np.ndarray]) -> list[float]:
    first, pictures = job
    return [judge(reading, _PROMPTS[first + i]).score for i, reading in enumerate(read_all(pictures))]


@dataclass
class _Pending:
    name: str
    shown: Tensor
    done: torch.cuda.Event | None
    found: AsyncResult[list[list[float]]] | None = None


@dataclass
class Judge:
    """Scores by name, found in the background: `submit` queues work on the GPU, `poll` moves what is ready on."""

    prompts: Sequence[Prompt]
    pool: Pool
    scores: dict[str, list[float]] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)

    def submit(self, name: str, sampler: Sampler, embedding: Tensor, guidance: float = GUIDANCE) -> None:
        """Decode P embeddings on the current stream; on a GPU the caller goes on at once."""
        pictures = sampler(embedding, guidance)
        if not pictures.is_cuda:
            self._pending.append(_Pending(name, pictures.clone(), None))
            return
        shown = torch.empty(pictures.shape, dtype=torch.uint8, pin_memory=True)
        shown.copy_(pictures, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._pending.append(_Pending(name, shown, done))

    def poll(self) -> list[str]:
        """Names whose scores have just been found."""
        fresh = []
        for pending in list(self._pending):
            if pending.found is None and (pending.done is None or pending.done.query()):
                shown = pending.shown.numpy()
                jobs = [(i, shown[i : i + _READ_AT_ONCE]) for i in range(0, len(shown), _READ_AT_ONCE)]
                pending.found = self.pool.map_async(_judged, jobs, chunksize=1)
            if pending.found is not None and pending.found.ready():
                self._pending.remove(pending)
                self.scores[pending.name] = [score for some in pending.found.get() for score in some]
                fresh.append(pending.name)
        return fresh

    @property
    def waiting(self) -> int:
        return len(self._pending)

    def table(self, name: str) -> dict[str, dict[str, float]]:
        """Mean score, category (and mean) → split."""
        means = category_means(self.prompts, self.scores[name])
        return {c: {split: round(value, 4) for split, value in row.items()} for c, row in means.items()}
