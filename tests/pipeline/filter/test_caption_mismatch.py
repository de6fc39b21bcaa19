"""Wrong captions from CLIP vectors alone: the probability means what it says, also where nothing is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from eclipse.pipeline.cache.vectors import unit
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.filter import caption_mismatch as mismatch


def weigh(image: np.ndarray, text: np.ndarray, group: np.ndarray | None = None) -> mismatch.Evidence:
    u, v = unit(text), unit(image)
    group = np.arange(len(u)) if group is None else group
    return mismatch.wrong_captions(len(u), lambda rows: (u[rows], v[rows]), group, Progress(quiet=True))


def pairs(n: int, wrong: float, *, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and texts in two cones that share a meaning; `wrong` of the texts are dealt among each other."""
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(n, 32))
    image = meaning + noise * rng.normal(size=(n, 32)) + 6 * np.eye(32)[0]
    text = meaning * rng.uniform(0.3, 1.5, (n, 1)) + noise * rng.normal(size=(n, 32)) + 6 * np.eye(32)[1]
    swapped = rng.permutation(n)[: int(wrong * n)]
    text[swapped] = text[np.roll(swapped, 1)]
    return image, text, np.isin(np.arange(n), swapped)


def test_swapped_captions_stand_out() -> None:
    image, text, wrong = pairs(4000, 0.04, noise=0.3)
    evidence = weigh(image, text)
    found = evidence.wrong >= 0.5
    assert (found & wrong).sum() >= 0.9 * wrong.sum() and (found & wrong).sum() >= 0.95 * found.sum()
    assert evidence.wrong_share == pytest.approx(0.04, abs=0.01)


def test_the_probability_is_calibrated_where_evidence_is_weak() -> None:
    image, text, wrong = pairs(20_000, 0.2, noise=1.0)
    probability = weigh(image, text).wrong
    for low, high in ((0.1, 0.3), (0.3, 0.6), (0.6, 0.95)):
        inside = (probability >= low) & (probability < high)
        assert wrong[inside].mean() == pytest.approx(probability[inside].mean(), abs=0.12)


def test_nothing_wrong_means_hardly_anything_rejected() -> None:
    image, text, _ = pairs(4000, 0.0, noise=0.5)
    evidence = weigh(image, text)
    assert (evidence.wrong >= 0.5).mean() < 0.002 and evidence.wrong_share < 0.01


def test_captions_that_say_nothing_are_all_suspect() -> None:
    rng = np.random.default_rng(0)
    evidence = weigh(rng.normal(size=(2000, 32)), rng.normal(size=(2000, 32)))
    assert evidence.wrong_share > 0.9 and np.median(evidence.wrong) > 0.8


def test_a_caption_is_never_dealt_to_its_own_picture() -> None:
    group = np.repeat(np.arange(40), 5)  # five captions per picture, as in COCO
    other = mismatch._deal(group)
    assert sorted(other.tolist()) == list(range(200)) and (group[other] != group).all()


def test_the_same_data_gives_the_same_probabilities_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, _ = pairs(1000, 0.04, noise=0.5)
    whole = weigh(image, text)
    monkeypatch.setattr(mismatch, "CHUNK", 77)
    pieces = weigh(image, text)
    np.testing.assert_allclose(pieces.z, whole.z, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(pieces.wrong, whole.wrong, atol=0.02)
