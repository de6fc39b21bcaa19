"""The prior against a plain padded reference, its published format, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from eclipse.bench.padded import PaddedPrior, pad
from eclipse.pipeline.core.errors import EclipseError
from eclipse.trainer.model.prior import PRESETS, Prior, PriorConfig, load_prior, sample, save_prior
from packed_captions import captions
from safetensors.torch import load_file, save_file

TINY = PriorConfig(24, num_layers=2, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize("preset", ["karlo", "kandinsky22"])
def test_packed_equals_padded_reference(preset: str) -> None:
    config = PRESETS[preset]
    torch.manual_seed(1)
    prior = Prior(config)
    padded = PaddedPrior.like(prior)
    noise, pooled, text = captions([7, 77, 3, 12, 7, 25], config.embedding_dim)
    ours = prior(noise, pooled, text)
    theirs = padded(noise, pooled, *pad(text))
    assert ours.shape == (6, config.embedding_dim)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    target = torch.randn_like(ours)
    (ours - target).square().sum(1).mean().backward()
    (theirs - target).square().sum(1).mean().backward()
    gradients = {name: p.grad for name, p in padded.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name, p in prior.named_parameters() if p.requires_grad}
    for name, parameter in prior.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_published_sizes_and_names() -> None:
    counts = {"karlo": 33_143_040, "kandinsky22": 34_193_152, "large": 89_056_512}
    for preset, count in counts.items():
        with torch.device("meta"):
            prior = Prior(PRESETS[preset])
        assert sum(p.numel() for p in prior.parameters()) == count
    with torch.device("meta"):
        names = set(Prior(PRESETS["karlo"]).state_dict())
    linear = {"proj_in", "embedding_proj", "encoder_hidden_states_proj", "norm_out", "proj_to_clip_embeddings"}
    parts = ["norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2"]
    linear |= {f"transformer_blocks.{i}.{part}" for i in range(10) for part in parts}
    expected = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    assert names == expected | {"positional_embedding", "prd_embedding", "clip_mean", "clip_std"}
    assert len(names) == 174


def test_a_caption_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    prior = Prior(TINY)
    noise, pooled, text = captions([5, 9, 5, 2], 24)
    together = prior(noise, pooled, text)
    for i in range(4):
        alone = prior(noise[i : i + 1], pooled[i : i + 1], text.take(i, i + 1))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_save_and_load_the_published_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = Prior(TINY)
    save_prior(prior, tmp_path / "prior")
    modes = {path.stat().st_mode for path in (tmp_path / "prior").iterdir()}
    assert len(modes) == 1, "weights are readable by whoever may read the config"
    assert {p.name for p in (tmp_path / "prior").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((tmp_path / "prior" / "config.json").read_text()) == {
        "_class_name": "PriorTransformer",
        "_diffusers_version": "0.20.2",
        "added_emb_type": "prd",
        "additional_embeddings": 3,
        "attention_head_dim": 8,
        "clip_embed_dim": None,
        "dropout": 0.0,
        "embedding_dim": 24,
        "embedding_proj_dim": None,
        "embedding_proj_norm_type": None,
        "encoder_hid_proj_type": "linear",
        "norm_in_type": None,
        "num_attention_heads": 2,
        "num_embeddings": 77,
        "num_layers": 2,
    }
    tensors = load_file(tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    assert all(x.dtype == torch.float32 for x in tensors.values())
    assert tensors["clip_mean"].eq(0).all() and tensors["clip_std"].eq(1).all()
    assert tensors["clip_mean"].shape == (1, 24)
    loaded = load_prior(str(tmp_path / "prior"))
    inputs = captions([3, 4], 24)
    assert isinstance(loaded, Prior)
    assert torch.equal(loaded(*inputs), prior(*inputs))
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in prior.named_parameters() if p.requires_grad}


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    save_prior(Prior(TINY), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    def message(**changes: object) -> str:
        config.write_text(json.dumps({**json.loads(good_config), **changes}))
        with pytest.raises(EclipseError) as caught:
            load_prior(tmp_path)
        config.write_text(good_config)
        return str(caught.value)

    assert "UNet2DModel" in message(_class_name="UNet2DModel")
    assert "num_layers" in message(num_layers="ten")
    assert "embedding_proj_norm_type" in message(embedding_proj_norm_type="layer")
    assert "a prior with 3" in message(additional_embeddings=4)
    assert "shape of" in message(num_attention_heads=4)
    assert "transformer_blocks.2" in message(num_layers=3)
    weights.write_bytes(good_weights[:-100])
    assert str(weights) in message()
    tensors = load_file_bytes(good_weights)
    save_file({**tensors, "surplus": torch.zeros(1)}, weights)
    assert "surplus" in message()
    with pytest.raises(EclipseError, match="no such prior"):
        load_prior(tmp_path / "nowhere")


def load_file_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_hub_id_offline_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EclipseError, match=f"HF_HUB_OFFLINE is set(.|\n)*133 MB, into {tmp_path}"):
        load_prior("ECLIPSE-Community/ECLIPSE_Karlo_Prior")


def test_sample_noise_follows_the_seeds() -> None:
    prior = Prior(TINY)
    _, pooled, text = captions([5, 9], 24)
    both = sample(prior, pooled, text, seed=[3, 4])
    alone = sample(prior, pooled[1:], text.take(1, 2), seed=[4])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    assert torch.equal(sample(prior, pooled, text, seed=1), sample(prior, pooled, text, seed=1))
    assert not torch.equal(sample(prior, pooled, text, seed=1), sample(prior, pooled, text, seed=2))


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    prior = Prior(TINY)
    save_prior(prior, tmp_path / "good")
    with torch.no_grad():
        prior.proj_in.weight[0, 0] = float("nan")
    with pytest.raises(EclipseError, match=r"proj_in\.weight holds numbers that are not finite"):
        save_prior(prior, tmp_path / "bad")
    assert not (tmp_path / "bad" / "config.json").exists()
    file = tmp_path / "good" / "diffusion_pytorch_model.safetensors"
    save_file({name: x.contiguous() for name, x in prior.state_dict().items()}, file)
    with pytest.raises(EclipseError, match="not finite"):
        load_prior(tmp_path / "good")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**9), ("embedding_dim", 10**30), ("num_attention_heads", -1), ("num_layers", "8")],
)
def test_a_config_no_network_has_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    save_prior(Prior(TINY), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(EclipseError, match=f"{key} is .* not a whole number") as caught:
        load_prior(tmp_path)
    assert caught.value.where == str(path)
    path.write_text("[" * 100_000)
    with pytest.raises(EclipseError, match="cannot read the prior's config"):
        load_prior(tmp_path)
