"""The step that never waits: equal to the plain loop, bad batches skipped on the device, captured equal to not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from eclipse.trainer.device_step import FIGURES, DeviceStep, Inputs
from eclipse.trainer.guard import Guard
from eclipse.trainer.loss import Draw, Objective
from eclipse.trainer.model.bins import SizeClasses
from eclipse.trainer.model.prior import Prior, PriorConfig
from packed_captions import captions

CONFIG = PriorConfig(24, num_layers=2, num_attention_heads=2, attention_head_dim=16)
OBJECTIVE = Objective(0.2, 0.01, "mean")
BATCH, STEPS, TEXTS = 8, 8, 100  # the longest batch has more: a size class of its own


def loss(network: torch.nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    return OBJECTIVE(
        network, inputs.image, inputs.text, inputs.packed(), Draw(inputs.noise, inputs.noise), inputs.text, 0
    )


def adamw(prior: Prior) -> torch.optim.AdamW:
    # Biases of keys have no gradient but rounding, which AdamW would blow up to a full step.
    trained = [p for name, p in prior.named_parameters() if p.requires_grad and "to_k.bias" not in name]
    return torch.optim.AdamW(trained, lr=1e-3, fused=True)


def run(device: str, *, captured: bool = False, half: bool = False, bad: int | None = None) -> tuple:
    """STEPS steps from one start: weights, average, figures of each step."""
    torch.manual_seed(0)
    prior = Prior(CONFIG).to(device)
    average = copy.deepcopy(prior).requires_grad_(False)
    optimizers = (adamw(prior),)
    step = DeviceStep(prior, average, optimizers, loss, Guard(), clip=1.0, half=half, compiled=False, captured=captured)
    classes, figures = SizeClasses(3, 77, TEXTS), []
    for number in range(STEPS):
        image, noise, pooled, text, lengths = batch(number)
        if number == bad:
            image[0] = torch.nan
            text.states[-1] = torch.nan  # and the next batch is shorter
        bins = classes.lay_out(lengths)
        given = [x.to(device) for x in (image, pooled, text.states)]
        step(*given, bins.to(device), rate=1e-3, decay=0.9, noise=lambda memory, noise=noise: memory.copy_(noise))
        figures.append(step.figures.tolist())
    return [p.detach().cpu() for p in prior.parameters()], [p.cpu() for p in average.parameters()], figures


def batch(number: int) -> tuple:
    lengths = np.random.default_rng(number).integers(3, 24 - number, BATCH)
    noise, pooled, text = captions(lengths.tolist(), 24, seed=number)
    image = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(number))
    return image, noise, pooled, text, lengths


def plain(bad: int | None = None) -> tuple:
    torch.manual_seed(0)
    prior = Prior(CONFIG)
    average = copy.deepcopy(prior).requires_grad_(False)
    optimizer = adamw(prior)
    for number in range(STEPS):
        image, noise, pooled, text, _ = batch(number)
        if number == bad:
            continue
        OBJECTIVE(prior, image, pooled, text, Draw(noise, noise), pooled, 0)["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for p in prior.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        prior.zero_grad()
        with torch.no_grad():
            for a, p in zip(average.parameters(), prior.parameters(), strict=True):
                a.lerp_(p, 0.1)
    return [p.detach() for p in prior.parameters()], list(average.parameters())


@pytest.mark.parametrize("bad", [None, 4])
def test_equals_the_plain_loop_and_a_bad_batch_leaves_no_trace(bad: int | None) -> None:
    weights, average, figures = run("cpu", bad=bad)
    expected, expected_average = plain(bad)
    for found, wanted in ((weights, expected), (average, expected_average)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert [row[FIGURES.index("accepted")] for row in figures] == [float(number != bad) for number in range(STEPS)]


@pytest.mark.cuda
def test_captured_equals_not_captured_and_the_cpu() -> None:
    free, captured, again, cpu = run("cuda"), run("cuda", captured=True), run("cuda", captured=True), run("cpu")
    assert all(torch.equal(a, b) for a, b in zip(captured[0], again[0], strict=True))
    for other in (free, cpu):
        for a, b in zip(captured[0], other[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    bad = run("cuda", captured=True, half=True, bad=5)
    assert [row[FIGURES.index("accepted")] for row in bad[2]] == [1.0] * 5 + [0.0] + [1.0] * 2
