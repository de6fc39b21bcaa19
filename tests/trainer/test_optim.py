"""Which optimizer owns which parameter, and that Muon's update is the one its name stands for."""

from __future__ import annotations

import pytest
import torch
from eclipse.trainer.model.prior import Prior, PriorConfig
from eclipse.trainer.optim import COEFFICIENTS, ITERATIONS, Muon, make_optimizers, orthogonalised

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


def matrices() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 8), (8, 8), (24, 8), (8, 24), (8, 8))]


def by_definition(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's polynomial of the singular values, in double precision."""
    u, s, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return (u @ torch.diag(s) @ v).float()


def test_muon_steps_along_the_polynomial_of_its_momentum() -> None:
    """Square, tall and wide matrices, several of a shape: all are as if they were alone."""
    ours = matrices()
    expected, momentum = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    muon = Muon(ours, 1e-2, 0.1)
    for step in range(4):
        for i, p in enumerate(ours):
            p.grad = torch.randn(*p.shape, generator=torch.Generator().manual_seed(step * 100 + p.numel()))
            momentum[i] = 0.95 * momentum[i] + 0.05 * p.grad
            update = by_definition(0.95 * momentum[i] + 0.05 * p.grad)
            expected[i] = expected[i] * (1 - 1e-2 * 0.1) - 1e-2 * 0.2 * max(p.shape) ** 0.5 * update
        muon.step()
    for p, value, buffer in zip(ours, expected, momentum, strict=True):
        torch.testing.assert_close(p.detach(), value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(muon.state[p]["momentum_buffer"], buffer, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (16, 24)])
def test_a_gradient_of_little_rank_stays_finite_and_small(shape: tuple[int, int]) -> None:
    thin = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    found = orthogonalised(thin[None])[0]
    torch.testing.assert_close(found, by_definition(thin), atol=2e-3, rtol=0)


def test_a_bad_step_leaves_no_trace_in_muon() -> None:
    ours = matrices()
    muon = Muon(ours, 1e-2, 0.1)

    def step(value: float, bad: float) -> None:
        for p in ours:
            p.grad = torch.full_like(p, value)
        muon.found_inf = torch.tensor(bad)
        muon.step()

    step(0.5, 0.0)
    before = [p.detach().clone() for p in ours], [muon.state[p]["momentum_buffer"].clone() for p in ours]
    step(torch.nan, 1.0)
    after = ours, [muon.state[p]["momentum_buffer"] for p in ours]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.cuda
def test_on_a_gpu_products_are_bfloat16() -> None:
    x = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalised(x.cuda()).cpu(), orthogonalised(x), atol=3e-2, rtol=0)
