"""Widening keeps what a network computes, and tells the two halves of a channel apart."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from eclipse.lab import widen as widening
from eclipse.lab.build_unet import EMBEDDING_DIM, new_unet
from eclipse.lab.widen import widen


@torch.inference_mode()
def test_a_wider_unet_computes_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    narrow, fresh = new_unet(32).eval(), new_unet(64).eval()
    noisy, times = torch.randn(4, 4, 16, 16), torch.tensor([10, 300, 600, 999])
    condition = {"image_embeds": torch.randn(4, EMBEDDING_DIM)}

    def error(wide: UNet2DConditionModel) -> float:
        """Relative to what the narrow one computes."""
        expected = narrow(noisy, times, None, added_cond_kwargs=condition).sample
        found = wide(noisy, times, None, added_cond_kwargs=condition).sample
        return float((found - expected).square().mean() / expected.square().mean())

    assert error(fresh) > 0.5
    monkeypatch.setattr(widening, "_NOISE", 0.0)
    exact = error(widen(narrow, new_unet(64).eval(), seed=1))
    assert exact < 0.02, "group norms over two levels group other channels: all that may differ"
    monkeypatch.undo()
    wide = widen(narrow, new_unet(64).eval(), seed=1)
    assert error(wide) < 0.03
    first, second = wide.state_dict()["conv_in.weight"].unflatten(0, (-1, 2)).unbind(1)
    assert not torch.equal(first, second) and torch.allclose(first, second, atol=0.1)
