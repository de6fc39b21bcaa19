"""Commands and keys that messages, help and pages name, read from the source: each is one that works when typed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from eclipse.cli import app
from eclipse.pipeline.core.card import every_key
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FILLED_IN = "FILLED-IN"  # what stands for the parts of a text that are known when the program runs
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for room in ("pipeline", "trainer", "decode", "lab") for path in (ROOT / room).rglob("*.py")),
]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "pipeline/report/templates").iterdir()]


def texts(path: Path) -> Iterator[str]:
    """The string literals of a module, with what is filled in marked; adjacent parts of one are one text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (str(v.value) if isinstance(v, ast.Constant) else FILLED_IN for v in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named(text: str) -> Iterator[str]:
    """`eclipse …` in backticks (or code), and the lines of examples that begin with it."""
    yield from re.findall(r"`eclipse ([^`]+)`", text)
    yield from re.findall(r"<code>eclipse ([^<]+)</code>", text)
    yield from re.findall(r"^ {6}eclipse (.+?)(?:  +.*)?$", text, flags=re.M)
    yield from re.findall(r"^eclipse (.+?)(?:  +#.*)?$", text, flags=re.M)


def fault(line: str) -> str | None:
    """What is wrong with this command line, by names alone."""
    words = shlex.split(re.split(r" (?:&&|\||>) ", line.replace("…", ""))[0])
    if words[0].startswith("--") or words[0].isupper() or FILLED_IN in words[0]:
        return None
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    known = {option for each in COMMANDS[words[0]].params for option in (*each.opts, *each.secondary_opts)}
    known |= {"-h", "--help"}
    wrong = [word for word in words[1:] if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"{words[0]} has no {wrong[0]}" if wrong else None


def test_every_command_that_is_named_can_be_typed() -> None:
    found = [(path, line) for path in SOURCES for text in texts(path) for line in named(text)]
    found += [(path, line) for path in PAGES for line in named(path.read_text(encoding="utf-8"))]
    assert len(found) > 100, "commands are found at all"
    wrong = [f"{path.relative_to(ROOT)}: eclipse {line}: {fault(line)}" for path, line in found if fault(line)]
    assert wrong == []


@pytest.mark.parametrize(("line", "wrong"), [("tran", "no command tran"), ("train --step 3", "train has no --step")])
def test_a_command_that_cannot_be_typed_is_seen(line: str, wrong: str) -> None:
    assert fault(line) == wrong


def test_every_key_that_a_hint_names_is_one() -> None:
    keys = {name.partition(" ")[0] for name, _ in every_key()}
    sections = "|".join({name.partition(".")[0] for name in keys})
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                for text in (each.value for each in ast.walk(node) if isinstance(each, ast.Constant)):
                    found = re.findall(rf"\b((?:{sections})\.[a-z_]+)\b", str(text))
                    wrong += [f"{path.relative_to(ROOT)}: {key}" for key in found if key not in keys]
    assert wrong == []
