"""From prompts to pictures on a GPU that is only pretended: nothing may mix devices, and the pictures are a CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eclipse.decode.conditioning import encode_texts
from eclipse.decode.decoder import Unconditional, load_decoder
from eclipse.pipeline.cache.packed_text import PackedText, TextFeatures
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.embed.clip import Encoder
from pretend_gpu import pretend_gpu
from tiny_clip import make_clip
from tiny_decoders import save_tiny_kandinsky, save_tiny_karlo

QUIET = Progress(quiet=True)
DIM = 32
TEXTS = ["", "a cat on a mat", "red"]
SEEDS = [3, 1, 2]


def prompts_to_pictures(root: Path, device: str) -> dict[str, np.ndarray]:
    """Pictures of every decoder for TEXTS, all models on `device`."""
    encoder = Encoder.load(f"local-dir:{root / 'clip'}", device=device)
    text = encode_texts(encoder, TEXTS, QUIET)
    blanks = {
        "karlo": Unconditional(caption=encode_texts(encoder, [""], QUIET)),
        "kandinsky22": Unconditional(encoder.encode_images(torch.zeros(1, 3, 32, 32))[0]),
    }
    pictures = {}
    for kind, blank in blanks.items():
        decoder = load_decoder(kind, str(root / kind), unconditional=blank, image_size=64, device=device)
        made = decoder.decode(text.embedding, seeds=SEEDS, steps=3, guidance_scale=4.0, captions=text)
        pictures[kind] = np.stack([np.asarray(picture) for picture in made]).astype(int)
    return pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_clip(root / "clip")
    save_tiny_karlo(root / "karlo", embedding_dim=DIM)
    save_tiny_kandinsky(root / "kandinsky22", embedding_dim=DIM)
    return root


def test_every_tensor_is_on_the_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    monkeypatch.setattr(torch, "float16", torch.float32)  # a GPU's decoders are float16, which a CPU cannot convolve
    plain = prompts_to_pictures(root, "cpu")
    with pretend_gpu(monkeypatch):
        pretended = prompts_to_pictures(root, "cuda")
    for kind, pictures in plain.items():
        assert np.abs(pictures - pretended[kind]).max() <= 1, kind


def test_noise_is_drawn_in_float32_where_networks_are_of_half_precision(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of torch draw other numbers in half precision: an H200's Kandinsky pictures were others by that."""
    plain = prompts_to_pictures(root, "cpu")
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.bfloat16)
    monkeypatch.setattr(torch, "float16", torch.bfloat16)  # which a CPU can convolve
    drawn, real = [], torch.randn

    def randn(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(options.get("dtype") or torch.float32)
        return real(*args, **options)

    monkeypatch.setattr(torch, "randn", randn)
    with pretend_gpu(monkeypatch):
        halved = prompts_to_pictures(root, "cuda")
    assert len(drawn) > 2 * len(SEEDS) and set(drawn) == {torch.float32}
    for kind, pictures in plain.items():
        assert np.abs(pictures - halved[kind]).mean() < 8, kind


def test_the_pretended_gpu_refuses_a_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for: the comparison that once failed on every GPU, and the type that now refuses it everywhere."""
    with pretend_gpu(monkeypatch), pytest.raises(RuntimeError, match="same device"):
        torch.arange(3, device="cuda")[None].lt(torch.ones(2, 1))
    with pretend_gpu(monkeypatch), pytest.raises(ValueError, match=r"states on cuda:0, offsets on cpu"):
        PackedText(torch.zeros(2, 4, device="cuda"), torch.tensor([0, 2]))


def test_a_batch_of_captions_never_makes_the_host_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch) as gpu:
        encoder = Encoder.load(f"local-dir:{root / 'clip'}", device="cuda")
        tokens = encoder.tokenize(TEXTS)
        gpu.waits.clear()
        text = encoder.encode_text(*tokens)
        text.padded(77)
        assert not gpu.waits
        text.select([0])
        assert gpu.waits, "the measure sees what waits"


@pytest.mark.cuda
def test_pictures_on_a_gpu(root: Path) -> None:
    """float16 beside float32: like, not equal."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain, made = prompts_to_pictures(root, "cpu"), prompts_to_pictures(root, "cuda")
    for kind, pictures in plain.items():
        assert np.abs(pictures - made[kind]).mean() < 8, kind


def test_text_is_taken_and_padded_without_loss() -> None:
    lengths = [2, 5, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    states = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    text = TextFeatures(states, offsets, embedding=torch.eye(3))
    some = text.select([2, 0, 2])
    assert some.states[:, 0].tolist() == [7, 0, 1, 7]
    assert some.n_tokens.tolist() == [1, 2, 1] and some.embedding.argmax(1).tolist() == [2, 0, 2]
    padded, mask = text.padded(4)
    assert padded[..., 0].tolist() == [[0, 1, 0, 0], [2, 3, 4, 5], [7, 0, 0, 0]]
    assert mask.sum(1).tolist() == [2, 4, 1]
    joined = TextFeatures.concatenated([some, text])
    assert joined.n_tokens.tolist() == [1, 2, 1, *lengths] and len(joined) == 6
