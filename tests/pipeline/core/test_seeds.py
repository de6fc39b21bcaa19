"""Streams of random numbers: named by purpose and numbers, and strangers to each other in every generator."""

from __future__ import annotations

import numpy as np
import torch
from eclipse.decode.conditioning import predict
from eclipse.decode.decoder import generators_of
from eclipse.pipeline.cache.packed_text import TextFeatures
from eclipse.pipeline.core.seeds import stream_seed
from eclipse.trainer.model.prior import Prior, PriorConfig, save_prior


def test_purpose_and_every_number_name_a_stream():
    names = [("a", 1), ("b", 1), ("a", 2), ("a", 1, 2), ("a", 12), ("a", 1 + 2**32), ("a", 2**32 + 2), ("a",)]
    seeds = [stream_seed(purpose, *numbers) for purpose, *numbers in names]
    low = {seed & 0xFFFFFFFF for seed in seeds}  # all that torch's CPU generator reads
    assert len(low) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed("a", 1) == stream_seed("a", 1) == stream_seed("a", int(np.int64(1)))


def test_the_priors_noise_is_not_the_decoders(tmp_path, monkeypatch):
    """A prior that returns its noise shows what it was given; the decoder's latents come from the bare seed."""
    dim, seeds = 64, [0, 1, 2**32 - 1]
    config = PriorConfig(dim, num_layers=1, num_attention_heads=2, attention_head_dim=16)
    save_prior(Prior(config), tmp_path)
    monkeypatch.setattr(Prior, "forward", lambda self, noise, text_embedding, text: noise)
    texts = TextFeatures(torch.randn(2, dim), torch.tensor([0, 2]), embedding=torch.randn(1, dim))
    noise = predict(str(tmp_path), texts, [0, 0, 0], seeds, "cpu")
    latents = torch.stack([torch.randn(dim, generator=generator) for generator in generators_of(seeds)])
    for mine in noise:
        for theirs in latents:
            assert abs(torch.corrcoef(torch.stack([mine, theirs]))[0, 1]) < 0.6  # 4.8 standard deviations at D = 64
    assert torch.equal(noise, predict(str(tmp_path), texts, [0, 0, 0], seeds, "cpu"))
