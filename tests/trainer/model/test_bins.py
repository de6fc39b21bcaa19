"""Captions in bins: nothing overlaps, and the prior computes what it computes on packed ones, gradients included."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from eclipse.trainer.model.bins import BIN, Bins, SizeClasses, allowed_in_bins, bin_attention, first_fit
from eclipse.trainer.model.prior import Prior, PriorConfig
from eclipse.trainer.model.transformer import PackedText
from packed_captions import captions

CONFIG = PriorConfig(24, num_layers=3, num_attention_heads=2, attention_head_dim=16)
LENGTHS = [7, 77, 2, 12, 7, 25, 30, 3, 61]


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_puts_every_sequence_into_one_bin_and_none_over_another(seed: int) -> None:
    rng = np.random.default_rng(seed)
    totals = np.minimum(10 + rng.poisson(rng.choice([3, 6, 20]), 700), 80)
    begin, used = first_fit(totals)
    assert np.array_equal(begin // BIN, (begin + totals - 1) // BIN)
    order = np.argsort(begin)
    assert (begin[order][1:] >= (begin + totals)[order][:-1]).all()
    assert used == begin.max() // BIN + 1 <= 1.06 * totals.sum() / BIN + 1
    with pytest.raises(ValueError, match="129 tokens"):
        first_fit(np.array([129]))


def test_a_batch_that_is_too_long_comes_in_a_larger_class() -> None:
    counts = np.random.default_rng(0).integers(5, 20, 5000)
    classes = SizeClasses.of(counts, 64, specials=3, text_positions=77)
    usual, long = classes.lay_out(counts[:64]), classes.lay_out(np.full(64, 77))
    assert len(usual.source) <= 1.25 * (counts[:64].sum() + 3 * 64) + 5 * BIN
    assert long.texts >= 64 * 77 > usual.texts and len(long.source) > len(usual.source)
    again = classes.lay_out(counts[64:128])
    assert (again.texts, len(again.source)) == (usual.texts, len(usual.source))


def test_bins_equal_packed_captions_gradients_included() -> None:
    torch.manual_seed(0)
    packed_prior = Prior(CONFIG)
    binned_prior = copy.deepcopy(packed_prior)
    noise, pooled, text = captions(LENGTHS, 24)
    spare = torch.zeros(11, 24)  # a buffer is larger than most batches
    bins = Bins.of(np.array(LENGTHS), specials=3, text_positions=77, n_text=len(text.states) + len(spare), rows=4)
    binned = PackedText(torch.cat([text.states, spare]), text.offsets, bins)
    expected, found = packed_prior(noise, pooled, text), binned_prior(noise, pooled, binned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for out in (expected, found):
        out.square().sum(1).mean().backward()
    for (name, a), b in zip(binned_prior.named_parameters(), packed_prior.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_of_attention_is_that_of_autograd() -> None:
    bins = Bins.of(np.array(LENGTHS), specials=3, text_positions=77)
    qkv = torch.randn(len(bins.source), 3 * 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: bin_attention(x, bins.caption, bins.draw, 2), qkv, atol=1e-6, fast_mode=True
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_the_kernel_equals_a_dense_product(dtype: torch.dtype, head_dim: int) -> None:
    heads = 4
    bins = Bins.of(np.array(LENGTHS * 5), specials=3, text_positions=77, rows=20).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(len(bins.source), 3 * heads * head_dim, device="cuda", generator=generator).to(dtype)
    gradient = torch.randn(len(qkv), heads * head_dim, device="cuda", generator=generator).to(dtype)
    found = qkv.clone().requires_grad_()
    out = bin_attention(found, bins.caption, bins.draw, heads)
    out.backward(gradient)
    exact = qkv.double().requires_grad_()
    q, k, v = exact.view(-1, BIN, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    score = (q @ k.mT / head_dim**0.5).masked_fill(~allowed_in_bins(bins.caption, bins.draw), -torch.inf)
    expected = (score.softmax(-1) @ v).transpose(1, 2).reshape(out.shape)
    expected.backward(gradient.double())
    for a, b in ((out, expected), (found.grad, exact.grad)):
        assert a is not None and b is not None
        assert (a.double() - b).norm() < 1e-2 * b.norm()
