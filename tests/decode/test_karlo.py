"""Karlo's decoder against diffusers' deprecated UnCLIPPipeline, with untrained weights of the published classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eclipse.decode.decoder import Unconditional, load_decoder
from eclipse.decode.karlo import KarloDecoder, UnCLIPTextProjModel
from eclipse.pipeline.cache.packed_text import TextFeatures
from eclipse.pipeline.core.errors import UsageError
from tiny_decoders import save_tiny_karlo

DIM, LENGTH = 32, 9
SEEDS = [11, 4]


def captions(lengths: list[int], seed: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(len(lengths), DIM, generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return TextFeatures(torch.randn(sum(lengths), DIM, generator=generator), offsets, embedding=pooled)


def padded(text: TextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """As the stock pipeline takes it: to LENGTH, with rubbish in the padding, which must not be looked at."""
    states, mask = text.padded(LENGTH)
    return torch.where(mask[..., None], states, torch.randn_like(states)), mask


EMPTY = captions([2], seed=1)
TEXT = captions([5, 9], seed=2)
EMBEDDING = torch.randn(2, DIM, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_karlo(tmp_path_factory.mktemp("karlo"), embedding_dim=DIM)


@pytest.fixture(scope="module")
def decoder(path: Path) -> KarloDecoder:
    made = load_decoder("karlo", str(path), unconditional=Unconditional(caption=EMPTY))
    assert isinstance(made, KarloDecoder)
    return made


def decode(decoder: KarloDecoder, embedding: torch.Tensor, seeds: list[int], **options: object) -> np.ndarray:
    pictures = decoder.decode(embedding, seeds=seeds, steps=3, **{"guidance_scale": 4.0, **options})  # type: ignore[arg-type]
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_are_those_of_the_deprecated_pipeline(decoder: KarloDecoder, guidance_scale: float) -> None:
    unclip = pytest.importorskip("diffusers.pipelines.deprecated.unclip.pipeline_unclip")
    stock = type("Stock", (unclip.UnCLIPPipeline,), {"_execution_device": torch.device("cpu")})
    pipe = stock.__new__(stock)
    _assemble(pipe, decoder)
    expected = pipe(
        decoder_num_inference_steps=3,
        prior_num_inference_steps=1,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        prior_latents=EMBEDDING,
        text_model_output=(TEXT.embedding, padded(TEXT)[0]),
        text_attention_mask=padded(TEXT)[1],
        prior_guidance_scale=1.0,
        decoder_guidance_scale=guidance_scale,
        output_type="np",
    ).images
    got = decode(decoder, EMBEDDING, SEEDS, guidance_scale=guidance_scale, captions=TEXT)
    assert got.shape == (2, 64, 64, 3)
    assert got.std() > 10
    assert np.abs(got - expected * 255).max() <= 1.0


def _assemble(pipe: object, decoder: KarloDecoder) -> None:
    """The pipeline around our parts; its prior hands through the latents, its text tower knows the empty caption."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as Published

    ours = decoder.parts.text_proj
    published = Published(**{k: v for k, v in ours.config.items() if not k.startswith("_")})
    published.load_state_dict(ours.state_dict())
    identity = SimpleNamespace(
        set_timesteps=lambda n, device: None,
        timesteps=torch.tensor([0]),
        init_noise_sigma=1.0,
        step=lambda predicted, sample, **_: SimpleNamespace(prev_sample=sample),
    )

    class Prior:
        config = SimpleNamespace(embedding_dim=DIM)

        def __call__(self, latents: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(predicted_image_embedding=latents)

        def post_process_latents(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    class Tokenizer:
        model_max_length = LENGTH

        def __call__(self, texts: list[str], **_: object) -> SimpleNamespace:
            n = len(texts)
            return SimpleNamespace(input_ids=torch.zeros(n, LENGTH), attention_mask=padded(EMPTY)[1].expand(n, -1))

    def text_encoder(ids: torch.Tensor) -> SimpleNamespace:
        n = len(ids)
        return SimpleNamespace(
            text_embeds=EMPTY.embedding.expand(n, -1), last_hidden_state=padded(EMPTY)[0].expand(n, -1, -1)
        )

    parts = {
        "prior": Prior(),
        "tokenizer": Tokenizer(),
        "text_encoder": text_encoder,
        "prior_scheduler": identity,
        "text_proj": published,
        "decoder": decoder.parts.decoder,
        "super_res_first": decoder.parts.super_res_first,
        "super_res_last": decoder.parts.super_res_last,
        "decoder_scheduler": decoder.parts.decoder_scheduler,
        "super_res_scheduler": decoder.parts.super_res_scheduler,
    }
    for name, part in parts.items():
        object.__setattr__(pipe, name, part)
    pipe._progress_bar_config = {"disable": True}  # type: ignore[attr-defined]
    pipe.maybe_free_model_hooks = lambda: None  # type: ignore[attr-defined]


def test_tensor_names_are_the_published_ones() -> None:
    published = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj").UnCLIPTextProjModel
    sizes = {"clip_embeddings_dim": 768, "time_embed_dim": 1280, "cross_attention_dim": 1536}
    shapes = {name: tensor.shape for name, tensor in published(**sizes).state_dict().items()}
    assert {name: tensor.shape for name, tensor in UnCLIPTextProjModel(**sizes).state_dict().items()} == shapes


def test_a_picture_does_not_depend_on_its_neighbours(decoder: KarloDecoder) -> None:
    together = decode(decoder, EMBEDDING, SEEDS, captions=TEXT)
    alone = decode(decoder, EMBEDDING[:1], SEEDS[:1], captions=TEXT.select([0]))
    assert np.abs(together[0] - alone[0]).max() <= 1


def test_a_caption_of_any_length_is_drawn_as_if_alone(decoder: KarloDecoder) -> None:
    """60 tokens, too: with the 4 extra ones as many as an 8×8 map has places, where diffusers' mask stays short."""
    for longest in (60, 77):
        text = captions([5, longest], seed=4)
        together = decode(decoder, EMBEDDING, SEEDS, captions=text)
        alone = decode(decoder, EMBEDDING[:1], SEEDS[:1], captions=text.select([0]))
        assert np.abs(together[0] - alone[0]).max() <= 1


def test_without_captions_the_text_is_blank(decoder: KarloDecoder) -> None:
    blank = decode(decoder, EMBEDDING, SEEDS)
    empty = decode(decoder, EMBEDDING, SEEDS, captions=EMPTY.select([0, 0]))
    assert np.abs(blank - empty).max() == 0
    assert np.abs(blank - decode(decoder, EMBEDDING, SEEDS, captions=TEXT)).max() > 2


def test_options_that_cannot_work_are_refused(path: Path, decoder: KarloDecoder) -> None:
    blank = Unconditional(caption=EMPTY)
    with pytest.raises(UsageError, match="64 px, not 512"):
        load_decoder("karlo", str(path), unconditional=blank, image_size=512)
    with pytest.raises(UsageError, match="one scheduler"):
        load_decoder("karlo", str(path), unconditional=blank, scheduler="ddim")
    with pytest.raises(UsageError, match="1 decoder steps"):
        decoder.decode(EMBEDDING, seeds=SEEDS, steps=1, guidance_scale=4.0)
