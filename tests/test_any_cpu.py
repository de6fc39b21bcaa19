"""On a CPU nothing multiplies in half precision, whatever the card asks: most take fifty times as long over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eclipse.decode.decoder import Unconditional, load_decoder
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.embed.clip import Encoder
from eclipse.trainer.stage import train
from half_products import Products
from learnable_cache import make_workspace
from tiny_clip import make_clip
from tiny_decoders import save_tiny_kandinsky


class Heard(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def test_the_check_sees_products_of_half_precision() -> None:
    layer = torch.nn.Linear(4, 4)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(2, 4)).sum().backward()
    assert products.half
    with Products() as products:
        torch.nn.Conv2d(1, 1, 1).half()(torch.ones(1, 1, 2, 2).half())
    assert products.half


@pytest.mark.parametrize(("arm", "optimizer"), [("eclipse", "muon"), ("eclipse", "adamw"), ("projection", "muon")])
def test_training_and_validation(tmp_path: Path, arm: str, optimizer: str) -> None:
    ws = make_workspace(tmp_path / "ws", steps=3, optimizer=optimizer, precision="bf16")
    heard = Heard()
    with Products() as products:
        train(ws, heard, gpus=0, arm=arm)
    assert products.made["addmm", torch.float32] > 20 and not products.half
    assert [message for message in heard.messages if "float32" in message and "bf16" in message]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_batch_of_pictures_and_texts(tmp_path: Path, precision: str) -> None:
    encoder = Encoder.load(make_clip(tmp_path / "clip"), precision=precision)
    assert encoder.precision == "fp32"
    with Products() as products:
        encoder.encode_images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
        encoder.encode_text(*encoder.tokenize(["a red square", "two"]))
    assert products.made and not products.half


def test_a_decode(tmp_path: Path) -> None:
    path = save_tiny_kandinsky(tmp_path / "decoder", embedding_dim=32)
    nothing = Unconditional(image_embedding=torch.zeros(32))
    decoder = load_decoder("kandinsky22", str(path), unconditional=nothing, image_size=64)
    with Products() as products:
        decoder.decode(torch.ones(1, 32), seeds=[0], steps=2, guidance_scale=2.0)
    assert products.made and not products.half
