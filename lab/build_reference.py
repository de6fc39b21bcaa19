"""Trains the reference prior on a CPU, for hours, on scenes drawn and encoded meanwhile by a process beside it.

Called by `build_models reference`. With a GPU `build_models further` does it, and more, in minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..pipeline.core.card import MODELS
from ..pipeline.core.files import atomic_path
from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import PRESETS
from .bank import Encoded, PairBank, encoded
from .build_movq import load as load_movq
from .build_unet import load as load_unet
from .build_unet import negative_embedding
from .device_judge import EVALUATED, Judge, PromptTexts, Sampler, judges, validation_prompts
from .ensemble import Ensemble, Settings, Training
from .scene_stream import Order, draw_block, prepare
from .shapes import World
from .truth import evaluation_texts

SEED, BATCH, BLOCK = 0, 128, 250
ROOM = 40_000  # distinct scenes at most
SETTINGS = Settings(0, BATCH, learning_rate=6e-3, warmup=50, ema=0.99, half=True)
FIRST = 2_000  # scenes there before it begins
SAVE_EVERY = 240.0  # seconds
PROMPTS = 24  # a category and split, once at the end


def build(folder: Path, minutes: float, pictures: int = ROOM, first: int = FIRST, prompts: int = PROMPTS) -> None:
    """Train for so many minutes and write `folder/reference-small.safetensors` (float16) as it goes, and figures."""
    began = time.monotonic()
    deadline = began + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    world = World()
    validation = validation_prompts(world, prompts)
    texts = evaluation_texts(world, EVALUATED) | {p.text for p in validation}
    context = multiprocessing.get_context("spawn")
    blocks: Any = context.Queue(8)
    feeder = context.Process(target=_feed, args=(blocks, texts, pictures), daemon=True)
    feeder.start()
    pool = judges(validation, 1)
    encoder = Encoder.load(f"local-dir:{MODELS / 'clip'}")
    bank = PairBank(encoder, pictures, "cpu")
    while bank.pictures < min(first, pictures):
        bank.put(_tensors(blocks.get(timeout=600)))
    ensemble = Ensemble(PRESETS["small"], [SEED], "cpu")
    training = Training(ensemble, SETTINGS, bank.pairs)
    started = saved = time.monotonic()
    log = folder / "reference.jsonl"
    while (now := time.monotonic()) < deadline:
        training.step((now - started) / (deadline - started))
        try:
            while True:
                bank.put(_tensors(blocks.get_nowait()))
        except queue.Empty:
            pass
        if training.done % 20 == 0:
            losses = [round(x, 4) for x in training.losses.flatten().tolist()]
            line = {"step": training.done, "losses": losses, "pictures": bank.pictures, "pairs": sum(bank.counts),
                    "seconds": round(now - began, 1)}  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if now - saved > SAVE_EVERY:
            _save(ensemble, folder)
            saved = now
    _save(ensemble, folder)
    feeder.kill()
    unet, movq = load_unet(MODELS / "decoder" / "unet").eval(), load_movq(MODELS / "decoder" / "movq").eval()
    sampler = Sampler(unet, movq, negative_embedding(encoder), len(validation))
    judge = Judge(validation, pool)
    judge.submit("reference", sampler, PromptTexts(encoder, validation, "cpu").predicted(ensemble)[0])
    while judge.waiting:
        judge.poll()
        time.sleep(0.05)
    pool.terminate()
    figures = {"steps": training.done, "batch": BATCH, "pictures": bank.pictures, "pairs": sum(bank.counts),
               "seconds": round(time.monotonic() - began), "validation": judge.table("reference")}  # fmt: skip
    (folder / "reference.json").write_text(json.dumps(figures, indent=1))
    print(figures, flush=True)


def _save(ensemble: Ensemble, folder: Path) -> None:
    state = {n: x.half().contiguous() for n, x in ensemble.member(0).state_dict().items()}
    with atomic_path(folder / "reference-small.safetensors") as beside:
        save_file(state, beside, metadata={"format": "pt"})


def _feed(blocks: Any, texts: set[str], pictures: int) -> None:
    """In a process of its own: draw and encode block after block."""
    torch.set_num_threads(1)
    prepare(World(), texts)
    encoder = Encoder.load(f"local-dir:{MODELS / 'clip'}")
    for first in range(0, pictures, BLOCK):
        found = encoded(encoder, [draw_block(Order("train", first, BLOCK))], "cpu")
        blocks.put(
            (
                found.image.numpy(),
                [(c.text.numpy(), c.states.numpy(), c.lengths, c.picture, c.column) for c in found.classes],
            )
        )


def _tensors(block: tuple[np.ndarray, list[tuple[np.ndarray, ...]]]) -> Encoded:
    from .bank import EncodedClass

    image, classes = block
    return Encoded(
        torch.from_numpy(image),
        [EncodedClass(torch.from_numpy(c[0]), torch.from_numpy(c[1]), c[2], c[3], c[4]) for c in classes],
    )
