"""Makes the lab's models again from seeds: `python -m eclipse.lab.build_models [STEP|all]`.

Each step checkpoints beside its log in the build folder and goes on where it was interrupted; `pack` writes the
finished models to `lab/models`, `card` measures them on fresh scenes. `further`, on a GPU, trains the reference prior
and the decoder in minutes and tries the levers of a short training; `install` puts its results into `lab/models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..pipeline.core.card import MODELS, Card
from ..pipeline.core.progress import Progress
from . import build_clip, build_movq, build_unet
from .build_run import Pictures
from .model_card import write_model_card

app = typer.Typer(add_completion=False, help=__doc__)


STEPS = ("clip", "movq", "refine", "unet", "unet-further", "unet-wide", "unet-crowded", "pack", "card")


@app.command()
def build(
    step: Annotated[str, typer.Argument(help=f"{', '.join(STEPS)}, or all of them in this order")] = "all",
    folder: Annotated[Path, typer.Option(help="where pictures, checkpoints, logs and results go")] = Path(".build"),
    models: Annotated[Path, typer.Option(help="where the finished models go")] = MODELS,
    pictures: Annotated[int, typer.Option(help="scenes drawn for training")] = 60_000,
    clip_steps: int = 1_300,
    movq_steps: int = 720,
    refine_steps: int = 1_500,
    unet_steps: int = 3_400,
    further_steps: int = 4_200,
    wide_steps: int = 9_000,
    crowded_steps: int = 6_000,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda; of `further`")] = "cpu",
    processes: Annotated[int, typer.Option(help="that draw; of `further`")] = 2,
    minutes: Annotated[float, typer.Option(help="all told; of `further`")] = 5.0,
    levers: Annotated[bool, typer.Option(help="of `further`: try them too, beside what ships")] = True,
) -> None:
    """Build one model or all. A step that was interrupted goes on from its last checkpoint."""
    if step not in (*STEPS, "all", "further", "install"):
        raise typer.BadParameter(f"{step!r} is none of {', '.join(STEPS)}, all, further, install")
    torch.set_num_threads(threads)
    if step == "further":
        from .build_further import further

        further(device, processes, minutes, folder, with_levers=levers)
        return
    if step == "install":
        from .build_further import install

        install(folder, models, "small")
        return
    wanted = STEPS if step == "all" else (step,)
    if set(wanted) - {"pack", "card"}:
        drawn = Pictures.drawn(folder, pictures)
        builders = {
            "clip": lambda: build_clip.build(folder, drawn, clip_steps),
            "movq": lambda: build_movq.build(folder, drawn, movq_steps),
            "refine": lambda: build_movq.refine(folder, drawn, refine_steps),
            "unet": lambda: build_unet.build(folder, drawn, unet_steps),
            "unet-further": lambda: build_unet.further(folder, drawn, further_steps),
            "unet-wide": lambda: build_unet.wide(folder, drawn, wide_steps),
            "unet-crowded": lambda: build_unet.crowded(folder, drawn, crowded_steps),
        }
        for name in wanted:
            if name in builders:
                builders[name]()
    if "pack" in wanted:
        build_unet.pack(folder, models)
    if "card" in wanted:
        write_model_card(folder, models, Card.load("shapes"), each=40, progress=Progress())


if __name__ == "__main__":
    app()
