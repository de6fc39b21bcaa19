"""Which optimizer owns which parameter, and that Muon's update is the one its name stands for."""

from __future__ import annotations

import pytest
import torch
from eclipse.trainer.model.prior import Prior, PriorConfig
from eclipse.trainer.optim import make_optimizers

CONFIG = PriorConfig(16, num_layers=2, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_parameter_has_one_owner_and_only_matrices_decay(kind: str) -> None:
    prior = Prior(CONFIG)
    optimizers = make_optimizers(prior, kind, learning_rate=1e-3, weight_decay=0.1)  # type: ignore[arg-type]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [parameter for group in groups for parameter in group["params"]]
    trained = {parameter for parameter in prior.parameters() if parameter.requires_grad}
    assert len(owned) == len(set(owned)) and set(owned) == trained
    linear = {module.weight for module in prior.modules() if isinstance(module, torch.nn.Linear)}
    assert {p for group in groups if group["weight_decay"] for p in group["params"]} == linear
    assert len(optimizers) == (2 if kind == "muon" else 1)


def test_muon_moves_matrices_along_near_orthogonal_directions() -> None:
    torch.manual_seed(0)
    prior = Prior(CONFIG)
    layer = prior.transformer_blocks[0].attn1.to_q  # type: ignore[union-attr]
    before = layer.weight.detach().clone()
    left, right = torch.randn(2, 16, 16).unbind()
    layer.weight.grad = left @ torch.diag(torch.logspace(0, -3, 16)) @ right
    optimizers = make_optimizers(prior, "muon", learning_rate=1e-2, weight_decay=0.0)
    for optimizer in optimizers:
        optimizer.step()
    values = torch.linalg.svdvals(before - layer.weight.detach())
    assert values.max() / values.median() < 2.5  # those of the gradient span a thousand
    assert (before - layer.weight.detach()).square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.35)  # as AdamW's RMS
