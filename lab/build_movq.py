"""Trains the lab's MoVQ (`VQModel`, spatial norm): 64×64 pictures ↔ 16×16×4 latents. Called by `build_models`.

Kandinsky's decoder hands MoVQ unquantised latents, so the reconstruction is trained on these; the codebook follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor
from torch.nn import functional as F

from .build_run import Pictures, Trainer

LATENT_CHANNELS = 4
BATCH = 32
_LATENT_NOISE = 0.05
_LEVELS = 3


def new_movq() -> VQModel:
    """The MoVQ's architecture, untrained: 0.2 M parameters."""
    return VQModel(
        down_block_types=["DownEncoderBlock2D"] * _LEVELS,  # type: ignore[arg-type]
        up_block_types=["UpDecoderBlock2D"] * _LEVELS,  # type: ignore[arg-type]
        block_out_channels=[32] * _LEVELS,  # type: ignore[arg-type]
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        num_vq_embeddings=1024,
        norm_num_groups=32,
        vq_embed_dim=LATENT_CHANNELS,
        norm_type="spatial",
        mid_block_add_attention=False,
    )


def encode(movq: VQModel, pictures: Tensor) -> Tensor:
    """Unquantised latents (B, 4, 16, 16) of pictures (B, 3, 64, 64) in 0..1."""
    return movq.quant_conv(movq.encoder(pictures * 2 - 1))


def decode(movq: VQModel, latents: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64), about 0..1, of unquantised latents."""
    return (movq.decoder(movq.post_quant_conv(latents), latents) + 1) / 2


def build(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train and write `folder/movq`."""
    torch.manual_seed(1)
    movq = cast(VQModel, new_movq().to(memory_format=torch.channels_last))  # type: ignore[call-arg]
    trainer = Trainer("movq", folder, movq, steps, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.995)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([22, step])
        truth = pictures.tensor(np.sort(rng.choice(pictures.count, BATCH, replace=False)))
        latents = encode(movq, truth)
        # A little noise keeps the decoder smooth, so that the errors of a diffusion model stay small in the picture.
        seen = decode(movq, latents + _LATENT_NOISE * torch.randn_like(latents))
        edges = sum((seen.diff(dim=d) - truth.diff(dim=d)).abs().mean() for d in (2, 3))
        close = (seen - truth).abs().mean()
        unit = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        codebook = movq.quantize(latents.detach())[1]
        loss = close + edges + 4 * F.mse_loss(seen, truth) + 0.05 * unit + 0.1 * codebook
        psnr = -10 * torch.log10(F.mse_loss(seen, truth)).item()
        return loss, {"l1": close.item(), "psnr": psnr, "std": latents.std().item(), "codebook": codebook.item()}

    trainer.run(loss_of)
    movq.half().save_pretrained(folder / "movq")


def refine(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train the decoder half of `folder/movq` further and write `folder/movq-refined`: latents stay what they are."""
    torch.manual_seed(4)
    movq = load(folder / "movq")
    movq.requires_grad_(False)
    movq.decoder.requires_grad_()
    movq.post_quant_conv.requires_grad_()
    trainer = Trainer("refine", folder, movq, steps, learning_rate=1e-3, weight_decay=0.0, ema_decay=0.995)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([24, step])
        truth = pictures.tensor(np.sort(rng.choice(pictures.count, BATCH, replace=False)))
        with torch.no_grad():
            latents = encode(movq, truth)
        seen = decode(movq, latents + _LATENT_NOISE * torch.randn_like(latents))
        # Objects cover a small part of a picture and hold all that matters: they weigh four times as much.
        objects = ((truth - truth[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.12).float()
        close = ((seen - truth).abs() * (1 + 3 * objects)).mean()
        edges = sum((seen.diff(dim=d) - truth.diff(dim=d)).abs().mean() for d in (2, 3))
        psnr = -10 * torch.log10(F.mse_loss(seen, truth)).item()
        return close + edges, {"l1": (seen - truth).abs().mean().item(), "psnr": psnr}

    trainer.run(loss_of)
    movq.half().save_pretrained(folder / "movq-refined")


def load(path: Path) -> VQModel:
    """A MoVQ in float32, ready to train or to use."""
    movq = VQModel.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    return cast(VQModel, cast(VQModel, movq).to(memory_format=torch.channels_last))  # type: ignore[call-arg]
