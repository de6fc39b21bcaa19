"""Embedding end to end beside the encoder's own forward pass on the same pictures, tokens and device, in memory.

Run: python -m eclipse.bench.embed [--model local-dir:{models}/clip] [--pictures 2000] [--rounds 3]
     --random ViT-B-32: that architecture with random weights, as speed does not depend on them
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from ..lab.drawing import draw
from ..lab.shapes import World
from ..pipeline.core.card import Card
from ..pipeline.core.workspace import Workspace
from ..pipeline.embed.clip import Encoder
from ..pipeline.embed.lane import TOKENS_PER_PICTURE, LaneSpec
from ..pipeline.embed.stage import BATCH_SIZES, plan
from ..pipeline.images.decode import Sample, open_picture, read_shard
from .results import arguments, hardware, record, table

END_TO_END = "eclipse embed, end to end"


def make_shards(directory: Path, pictures: int, side: int, rows_per_shard: int = 1000) -> None:
    """Scenes of the shapes world, as JPEG of quality 95 with `side` pixels, in WebDataset tars."""
    world, rng = World(), np.random.default_rng(0)
    directory.mkdir(parents=True)
    for start in range(0, pictures, rows_per_shard):
        scenes = [world.scene(i) for i in range(start, min(start + rows_per_shard, pictures))]
        with tarfile.open(directory / f"{start // rows_per_shard:05d}.tar", "w") as tar:
            for i, (scene, pixels) in enumerate(zip(scenes, draw(scenes), strict=True)):
                image, buffer = Image.fromarray(pixels), io.BytesIO()
                (image if side == image.width else image.resize((side, side))).save(buffer, "JPEG", quality=95)
                key, caption = f"{start + i:09d}", world.caption(scene, rng)
                meta = json.dumps(
                    {"key": key, "caption": caption, "url": f"http://localhost/{key}", "status": "success"}
                )
                for name, data in (
                    (f"{key}.jpg", buffer.getvalue()),
                    (f"{key}.json", meta.encode()),
                    (f"{key}.txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def random_clip(name: str, directory: Path) -> str:
    """The named architecture with random weights, as a directory that open_clip loads."""
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{directory}"


def make_workspace(root: Path, model: str) -> Workspace:
    """A workspace for shards that no download made, and the encoder `model`."""
    card = Card.model_validate(
        {
            "name": "bench",
            "source": {"kind": "urls", "urls": "none.parquet"},
            "encoder": {"model": model},
            "decoder": {"path": "none"},
        }
    )
    return Workspace.create(root, card)


def forward_passes(encoder: Encoder, shards: Path, batch: int) -> dict[str, Callable[[], None]]:
    """Both towers over everything in the shards, decoded and tokenized beforehand, captions sorted by length."""
    samples = [item for tar in sorted(shards.glob("*.tar")) for item in read_shard(tar) if isinstance(item, Sample)]
    pixels = np.stack([encoder.preprocess(open_picture(sample.data)) for sample in samples])
    ids, n_tokens = encoder.tokenize([caption for sample in samples for caption in sample.captions])
    order = torch.argsort(n_tokens, stable=True)
    ids, n_tokens = ids[order], n_tokens[order]
    texts = batch * TOKENS_PER_PICTURE // int(n_tokens.float().mean())
    work: list[Callable[[], object]] = [
        *(lambda i=i: encoder.encode_images(pixels[i : i + batch]) for i in range(0, len(pixels), batch)),
        *(
            lambda i=i: encoder.encode_text(ids[i : i + texts], n_tokens[i : i + texts])
            for i in range(0, len(ids), texts)
        ),
    ]

    def one_by_one() -> None:
        for piece in work:
            piece()

    def a_thread_each() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(lambda piece: piece(), work):
                    pass
        finally:
            torch.set_num_threads(threads)

    return {"forward, batch after batch": one_by_one, "forward, a batch on each thread": a_thread_each}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="local-dir:{models}/clip")
    parser.add_argument("--random", metavar="NAME", help="an architecture with random weights instead")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    machine = hardware()
    with tempfile.TemporaryDirectory() as scratch:
        model = random_clip(options.random, Path(scratch) / "clip") if options.random else options.model
        encoder = Encoder.load(model)
        ws = make_workspace(Path(scratch) / "ws", model)
        make_shards(ws.images, options.pictures, 64 if encoder.image_size <= 64 else 256)
        best = measure(ws, encoder, options.pictures, options.rounds)
    forward = [figures for name, figures in best.items() if name != END_TO_END]
    fastest, leanest = max(rate for rate, _ in forward), min(cost for _, cost in forward)
    rows = [
        (name, f"{rate:,.0f}", f"{rate / fastest:.2f}", f"{cost * 1e3:.2f}", f"{leanest / cost:.2f}")
        for name, (rate, cost) in best.items()
    ]
    record(
        "python -m eclipse.bench.embed",
        f"Embed, {options.random or 'the lab CLIP'}, CPU",
        table(["", "pictures/s", "× the faster forward", "CPU ms per picture", "× the leaner forward"], rows),
        {"pictures": options.pictures, "batch": BATCH_SIZES["cpu"], "float32, best of": options.rounds},
        machine,
        options.results,
    )


def measure(ws: Workspace, encoder: Encoder, pictures: int, rounds: int) -> dict[str, tuple[float, float]]:
    """(pictures/s, CPU seconds per picture) of every contender, the best of its turns.

    They take turns, so that other work on the machine meets all of them; CPU seconds count that work least.
    """

    spec = LaneSpec(ws.card.encoder.model, None, "fp32", (), text_states=True, card="")
    lane = spec.build("cpu")

    def end_to_end() -> None:
        """From tars on disk to committed parts on disk, as the stage does it; loading the encoder is not counted."""
        lane.run(plan(ws, BATCH_SIZES["cpu"]), lambda event: None)

    contenders = {**forward_passes(encoder, ws.images, BATCH_SIZES["cpu"]), END_TO_END: end_to_end}
    best: dict[str, tuple[float, float]] = {}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            began, used = time.perf_counter(), time.process_time()
            contender()
            rate = pictures / (time.perf_counter() - began)
            cost = (time.process_time() - used) / pictures
            old = best.get(name, (0.0, float("inf")))
            if turn:  # the first warms up
                best[name] = max(old[0], rate), min(old[1], cost)
    return best


if __name__ == "__main__":
    main()
