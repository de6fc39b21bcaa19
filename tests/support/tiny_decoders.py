"""Untrained decoders of the published classes, a few thousand weights each; called by the decoder tests."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_kandinsky(path: Path, *, embedding_dim: int = 128, seed: int = 0, levels: int = 4) -> Path:
    """A random KandinskyV22Pipeline: same block types as the published one. Pictures are latents × 2**(levels−1)."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=16,
        addition_embed_type="image",
        addition_embed_type_num_heads=64,
        encoder_hid_dim=embedding_dim,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32,) * levels,
        layers_per_block=0,
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        latent_channels=4,
        num_vq_embeddings=64,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = DDPMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=True,
        clip_sample_range=2.0,
        variance_type="learned_range",
    )
    KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(path)
    return path


def save_tiny_karlo(path: Path, *, embedding_dim: int = 32, seed: int = 0) -> Path:
    """A random Karlo: decoder at 16 px, super-resolution to 64 px, in the published repository's folders."""
    from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]
    from eclipse.decode.karlo import UnCLIPTextProjModel

    torch.manual_seed(seed)
    channels = (32, 64)
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=embedding_dim, time_embed_dim=channels[0] * 4, cross_attention_dim=24
    )
    torch.nn.init.normal_(projection.learned_classifier_free_guidance_embeddings)
    decoder = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    parts = {"text_proj": projection, "decoder": decoder}
    for name in ("super_res_first", "super_res_last"):
        parts[name] = UNet2DModel(
            sample_size=64,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 32, 32),
            down_block_types=("ResnetDownsampleBlock2D",) * 3,
            up_block_types=("ResnetUpsampleBlock2D",) * 3,
            add_attention=False,
        )
    for name, module in parts.items():
        module.save_pretrained(path / name)
    UnCLIPScheduler(variance_type="learned_range").save_pretrained(path / "decoder_scheduler")
    UnCLIPScheduler(variance_type="fixed_small_log").save_pretrained(path / "super_res_scheduler")
    return path
