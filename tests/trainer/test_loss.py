"""The objective's terms by hand, and that pieces of a batch add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from eclipse.pipeline.cache.packed_text import TextFeatures
from eclipse.pipeline.core.errors import EclipseError
from eclipse.trainer.guard import MOST_IN_A_ROW, Guard
from eclipse.trainer.loss import Draw, Objective, contrastive_loss, projection_loss
from eclipse.trainer.model.transformer import PackedText
from eclipse.trainer.schedule import learning_rate


def test_projection_loss_sums_or_averages_dimensions() -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert projection_loss(prediction, target, "sum").item() == (5 + 9) / 2
    assert projection_loss(prediction, target, "mean").item() == (5 + 9) / 4


def test_contrastive_loss_is_infonce_with_cosines() -> None:
    prediction = torch.tensor([[3.0, 0.0]])
    texts = torch.tensor([[0.0, 5.0], [2.0, 0.0], [1.0, 1.0]])
    logits = torch.tensor([0.0, 1.0, 1 / math.sqrt(2)]) / 0.5
    expected = -torch.log_softmax(logits, 0)[1]
    torch.testing.assert_close(contrastive_loss(prediction, texts, 1, 0.5), expected)


@pytest.mark.parametrize("block_rows", [3, 5, 64])
@pytest.mark.parametrize("dropped", [False, True])
def test_contrastive_loss_in_blocks_is_exact(block_rows: int, dropped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, texts = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (11, 20))
    prediction.requires_grad_()
    kept = torch.arange(11) % 3 > 0 if dropped else None
    logits = F.normalize(prediction, dim=1) @ F.normalize(texts, dim=1).T / 0.05
    each = F.cross_entropy(logits, torch.arange(4, 15), reduction="none")
    expected = (each if kept is None else each * kept).mean()
    found = contrastive_loss(prediction, texts, 4, 0.05, kept, block_rows=block_rows)
    torch.testing.assert_close(found, expected)
    (wanted,), (gradient,) = (torch.autograd.grad(3 * loss, prediction) for loss in (expected, found))
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9)


def one_caption(embedding: torch.Tensor, states: torch.Tensor) -> TextFeatures:
    return TextFeatures(states, torch.tensor([0, len(states)]), embedding=embedding)


@pytest.mark.parametrize(("weight", "dropout"), [(0.0, 0.0), (0.2, 0.0), (0.2, 0.5)])
def test_pieces_have_the_gradient_of_the_whole(weight: float, dropout: float) -> None:
    torch.manual_seed(0)
    uniform = torch.rand(6, 2)
    images, texts, noise = (torch.randn(6, 4) for _ in range(3))
    matrix = torch.randn(4, 4, requires_grad=True)
    empty = PackedText(torch.zeros(0, 4), torch.zeros(7, dtype=torch.int64))
    objective = Objective(weight, 0.1, "sum", dropout, one_caption(torch.ones(1, 4), torch.zeros(0, 4)))

    def gradient(bounds: list[tuple[int, int]]) -> torch.Tensor:
        matrix.grad = None
        for a, b in bounds:
            draw = Draw(noise[a:b], uniform[a:b])
            terms = objective(
                lambda e, t, _: (t + e) @ matrix, images[a:b], texts[a:b], empty.take(a, b), draw, texts, a
            )
            (terms["loss"] * (b - a) / 6).backward()
        assert matrix.grad is not None
        return matrix.grad

    whole = gradient([(0, 6)])
    torch.testing.assert_close(gradient([(0, 1), (1, 4), (4, 6)]), whole)


def test_a_dropped_caption_is_the_empty_one_and_has_no_contrastive_loss() -> None:
    images, texts = torch.randn(2, 3, 4).unbind()
    text = PackedText(torch.randn(5, 4), torch.tensor([0, 2, 4, 5]))
    nothing = one_caption(torch.full((1, 4), 7.0), torch.full((2, 4), 8.0))
    seen: list[tuple[torch.Tensor, PackedText]] = []

    def prior(noise: torch.Tensor, pooled: torch.Tensor, packed: PackedText) -> torch.Tensor:
        seen.append((pooled, packed))
        return texts

    draw = Draw(torch.zeros(3, 4), torch.tensor([[0.0, 0.9], [0.0, 0.1], [0.0, 0.9]]))
    terms = Objective(0.2, 0.1, "sum", 0.5, nothing)(prior, images, texts, text, draw, texts, 0)
    pooled, packed = seen[0]
    assert pooled[1].eq(7).all() and torch.equal(pooled[[0, 2]], texts[[0, 2]])
    assert packed.states[2:4].eq(8).all() and torch.equal(packed.states[[0, 1, 4]], text.states[[0, 1, 4]])
    each = [contrastive_loss(texts[i : i + 1], texts, i, 0.1) for i in (0, 2)]
    torch.testing.assert_close(terms["contrastive"], torch.stack(each).sum() / 3)
    torch.testing.assert_close(terms["projection"], projection_loss(texts, images, "sum"))


def test_learning_rate_warms_up_falls_and_restarts() -> None:
    plain = [learning_rate(s, peak=1.0, warmup=10, steps=110) for s in range(110)]
    assert plain[0] == 0.1 and plain[9] == plain[10] == 1.0
    assert plain[60] == pytest.approx(0.5) and plain[109] < 0.001
    twice = [learning_rate(s, peak=1.0, warmup=10, steps=110, restarts=1) for s in range(110)]
    assert twice[59] < 0.01 and twice[60] == 1.0 and twice[109] < 0.01


def test_guard_skips_spikes_and_gives_up_after_many() -> None:
    guard = Guard()
    assert all(guard.accepts(1.0, 1.0) for _ in range(100))
    assert not guard.accepts(10.0, 1.0)
    assert not guard.accepts(1.0, float("nan"))
    assert guard.accepts(1.1, 1.0) and guard.skipped == 2
    for step in range(MOST_IN_A_ROW - 1):
        guard.accepts(float("inf"), 1.0)
        guard.check(step, float("inf"), 1.0)
    guard.accepts(float("inf"), 1.0)
    with pytest.raises(EclipseError, match="diverged"):
        guard.check(MOST_IN_A_ROW, float("inf"), 1.0)
