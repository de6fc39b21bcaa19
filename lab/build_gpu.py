"""Trains on a GPU what hours on a CPU do not reach: the reference prior, the decoder further, the table of levers.

Called by `build_models rates`. Everything there is drawn afresh by the machine's cores while the GPU trains.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipeline.core.card import MODELS
from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import PRESETS, PriorConfig
from .build_movq import encode as to_latents
from .build_movq import load as load_movq
from .build_unet import Phase, Recipe, negative_embedding
from .build_unet import load as load_unet
from .checker import read_all
from .decoder_steps import Examples, Rows, Step, movq_loss, unet_loss
from .ensemble import LENGTHS, Ensemble, Pairs, Settings, Training
from .scene_stream import BLOCK, MOST_CAPTIONS, Drawn, Order, stream, workers
from .shapes import World

LONGEST = 60.0  # seconds that `rates` waits for what is compiled
DEEP = PriorConfig(128, num_layers=8, num_attention_heads=6)
SHAPES = {"tiny": PRESETS["tiny"], "small": PRESETS["small"], "deep": DEEP}
RECIPE = Recipe(31, 512, 1e-3, (Phase(0, 0.05, 0.1, 0.3, 0.6, retold_share=0.3, crowded_share=0.4),))


@torch.inference_mode()
def image_embeddings(encoder: Encoder, drawn: Drawn) -> Tensor:
    """(n, 128) float16 on the device."""
    return encoder.encode_images(drawn.pixels).half()


@torch.inference_mode()
def pairs_of(encoder: Encoder, image: Tensor, ids: np.ndarray, n_tokens: np.ndarray) -> Pairs:
    """Every caption of every picture, encoded and sorted into length classes. ids (n, c, W), n_tokens (n, c)."""
    device = image.device
    text, states, lengths, picture = [], [], [], []
    for c, longest in enumerate(LENGTHS):
        shortest = LENGTHS[c - 1] if c else 0
        rows, column = np.nonzero((n_tokens > shortest) & (n_tokens <= longest))
        own = torch.from_numpy(n_tokens[rows, column].astype(np.int64))
        tokens = torch.from_numpy(ids[rows, column][:, :longest].astype(np.int64))
        pooled = torch.empty(len(rows), encoder.embedding_dim, dtype=torch.float16, device=device)
        padded = torch.zeros(len(rows), longest, encoder.text_width, dtype=torch.float16, device=device)
        for start in range(0, len(rows), 8192):
            some = slice(start, start + 8192)
            found = encoder.encode_text(tokens[some], own[some])
            pooled[some] = found.embedding.half()
            real = torch.arange(longest, device=device) < own[some].to(device)[:, None]
            padded[some][real] = found.states.half()
        text.append(pooled)
        states.append(padded)
        lengths.append(own.to(device))
        picture.append(torch.from_numpy(rows).to(device))
    filled = torch.tensor([len(t) for t in text], device=device)
    return Pairs(image, text, states, lengths, picture, filled)


def rates(device: str, processes: int, pictures: int, seconds: float, out: Path) -> dict[str, Any]:
    """How fast everything runs here: drawing, encoding, and steps of every network at several batch sizes.

    seconds: how long each is timed. Two children compile meanwhile; what they are not ready to time is left out.
    """
    began, found = time.monotonic(), dict[str, Any]()
    pool = workers(World(), processes)
    out.mkdir(parents=True, exist_ok=True)

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(f"{time.monotonic() - began:6.1f} s  {name}: {value}", flush=True)
        (out / "rates.json").write_text(json.dumps(found, indent=1))

    orders = [Order("train", first, BLOCK) for first in range(0, pictures, BLOCK)]
    orders += [Order("any", first, BLOCK) for first in range(0, pictures // 2, BLOCK)]
    orders += [Order("retold", first, BLOCK // 5) for first in range(0, pictures // 20, BLOCK // 5)]
    drawn: dict[str, list[Drawn]] = {"train": [], "any": [], "retold": []}
    start, counted = time.monotonic(), 0
    for block in stream(pool, orders):
        drawn[block.order.kind].append(block)
        counted += len(block.pixels)
    note("drawn pictures/s", round(counted / (time.monotonic() - start)))
    note("processes", processes)
    note("device", torch.cuda.get_device_name() if device == "cuda" else "cpu")
    note("torch", torch.__version__)
    ready = multiprocessing.get_context("spawn").Event()
    children = []
    if device == "cuda":
        context = multiprocessing.get_context("spawn")
        children = [
            context.Process(target=_compiled_rates, args=(kind, seconds, ready, out)) for kind in ("unet", "small")
        ]
        for child in children:
            child.start()
        torch.backends.cudnn.benchmark = True

    encoder = Encoder.load(f"local-dir:{MODELS / 'clip'}", device=device)
    image_embeddings(encoder, drawn["train"][0])
    start = time.monotonic()
    image = torch.cat([image_embeddings(encoder, block) for block in drawn["train"]])
    _wait(device)
    note("image embeddings/s", round(len(image) / (time.monotonic() - start)))
    ids, n_tokens = (np.concatenate([getattr(block, name) for block in drawn["train"]]) for name in ("ids", "n_tokens"))
    start = time.monotonic()
    pairs = pairs_of(encoder, image, ids, n_tokens)
    _wait(device)
    note("captions/s", round(int((n_tokens > 0).sum()) / (time.monotonic() - start)))
    note("captions a picture", round(float((n_tokens > 0).sum(1).mean()), 2))
    assert n_tokens.shape[1] == MOST_CAPTIONS

    trials = [
        ("tiny", 3, 64, False), ("tiny", 3, 128, False), ("small", 3, 128, False), ("small", 1, 128, False),
        ("small", 1, 1024, False), ("small", 1, 1024, True), ("small", 1, 2048, True), ("deep", 1, 1024, True),
    ]  # fmt: skip
    for shape, members, batch, half in trials if device == "cuda" else trials[:1]:
        try:
            ensemble = Ensemble(SHAPES[shape], list(range(members)), device)
            training = Training(ensemble, Settings(10_000, batch, half=half), pairs)
            note(
                f"prior {shape} ×{members} batch {batch} {'bf16' if half else 'fp32'} steps/s",
                _steps(training.step, seconds, device),
            )
            note("  losses", [round(x, 3) for x in training.losses.flatten().tolist()])
        except Exception as error:  # one that fails must not cost the others their figures
            note(f"prior {shape} ×{members} batch {batch} failed", repr(error)[:300])
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        ensemble = Ensemble(SHAPES["small"], [0], device)
        training = Training(ensemble, Settings(10_000, 1024), pairs)
        note("prior small ×1 batch 1024 tf32 steps/s", _steps(training.step, seconds, device))

    movq = load_movq(MODELS / "decoder" / "movq").to(torch.device(device))  # type: ignore[call-arg]
    examples = examples_of(encoder, movq, drawn["any"], drawn["retold"], device)
    for batch in (128, 256, 512, 1024) if device == "cuda" else (8,):
        try:
            step, _ = unet_step(examples, batch, device)
            note(f"unet batch {batch} steps/s", _steps(partial(step, 1e-4), seconds, device))
            note("  loss", round(float(step.last_loss), 4))
        except Exception as error:
            note(f"unet batch {batch} failed", repr(error)[:300])
    pixels = torch.from_numpy(np.concatenate([block.pixels for block in drawn["any"]])).to(device)
    for batch in (64, 128, 256) if device == "cuda" else (4,):
        try:
            step = movq_step(movq, examples, pixels, batch)
            note(f"movq batch {batch} steps/s", _steps(partial(step, 1e-4), seconds, device))
            note("  loss", round(float(step.last_loss), 4))
        except Exception as error:
            note(f"movq batch {batch} failed", repr(error)[:300])
    if device == "cuda":
        note("GPU memory, GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))
    note("picture decoding", _decode_rate(device, image[: 1024 if device == "cuda" else 8], pool))
    ready.set()
    for child in children:
        child.join(max(1.0, began + LONGEST - time.monotonic()))
        if child.is_alive():
            child.kill()
            note("a child was still compiling after", round(time.monotonic() - began))
    pool.terminate()
    for path in sorted(out.glob("compiled-*.json")):
        note(path.stem, json.loads(path.read_text()))
    return found


def examples_of(encoder: Encoder, movq: Any, pictures: list[Drawn], retold: list[Drawn], device: str) -> Examples:
    """The UNet's examples of these blocks; scene i of `retold` is scene i of `pictures`."""
    with torch.inference_mode():
        latents, embedding = [], []
        for block in pictures:
            pixels = torch.from_numpy(block.pixels).to(device).permute(0, 3, 1, 2).float() / 255
            latents.append(to_latents(movq, pixels.contiguous(memory_format=torch.channels_last)).half())
            embedding.append(image_embeddings(encoder, block))
        told = torch.cat([image_embeddings(encoder, block) for block in retold]).unflatten(0, (-1, 8))
        blank = negative_embedding(encoder).to(device)
    # Inference tensors cannot be saved for a backward pass: clones can.
    embeddings, told, blank = torch.cat(embedding).clone(), told.clone(), blank.clone()
    crowded = torch.from_numpy(np.concatenate([block.crowded for block in pictures])).to(device)
    number = torch.arange(len(embeddings), device=device)

    def rows(numbers: Tensor) -> Rows:
        return Rows(numbers, torch.tensor(float(len(numbers)), device=device))

    return Examples(
        latents=torch.cat(latents).contiguous().clone(), embedding=embeddings, retold=told, retold_of=number,
        every=rows(number), crowded=rows(number[crowded]), told=rows(number[: len(told)]),
        told_crowded=rows(number[: len(told)][crowded[: len(told)]]), negative=blank, spread=embeddings.float().std(0),
    )  # fmt: skip


def unet_step(examples: Examples, batch: int, device: str, compiled: bool = False) -> tuple[Step, Any]:
    """A step of the shipped UNet's further training, and the UNet."""
    unet: Any = load_unet(MODELS / "decoder" / "unet").to(device, memory_format=torch.channels_last).train()  # type: ignore[call-arg]
    called = torch.compile(unet, dynamic=False) if compiled else unet
    recipe = Recipe(RECIPE.seed, batch, RECIPE.learning_rate, RECIPE.phases)
    return Step(unet.parameters(), unet_loss(called, examples, recipe), weight_decay=0.01, ema=0.999), unet


def movq_step(movq: Any, examples: Examples, pixels: Tensor, batch: int) -> Step:
    """A step of the further training of the MoVQ's decoder half."""
    movq.requires_grad_(False)
    trained = [*movq.decoder.parameters(), *movq.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    used = [p for n, p in movq.named_parameters() if p.requires_grad]
    return Step(
        used, movq_loss(movq, examples.latents, pixels, examples.every, batch, 0.05), weight_decay=0.0, ema=0.999
    )


def _compiled_rates(kind: str, seconds: float, ready: Any, out: Path) -> None:
    """In a process of its own: compile on made-up data, wait for the GPU to be free, time."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    began, device, found = time.monotonic(), "cuda", dict[str, Any]()
    try:
        if kind == "unet":
            step, _ = unet_step(_made_up_examples(device), 512, device, compiled=True)
            run: Callable[[], None] = partial(step, 1e-4)
        else:
            pairs = _made_up_pairs(device)
            ensemble = Ensemble(SHAPES["small"], [0], device)
            training = Training(ensemble, Settings(10_000, 1024, half=True), pairs, compiled=True)
            run = training.step
        run()
        _wait(device)
        found["seconds to compile"] = round(time.monotonic() - began, 1)
        ready.wait(LONGEST)
        start = time.monotonic()
        time.sleep(0 if kind == "unet" else 2 * seconds)
        found["steps/s alone"] = _steps(run, seconds, device)
        time.sleep(max(0.0, start + 4 * seconds - time.monotonic()))
        found["steps/s beside the other"] = _steps(run, seconds, device)
    except Exception as error:
        found["failed"] = repr(error)[:600]
    (out / f"compiled-{kind}.json").write_text(json.dumps(found))


def _made_up_examples(device: str, count: int = 4096) -> Examples:
    number = torch.arange(count, device=device)
    rows = Rows(number, torch.tensor(float(count), device=device))
    normal = [
        torch.randn(*shape, device=device).half() for shape in ((count, 4, 16, 16), (count, 128), (count, 8, 128))
    ]
    blank, spread = torch.zeros(1, 128, device=device), torch.ones(128, device=device)
    latents, embedding, retold = normal
    return Examples(latents, embedding, retold, number, rows, rows, rows, rows, blank, spread)


def _made_up_pairs(device: str, count: int = 4096) -> Pairs:
    text = [torch.randn(count, 128, device=device).half() for _ in LENGTHS]
    states = [torch.randn(count, longest, 128, device=device).half() for longest in LENGTHS]
    lengths = [torch.full((count,), longest, device=device) for longest in LENGTHS]
    picture = [torch.arange(count, device=device) for _ in LENGTHS]
    filled = torch.tensor([count // 10 * share for share in (5, 3, 1, 1)], device=device)
    return Pairs(torch.randn(count, 128, device=device).half(), text, states, lengths, picture, filled)


def _decode_rate(device: str, embedding: Tensor, pool: Pool) -> dict[str, float]:
    """Pictures a second of the shipped decoder, and of the checker on all processes."""
    from ..decode.decoder import Unconditional, load_decoder

    decoder = load_decoder(
        "kandinsky22", str(MODELS / "decoder"), unconditional=Unconditional(), image_size=64, device=device
    )
    count, size, pictures = len(embedding), min(256, len(embedding)), []
    decoder.decode(embedding[:size].float(), seeds=range(size), steps=2, guidance_scale=2.0)
    start = time.monotonic()
    for first in range(0, count, size):
        pictures += decoder.decode(
            embedding[first : first + size].float(), seeds=range(size), steps=10, guidance_scale=2.0
        )
    decoded = count / (time.monotonic() - start)
    shown = np.stack([np.asarray(picture) for picture in pictures])
    start = time.monotonic()
    pool.map(read_all, np.array_split(shown, len(shown) // 8))
    checked = count / (time.monotonic() - start)
    return {"decoded/s": round(decoded, 1), "checked/s": round(checked, 1), "cores": os.cpu_count() or 0}


def _steps(run: Callable[[], None], seconds: float, device: str) -> float:
    """Steps a second, once it has warmed up (and been captured)."""
    for _ in range(3):
        run()
    _wait(device)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        for _ in range(10 if device == "cuda" else 1):
            run()
        count += 10 if device == "cuda" else 1
        _wait(device)
    return round(count / (time.monotonic() - start), 1)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
