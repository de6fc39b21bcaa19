"""What the commands of cli.py share: the app, their options, and how a function becomes one. Used by cli.py alone."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .pipeline.core.console import present
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


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"eclipse {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


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


def _every_command(quiet: Quiet = False, as_json: Json = False, debug: Debug = False) -> None: ...


def _every_stage(
    card: Card = None, workspace: Root = None, cluster: Cluster = "local", overwrite: Overwrite = False
) -> None: ...


def shown(show: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Make a command of a function of a Progress and its own options; core/results.py has what prints its result.

    A result with something `broken` ends it with exit code 1.
    """

    def command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        return _command(function, function, show, _parameters(function)[1:])

    return command


def stage(options_of: Callable[..., dict[str, Any] | None]) -> Callable[..., None]:
    """Make a command of a function that has a stage's name, its own options and its help.

    Options left at None are the stage's own to decide. What the function returns takes the place of what was given.
    """
    name = options_of.__name__

    def run(
        progress: Progress, card: str | None, workspace: Path | None, cluster: str, overwrite: bool, **given: Any
    ) -> dict[str, Any]:
        from .pipeline.run import cluster_option, locate, run_stage

        options = {**given, **(options_of(**given) or {}), **cluster_option(name, cluster)}
        ws = locate(card, workspace, progress, prior=options.get("prior"))
        return run_stage(ws, name, progress, overwrite=overwrite, **options)

    return _command(run, options_of, None, [*_parameters(options_of), *_parameters(_every_stage)])


def _command(
    work: Callable[..., dict[str, Any]], like: Callable[..., Any], show: str | None, parameters: list[Parameter]
) -> Callable[..., None]:
    """What Typer calls, and how it shall read it: with the name and help of `like`, and these options before all's."""

    def command(quiet: bool, as_json: bool, debug: bool, **given: Any) -> None:
        def show_it(result: dict[str, Any]) -> None:
            from .pipeline.core import results

            getattr(results, show)(result) if show else results.show_stage(like.__name__, result)

        result = present(lambda progress: work(progress, **given), show_it, quiet=quiet, as_json=as_json, debug=debug)
        if result.get("broken"):
            raise typer.Exit(1)

    parameters = [*parameters, *_parameters(_every_command)]
    command.__name__, command.__doc__ = like.__name__, like.__doc__
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return app.command(cls=_RetryFailed if like.__name__ == "download" else None)(command)


class _RetryFailed(TyperCommand):
    """`--retry-failed` alone stands for `--retry-failed all`: Typer knows no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        option = "--retry-failed"
        for place in range(len(args), 0, -1):
            if args[place - 1] == option and (place == len(args) or args[place].startswith("-")):
                args.insert(place, "all")
        return super().parse_args(ctx, args)


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    return list(signature(function, eval_str=True).parameters.values())
