"""Decoders of the published sizes on a GPU, random weights, float16: pictures/s and peak memory by batch.

Called by bench.gpu; on a CPU it rehearses with tiny networks of the same classes, and its rates say nothing.
Run: python -m eclipse.bench.gpu_decoders --out OUT [--seconds 40]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..decode.decoder import Decoder, pictures_at_once
from ..decode.kandinsky import KandinskyDecoder
from ..decode.karlo import KarloDecoder, Parts, UnCLIPTextProjModel
from ..decode.weights import quiet_diffusers
from ..pipeline.cache.packed_text import TextFeatures
from .results import hardware, table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.float32
WIDTHS = {"kandinsky": (384, 768, 1152, 1536), "movq": (128, 256, 256, 512), "karlo": (320, 640, 960, 1280)}
if not CUDA:
    WIDTHS = {"kandinsky": (32, 32, 64, 64), "movq": (32, 32, 32, 32), "karlo": (32, 32, 64, 64)}
LAYERS = 3 if CUDA else 1
SIDES = {"kandinsky": 512 if CUDA else 64, "karlo": 256 if CUDA else 64}
USUAL_STEPS = {"kandinsky": 50, "karlo": 25}


def kandinsky() -> KandinskyDecoder:
    """kandinsky-community/kandinsky-2-2-decoder by its published configuration."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel  # pyright: ignore[reportPrivateImportUsage]

    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim=1280,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=768,
            attention_head_dim=64 if CUDA else 16,
            block_out_channels=WIDTHS["kandinsky"],
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            layers_per_block=LAYERS,
            resnet_time_scale_shift="scale_shift",
        )
        movq = VQModel(
            latent_channels=4,
            num_vq_embeddings=16384,
            vq_embed_dim=4,
            norm_type="spatial",
            block_out_channels=WIDTHS["movq"],
            layers_per_block=2 if CUDA else 1,
            down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
        )
    scheduler = DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=True
    )
    pipe: Any = KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(DEVICE, DTYPE)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.movq.to(memory_format=torch.channels_last)
    size = (SIDES["kandinsky"], SIDES["kandinsky"])
    return KandinskyDecoder(pipe, torch.randn(1280).to(DEVICE, DTYPE), size, DEVICE)


def karlo() -> KarloDecoder:
    """kakaobrain/karlo-v1-alpha's decoder and super-resolution by their published configuration."""
    from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]

    widths = WIDTHS["karlo"]
    with torch.device(DEVICE):
        text_proj = UnCLIPTextProjModel(
            clip_embeddings_dim=768, time_embed_dim=4 * widths[0], cross_attention_dim=1536 if CUDA else 32
        )
        decoder = UNet2DConditionModel(
            sample_size=64 if CUDA else 16,
            in_channels=3,
            out_channels=6,
            block_out_channels=widths,
            layers_per_block=LAYERS,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            cross_attention_dim=1536 if CUDA else 32,
            attention_head_dim=64 if CUDA else 16,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        first, last = (
            UNet2DModel(
                sample_size=SIDES["karlo"],
                in_channels=6,
                out_channels=3,
                layers_per_block=LAYERS,
                block_out_channels=widths,
                down_block_types=("ResnetDownsampleBlock2D",) * 4,
                up_block_types=("ResnetUpsampleBlock2D",) * 4,
                resnet_time_scale_shift="scale_shift",
                add_attention=False,
            )
            for _ in range(2)
        )
    networks: tuple[Any, ...] = (text_proj, decoder, first, last)
    models = [network.to(DTYPE).eval() for network in networks]
    parts = Parts(
        *models,
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log"),
    )
    return KarloDecoder(parts, captions(1), DEVICE)


def captions(count: int) -> TextFeatures:
    """Random features of captions of 15 tokens, as ViT-L/14 makes them."""
    offsets = 15 * torch.arange(count + 1, device=DEVICE)
    states = torch.randn(15 * count, 768, device=DEVICE, dtype=DTYPE)
    return TextFeatures(states, offsets, embedding=torch.randn(count, 768, device=DEVICE, dtype=DTYPE))


def parameters(decoder: Any) -> float:
    pipe = getattr(decoder, "pipe", None)
    networks = [pipe.unet, pipe.movq] if pipe else [v for v in vars(decoder.parts).values() if hasattr(v, "parameters")]
    return sum(p.numel() for network in networks for p in network.parameters()) / 1e9


def timed(decoder: Decoder, batch: int, steps: int) -> float:
    """Seconds of one batch with guidance."""
    embedding = torch.randn(batch, decoder.embedding_dim)
    text = captions(batch) if decoder.name == "karlo" else None
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    decoder.decode(embedding, seeds=range(batch), steps=steps, guidance_scale=4.0, captions=text)
    return time.perf_counter() - began


def measure(
    name: str, make: Callable[[], Decoder], batches: Sequence[int], seconds: float, say: Callable[[str], None]
) -> None:
    """Seconds a step and besides, and the peak memory, of each batch that fits; larger ones while time is left."""
    began = time.perf_counter()
    decoder = make()
    say(f"{name}: {parameters(decoder):.3f} billion parameters, made in {time.perf_counter() - began:.1f} s")
    timed(decoder, 1, 2)  # warms up
    usual, rows = USUAL_STEPS[name], []
    for batch in batches:
        if rows and time.perf_counter() - began > seconds * 0.6:
            break
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            timed(decoder, batch, 2)  # what is chosen and allocated once for this shape
            few, more = timed(decoder, batch, 2), timed(decoder, batch, 8)
        except torch.OutOfMemoryError:
            rows.append((batch, "out of memory", "", "", ""))
            break
        step = (more - few) / 6
        whole = few + (usual - 2) * step
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else "–"
        rows.append((batch, f"{step * 1e3:.0f} ms", f"{(few - 2 * step) * 1e3:.0f} ms", f"{batch / whole:.2f}", peak))
    columns = [
        f"{name}, {SIDES[name]} px",
        "a step",
        "besides",
        f"pictures/s at {usual} steps (derived)",
        "peak memory",
    ]
    say(table([f"batch of {columns[0]}", *columns[1:]], rows))
    say(f"the batch that `render` takes by itself: {pictures_at_once(SIDES[name], DEVICE)}\n")


def main(out: Path, seconds_budget: float) -> None:
    """Write OUT/gpu_decoders.md line by line, within about `seconds_budget`."""
    out.mkdir(parents=True, exist_ok=True)
    quiet_diffusers()
    began = time.perf_counter()
    with (out / "gpu_decoders.md").open("a", buffering=1) as file:

        def say(text: str) -> None:
            print(text, flush=True)
            file.write(text + "\n")

        say(f"## Decoders, random weights of published size, {DTYPE}\n\n{hardware()}\n")
        for index, (name, make) in enumerate((("kandinsky", kandinsky), ("karlo", karlo))):
            left = seconds_budget - (time.perf_counter() - began)
            batches = ((4, 16, 32) if name == "kandinsky" else (8, 32, 64, 128)) if CUDA else (1, 2)
            try:
                measure(name, make, batches, left / (2 - index), say)
            except Exception as error:  # one decoder's failure says nothing of the other
                say(f"{name}: {type(error).__name__}: {error}\n")
            if CUDA:
                torch.cuda.empty_cache()
        say(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    main(options.out, options.seconds)
