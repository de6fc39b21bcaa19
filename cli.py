"""The command line: reads options, calls one stage, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Card, Cluster, Gpus, Overwrite, Root, app, shown, stage
from .pipeline.core.progress import Progress


@shown("show_run")
def run(
    progress: Progress,
    card: Card = None,
    workspace: Root = None,
    gpus: Gpus = None,
    cluster: Cluster = "local",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Run every stage in turn, from URLs to pictures and figures.

    The stages: download, embed, filter, train, render, evaluate. A complete one is skipped, an interrupted one
    continues. With nothing named, the embedded shapes card runs in ./eclipse-shapes.

    \b
    Examples:
      eclipse run
      eclipse run --card coco -w coco --gpus 8
    """
    from .pipeline.run import locate, run_all

    ws = locate(card, workspace, progress, default_card="shapes")
    return run_all(ws, progress, overwrite=overwrite, gpus=gpus, cluster=cluster)


@shown("show_workspace")
def init(
    progress: Progress,
    card: Annotated[
        str,
        typer.Argument(
            metavar="CARD|PICTURES",
            help="Name or file of a data card; or what you have: a folder, tars, tables, a list.",
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to make the workspace.")],
    like: Annotated[
        str, typer.Option("--like", metavar="CARD", help="For pictures: whose encoder, prior and decoder to take.")
    ] = "coco",
) -> dict[str, Any]:
    """Make a workspace from a card, or from pictures that you have.

    For pictures a card is proposed, in DIR/eclipse.yaml: they are read where they lie. Later commands find the
    workspace in the current directory, or through -w DIR.

    \b
    Examples:
      eclipse init shapes my-shapes
      eclipse init my-card.yaml /data/mine && cd /data/mine && eclipse download
      eclipse init ./photos my-prior
      eclipse init 'cc12m-{00000..01242}.tar' my-prior --like cc12m
      eclipse init list.parquet my-prior
    """
    from .pipeline.run import begin_workspace

    ws = begin_workspace(card, directory, like, progress)
    return {"workspace": str(ws.root), "card": ws.card.name, "source": ws.card.source.kind}


@shown("show_cards")
def cards(
    progress: Progress,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this card in full.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key that a card may have.")] = False,
) -> dict[str, Any]:
    """List the shipped data cards, or print one.

    \b
    Examples:
      eclipse cards
      eclipse cards coco > my-card.yaml
      eclipse cards --keys
    """
    from .pipeline.core.results import read_cards

    return read_cards(name, keys=keys)


@shown("show_status")
def status(progress: Progress, workspace: Root = None) -> dict[str, Any]:
    """Show what each stage has done, and what is next.

    \b
    Examples:
      eclipse status
      eclipse status -w eclipse-shapes --json
    """
    from .pipeline.core.status import gather
    from .pipeline.run import locate

    return gather(locate(None, workspace, progress))


@shown("show_doctor")
def doctor(
    progress: Progress,
    card: Card = None,
    workspace: Root = None,
) -> dict[str, Any]:
    """Check installation, machine and cards.

    In a workspace it verifies every stored feature too. Exit code 1 if something is broken. What merely is not
    there yet (weights, URL lists) is listed with what to do.

    \b
    Examples:
      eclipse doctor
      eclipse doctor --card cc12m
    """
    from .pipeline.doctor import examine

    return examine(card, workspace, progress)


@shown("show_story")
def why(
    progress: Progress,
    what: Annotated[str, typer.Argument(metavar="UID|KEY|URL", help="A row; the first 8 digits of a uid will do.")],
    workspace: Root = None,
) -> dict[str, Any]:
    """Tell a row's story, from the list to the batch.

    \b
    Examples:
      eclipse why 000031415
      eclipse why https://example.org/cat.jpg
    """
    from .pipeline.run import locate
    from .why import tell

    return tell(locate(None, workspace, progress), what, progress)


@shown("show_search")
def search(
    progress: Progress,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in quotes.")],
    top: Annotated[int, typer.Option("--top", min=1, max=1000, metavar="N", help="Pictures to show.")] = 24,
    workspace: Root = None,
) -> dict[str, Any]:
    """Find the embedded pictures nearest to a text.

    By the encoder that embedded them, with the filter's verdict; reports/search.html shows them.

    \b
    Examples:
      eclipse search "a red cube"
      eclipse search "a watermark" --top 100
    """
    from .pipeline.run import locate, write_overview
    from .search import search as find

    ws = locate(None, workspace, progress)
    found = find(ws, text, progress, top=top)
    write_overview(ws, "search")
    return found


@stage
def download(
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="So many pictures for now.")] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="SHARE", help="Such a share for now, by a hash of the URLs: 1%.")
    ] = None,
    retry_failed: Annotated[
        str | None,
        typer.Option(
            "--retry-failed", metavar="[REASON,…]", help="Fetch what failed (for these reasons) into further shards."
        ),
    ] = None,
) -> None:
    """Fetch the card's pictures into image shards.

    img2dataset writes them as WebDataset tars; a resumed download fetches what is missing. What is asked for by --limit
    or --sample is remembered; asking for more, up to --sample 100%, adds to it. Pictures that a card reads where they
    lie are counted, and not copied.

    \b
    Examples:
      eclipse download
      eclipse download --card my-card.yaml -w /data/mine
      eclipse download --sample 1%
      eclipse download --retry-failed
      eclipse download --retry-failed timed_out,http_503
    """


@stage
def embed(
    gpus: Gpus = None,
    text_states: Annotated[
        bool | None, typer.Option("--text-states/--no-text-states", help="Store token states; the card decides.")
    ] = None,
) -> None:
    """Turn image shards into CLIP features.

    One memory-mapped Parquet part per shard; finished parts are kept when it is run again.

    \b
    Examples:
      eclipse embed
      eclipse embed --gpus 8
      eclipse embed --cluster ray --no-text-states
    """


@stage
def filter(
    dry_run: Annotated[
        bool | None,
        typer.Option("--dry-run", help="Write no verdict: say what each rule would drop, alone and in sequence."),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="KEY=VALUE", help="A key of the card's filter section, for this run; repeat."),
    ] = None,
) -> None:
    """Find copies and bad pairs by the card's rules.

    Each row gets a verdict with a reason in selection.parquet; nothing is deleted. What takes long is kept, so that
    filtering again under other rules takes seconds.

    \b
    Examples:
      eclipse filter
      eclipse filter --dry-run --rule preset=datacomp_basic --rule min_side=256
      eclipse filter --overwrite        after changing the rules in eclipse.yaml
    """


@stage
def train(
    gpus: Gpus = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=10**9, help="Optimizer steps, instead of the card's.")
    ] = None,
    arm: Annotated[
        str | None, typer.Option("--arm", metavar="NAME", help="eclipse, or a baseline: projection, diffusion.")
    ] = None,
    init: Annotated[
        str | None, typer.Option("--init", metavar="DIR|HUB-ID", help="Prior to start from, instead of the card's.")
    ] = None,
) -> None:
    """Train the prior; an interrupted run resumes exactly.

    With more --steps than a finished run had, it goes on from there. On several nodes, start the same command under
    torchrun; every node needs the workspace.

    \b
    Examples:
      eclipse train
      eclipse train --gpus 8
      eclipse train --init ECLIPSE-Community/ECLIPSE_KandinskyV22_Prior
      torchrun --nnodes 2 --nproc-per-node 8 -m eclipse.cli train -w /shared/ws
    """


@stage
def render(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT|FILE]",
            show_default=False,
            help="One prompt in quotes, or a .txt, .jsonl, .csv, .tsv or folder of .txt; the card's by default.",
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative", metavar="TEXT", help="What the pictures shall not show.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of the pictures; one in the workspace's renders/ by default."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="flat, or of a scorer: geneval, t2i-compbench, dpg, hrs."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, max=10_000, help="Pictures a prompt.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the noise.")] = None,
    prior: Annotated[
        str | None, typer.Option("--prior", metavar="DIR|HUB-ID|text", help="Another prior; text: the raw embedding.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=16, max=4096, help="Of the pictures, in pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=16, max=4096, help="The card's by default.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps of the decoder.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", min=0, help="Of the decoder.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="NAME", help="ddpm, ddim, dpm++, dpm++-karras or dpm++-sde."),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", metavar="NAME", help="Of a .csv or .tsv, in place of Prompt.")
    ] = None,
    blank_decoder_text: Annotated[
        bool | None,
        typer.Option("--blank-decoder-text", help="Hide the prompt from a decoder that reads it (Karlo)."),
    ] = None,
) -> dict[str, Any]:
    """Make pictures from prompts, and a gallery of them.

    Outside a workspace, --prior with an export or a hub id makes one from the data card that came with the prior.

    \b
    Examples:
      eclipse render
      eclipse render "a red cube on a blue table" --samples 4
      eclipse render prompts.txt --samples 4 --seed 1
      eclipse render geneval.jsonl --layout geneval --out geneval-pictures
    """
    from .decode.prompts import typed

    return {"prompts": typed(prompts or [])}


@stage
def evaluate() -> None:
    """Measure the trained prior.

    In embedding space, and on the shapes card by pixel, beside the oracle.

    \b
    Examples:
      eclipse evaluate
      eclipse evaluate --json > figures.json
    """


@shown("show_export")
def export(
    progress: Progress,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the checkpoint.")],
    workspace: Root = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write the prior in the published ECLIPSE format.

    Beside it a model card, README.md, and eclipse.json: its encoder, its data card and every stage's figures.

    \b
    Examples:
      eclipse export my-prior
    """
    from .decode.export import export_prior
    from .pipeline.run import check_prior, locate

    ws = locate(None, workspace, progress)
    check_prior(ws, progress)
    return export_prior(ws, directory, progress, overwrite=overwrite)


@shown("show_push")
def push(
    progress: Progress,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the hub; made where there is none.")],
    workspace: Root = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; needs no network.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Into a repository that holds something else, too.")
    ] = False,
) -> dict[str, Any]:
    """Publish the prior with its model card on the hub.

    It sends what `eclipse export` writes. Log in first with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      eclipse push ada/shapes-prior --dry-run
      eclipse push ada/shapes-prior
    """
    from .decode.export import push_prior
    from .pipeline.run import check_prior, locate

    ws = locate(None, workspace, progress)
    check_prior(ws, progress)
    return push_prior(ws, repository, progress, private=private, overwrite=overwrite, dry_run=dry_run)


@shown("show_experiment")
def lab(
    progress: Progress,
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="world, separation, reduction or sweep.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of results and caches, made where there is none.")
    ] = Path("eclipse-lab"),
    held_out: Annotated[
        float | None, typer.Option("--held-out", min=0.05, max=0.8, help="Share of compositions kept from training.")
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", min=100, max=100_000_000, help="Training pairs.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,N,…", help="0,1,2 by default; 0 alone in the sweep.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=10**9, help="Optimizer steps of every prior.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, max=10_000, help="Prompts a category and split.")
    ] = None,
    card: Card = None,
) -> dict[str, Any]:
    """Run an experiment of the closed world.

    world shows scenes, checker and small models on a page. separation: can the world tell priors apart? reduction:
    the projection loss as mean or as sum. sweep: the projection arm over held-out shares and numbers of pairs. What
    is done is kept in DIR; the same command continues.

    \b
    Examples:
      eclipse lab separation
      eclipse lab separation --held-out 0.8 --pairs 16000 --seeds 0,1,2,3,4
      eclipse lab reduction --json > reduction.json
      eclipse lab sweep -o sweep
    """
    from .lab.experiments import Dials, run, seeds_of

    dials = Dials(held_out=held_out, pairs=pairs, seeds=seeds_of(seeds), steps=steps, prompts=prompts)
    return run(experiment, out, progress, dials, card=card)


if __name__ == "__main__":
    app()
