"""Trains the lab's decoder: the image-conditioned UNet of Kandinsky 2.2 on MoVQ latents. Called by `build_models`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..pipeline.core.files import atomic_path
from ..pipeline.embed.clip import Encoder
from .build_movq import LATENT_CHANNELS, encode
from .build_movq import load as load_movq
from .build_run import Pictures, Trainer, as_floats
from .captions import open_categories
from .drawing import draw
from .shapes import Scene, World
from .widen import widen

EMBEDDING_DIM = 128
RETOLD = 8  # other scenes a caption is told of


@dataclass(frozen=True)
class Phase:
    """How a stretch of the training draws its examples."""

    first_step: int
    negative_share: float  # of pictures conditioned on the all-zero picture's embedding, for guidance
    noisy_share: float  # of embeddings with noise, since a prior's prediction is never exact
    noise: float  # at most, in standard deviations of the embeddings
    time_power: (
        float  # time = 1000·u^power for uniform u: below 1 it dwells where only the embedding tells what to draw
    )
    retold_share: float = 0.0  # of pictures conditioned on a mean over other scenes that share a caption: what the
    # best of priors predicts, since it knows no more than the caption
    crowded_share: float = 0.0  # of pictures drawn among those of three or four objects alone


@dataclass(frozen=True)
class Recipe:
    """One training run: optimizer settings, its seed, and its phases in order."""

    seed: int
    batch: int
    learning_rate: float
    phases: tuple[Phase, ...]


FIRST = Recipe(23, 64, 1e-3, (Phase(0, 0.1, 0.5, 0.7, 1.0), Phase(1800, 0.05, 0.25, 0.4, 0.33)))
# Layouts are learnt by then; shapes and textures need many more steps, so the batch is halved.
FURTHER = Recipe(25, 32, 8e-4, (Phase(0, 0.05, 0.15, 0.3, 0.5),))
WIDE = Recipe(27, 32, 8e-4, (Phase(0, 0.05, 0.15, 0.3, 0.6, retold_share=0.35),))
# What is wrong by then is nearly always the outline of one of several small objects.
CROWDED = Recipe(29, 32, 6e-4, (Phase(0, 0.05, 0.1, 0.3, 0.6, retold_share=0.3, crowded_share=0.4),))


def new_unet(outer_channels: int = 32) -> UNet2DConditionModel:
    """The classes and options of the published Kandinsky 2.2 decoder, with 16×16 latents and few channels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # as published: the second half, a learned variance, is not used here
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],  # type: ignore[arg-type]
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],  # type: ignore[arg-type]
        block_out_channels=[outer_channels, 96, 128],  # type: ignore[arg-type]
        layers_per_block=1,
        attention_head_dim=32,
        cross_attention_dim=64,
        time_embedding_dim=128,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        encoder_hid_dim=EMBEDDING_DIM,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )


def new_scheduler() -> DDPMScheduler:
    """The noise schedule, in training and in sampling."""
    return DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def build(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train and write `folder/unet`."""
    torch.manual_seed(2)
    _train("unet", FIRST, new_unet(), folder, pictures, steps)


def further(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train `folder/unet` further and write `folder/unet-further`."""
    _train("unet-further", FURTHER, load(folder / "unet"), folder, pictures, steps)


def wide(folder: Path, pictures: Pictures, steps: int) -> None:
    """Double the outer channels of `folder/unet-further`, train it further and write `folder/unet-wide`."""
    _train("unet-wide", WIDE, widen(load(folder / "unet-further"), new_unet(64), seed=3), folder, pictures, steps)


def crowded(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train `folder/unet-wide` further, on crowded scenes above all, and write `folder/unet-crowded`."""
    _train("unet-crowded", CROWDED, load(folder / "unet-wide"), folder, pictures, steps)


def load(path: Path) -> UNet2DConditionModel:
    """A UNet in float32, ready to train or to pack."""
    loaded = UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    return cast(UNet2DConditionModel, loaded)


def _train(name: str, recipe: Recipe, unet: UNet2DConditionModel, folder: Path, pictures: Pictures, steps: int) -> None:
    encoder = Encoder.load(f"local-dir:{folder / 'clip'}")
    latents = latents_of(folder, pictures, load_movq(folder / "movq"))
    embeddings = embeddings_of(folder, pictures, encoder)
    negative = negative_embedding(encoder)
    retold = retold_of(folder, pictures, encoder) if any(p.retold_share for p in recipe.phases) else None
    spread = embeddings.float().std(0)
    several = _crowded(pictures) if any(p.crowded_share for p in recipe.phases) else np.arange(0)
    scheduler, batch = new_scheduler(), recipe.batch
    unet = cast(UNet2DConditionModel, unet.to(memory_format=torch.channels_last))  # type: ignore[call-arg]
    trainer = Trainer(name, folder, unet, steps, recipe.learning_rate, ema_decay=0.998, warmup=200)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        phase = [p for p in recipe.phases if p.first_step <= step][-1]
        rng = np.random.default_rng([recipe.seed, step])
        rows = rng.choice(pictures.count, batch, replace=False)
        if n := round(batch * phase.crowded_share):
            rows[:n] = rng.choice(several, n, replace=False)
        rows = torch.from_numpy(rows)
        clean, condition = latents[rows].float(), embeddings[rows].float()
        if retold is not None:
            told = (rows < len(retold)) & (torch.rand(batch) < phase.retold_share * pictures.count / len(retold))
            condition[told] = _mean_of_some(retold[rows[told]].float())
        level = torch.rand(batch, 1) * phase.noise * (torch.rand(batch, 1) < phase.noisy_share)
        condition = condition + level * spread * torch.randn_like(condition)
        condition = torch.where(torch.rand(batch, 1) < phase.negative_share, negative, condition)
        times = (1000 * torch.rand(batch) ** phase.time_power).long().clamp(max=999)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]
        guess = unet(noisy, times, None, added_cond_kwargs={"image_embeds": condition}).sample[:, :LATENT_CHANNELS]  # type: ignore[arg-type]
        loss = F.mse_loss(guess, scheduler.get_velocity(clean, noise, times))  # type: ignore[arg-type]
        return loss, {}

    trainer.run(loss_of)
    unet.half().save_pretrained(folder / name)


def _mean_of_some(embeddings: Tensor) -> Tensor:
    """(B, D) means over the first few, at least three and a random number for each, of embeddings (B, RETOLD, D)."""
    number = torch.randint(3, RETOLD + 1, (len(embeddings), 1))
    chosen = (torch.arange(RETOLD) < number).float()
    return torch.einsum("bk,bkd->bd", chosen / number, embeddings)


def _crowded(pictures: Pictures) -> np.ndarray:
    """Numbers of the pictures of three or four objects."""
    return np.flatnonzero([len(pictures.scene(i).things) > 2 for i in range(pictures.count)])


def negative_embedding(encoder: Encoder) -> Tensor:
    """(1, 128) embedding of the picture whose normalised pixels are all zero, as Kandinsky's pipelines define it."""
    return encoder.encode_images(torch.zeros(1, 3, encoder.image_size, encoder.image_size))


def pack(folder: Path, models: Path) -> None:
    """Write what was built to `models`: `clip`, and `decoder`, which stock `KandinskyV22Pipeline` reads."""
    shutil.copytree(folder / "clip", models / "clip", dirs_exist_ok=True)
    unet = load(folder / "unet-crowded")
    movq = load_movq(folder / "movq-refined")
    pipeline = KandinskyV22Pipeline(unet=unet, scheduler=new_scheduler(), movq=movq)
    pipeline.to(torch.float16).save_pretrained(models / "decoder")
    for weights in models.rglob("*.safetensors"):
        weights.chmod(0o644)  # save_pretrained makes them readable by their owner alone
    negative = negative_embedding(Encoder.load(f"local-dir:{models / 'clip'}"))
    save_file(
        {"negative_image_embedding": negative.half()}, models / "decoder" / "negative_image_embedding.safetensors"
    )


@torch.inference_mode()
def _cached(path: Path, count: int, block: int, of: Callable[[int, int], Tensor]) -> Tensor:
    """`of(start, stop)` for blocks of 0..count−1, in float16, end to end; computed once and kept in `path`."""
    if not path.exists():
        parts = []
        for start in range(0, count, block):
            stop = min(start + block, count)
            parts.append(of(start, stop).half())
            print(f"{path.stem} {stop}/{count}", end="\r", flush=True)
        with atomic_path(path) as beside:
            save_file({"rows": torch.cat(parts).contiguous()}, beside)
    return load_file(path)["rows"]


def embeddings_of(folder: Path, pictures: Pictures, encoder: Encoder) -> Tensor:
    """Raw image embeddings (N, 128) float16 of all pictures."""

    def embed(start: int, stop: int) -> Tensor:
        return encoder.encode_images(pictures.pixels[start:stop])

    return _cached(folder / "embeddings.safetensors", pictures.count, 250, embed)


def retold_of(folder: Path, pictures: Pictures, encoder: Encoder) -> Tensor:
    """Raw image embeddings (N/2, RETOLD, 128) float16: of other scenes that one caption of picture i tells as well.

    Made for the first half of the pictures.
    """

    def embed(start: int, stop: int) -> Tensor:
        told = [
            _retell(pictures.world, pictures.scene(i), np.random.default_rng([26, start, i - start]))
            for i in range(start, stop)
        ]
        embedded = encoder.encode_images(draw([scene for alike in told for scene in alike]))
        return embedded.unflatten(0, (len(told), RETOLD))

    return _cached(folder / "retold.safetensors", pictures.count // 2, 32, embed)


def _retell(world: World, scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """RETOLD other scenes with the scene's captions of one category, drawn among those that leave something open."""
    fitting = open_categories(scene)
    category = fitting[int(rng.integers(len(fitting)))]
    return [world.retold(scene, category, rng) for _ in range(RETOLD)]


def latents_of(folder: Path, pictures: Pictures, movq: VQModel) -> Tensor:
    """Unquantised latents (N, 4, 16, 16) float16 of all pictures."""

    def encoded(start: int, stop: int) -> Tensor:
        return encode(movq, as_floats(pictures.pixels[start:stop]))

    return _cached(folder / "latents.safetensors", pictures.count, 250, encoded)
