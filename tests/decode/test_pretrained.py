"""Five lines of Python: a prior with its encoder from a directory, what it returns, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UnCLIPScheduler  # pyright: ignore[reportPrivateImportUsage]
from eclipse import load
from eclipse.decode.conditioning import encode_texts, predict
from eclipse.decode.export import export_prior
from eclipse.decode.layouts import plan
from eclipse.decode.prompts import prompts_of
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.trainer.model.prior import PackedText, Prior, PriorConfig, save_prior
from tiny_clip import make_clip
from tiny_workspace import DIM, make_workspace, save_tiny_prior


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    export_prior(make_workspace(root), root / "out", Progress(quiet=True))
    return root / "out"


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import eclipse, sys; assert {'load', 'open'} <= set(dir(eclipse))\n"
        "heavy = {'torch', 'numpy', 'polars', 'pydantic', 'eclipse.api'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_in_embeddings_out(exported: Path) -> None:
    prior = load(exported)
    out = prior(["a red dog", "two cats"], draws=3)
    assert out.image_embeds.shape == out.negative_image_embeds.shape == (6, DIM)
    torch.testing.assert_close(prior("two cats", draws=3).image_embeds, out.image_embeds[3:])  # a prompt's lie together
    assert len({tuple(row.tolist()) for row in out.image_embeds}) == 6
    assert not torch.equal(prior("two cats", seed=1).image_embeds, out.image_embeds[3:4])
    assert {**out}.keys() == {"image_embeds", "negative_image_embeds"} and out.to_tuple()[0] is out.image_embeds


def test_negative_embeddings_are_of_nothing_or_of_a_text(exported: Path) -> None:
    prior = load(exported)
    blank = prior("a red dog", draws=2).negative_image_embeds
    size = prior.encoder.image_size
    assert torch.equal(blank, prior.encoder.encode_images(torch.zeros(1, 3, size, size)).expand(2, -1))
    of_text = prior("a red dog", draws=2, negative_prompt="ugly").negative_image_embeds
    assert torch.equal(of_text, prior("ugly").image_embeds.expand(2, -1))


@pytest.mark.parametrize(("prompt", "draws"), [("", 1), ([], 1), (["a", " "], 1), ("a", 0)])
def test_what_cannot_be_asked(exported: Path, prompt: Any, draws: int) -> None:
    with pytest.raises(UsageError):
        load(exported)(prompt, draws=draws)


def test_the_encoder_must_be_known_and_the_right_one(exported: Path, tmp_path: Path) -> None:
    bare = save_tiny_prior(tmp_path / "bare")
    with pytest.raises(UsageError, match="nothing says which encoder"):
        load(bare)
    record = json.loads((exported / "eclipse.json").read_text())
    assert load(bare, encoder=record["encoder"]["model"])("a dog").image_embeds.shape == (1, DIM)
    record["encoder"]["fingerprint"] = "0" * 64
    (bare / "eclipse.json").write_text(json.dumps(record))
    with pytest.raises(EclipseError, match="other weights than the encoder"):
        load(bare)
    wider = tmp_path / "wider"
    save_prior(Prior(PriorConfig(48, num_layers=1, num_attention_heads=2)), wider)
    with pytest.raises(UsageError, match=f"48 dimensions, this encoder makes {DIM}"):
        load(wider, encoder=make_clip(tmp_path / "clip"))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [2, 5])
def test_stock_diffusers_samples_it_in_one_pass(exported: Path, guidance: float, steps: int) -> None:
    """The loop of KandinskyV22PriorPipeline, with its scheduler: what comes out is the one pass's prediction."""
    prior = load(exported)
    wrapped = prior.as_diffusers()
    features = prior.encoder.encode_text(*prior.encoder.tokenize(["a red dog", "two cats on a hat"]))
    lengths = features.n_tokens.tolist()
    padded = torch.zeros(2, 77, DIM)
    mask = torch.zeros(2, 77, dtype=torch.bool)
    for row, states in enumerate(features.states.split(lengths)):
        padded[row, : len(states)], mask[row, : len(states)] = states, True
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample=True, clip_sample_range=5.0, prediction_type="sample"
    )
    guided = guidance > 1
    for seed in (0, 1):  # a second sampling begins anew
        scheduler.set_timesteps(steps)
        latents = noise = torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed))
        for i, t in enumerate(scheduler.timesteps):
            said = wrapped(
                torch.cat([latents] * 2) if guided else latents,
                timestep=t,
                proj_embedding=torch.cat([torch.zeros(2, DIM), features.embedding]) if guided else features.embedding,
                encoder_hidden_states=torch.cat([padded] * 2) if guided else padded,
                attention_mask=torch.cat([mask] * 2) if guided else mask,
            ).predicted_image_embedding
            if guided:
                without, with_text = said.chunk(2)
                said = without + guidance * (with_text - without)
            last = i + 1 == len(scheduler.timesteps)
            before: Any = None if last else scheduler.timesteps[i + 1]
            latents = scheduler.step(said, cast(Any, t), latents, before, return_dict=False)[0]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        network: Any = prior.prior
        with torch.no_grad():
            expected = network(noise, features.embedding, PackedText(features.states, offsets))
        torch.testing.assert_close(wrapped.post_process_latents(latents), expected, rtol=1e-3, atol=1e-4)


def test_a_draw_is_the_one_that_render_makes(exported: Path) -> None:
    prior = load(exported)
    pictures = plan("flat", prompts_of(["a red dog"]), samples=2, seed=7)
    texts = encode_texts(prior.encoder, ["a red dog"], Progress(quiet=True))
    rendered = predict(str(exported), texts, [0, 0], [picture.seeds[0] for picture in pictures], "cpu")
    torch.testing.assert_close(prior("a red dog", draws=2, seed=7).image_embeds, rendered)
