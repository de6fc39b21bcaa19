"""What is judged while a GPU trains is what the pipeline would show, of prompts that no evaluation asks."""

import numpy as np
import pytest
import torch
from eclipse.decode.conditioning import encode_texts
from eclipse.decode.decoder import Unconditional, load_decoder
from eclipse.lab.bank import PairBank
from eclipse.lab.build_movq import load as load_movq
from eclipse.lab.build_unet import load as load_unet
from eclipse.lab.build_unet import negative_embedding
from eclipse.lab.device_judge import (
    EVALUATED,
    Judge,
    PromptTexts,
    Sampler,
    judges,
    validation_prompts,
)
from eclipse.lab.ensemble import LENGTHS, Ensemble
from eclipse.lab.scene_stream import Order, captions_of, draw_block, workers
from eclipse.lab.score import encode_scenes
from eclipse.lab.shapes import CATEGORIES, World
from eclipse.lab.truth import evaluation_texts
from eclipse.pipeline.core.card import MODELS
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.embed.clip import Encoder
from eclipse.trainer.model.prior import PriorConfig

WORLD = World()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(f"local-dir:{MODELS / 'clip'}")


def test_validation_prompts_are_none_of_the_evaluation() -> None:
    prompts = validation_prompts(WORLD, 20)
    assert len({p.text for p in prompts}) == len(prompts) == 20 * len(CATEGORIES) * 2
    assert not {p.text for p in prompts} & evaluation_texts(WORLD, EVALUATED)
    assert {p.text for p in WORLD.prompts("spatial", EVALUATED, "unseen")} <= evaluation_texts(WORLD, EVALUATED)


def test_the_sampler_draws_what_the_pipeline_does(encoder: Encoder) -> None:
    seeds, steps = [3, 5, 8], 3
    embedding = encode_scenes(encoder, [WORLD.scene(i, "any") for i in range(3)])
    decoder = load_decoder("kandinsky22", str(MODELS / "decoder"), unconditional=Unconditional(), image_size=64)
    expected = decoder.decode(embedding, seeds=seeds, steps=steps, guidance_scale=2.0)
    unet, movq = load_unet(MODELS / "decoder" / "unet").eval(), load_movq(MODELS / "decoder" / "movq").eval()
    sampler = Sampler(unet, movq, negative_embedding(encoder), len(seeds), steps)
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            sampler.noise[step, i] = torch.randn(1, 4, 16, 16, generator=generator)[0]
    found = sampler(embedding).numpy().astype(int)
    difference = np.abs(found - np.stack([np.asarray(picture) for picture in expected]).astype(int))
    assert difference.max() <= 4 and difference.mean() < 0.1


def test_members_predict_for_prompts_what_their_priors_do(encoder: Encoder) -> None:
    prompts = validation_prompts(WORLD, 2)
    texts = PromptTexts(encoder, prompts, "cpu")
    ensemble = Ensemble(PriorConfig(128, num_layers=2, num_attention_heads=2), [1, 2], "cpu")
    found = texts.predicted(ensemble)
    plain = encode_texts(encoder, [p.text for p in prompts], Progress(quiet=True))
    for k in range(2):
        with torch.no_grad():
            expected = ensemble.member(k)(texts.noise, plain.embedding, plain)
        torch.testing.assert_close(found[k], expected, atol=5e-3, rtol=5e-3)  # float16 features


def test_the_bank_holds_every_caption_in_its_class_and_grows(encoder: Encoder) -> None:
    taken = {captions_of(WORLD, WORLD.scene(3), 3)[0]}
    pool = workers(WORLD, 1, taken)
    try:
        blocks = [pool.apply(draw_block, (Order("train", first, 6),)) for first in (0, 6)]
    finally:
        pool.terminate()
    bank = PairBank(encoder, 40, "cpu")
    for block in blocks:
        bank.add([block])
    captions = [[c for c in captions_of(WORLD, WORLD.scene(i), i) if c not in taken] for i in range(12)]
    assert bank.pictures == 12 and bank.pairs.filled.tolist() == bank.counts
    assert sum(bank.counts) == sum(map(len, captions))
    seen = set()
    for c, longest in enumerate(LENGTHS):
        for row in range(bank.counts[c]):
            picture, column, length = (int(x[c][row]) for x in (bank.pairs.picture, bank.column, bank.pairs.lengths))
            seen.add((picture, column))
            text = encoder.encode_text(*encoder.tokenize([captions[picture][column]]))
            assert len(text.states) == length <= longest
            states = bank.pairs.states[c][row]
            torch.testing.assert_close(states[:length].float(), text.states, atol=5e-3, rtol=5e-3)
            assert not states[length:].any()
            torch.testing.assert_close(bank.pairs.text[c][row].float(), text.embedding[0], atol=5e-3, rtol=5e-3)
    assert len(seen) == sum(bank.counts)
    image = encode_scenes(encoder, [WORLD.scene(i) for i in range(12)])
    torch.testing.assert_close(bank.pairs.image[:12].float(), image, atol=5e-3, rtol=5e-3)
    usable = bank.usable(5, 2, LENGTHS[1])
    assert [len(u) for u in usable[2:]] == [0, 0]
    for c, rows in enumerate(usable):
        assert (bank.pairs.picture[c][rows] < 5).all() and (bank.column[c][rows] < 2).all()


def test_scores_are_those_of_the_prompts() -> None:
    prompts = validation_prompts(WORLD, 1)
    pool = judges(prompts, 1)

    class Drawn:
        """Stands for a decoder that draws just what the prompt asks."""

        def __call__(self, embedding: torch.Tensor, guidance: float) -> torch.Tensor:
            from eclipse.lab.drawing import draw

            return torch.from_numpy(draw([WORLD.scene_for(p) for p in prompts]))

    judge = Judge(prompts, pool)
    try:
        judge.submit("drawn", Drawn(), torch.zeros(len(prompts), 128))  # type: ignore[arg-type]
        found: list[str] = []
        while not found:
            found = judge.poll()
    finally:
        pool.terminate()
    assert judge.waiting == 0 and found == ["drawn"]
    assert judge.table("drawn")["mean"]["seen"] >= 0.9
