"""The command line: reads options, calls one stage, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .pipeline.core.console import present, show_summary
from .pipeline.core.progress import Progress

app = typer.Typer(
    name="eclipse",
    help="From image URLs to a text-to-image prior, and from a prior to pictures.\n\n"
    "`eclipse run` goes through every stage on an embedded example; `eclipse init CARD DIR` starts your own.",
    rich_markup_mode=None,  # plain help keeps `eclipse --help` quick
    pretty_exceptions_enable=False,
    add_completion=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Card = Annotated[str | None, typer.Option("--card", metavar="NAME|FILE", help="Data card; see `eclipse cards`.")]
Root = Annotated[
    Path | None, typer.Option("--workspace", "-w", metavar="DIR", help="Workspace; the current directory by default.")
]
Cluster = Annotated[
    str, typer.Option("--cluster", metavar="local|ray|ray://…", help="Where shard tasks run.", show_default=True)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo the stage from its beginning.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages, only errors and results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=0, max=1024, metavar="N", help="GPUs to use; 0 for the CPU, all by default.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"eclipse {version('eclipse-prior')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def shared(
    card: Card = None,
    workspace: Root = None,
    cluster: Cluster = "local",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The options that every stage takes: `stage` appends them to its own."""


def stage(options_of: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Make a command of a function that has a stage's name, its own options and its help, and returns those for it.

    Options left at None are the stage's own to decide. What the function raises is shown like what the stage raises.
    """
    name = options_of.__name__
    own, more = (list(signature(each, eval_str=True).parameters.values()) for each in (options_of, shared))

    def command(
        card: str | None,
        workspace: Path | None,
        cluster: str,
        overwrite: bool,
        quiet: bool,
        as_json: bool,
        debug: bool,
        **given: Any,
    ) -> None:
        from .pipeline.core.results import show_stage
        from .pipeline.run import cluster_option, locate, run_stage

        def work(progress: Progress) -> dict[str, Any]:
            options = {**options_of(**given), **cluster_option(name, cluster)}
            if name == "render" and options["prior"] is not None:
                from .decode.export import workspace_for

                ws = workspace_for(card, workspace, options["prior"], progress)
            else:
                ws = locate(card, workspace, progress)
            return run_stage(ws, name, progress, overwrite=overwrite, **options)

        present(work, lambda summary: show_stage(name, summary), quiet=quiet, as_json=as_json, debug=debug)

    command.__name__, command.__doc__ = name, options_of.__doc__
    command.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]  what Typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
    return app.command(cls=_RetryFailed if name == "download" else None)(command)


class _RetryFailed(TyperCommand):
    """`--retry-failed` alone stands for `--retry-failed all`: Typer knows no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        option = "--retry-failed"
        for place in range(len(args), 0, -1):
            if args[place - 1] == option and (place == len(args) or args[place].startswith("-")):
                args.insert(place, "all")
        return super().parse_args(ctx, args)


@app.command()
def run(
    card: Card = None,
    workspace: Root = None,
    gpus: Gpus = None,
    cluster: Cluster = "local",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every stage in turn, from URLs to pictures and figures.

    The stages: download, embed, filter, train, render, evaluate. A complete one is skipped, an interrupted one
    continues. With nothing named, the embedded shapes card runs in ./eclipse-shapes.

    \b
    Examples:
      eclipse run
      eclipse run --card coco -w coco --gpus 8
    """
    from .pipeline.core.results import show_run
    from .pipeline.run import locate, run_all

    def work(progress: Progress) -> dict[str, Any]:
        ws = locate(card, workspace, progress, default_card="shapes")
        return run_all(ws, progress, overwrite=overwrite, gpus=gpus, cluster=cluster)

    present(work, show_run, quiet=quiet, as_json=as_json, debug=debug)


@app.command()
def init(
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
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

    def work(progress: Progress) -> dict[str, Any]:
        ws = begin_workspace(card, directory, like, progress)
        return {"workspace": str(ws.root), "card": ws.card.name, "source": ws.card.source.kind}

    def show(result: dict[str, Any]) -> None:
        print(f"workspace for {result['card']} ({result['source']}): {result['workspace']}")
        print(f"next: cd {directory} && eclipse run")

    present(work, show, as_json=as_json, debug=debug)


@app.command()
def cards(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this card in full.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key that a card may have.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the shipped data cards, or print one.

    \b
    Examples:
      eclipse cards
      eclipse cards coco > my-card.yaml
      eclipse cards --keys
    """
    from .pipeline.core.results import read_cards, show_cards

    present(lambda progress: read_cards(name, keys=keys), show_cards, as_json=as_json, debug=debug)


@app.command()
def status(workspace: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what each stage has done, and what is next.

    \b
    Examples:
      eclipse status
      eclipse status -w eclipse-shapes --json
    """
    from .pipeline.core.results import show_status
    from .pipeline.core.status import gather
    from .pipeline.run import locate

    present(lambda progress: gather(locate(None, workspace, progress)), show_status, as_json=as_json, debug=debug)


@app.command()
def doctor(
    card: Card = None, workspace: Root = None, quiet: Quiet = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Check installation, machine and cards.

    In a workspace it verifies every stored feature too. Exit code 1 if something is broken. What merely is not
    there yet (weights, URL lists) is listed with what to do.

    \b
    Examples:
      eclipse doctor
      eclipse doctor --card cc12m
    """
    from .pipeline.core.results import show_doctor
    from .pipeline.doctor import examine

    def work(progress: Progress) -> dict[str, Any]:
        return examine(card, workspace, progress)

    if present(work, show_doctor, quiet=quiet, as_json=as_json, debug=debug)["broken"]:
        raise typer.Exit(1)


@app.command()
def why(
    what: Annotated[str, typer.Argument(metavar="UID|KEY|URL", help="A row; the first 8 digits of a uid will do.")],
    workspace: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell a row's story, from the list to the batch.

    \b
    Examples:
      eclipse why 000031415
      eclipse why https://example.org/cat.jpg
    """
    from .pipeline.core.results import show_story
    from .pipeline.run import locate
    from .why import tell

    present(
        lambda progress: tell(locate(None, workspace, progress), what, progress),
        show_story,
        as_json=as_json,
        debug=debug,
    )


@app.command()
def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in quotes.")],
    top: Annotated[int, typer.Option("--top", min=1, max=1000, metavar="N", help="Pictures to show.")] = 24,
    workspace: Root = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the embedded pictures nearest to a text.

    By the encoder that embedded them, with the filter's verdict; reports/search.html shows them.

    \b
    Examples:
      eclipse search "a red cube"
      eclipse search "a watermark" --top 100
    """
    from .pipeline.core.results import show_search
    from .pipeline.run import locate, write_overview
    from .search import search as find

    def work(progress: Progress) -> dict[str, Any]:
        ws = locate(None, workspace, progress)
        found = find(ws, text, progress, top=top)
        write_overview(ws, "search")
        return found

    present(work, show_search, quiet=quiet, as_json=as_json, debug=debug)


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
) -> dict[str, Any]:
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
    return {"limit": limit, "sample": sample, "retry_failed": retry_failed}


@stage
def embed(
    gpus: Gpus = None,
    text_states: Annotated[
        bool | None, typer.Option("--text-states/--no-text-states", help="Store token states; the card decides.")
    ] = None,
) -> dict[str, Any]:
    """Turn image shards into CLIP features.

    One memory-mapped Parquet part a shard; finished parts are kept when it is run again.

    \b
    Examples:
      eclipse embed
      eclipse embed --gpus 8
      eclipse embed --cluster ray --no-text-states
    """
    return {"gpus": gpus, "text_states": text_states}


@stage
def filter(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write no verdict: say what each rule would drop, alone and in sequence.")
    ] = False,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="KEY=VALUE", help="A key of the card's filter section, for this run; repeat."),
    ] = None,
) -> dict[str, Any]:
    """Find copies and bad pairs by the card's rules.

    Each row gets a verdict with a reason in selection.parquet; nothing is deleted. What takes long is kept, so that
    filtering again under other rules takes seconds.

    \b
    Examples:
      eclipse filter
      eclipse filter --dry-run --rule preset=datacomp_basic --rule min_side=256
      eclipse filter --overwrite        after changing the rules in eclipse.yaml
    """
    return {"dry_run": dry_run or None, "rules": rule or None}


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
) -> dict[str, Any]:
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
    return {"gpus": gpus, "steps": steps, "arm": arm, "init": init}


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
    negative: Annotated[
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
        bool, typer.Option("--blank-decoder-text", help="Hide the prompt from a decoder that reads it (Karlo).")
    ] = False,
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

    return {
        "prompts": typed(prompts or []),
        "negative_prompt": negative,
        "out": out,
        "layout": layout,
        "samples": samples,
        "seed": seed,
        "prior": prior,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "prompt_column": prompt_column,
        "blank_decoder_text": blank_decoder_text or None,
    }


@stage
def evaluate() -> dict[str, Any]:
    """Measure the trained prior.

    In embedding space, and on the shapes card by pixel, beside the oracle.

    \b
    Examples:
      eclipse evaluate
      eclipse evaluate --json > figures.json
    """
    return {}


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the checkpoint.")],
    workspace: Root = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the prior in the published ECLIPSE format.

    Beside it a model card, README.md, and eclipse.json: its encoder, its data card and every stage's figures.

    \b
    Examples:
      eclipse export my-prior
    """
    from .decode.export import export_prior
    from .pipeline.run import check_prior, locate

    def work(progress: Progress) -> dict[str, Any]:
        ws = locate(None, workspace, progress)
        check_prior(ws, progress)
        return export_prior(ws, directory, progress, overwrite=overwrite)

    present(work, lambda result: show_summary(result, title="export"), as_json=as_json, debug=debug)


@app.command()
def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the hub; made where there is none.")],
    workspace: Root = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; needs no network.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Into a repository that holds something else, too.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish the prior with its model card on the hub.

    It sends what `eclipse export` writes. Log in first with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      eclipse push ada/shapes-prior --dry-run
      eclipse push ada/shapes-prior
    """
    from .decode.export import push_prior
    from .pipeline.core.results import show_push
    from .pipeline.run import check_prior, locate

    def work(progress: Progress) -> dict[str, Any]:
        ws = locate(None, workspace, progress)
        check_prior(ws, progress)
        return push_prior(ws, repository, progress, private=private, overwrite=overwrite, dry_run=dry_run)

    present(work, show_push, quiet=quiet, as_json=as_json, debug=debug)


@app.command()
def lab(
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
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
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
    from .pipeline.core.results import show_experiment

    def work(progress: Progress) -> dict[str, Any]:
        from .lab.experiments import Dials, run, seeds_of

        dials = Dials(held_out=held_out, pairs=pairs, seeds=seeds_of(seeds), steps=steps, prompts=prompts)
        return run(experiment, out, progress, dials, card=card)

    present(work, show_experiment, quiet=quiet, as_json=as_json, debug=debug)


if __name__ == "__main__":
    app()
