"""One step of training the decoder on a device, UNet and MoVQ's decoder half, all examples drawn from what is resident
there. Called by `build_further`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..pipeline.core.card import MODELS
from .build_movq import LATENT_CHANNELS, decode
from .build_unet import RETOLD, Phase, Recipe, new_scheduler
from .build_unet import load as load_unet
from .graphs import captured

RECIPE = Recipe(31, 512, 1e-3, (Phase(0, 0.05, 0.1, 0.3, 0.6, retold_share=0.3, crowded_share=0.4),))


@dataclass
class Rows:
    """Row numbers (N,) int64 on the device, of which the first `filled` () are there yet."""

    numbers: Tensor
    filled: Tensor

    def draw(self, count: int) -> Tensor:
        """(count,) of them at random, with replacement."""
        at = (torch.rand(count, device=self.numbers.device) * self.filled).long()
        return self.numbers[at.clamp(max=len(self.numbers) - 1)]


@dataclass
class Examples:
    """What the UNet learns from, resident on the device: latents (N, 4, 16, 16) and embedding (N, 128) float16 of
    pictures; retold (M, RETOLD, 128) float16 and retold_of (N,) int64, the row of `retold` of a picture that has one.
    Lists of rows: every picture, the crowded ones, and both again of those that are retold.
    """

    latents: Tensor
    embedding: Tensor
    retold: Tensor
    retold_of: Tensor
    every: Rows
    crowded: Rows
    told: Rows
    told_crowded: Rows
    negative: Tensor  # (1, 128) embedding of the all-zero picture
    spread: Tensor  # (128,) standard deviation of the embeddings


class Step:
    """AdamW with averaged weights around a loss; on a GPU one captured graph in bfloat16."""

    def __init__(
        self, trained: Sequence[nn.Parameter], loss: Callable[[], Tensor], *, weight_decay: float, ema: float
    ) -> None:
        self.parameters, self.loss, self.ema = list(trained), loss, ema
        device = self.parameters[0].device
        self.average = [p.detach().clone() for p in self.parameters]
        self.rate, self.last_loss = torch.zeros((), device=device), torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            self.rate if on_gpu else 1e-3,
            (0.9, 0.98),
            weight_decay=weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        if on_gpu:  # the very tensor that the captured graph reads
            self.rate = self._optimizer.param_groups[0]["lr"]
        self._replay: Callable[[], None] | None = None

    def __call__(self, rate: float) -> None:
        """One update at this learning rate."""
        self.rate.fill_(rate)
        if not self.rate.is_cuda:
            self._optimizer.param_groups[0]["lr"] = rate
        if self._replay is None:
            self._replay = captured(self._update, self._state)
        self._replay()

    def _update(self) -> None:
        device = self.rate.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            loss = self.loss()
        gradients = torch.autograd.grad(loss, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            self.last_loss.copy_(loss)
            get_ema_multi_avg_fn(self.ema)(self.average, [p.detach() for p in self.parameters], 0)

    def _state(self) -> list[Tensor]:
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        return [*self.parameters, *self.average, *moments]

    @torch.no_grad()
    def use_average(self) -> None:
        """The averaged weights take the place of the last ones."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def unet_loss(unet: Callable[..., Any], examples: Examples, recipe: Recipe) -> Callable[[], Tensor]:
    """The loss of `build_unet`, its examples drawn on the device; the recipe's last phase."""
    phase, batch, device = recipe.phases[-1], recipe.batch, examples.latents.device
    told = round(batch * phase.retold_share)
    told_crowded, crowded = round(told * phase.crowded_share), round((batch - told) * phase.crowded_share)
    kept = new_scheduler().alphas_cumprod.to(device)

    def loss() -> Tensor:
        rows = torch.cat([
            examples.told.draw(told - told_crowded), examples.told_crowded.draw(told_crowded),
            examples.crowded.draw(crowded), examples.every.draw(batch - told - crowded),
        ])  # fmt: skip
        clean, own = examples.latents[rows].float(), examples.embedding[rows].float()
        others = examples.retold[examples.retold_of[rows[:told]]].float()
        number = torch.randint(3, RETOLD + 1, (told, 1), device=device)
        share = (torch.arange(RETOLD, device=device) < number).float() / number
        condition = torch.cat([torch.einsum("bk,bkd->bd", share, others), own[told:]])

        def one_in(share: float) -> Tensor:
            return torch.rand(batch, 1, device=device) < share

        level = torch.rand(batch, 1, device=device) * phase.noise * one_in(phase.noisy_share)
        condition = condition + level * examples.spread * torch.randn_like(condition)
        condition = torch.where(one_in(phase.negative_share), examples.negative, condition)
        times = (1000 * torch.rand(batch, device=device) ** phase.time_power).long().clamp(max=999)
        signal = kept[times].sqrt()[:, None, None, None]
        spoilt = (1 - kept[times]).sqrt()[:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = (signal * clean + spoilt * noise).contiguous(memory_format=torch.channels_last)
        guess = unet(noisy, times, None, added_cond_kwargs={"image_embeds": condition}).sample[:, :LATENT_CHANNELS]  # type: ignore[arg-type]
        return F.mse_loss(guess.float(), signal * noise - spoilt * clean)

    return loss


def movq_loss(
    movq: VQModel, latents: Tensor, pixels: Tensor, there: Rows, batch: int, noise: float
) -> Callable[[], Tensor]:
    """The loss of `build_movq.refine`: latents (N, 4, 16, 16) float16 → pixels (N, 64, 64, 3) uint8."""

    def loss() -> Tensor:
        rows = there.draw(batch)
        truth = (pixels[rows].permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
        clean = latents[rows].float()
        seen = decode(movq, clean + noise * torch.randn_like(clean)).float()
        objects = ((truth - truth[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.12).float()
        close = ((seen - truth).abs() * (1 + 3 * objects)).mean()
        return close + sum((seen.diff(dim=d) - truth.diff(dim=d)).abs().mean() for d in (2, 3))

    return loss


def unet_step(examples: Examples, batch: int, device: str) -> tuple[Step, Any]:
    """A step of the shipped UNet's further training, and the UNet."""
    unet: Any = load_unet(MODELS / "decoder" / "unet").to(device, memory_format=torch.channels_last).train()  # type: ignore[call-arg]
    recipe = Recipe(RECIPE.seed, batch, RECIPE.learning_rate, RECIPE.phases)
    return Step(unet.parameters(), unet_loss(unet, examples, recipe), weight_decay=0.01, ema=0.999), unet


def movq_step(movq: Any, examples: Examples, pixels: Tensor, batch: int) -> Step:
    """A step of the further training of the MoVQ's decoder half."""
    movq.requires_grad_(False)
    trained = [*movq.decoder.parameters(), *movq.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    used = [p for n, p in movq.named_parameters() if p.requires_grad]
    return Step(
        used, movq_loss(movq, examples.latents, pixels, examples.every, batch, 0.05), weight_decay=0.0, ema=0.999
    )
