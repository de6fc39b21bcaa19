"""The Kandinsky decoder against diffusers' own pipeline, with untrained weights of the published classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from eclipse.decode.decoder import Unconditional, load_decoder
from eclipse.decode.kandinsky import NEGATIVE_FILE
from eclipse.decode.weights import _variant
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.sections import Scheduler
from safetensors.torch import save_file
from tiny_decoders import save_tiny_kandinsky

DIM = 48
SEEDS = [3, 1, 2**32 - 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_kandinsky(tmp_path_factory.mktemp("kandinsky"), embedding_dim=DIM)


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(5)) * 3


NEGATIVE = torch.linspace(-1, 1, DIM)


def decode(
    path: Path,
    embedding: torch.Tensor,
    seeds: list[int],
    *,
    steps: int = 3,
    guidance_scale: float = 3.0,
    **options: object,
):
    decoder = load_decoder("kandinsky22", str(path), unconditional=Unconditional(NEGATIVE), image_size=64, **options)  # type: ignore[arg-type]
    pictures = decoder.decode(embedding, seeds=seeds, steps=steps, guidance_scale=guidance_scale)
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def test_fp16_files_are_read_where_there_are_no_others(path: Path, embedding: torch.Tensor, tmp_path: Path) -> None:
    from diffusers import KandinskyV22Pipeline  # pyright: ignore[reportPrivateImportUsage]

    pipe = KandinskyV22Pipeline.from_pretrained(path).to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list(tmp_path.rglob("*model.safetensors"))
    difference = np.abs(decode(tmp_path / "half", embedding, SEEDS) - decode(path, embedding, SEEDS))
    assert difference.mean() < 2
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    pipe.save_pretrained(tmp_path / "both")
    assert (
        _variant(str(tmp_path / "both"), "", half=True)
        == _variant(str(tmp_path / "half"), "unet", half=False)
        == "fp16"
    )
    assert _variant(str(tmp_path / "both"), "", half=False) is _variant(str(path), "", half=True) is None


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pictures_are_those_of_the_stock_pipeline(path: Path, embedding: torch.Tensor, guidance_scale: float) -> None:
    from diffusers import KandinskyV22Pipeline  # pyright: ignore[reportPrivateImportUsage]

    stock: Any = KandinskyV22Pipeline.from_pretrained(path, use_safetensors=True)
    expected = stock(
        image_embeds=embedding,
        negative_image_embeds=NEGATIVE.expand(3, -1),
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    got = decode(path, embedding, SEEDS, guidance_scale=guidance_scale)
    assert got.shape == (3, 64, 64, 3)
    assert np.abs(got - expected * 255).max() <= 1.0


def test_a_picture_does_not_depend_on_its_neighbours(path: Path, embedding: torch.Tensor) -> None:
    together = decode(path, embedding, SEEDS)
    alone = decode(path, embedding[1:2], SEEDS[1:2])
    turned = decode(path, embedding[[2, 1]], [SEEDS[2], SEEDS[1]])
    assert np.abs(together[1] - alone[0]).max() <= 1
    assert np.abs(together[1] - turned[1]).max() <= 1


def test_embedding_seed_and_negative_embedding_each_matter(path: Path, embedding: torch.Tensor) -> None:
    plain = decode(path, embedding, SEEDS)
    assert np.abs(plain - decode(path, embedding.flip(0), SEEDS)).max() > 2
    assert np.abs(plain - decode(path, embedding, [7, 8, 9])).max() > 2
    decoder = load_decoder("kandinsky22", str(path), unconditional=Unconditional(-NEGATIVE * 20), image_size=64)
    other = decoder.decode(embedding, seeds=SEEDS, steps=3, guidance_scale=3.0)
    assert np.abs(plain[0] - np.asarray(other[0]).astype(int)).max() > 2


def test_the_negative_embedding_beside_the_decoder_goes_first(tmp_path: Path, embedding: torch.Tensor) -> None:
    path = save_tiny_kandinsky(tmp_path / "decoder", embedding_dim=DIM)
    given = decode(path, embedding, SEEDS)
    save_file({"anything": (-NEGATIVE * 20).half()}, path / NEGATIVE_FILE)
    assert np.abs(given - decode(path, embedding, SEEDS)).max() > 2
    (path / NEGATIVE_FILE).write_bytes(b"broken")
    with pytest.raises(EclipseError, match="not a file of one tensor") as error:
        decode(path, embedding, SEEDS)
    assert NEGATIVE_FILE in str(error.value.where)


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_every_scheduler_makes_pictures_or_says_why_not(
    tmp_path: Path, embedding: torch.Tensor, scheduler: str
) -> None:
    path = save_tiny_kandinsky(tmp_path / "decoder", embedding_dim=DIM)
    file = path / "scheduler" / "scheduler_config.json"
    for schedule in ("linear", "squaredcos_cap_v2"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "beta_schedule": schedule}))
        if scheduler == "dpm++-karras" and schedule != "linear":
            with pytest.raises(UsageError, match="whose noise follows a cosine"):
                decode(path, embedding, SEEDS, scheduler=scheduler, steps=10)
        else:
            assert decode(path, embedding, SEEDS, scheduler=scheduler, steps=10).std() > 1


def test_ddim_is_deterministic_after_the_first_noise(path: Path, embedding: torch.Tensor) -> None:
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

    decoder = load_decoder("kandinsky22", str(path), unconditional=Unconditional(NEGATIVE), scheduler="ddim")
    assert isinstance(decoder.pipe.scheduler, DDIMScheduler)  # type: ignore[attr-defined]
    ddim = decode(path, embedding, SEEDS, scheduler="ddim")
    assert np.abs(ddim - decode(path, embedding, SEEDS, scheduler="ddpm")).max() > 2
    assert decode(path, embedding, SEEDS, scheduler="ddpm").tolist() == decode(path, embedding, SEEDS).tolist()


def test_what_cannot_be_loaded_is_named(path: Path, tmp_path: Path) -> None:
    blank = Unconditional(NEGATIVE)
    with pytest.raises(UsageError, match="unknown decoder kind 'sdxl'"):
        load_decoder("sdxl", str(path), unconditional=blank)
    with pytest.raises(UsageError, match="unknown scheduler 'euler'"):
        load_decoder("kandinsky22", str(path), unconditional=blank, scheduler="euler")
    with pytest.raises(EclipseError, match="takes 48") as error:
        load_decoder("kandinsky22", str(path), unconditional=Unconditional(torch.zeros(7)))
    assert "7 dims" in error.value.what
    with pytest.raises(EclipseError, match="weights cannot be loaded") as error:
        load_decoder("kandinsky22", str(tmp_path), unconditional=blank)
    assert error.value.where == str(tmp_path)
    with pytest.raises(EclipseError, match="all-zero picture"):
        load_decoder("kandinsky22", str(path), unconditional=Unconditional())


def test_pickled_weights_are_refused(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(path, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(EclipseError, match="weights cannot be loaded"):
        load_decoder("kandinsky22", str(copy), unconditional=Unconditional(NEGATIVE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet": ["subprocess", "Popen"]}, "subprocess"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "DiffusionPipeline"),
        ({"scheduler": ["transformers", "pipeline"]}, "pipeline"),
        ({"_class_name": ["mine", "KandinskyV22Pipeline"]}, "mine"),
    ],
)
def test_a_decoders_index_names_models_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    from diffusers import KandinskyV22Pipeline  # pyright: ignore[reportPrivateImportUsage]

    shutil.copytree(path, tmp_path / "decoder")
    index = tmp_path / "decoder" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    monkeypatch.setattr(KandinskyV22Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("diffusers was asked"))
    with pytest.raises(EclipseError, match=said):
        load_decoder("kandinsky22", str(tmp_path / "decoder"), unconditional=Unconditional(NEGATIVE))
