"""Trains on a GPU what hours on a CPU do not reach: the reference priors, the decoder further, the table of levers.

Called by `build_models further`. One process feeds the GPU; every training is a captured graph on a stream of its own,
and takes its turns as long as its last ones are done, so that small networks fill what large ones leave. The cores draw
new scenes meanwhile. Everything that matters is written as it comes: whoever stops it early keeps what there is.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pipeline.core.card import MODELS
from ..pipeline.core.files import atomic_path
from ..pipeline.embed.clip import Encoder
from ..trainer.model.prior import PRESETS, WEIGHTS, Prior, PriorConfig, save_prior
from .bank import ExampleBank, PairBank
from .build_movq import load as load_movq
from .build_unet import load as load_unet
from .build_unet import negative_embedding
from .decoder_steps import Step, movq_step, unet_step
from .device_judge import EVALUATED, Judge, PromptTexts, Sampler, judges, validation_prompts
from .ensemble import Ensemble, Settings, Training, orders
from .levers import SEEDS, Lever, combined, levers
from .scene_stream import BLOCK, Drawn, Order, stream, workers
from .score import encode_scenes
from .shapes import World
from .truth import evaluation_texts

DEEP = PriorConfig(128, num_layers=8, num_attention_heads=6)
REFERENCES = {
    "small": (PRESETS["small"], Settings(0, 1024, learning_rate=6e-3, warmup=200, ema=0.999, half=True)),
    "deep": (
        DEEP,
        Settings(0, 1024, learning_rate=4e-3, warmup=200, contrastive_weight=0.05, ema=0.999, half=True),
    ),
}
UNET_RATE, MOVQ_RATE, WARM_UP = 1e-3, 1e-3, 200
MARGIN = 15.0  # seconds before the deadline at which it ends whatever is still missing
EVERY = 40.0  # seconds between looks at the accuracy of what is in training
AHEAD = 2  # turns of a training queued on the GPU


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are for a GPU of 80 GB."""

    train: int = 700_000  # scenes with captions
    any: int = 240_000  # scenes for the decoder
    retold: int = 50_000  # of them with eight other tellings
    first: int = 8_000  # scenes there before a training begins
    prior_batch: int = 1024
    unet_batch: int = 512
    movq_batch: int = 128
    prompts: int = 32  # a category and split
    slots: int = 4  # levers tried at once
    block: int = BLOCK
    scale: float = 1.0  # of the levers' steps and pictures, for a rehearsal
    references: tuple[str, ...] = tuple(REFERENCES)
    chunks: tuple[int, int, int] = (8, 2, 2)  # steps a turn of reference, UNet and MoVQ
    last: float = 45.0  # seconds kept for writing and for the last evaluations


@dataclass
class Turns:
    """A training that takes turns: `step` is called `chunk` times a turn, on a stream of its own."""

    name: str
    step: Callable[[], None]
    chunk: int
    stream: Any
    loss: Callable[[], Tensor] | None = None
    done: int = 0
    failed: bool = False
    _queued: list[Any] = field(default_factory=list)

    def take(self) -> bool:
        """Queue one more turn if there is room; whether there was."""
        self._queued = [event for event in self._queued if not event.query()]
        if self.failed or len(self._queued) >= AHEAD:
            return False
        try:
            with on(self.stream):
                for _ in range(self.chunk if self.stream else 1):
                    self.step()
                    self.done += 1
                if self.stream:
                    self._queued.append(torch.cuda.current_stream().record_event())
        except Exception:  # one training that fails must not cost the others their time
            self.failed = True
            print(f"{self.name} failed\n{traceback.format_exc()}", flush=True)
        return True

    @property
    def idle(self) -> bool:
        """Whether nothing is queued."""
        return all(event.query() for event in self._queued)


def on(stream: Any) -> Any:
    """A CUDA stream as a context; without one (on a CPU) nothing."""
    return torch.cuda.stream(stream) if stream else nullcontext()


def drawing_orders(sizes: Sizes) -> Iterator[Order]:
    """Blocks of the three kinds, mixed so that each has its share at any time."""
    told_block, counts = max(1, sizes.block // 5), {"train": 0, "any": 0, "retold": 0}
    wanted = {"train": sizes.train, "any": sizes.any, "retold": sizes.retold}
    block = {"train": sizes.block, "any": sizes.block, "retold": told_block}
    while True:
        # What has got least of its own share comes next; others are told only of scenes that are there.
        open_kinds = [k for k in wanted if counts[k] + block[k] <= wanted[k]]
        if counts["retold"] + told_block > counts["any"] and "retold" in open_kinds:
            open_kinds.remove("retold")
        if not open_kinds:
            return
        kind = min(open_kinds, key=lambda k: counts[k] / wanted[k])
        yield Order(kind, counts[kind], block[kind])  # type: ignore[arg-type]
        counts[kind] += block[kind]


class Further:
    """The whole run; see `run`."""

    def __init__(self, device: str, processes: int, seconds: float, out: Path, sizes: Sizes) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        # A rehearsal of a minute still has time to train.
        self.stop = self.deadline - min(sizes.last, 0.35 * seconds)
        self.device, self.out, self.sizes = device, out, sizes
        out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.log: dict[str, Any] = {"device": name, "torch": torch.__version__, "curves": {}, "levers": {}}
        self.log["prompts"] = sizes.prompts
        world = World()
        self.prompts = validation_prompts(world, sizes.prompts)
        texts = evaluation_texts(world, EVALUATED) | {p.text for p in self.prompts}
        self.judge_pool = judges(self.prompts, max(1, processes // 3))
        self.pool = workers(world, processes, texts)
        self.blocks = stream(self.pool, drawing_orders(sizes))
        self.encoder = Encoder.load(f"local-dir:{MODELS / 'clip'}", device=device)
        self.movq: Any = load_movq(MODELS / "decoder" / "movq").to(torch.device(device))  # type: ignore[call-arg]
        negative = negative_embedding(self.encoder).clone().to(device)
        self.texts = PromptTexts(self.encoder, self.prompts, device)
        self.oracle = encode_scenes(self.encoder, [world.scene_for(p) for p in self.prompts]).to(device)
        self.pairs = PairBank(self.encoder, sizes.train, device)
        self.examples = ExampleBank(self.encoder, self.movq, negative, sizes.any, sizes.retold, device)
        self.judge = Judge(self.prompts, self.judge_pool)
        dtype = torch.float16 if device == "cuda" else torch.float32
        unet: Any = load_unet(MODELS / "decoder" / "unet").to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-arg]
        movq: Any = load_movq(MODELS / "decoder" / "movq").to(device, dtype)  # type: ignore[call-arg]
        for part in (unet, movq):
            part.requires_grad_(False).eval()
        self.shipped = Sampler(unet, movq, negative.float(), len(self.prompts))
        self.new = Sampler(deepcopy(unet), deepcopy(movq), negative.float(), len(self.prompts))
        self.feeding, self.judging = self._stream(-2), self._stream(-2)
        self.turns: dict[str, Turns] = {}
        self.references: dict[str, Ensemble] = {}
        self.decoder: dict[str, tuple[Step, Any]] = {}
        self.slots: list[tuple[Lever, Ensemble, Turns] | None] = [None] * sizes.slots
        self.levers = levers(sizes.scale)
        self.combined = False

    def run(self) -> None:
        """Train until it is time to stop, then measure everything once more and write it."""
        self._note("set up", True)
        self._submit("oracle, shipped decoder", self.shipped, self.oracle)
        self._submit("oracle, new decoder", self.new, self.oracle)  # the same weights yet
        next_look = self.began + EVERY
        while (now := time.monotonic()) < self.stop:
            busy = self._feed()
            if not self.turns and self._ready:
                self._start()
                self._note("training began", True)
                next_look = time.monotonic() + EVERY
            for turns in list(self.turns.values()):
                busy |= turns.take()
            if self.turns:
                for i in range(len(self.slots)):
                    self._slot(i)
            self._collect()
            if self.turns and now > next_look:
                self._guarded("a look", self._look)
                next_look = time.monotonic() + EVERY
            if not busy:
                time.sleep(0.0005)
        # In the background: nothing that hangs may stand between the weights and their files.
        ends = [threading.Thread(target=pool.terminate, daemon=True) for pool in (self.pool, self.judge_pool)]
        ends[0].start()
        self._note("trained", {name: t.done for name, t in self.turns.items()})
        self._guarded("the end", self._end)
        while self.judge.waiting and time.monotonic() < self.deadline - MARGIN:
            self._collect()
            time.sleep(0.01)
        self._note("judged all", self.judge.waiting == 0)
        ends[1].start()
        for end in ends:
            end.join(5.0)
        # A pool whose queue is full may never end by itself, and would keep this process from ending.
        for child in multiprocessing.active_children():
            child.kill()

    @property
    def _ready(self) -> bool:
        first = self.sizes.first
        return self.pairs.pictures >= first and self.examples.pictures >= first // 4 and self.examples.retold > 0

    def _stream(self, priority: int) -> Any:
        return torch.cuda.Stream(priority=priority) if self.device == "cuda" else None

    def _note(self, name: str, value: Any) -> None:
        self.log[name] = value
        seconds = round(time.monotonic() - self.began, 1)
        print(f"{seconds:6.1f} s  {name}: {value}", flush=True)
        self._write()

    def _write(self) -> None:
        self.log["seconds"] = round(time.monotonic() - self.began, 1)
        self.log["scenes"] = [self.pairs.pictures, self.examples.pictures, self.examples.retold]
        self.log["pairs"] = self.pairs.counts
        (self.out / "further.json").write_text(json.dumps(self.log))

    def _guarded(self, name: str, part: Callable[[], None]) -> None:
        """Run a part; one that fails must not cost the others their time."""
        try:
            part()
        except Exception:
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)

    def _feed(self) -> bool:
        """Encode what has been drawn, a few blocks at most."""
        blocks: list[Drawn] = []
        while len(blocks) < 4:
            try:
                blocks.append(self.blocks.next(timeout=0.0))
            except (multiprocessing.TimeoutError, StopIteration):
                break
        if not blocks:
            return False
        self._guarded("feeding", lambda: self._encode(blocks))
        return True

    def _encode(self, blocks: list[Drawn]) -> None:
        with on(self.feeding):
            captioned = [b for b in blocks if b.order.kind == "train"]
            if captioned and self.pairs.room:
                self.pairs.add(captioned)
            self.examples.add([b for b in blocks if b.order.kind != "train"])

    def _start(self) -> None:
        """Everything that trains throughout."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        for name in self.sizes.references:
            self._guarded(name, lambda name=name: self._start_reference(name))
        self._guarded("unet", self._start_unet)
        self._guarded("movq", self._start_movq)

    def _progress(self, started: float) -> float:
        return min(1.0, (time.monotonic() - started) / (self.stop - started))

    def _start_reference(self, name: str) -> None:
        config, settings = REFERENCES[name]
        ensemble = Ensemble(config, [SEEDS[0]], self.device)
        settings = replace(settings, batch_size=self.sizes.prior_batch, half=settings.half and self.device == "cuda")
        training, started = Training(ensemble, settings, self.pairs.pairs), time.monotonic()
        self.references[name] = ensemble
        step = lambda: training.step(self._progress(started))  # noqa: E731
        self.turns[name] = Turns(name, step, self.sizes.chunks[0], self._stream(0), lambda: training.losses)

    def _start_unet(self) -> None:
        step, unet = unet_step(self.examples.examples, self.sizes.unet_batch, self.device)
        self.decoder["unet"] = (step, unet)
        scheduled = self._scheduled(step, UNET_RATE)
        self.turns["unet"] = Turns("unet", scheduled, self.sizes.chunks[1], self._stream(0), lambda: step.last_loss)

    def _start_movq(self) -> None:
        step = movq_step(self.movq, self.examples.examples, self.examples.pixels, self.sizes.movq_batch)
        self.decoder["movq"] = (step, self.movq)
        scheduled = self._scheduled(step, MOVQ_RATE)
        self.turns["movq"] = Turns("movq", scheduled, self.sizes.chunks[2], self._stream(0), lambda: step.last_loss)

    def _scheduled(self, step: Step, peak: float) -> Callable[[], None]:
        started, number = time.monotonic(), 0

        def next_step() -> None:
            nonlocal number
            number += 1
            step(peak * min(1.0, number / WARM_UP) * 0.5 * (1 + cos(pi * self._progress(started))))

        return next_step

    def _slot(self, i: int) -> None:
        """Begin, continue or judge the lever in a slot."""
        if (held := self.slots[i]) is None:
            lever = next((a for a in self.levers if a.pictures <= self.pairs.pictures), None)
            if lever is not None:
                self.levers.remove(lever)
                self._guarded(lever.name, lambda: self._begin(i, lever))
            return
        lever, ensemble, turns = held
        if not turns.failed and turns.done < lever.settings.steps:
            turns.take()
            return
        if turns.failed or turns.idle:
            self.slots[i] = None
            if not turns.failed:
                with on(turns.stream):
                    predicted = self.texts.predicted(ensemble)
                for k in range(len(predicted)):
                    self._submit(f"{lever.name}|{SEEDS[k]}", self.shipped, predicted[k], turns.stream)

    def _begin(self, i: int, lever: Lever) -> None:
        stream = self._stream(-1)
        with on(stream):
            ensemble = Ensemble(lever.config, list(SEEDS), self.device)
            usable = self.pairs.usable(lever.pictures, lever.captions, lever.longest)
            rows = self.pairs.pairs.shares(lever.settings.batch_size, [len(some) for some in usable])
            order = orders(self.pairs.pairs, list(SEEDS), lever.settings.steps, rows, lambda c: usable[c])
            training = Training(ensemble, lever.settings, self.pairs.pairs, order, rows=rows)
        self.slots[i] = (lever, ensemble, Turns(lever.name, training.step, 20, stream))

    def _submit(self, name: str, sampler: Sampler, embedding: Tensor, after: Any = None, guidance: float = 2.0) -> None:
        if self.judging:
            self.judging.wait_stream(after or torch.cuda.current_stream())
            embedding.record_stream(self.judging)
        with on(self.judging):
            self.judge.submit(name, sampler, embedding, guidance)

    def _collect(self) -> None:
        """Note the scores that have been found."""
        fresh = self.judge.poll()
        for name in fresh:
            table = self.judge.table(name)
            if "|" in name:
                lever, seed = name.split("|")
                self.log["levers"].setdefault(lever, {})[seed] = table
            else:
                self.log["curves"].setdefault(name, []).append(table)
            mean = table["mean"]
            print(f"{time.monotonic() - self.began:6.1f} s  {name}: {mean}", flush=True)
        if fresh:
            self._write()
        if self.turns and not self.levers and not self.combined and not any(self.slots) and not self.judge.waiting:
            self.combined = True
            self._guarded("combined levers", lambda: self.levers.extend(combined(self.log["levers"], self.sizes.scale)))

    def _look(self) -> None:
        """Accuracies now, and weights in case it ends early."""
        steps = {name: turns.done for name, turns in self.turns.items()}
        self._note(f"steps at {time.monotonic() - self.began:.0f} s", steps)
        for name, turns in self.turns.items():
            assert turns.loss is not None
            with on(turns.stream):
                losses = [round(x, 4) for x in turns.loss().flatten().tolist()]
            print(f"         {name} loss {losses}", flush=True)
        for name, ensemble in self.references.items():
            stream = self.turns[name].stream
            with on(stream):
                predicted = self.texts.predicted(ensemble)[0]
            self._submit(f"{name} at {steps[name]}", self.shipped, predicted, stream)
        self._renew()
        self._submit("oracle, new decoder", self.new, self.oracle)
        self._save()

    def _renew(self) -> None:
        """The averaged weights into the new decoder."""
        with on(self.judging), torch.no_grad():
            for name, (step, module) in self.decoder.items():
                own = dict(getattr(self.new, name).named_parameters())
                trained = [n for n, p in module.named_parameters() if p.requires_grad]
                for n, average in zip(trained, step.average, strict=True):
                    own[n].copy_(average)

    def _save(self) -> None:
        for name, ensemble in self.references.items():
            with on(self.turns[name].stream):
                state = {n: x.half().contiguous() for n, x in ensemble.member(0).state_dict().items()}
            self._save_tensors(f"reference-{name}", state)
        for name, (step, module) in self.decoder.items():
            with on(self.turns[name].stream):
                state = {n: x.detach().half().cpu().contiguous() for n, x in module.state_dict().items()}
                trained = [n for n, p in module.named_parameters() if p.requires_grad]
                state |= {
                    n: average.half().cpu().contiguous() for n, average in zip(trained, step.average, strict=True)
                }
            self._save_tensors(name, state)

    def _save_tensors(self, name: str, state: dict[str, Tensor]) -> None:
        if not all(x.isfinite().all() for x in state.values()):
            print(f"{name} is not finite", flush=True)
            return
        with atomic_path(self.out / f"{name}.safetensors") as beside:
            save_file(state, beside, metadata={"format": "pt"})

    def _end(self) -> None:
        """The last weights, and what they are worth with both decoders and several guidance scales."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._save()
        self._note("saved", True)
        self._renew()
        arms = {"oracle": self.oracle} | {n: self.texts.predicted(e)[0] for n, e in self.references.items()}
        for name, embedding in arms.items():
            self._submit(f"end: {name}, shipped decoder", self.shipped, embedding)
            self._submit(f"end: {name}, new decoder", self.new, embedding)
        for scale in (1.0, 1.5, 3.0):
            for name, embedding in arms.items():
                self._submit(f"end: {name}, new decoder, guidance {scale}", self.new, embedding, guidance=scale)


REHEARSAL = Sizes(600, 120, 12, 40, 8, 4, 4, 1, 2, 20, 0.001)
# No levers, and no second reference: all of the time for what ships.
SHIPPED = Sizes(600_000, 300_000, 60_000, slots=0, references=("small",), chunks=(16, 8, 4), last=20.0)


def further(device: str, processes: int, minutes: float, out: Path, *, with_levers: bool = True) -> None:
    """Train for so many minutes, all told, and write weights and figures into `out`. On a CPU: a rehearsal."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        sizes = Sizes() if with_levers else SHIPPED
    else:
        sizes = REHEARSAL if with_levers else replace(REHEARSAL, slots=0, references=SHIPPED.references)
    Further(device, processes, 60 * minutes, out, sizes).run()


def install(folder: Path, models: Path, reference: str) -> None:
    """Put what `further` wrote into the shipped models: a reference prior, the decoder's parts that are there, and the
    figures of that training.
    """
    shutil.copyfile(folder / "further.json", models / "further.json")
    prior = Prior(REFERENCES[reference][0])
    weights = load_file(folder / f"reference-{reference}.safetensors")
    prior.load_state_dict({name: x.float() for name, x in weights.items()})
    save_prior(prior, models / "prior")  # config, and weights in float32: half of it is enough here
    _replace(models / "prior", weights)
    for part in ("movq", "unet"):
        if (folder / f"{part}.safetensors").exists():
            _replace(models / "decoder" / part, load_file(folder / f"{part}.safetensors"))


def _replace(model: Path, weights: dict[str, Tensor]) -> None:
    with atomic_path(model / WEIGHTS) as beside:
        save_file(weights, beside, metadata={"format": "pt"})
    (model / WEIGHTS).chmod(0o644)  # save_file makes it readable by its owner alone
