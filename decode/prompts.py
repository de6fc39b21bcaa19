"""Prompts files → prompts, with errors that name file and line; and the default prompts. Called by `job`."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline.core.errors import UsageError
from ..pipeline.core.registry import find

if TYPE_CHECKING:
    from ..pipeline.core.card import Card

MAX_CHARACTERS = 2000  # a CLIP caption ends at 77 tokens; a line longer than this is not a prompt
FORMATS = (".txt", ".jsonl", ".tsv", ".csv")
_FORMATS_HINT = f"name a file with one prompt a line ({', '.join(FORMATS)}), or a folder of .txt files"

GENERAL_PROMPTS = (
    "a red car and a white sheep",
    "a green bench and a blue bowl",
    "a wooden table with three apples on it",
    "a cat on the left of a yellow vase",
    "a metallic ball and a fluffy pillow",
    "two boats on a calm lake at sunset",
    "a round mirror above a square table",
    "a bowl of soup that looks like a planet, digital art",
)


@dataclass(frozen=True)
class Prompt:
    """One prompt. `name`: its number, or the stem of its own file, if it has one; `metadata`: for GenEval's scorer."""

    text: str
    name: str
    metadata: dict[str, Any] = field(default_factory=dict)
    category: str = ""
    split: str = ""
    wanted: Any = None  # what a registered judge goes by; None: nothing is known but the text
    own_file: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a picture: whether all that was asked is there, and each thing with whether it holds."""

    right: bool
    facts: tuple[tuple[str, bool], ...] = ()


def typed(words: Sequence[str]) -> Path | list[str] | None:
    """What somebody typed in place of prompts: a file or folder, or else the text of one prompt; None: nothing.

    Raises:
        UsageError: several words, or the name of a prompts file that is not there.
    """
    if not words:
        return None
    if len(words) > 1:
        raise UsageError(
            f"{len(words)} arguments where one is wanted",
            hint=f'put a prompt in quotes, `eclipse render "{" ".join(words)[:60]}"`, or several into a file',
        )
    (word,) = words
    path = Path(word).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # longer than any file name, or with a character that none has
        return [word]
    if path.suffix.lower() in FORMATS or (" " not in word and word.endswith("/")):
        raise UsageError("no such prompts file", where=word, hint=_FORMATS_HINT)
    return [word]


def read_prompts(path: Path, *, column: str | None = None) -> list[Prompt]:
    """Read .txt (one a line), .jsonl (GenEval metadata), .tsv or .csv (a Prompt column), or a folder of .txt files.

    Blank lines are skipped; a prompt's name is its line's number all the same. column: of a .tsv or .csv, in place of
    Prompt; HRS-Bench's files have several.

    Raises:
        UsageError: naming file and line, for whatever cannot be read as a prompt.
    """
    path = Path(path)
    if column is not None and (path.is_dir() or path.suffix.lower() not in (".tsv", ".csv")):
        raise UsageError("only a .csv or .tsv has columns", where=str(path), hint="leave --prompt-column out")
    if path.is_dir():
        prompts = [_one_in_file(file) for file in sorted(path.glob("*.txt"))]
    elif not path.is_file():
        raise UsageError("no such prompts file", where=str(path), hint=_FORMATS_HINT)
    elif path.suffix.lower() not in FORMATS:
        raise UsageError(f"unknown kind of file: {path.suffix or 'no suffix'}", where=str(path), hint=_FORMATS_HINT)
    else:
        reader = {".txt": _text, ".jsonl": _jsonl}.get(path.suffix.lower())
        prompts = list(_table(path, column or "Prompt") if reader is None else reader(path))
    if not prompts:
        raise UsageError("no prompts in it", where=str(path), hint="write one prompt a line")
    return prompts


def prompts_of(texts: Iterable[str]) -> list[Prompt]:
    """Prompts given as strings."""
    return [_checked(text, f"prompt {i}", name=f"{i:05d}") for i, text in enumerate(texts)]


def default_prompts(card: Card, per_category: int) -> list[Prompt]:
    """What is registered for the card's kind of source, such as the shapes world's own; else a few general ones."""
    own = find("prompts", card.source.kind)
    return own(card, per_category) if own else prompts_of(GENERAL_PROMPTS)


def _text(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        if line.strip():
            yield _checked(line, f"{path}:{number}", name=f"{number - 1:05d}")


def _jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"not JSON: {error}", where=where, hint='each line is {"prompt": "…"}') from None
        except ValueError:  # of Python: more than 4,300 digits
            raise UsageError("a number of too many digits", where=where, hint="shorten it") from None
        except RecursionError:
            raise UsageError("nested too deeply", where=where, hint='each line is {"prompt": "…"}') from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UsageError('no "prompt" text in this object', where=where, hint='each line is {"prompt": "…"}')
        category = str(entry.get("tag", ""))
        yield _checked(entry["prompt"], where, name=f"{number - 1:05d}", metadata=entry, category=category)


def _table(path: Path, named: str) -> Iterator[Prompt]:
    """PartiPrompts and its like: a header line with the named column, and perhaps one named Category."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # PartiPrompts has bare quotation marks inside fields: in a .tsv they are plain characters.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader((line + "\n" for _, line in _lines(path)), delimiter=separator, quoting=quoting)
    try:
        header = [name.strip().lower() for name in next(filter(_filled, reader), [])]
        if named.strip().lower() not in header:
            where = f"{path}:{max(1, reader.line_num)}"
            columns = ", ".join(name[:40] for name in header[:12] if name)
            raise UsageError(
                f"the first line names no column {named!r}",
                where=where,
                hint=f"add a header line, or name a column with --prompt-column: {columns}",
            )
        column = header.index(named.strip().lower())
        category = header.index("category") if "category" in header else None
        for i, row in enumerate(reader):
            where = f"{path}:{reader.line_num}"
            if not _filled(row):
                continue
            if len(row) <= max(column, category or 0):
                raise UsageError(f"{len(row)} fields, the header has {len(header)}", where=where)
            label = "" if category is None else row[category]
            yield _checked(row[column], where, name=f"{i:05d}", category=label)
    except csv.Error as error:
        raise UsageError(f"not a table: {error}", where=f"{path}:{reader.line_num}") from None


def _filled(row: list[str]) -> bool:
    """Whether a row is more than a blank line; one of separators alone is a row with nothing in it."""
    return len(row) > 1 or any(cell.strip() for cell in row)


def _one_in_file(path: Path) -> Prompt:
    prompt = _checked(" ".join(line.strip() for _, line in _lines(path)), str(path), name=path.stem)
    return replace(prompt, own_file=True)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines; empty ones at the end of the file are dropped."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=str(path)) from None
    lines = raw.removeprefix(b"\xef\xbb\xbf").rstrip().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"not UTF-8 text (byte {error.start})", where=f"{path}:{number}", hint="save the file as UTF-8"
            ) from None


def _checked(text: str, where: str, *, name: str, metadata: dict[str, Any] | None = None, category: str = "") -> Prompt:
    text = text.strip()
    if not text:
        raise UsageError("an empty prompt", where=where, hint="write a prompt there or remove the line")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"{len(text):,} characters, at most {MAX_CHARACTERS:,}", where=where, hint="shorten it")
    # A category names rows of the gallery, a name files: neither holds half of a surrogate pair either.
    if odd := next((c for c in (*text, *category, *name) if _unwritable(c)), None):
        raise UsageError(f"half of a character (a lone surrogate, U+{ord(odd):04X})", where=where, hint="remove it")
    if odd := next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c != "\t"), None):
        kind = "control character" if unicodedata.category(odd) == "Cc" else "line separator"
        raise UsageError(f"a {kind} (U+{ord(odd):04X})", where=where, hint="remove it")
    return Prompt(text, name, metadata or {"prompt": text}, category)


def _unwritable(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"
