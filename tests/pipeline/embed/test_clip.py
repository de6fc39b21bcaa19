"""The encoder against transformers' CLIP of the same weights, and against open_clip's own preprocessing and tokens."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.embed.clip import PRESETS, Encoder, wants_quick_gelu
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import TINY, make_clip
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

CAPTIONS = [
    "a red square left of a blue circle",
    "",
    "two dogs",
    "  A   Café &amp; bar,\nat “night” ",
    " ".join(["photograph"] * 75),  # exactly 77 tokens
    " ".join(["photograph"] * 76),  # one too many
    "a very long caption " * 40,
]
# Full widths of the published models, less depth, as agreement of one block is agreement of all. ECLIPSE_FULL_DEPTH=1
# takes the depth too: two minutes and 12 GB.
LAYERS = None if os.environ.get("ECLIPSE_FULL_DEPTH") else 2


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(clip_name: str) -> Encoder:
    return Encoder.load(clip_name)


def published(name: str, pretrained: str, layers: int | None = LAYERS) -> nn.Module:
    """The published configuration with random weights, biases and layer norms included."""
    config = open_clip.get_model_config(name)
    assert config is not None
    depth = {} if layers is None else {"layers": layers}
    towers: dict[str, Any] = {key: {**config[key], **depth} for key in ("vision_cfg", "text_cfg")}
    torch.manual_seed(0)
    model = open_clip.create_model(name, force_quick_gelu=wants_quick_gelu(name, pretrained), **towers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_transformers(model: Any, quick_gelu: bool) -> tuple[nn.Module, nn.Module]:
    """The same weights in transformers' classes, text and vision, sharing memory with the original."""
    act = "quick_gelu" if quick_gelu else "gelu"
    visual = model.visual
    shared = {"projection_dim": model.text_projection.shape[1], "hidden_act": act}
    text_config = CLIPTextConfig(
        **_sizes(model.transformer), **shared, eos_token_id=49407, max_position_embeddings=model.context_length
    )
    vision_config = CLIPVisionConfig(
        **_sizes(visual.transformer), **shared, patch_size=visual.patch_size[0], image_size=visual.image_size[0]
    )
    with torch.device("meta"):
        text, vision = CLIPTextModelWithProjection(text_config), CLIPVisionModelWithProjection(vision_config)
    text_state = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        **_blocks(model.transformer),
        **_norm("final_layer_norm", model.ln_final),
    }
    vision_state = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        **_blocks(visual.transformer),
        **_norm("pre_layrnorm", visual.ln_pre),
        **_norm("post_layernorm", visual.ln_post),
    }
    for target, prefix, state, projection in (
        (text, "text_model", text_state, {"text_projection.weight": model.text_projection.T}),
        (vision, "vision_model", vision_state, {"visual_projection.weight": visual.proj.T}),
    ):
        state = {f"{prefix}.{name}": tensor for name, tensor in state.items()} | projection
        positions = torch.arange(len(state[f"{prefix}.embeddings.position_embedding.weight"]))[None]
        target.load_state_dict({k: v.detach() for k, v in state.items()}, assign=True, strict=True)
        target.get_submodule(f"{prefix}.embeddings").register_buffer("position_ids", positions, persistent=False)
        target.eval()
    return text, vision


def _sizes(transformer: Any) -> dict[str, int]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
    }


def _norm(name: str, norm: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _blocks(transformer: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for i, block in enumerate(transformer.resblocks):
        at = f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3), strict=True):
                state[f"{at}.self_attn.{name}_proj.{kind}"] = part
        for name, module in (
            ("self_attn.out_proj", block.attn.out_proj),
            ("mlp.fc1", block.mlp.c_fc),
            ("mlp.fc2", block.mlp.c_proj),
            ("layer_norm1", block.ln_1),
            ("layer_norm2", block.ln_2),
        ):
            state |= _norm(f"{at}.{name}", module)
    return state


@pytest.mark.parametrize("preset", PRESETS)
def test_agrees_with_transformers_at_published_widths(preset: str) -> None:
    """Issue's bound: 1e-4 in float32, image embedding, text embedding and token states."""
    model = published(*PRESETS[preset])
    text, vision = in_transformers(model, quick_gelu=preset == "karlo")
    encoder = Encoder(model, open_clip.get_tokenizer(PRESETS[preset][0]))
    assert (encoder.embedding_dim, encoder.text_width) == {"karlo": (768, 768), "kandinsky22": (1280, 1280)}[preset]

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode_images(pixels), vision(pixels).image_embeds, atol=1e-4, rtol=0)
        ids, n_tokens = encoder.tokenize(CAPTIONS)
        ours, theirs = encoder.encode_text(ids, n_tokens), text(ids)
    torch.testing.assert_close(ours.embedding, theirs.text_embeds, atol=1e-4, rtol=0)
    padded = theirs.last_hidden_state
    real = torch.cat([padded[i, :n] for i, n in enumerate(n_tokens)])
    torch.testing.assert_close(ours.states, real, atol=1e-4, rtol=0)


def test_long_and_empty_captions(encoder: Encoder) -> None:
    tokens = encoder.tokenize_captions(CAPTIONS)
    assert tokens.n_tokens.tolist() == [10, 2, 4, *tokens.n_tokens[3:4].tolist(), 77, 77, 77]
    assert tokens.truncated.tolist() == [False] * 5 + [True, True]
    assert tokens.ids[5, 76] == encoder.tokenize_captions.end
    assert torch.equal(tokens.ids, open_clip.tokenize(CAPTIONS))


def test_tokens_are_those_of_open_clip(encoder: Encoder) -> None:
    """The short way for plain captions must not change a single token."""
    rng = np.random.default_rng(0)
    printable = [chr(c) for c in range(32, 127)]
    noise = ["".join(rng.choice(printable, 60)) for _ in range(300)]
    tricky = [
        "don't",
        "it's 4:30pm!!",
        "a&amp;b",
        "x\ty",
        "ＦＵＬＬ",
        "naïve",
        "\x1b[1m",
        "##--",
        "<b>",
        "1234",
        "mixed CaSe",
        "‘q’",
    ]
    captions = [*noise, *tricky, *(f"{a} {b}" for a, b in zip(noise[:50], tricky * 5, strict=False))]
    assert torch.equal(encoder.tokenize(captions)[0], open_clip.tokenize(captions))


def test_an_end_token_spelled_out_ends_the_caption(encoder: Encoder) -> None:
    """CLIP pools at the first end token; what follows it can change nothing."""
    spelled, plain = (encoder.encode_text(*encoder.tokenize([c])) for c in ("a cat <end_of_text> dog", "a cat"))
    assert spelled.n_tokens.tolist() == [4]
    assert torch.equal(spelled.embedding, plain.embedding)


def test_short_captions_need_no_padding(encoder: Encoder) -> None:
    """Alone, in a batch of its like, or padded to 77 beside a long one: the same features."""
    ids, n_tokens = encoder.tokenize(CAPTIONS)
    together = encoder.encode_text(ids, n_tokens)
    for row, states in enumerate(together.states.split(n_tokens.tolist())):
        alone = encoder.encode_text(ids[row : row + 1], n_tokens[row : row + 1])
        torch.testing.assert_close(alone.states, states, atol=2e-6, rtol=0)
        torch.testing.assert_close(alone.embedding[0], together.embedding[row], atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (300, 40), (7, 9), (1, 1)])
def test_preprocessing_is_the_encoders_own(encoder: Encoder, size: tuple[int, int]) -> None:
    """Our resize beside Pillow's in open_clip's transforms: a level or so in some values, and the same embedding."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    own: Any = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    pixels = encoder.preprocess(picture)
    *to_rgb, _, _ = own.transforms
    wanted = np.array(functools.reduce(lambda image, step: step(image), to_rgb, picture)).astype(int)
    assert np.abs(pixels - wanted).max() <= 3 and (pixels != wanted).mean() < 0.05
    from_bytes, from_floats = encoder.encode_images(pixels[None]), encoder.encode_images(own(picture)[None])
    assert torch.cosine_similarity(from_bytes, from_floats).item() > 0.9999
    if size == (32, 32):
        torch.testing.assert_close(from_bytes, from_floats, atol=1e-6, rtol=0)


def test_low_precision_keeps_the_direction(clip_name: str, encoder: Encoder) -> None:
    low = Encoder.load(clip_name, precision="bf16")
    assert low.fingerprint == encoder.fingerprint
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    tokens = encoder.tokenize(CAPTIONS)
    for ours, reference in (
        (low.encode_images(pixels), encoder.encode_images(pixels)),
        (low.encode_text(*tokens).embedding, encoder.encode_text(*tokens).embedding),
    ):
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours, reference).min() > 0.999


def test_fingerprint_follows_weights_and_activation(tmp_path, encoder: Encoder) -> None:
    same = Encoder.load(make_clip(tmp_path / "same"))
    other = Encoder.load(make_clip(tmp_path / "other", seed=1))
    quick = Encoder.load(make_clip(tmp_path / "quick", {**TINY, "quick_gelu": True}))
    assert same.fingerprint == encoder.fingerprint
    assert len({encoder.fingerprint, other.fingerprint, quick.fingerprint}) == 3


def test_resnet_and_custom_text_towers_load(tmp_path) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None}
    resnet = {**TINY, "vision_cfg": vision}
    custom = {**TINY, "custom_text": True}
    for name, config in {"resnet": resnet, "custom": custom}.items():
        encoder = Encoder.load(make_clip(tmp_path / name, config))
        side = encoder.image_size
        assert encoder.encode_images(np.zeros((1, side, side, 3), np.uint8)).shape == (1, 32)
        assert encoder.encode_text(*encoder.tokenize(["a cat"])).states.shape == (4, 32)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L-41", None, "near: .*ViT-L-14"),
        ("ViT-L-14", None, "openai"),
        ("ViT-L-14", "laion5b", "laion2b_s32b_b82k"),
        ("local-dir:/nowhere", None, "no such model directory"),
    ],
)
def test_wrong_names_are_explained(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Encoder.load(model, pretrained)


def test_towers_that_cannot_feed_a_prior_are_refused(tmp_path) -> None:
    text = {**TINY["text_cfg"], "no_causal_mask": True}
    with pytest.raises(EclipseError, match="not causal"):
        Encoder.load(make_clip(tmp_path / "open", {**TINY, "custom_text": True, "text_cfg": text}))
    (tmp_path / "broken").mkdir()
    with pytest.raises(EclipseError, match="cannot load the encoder"):
        Encoder.load(f"local-dir:{tmp_path / 'broken'}")


def damage(folder: Path, kind: str) -> Path:
    """Break a model directory in one way; returns the file that is to be named."""
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "garbage":
        weights.write_bytes(b"garbage" * 1000)
    elif kind == "pipe":
        weights.unlink()
        os.mkfifo(weights)
    elif kind == "no config":
        config.unlink()
    else:
        config.write_text(kind)
    return config if kind == "no config" or kind[0] in "[{" else weights


@pytest.mark.parametrize(
    "kind",
    ["[]", "{}", '{"model_cfg": {"text_cfg": []}}', "no config", "no weights", "truncated", "garbage", "pipe"],
)
def test_a_damaged_directory_is_named_with_the_way_out(tmp_path: Path, kind: str) -> None:
    name = make_clip(tmp_path / "clip")
    Encoder.load(name)
    file = damage(tmp_path / "clip", kind)
    with pytest.raises(EclipseError, match="cannot load the encoder") as error:
        Encoder.load(name)
    assert error.value.where == str(file) and "encoder.model in the card" in str(error.value.hint)


def test_weights_under_open_clips_other_names_load(tmp_path: Path, encoder: Encoder) -> None:
    name = make_clip(tmp_path / "clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.rename(weights.with_name("mine.safetensors"))
    assert Encoder.load(name).fingerprint == encoder.fingerprint
    state = load_file(weights.with_name("mine.safetensors"))
    torch.save(state, weights.with_name("open_clip_pytorch_model.bin"))
    weights.with_name("mine.safetensors").write_bytes(b"not what is loaded")
    assert Encoder.load(name).fingerprint == encoder.fingerprint


CODE_IN_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("text_cfg.tokenizer_kwargs", {"tokenizer_kwargs": {"trust_remote_code": True}}),
    ("text_cfg.hf_tokenizer_name", {"hf_tokenizer_name": "any/thing"}),
    ("text_cfg.hf_model_name", {"hf_model_name": "any/thing"}),
    ("text_cfg.norm_kwargs.auto_map", {"norm_kwargs": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}}),
]


@pytest.mark.parametrize(("key", "change"), CODE_IN_CONFIGS)
def test_no_config_has_code_or_further_models_loaded(tmp_path: Path, key: str, change: dict[str, Any]) -> None:
    folder = tmp_path / "clip"
    name = make_clip(folder)
    config = {"model_cfg": {**TINY, "text_cfg": {**TINY["text_cfg"], **change}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(EclipseError, match=f"model_cfg.{key} has further code") as error:
        Encoder.load(name)
    assert error.value.where == str(folder / "open_clip_config.json")


def test_python_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What open_clip would do with such a directory, and that nothing of it happens even past the check."""
    folder, ran = tmp_path / "clip", tmp_path / "ran"
    name = make_clip(folder)
    text = {**TINY["text_cfg"], "hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, "text_cfg": text}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with contextlib.suppress(Exception):
        open_clip.get_tokenizer(name)
    assert ran.exists()  # the danger is real
    ran.unlink()
    with pytest.raises(EclipseError, match="has further code"):
        Encoder.load(name)
    monkeypatch.setattr("eclipse.pipeline.embed.clip._check_config", lambda config: None)
    Encoder.load(name)
    assert not ran.exists()
