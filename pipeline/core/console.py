"""How a command begins and ends: signals, one message an error, exit codes, JSON. Used by cli.py alone."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import typer

from .errors import EclipseError, Terminated
from .interrupts import INTERRUPTED, one_interrupt, one_termination
from .progress import Progress, printable

# Packages that come with an extra of the distribution, since using a prior takes none of them.
EXTRAS = {
    **dict.fromkeys(("img2dataset", "aiohttp", "polars", "zlib_ng", "tensorboard"), "all"),
    "ray": "ray",
    "wandb": "wandb",
}


def present(
    work: Callable[[Progress], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    *,
    quiet: bool = False,
    as_json: bool = False,
    debug: bool = False,
) -> dict[str, Any]:
    """Do the work of a command, print its result (one JSON object, or through `show`), and return it.

    While working, standard output (also that of libraries and children) is sent to standard error. Of the processes
    that torchrun started, the one of rank 0 speaks for all; a failing one says so wherever it is.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    _open_standard_streams()
    try:
        with (
            one_termination(_again()),
            one_interrupt(lambda: _end_children(patience_s=0)),
            _a_line_a_thread(debug),
            _stdout_is_stderr(),
        ):
            result = work(Progress(quiet=quiet or not is_main))
    except BaseException as error:
        raise typer.Exit(_fail(error, as_json=as_json, debug=debug)) from None
    if not is_main:
        return result
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        return result
    try:
        if as_json:
            print(_json(plain(result), indent=1))
        else:
            show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # `eclipse status | head`: as the signal ends other programs, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter fails on the same buffer again at its end
        raise typer.Exit(_fail(error, as_json=False, debug=debug)) from None
    return result


def _json(value: Any, indent: int | None = None) -> str:
    """JSON for standard output: what JSON allows raw and a terminal obeys is escaped, which means the same."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def plain(value: Any) -> Any:
    """The value with nothing but JSON's own types: no numpy scalars, no paths, null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table to standard output; columns of numbers are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(_cell(value)) for value in row] for row in rows]
    view = Table(
        title=title and Text(printable(title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        view.add_column(Text(printable(column)), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        view.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    console = Console(file=sys.stdout, width=width)
    console.on_broken_pipe = _reader_left  # rich's own ends with 1
    console.print(view, "")


def _reader_left() -> None:
    raise BrokenPipeError


def show_summary(summary: dict[str, Any], *, title: str) -> None:
    """Print a stage's summary: single values as lines, and each mapping of mappings as a table."""
    done = "complete already" if summary.get("already_complete") else "done"
    print(f"{title}: {done}")
    for warning in summary.get("warnings", ()):
        print(printable(f"  warning: {warning}"))
    for key, value in summary.items():
        if key == "already_complete" or isinstance(value, list):
            continue
        if not isinstance(value, dict):
            print(printable(f"  {key.replace('_', ' ')}: {_cell(value)}"))
        elif value and all(isinstance(inner, dict) for inner in value.values()):
            _show_grid(key, value)
        else:
            pairs = ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
            print(printable(f"  {key.replace('_', ' ')}: {pairs or 'none'}"))


def _show_grid(key: str, grid: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in grid.values() for name in row))
    rows = [[name, *(row.get(column, "–") for column in columns)] for name, row in grid.items()]
    table(["", *(column.replace("_", " ") for column in columns)], rows, title=key.replace("_", " "))


def _cell(value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _is_number(cell: str) -> bool:
    return cell in ("", "–") or cell.replace(",", "").replace(".", "").lstrip("-").isdigit()


def _fail(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong in one message and return the exit code."""
    _end_children()
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        problem, code = EclipseError("interrupted", hint=_again()), INTERRUPTED
    else:
        problem = explain(error)
        code = problem.exit_code
    parts = {"error": problem.what, "where": problem.where, "hint": problem.hint}
    shown = {name: part and printable(part) for name, part in parts.items()}
    print(f"error: {EclipseError(str(shown['error']), where=shown['where'], hint=shown['hint'])}", file=sys.stderr)
    if as_json:
        print(_json({**shown, "exit_code": code}))
    return code


def _again() -> str:
    """How to go on: a second --overwrite would begin once more."""
    if "--overwrite" in sys.argv:
        return "run the command again without --overwrite to continue, or as it was to begin anew"
    return "run the same command again to continue"


def explain(error: BaseException) -> EclipseError | Terminated:
    """The message for the user behind any exception."""
    if isinstance(error, (EclipseError, Terminated)):
        return error
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        where = str(error.filename) if isinstance(error, OSError) and error.filename else None
        return EclipseError("the disk is full", where=where, hint=f"free some space, then {_again()}")
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return EclipseError(
            f"the package {error.name} is not installed",
            hint=f'install what this command needs: pip install "eclipse-prior[{extra}]"',
        )
    if isinstance(error, OSError) and error.filename:
        return EclipseError(error.strerror or text, where=str(error.filename))
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        keys = "train.microbatch (training) or decoder.batch_size (pictures)"
        hint = f"set a smaller {keys} in eclipse.yaml: neither makes finished work stale"
        return EclipseError(f"out of memory: {text or 'main memory'}", hint=hint)
    return EclipseError(
        f"unexpected {type(error).__name__}: {text.strip() or 'no message'}",
        hint="run the same command with --debug for the traceback; finished work is kept",
    )


@contextlib.contextmanager
def _a_line_a_thread(debug: bool) -> Iterator[None]:
    """What ends a library's thread, such as a full disk under TensorBoard's, is a line, not a traceback."""

    def tell(ended: threading.ExceptHookArgs) -> None:
        if debug and ended.exc_value is not None:
            traceback.print_exception(ended.exc_value)
        name = ended.thread.name if ended.thread is not None else "a thread"
        print(printable(f"{name} ended: {ended.exc_value or ended.exc_type.__name__}"), file=sys.stderr)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before


def _open_standard_streams() -> None:
    """Streams that were closed (`>&-`) lead nowhere: a file of ours that took their number would be written into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Send file descriptor 1 to standard error: libraries and children print what they like, results stay clean."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _end_children(patience_s: float = 3) -> None:
    """Stop worker processes that an interrupted stage left behind."""
    if "multiprocessing" not in sys.modules:
        return
    import multiprocessing

    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(timeout=patience_s)
        if child.is_alive():
            child.kill()
