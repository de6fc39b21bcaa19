"""A card's file: found by name, read as safe YAML, its former key names and its paths put right. Used by card.py."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .source import PLACES

CARD_NAME = "eclipse.yaml"  # the resolved card in a workspace
LARGEST_CARD = 1 << 20  # bytes; a card that spells out every key takes about 6,000
MOST_NODES = 20_000  # of a card's YAML, each alias counted as what it stands for
INSTALLATION = Path(__file__).resolve().parents[2]
CARDS = INSTALLATION / "data_cards"

# Keys that once had other names, by section. They are still read, with a note; a workspace made before is recognised.
RENAMED: dict[str, dict[str, str]] = {
    "train": {"warmup": "warmup_steps", "ema": "ema_decay", "clip_gradient": "grad_clip_norm"},
}


def read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a card's file says, under today's names of its keys; a note for each that had another. Raises UsageError."""
    try:
        if path.stat().st_size > LARGEST_CARD:
            raise UsageError(f"this is no card: it is larger than {LARGEST_CARD:,} bytes", where=str(path))
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = path.name  # what the messages call it
        data = loader.get_single_data()
    except OSError as error:
        raise UsageError(f"cannot read the card: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the card is not valid YAML: {error}", where=str(path)) from error
    except RecursionError:
        raise UsageError("the card is nested too deeply", where=str(path)) from None
    if not isinstance(data, dict):
        raise UsageError(
            "the card is empty or no mapping", where=str(path), hint="`eclipse cards --keys` shows every key"
        )
    return renamed(_absolute_urls(data, path))


def card_names() -> list[str]:
    """Names of the cards that ship with the installation."""
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def find_card(name_or_path: str | Path) -> Path:
    """The file of a card. UsageError suggests the nearest name."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError("no such card file", where=text, hint=f"cards known by name: {', '.join(card_names())}")
        return path
    if text in card_names():
        return CARDS / f"{text}.yaml"
    near = difflib.get_close_matches(text, card_names(), n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown card {text!r}", hint=f"{meant}cards: {', '.join(card_names())}, or the path of a file")


def renamed(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A card as read, with today's names in place of former ones, and a note for each; both at once are left alone."""
    notes, result = [], dict(data)
    for section, names in RENAMED.items():
        values = result.get(section)
        if not isinstance(values, dict):
            continue
        for old, new in names.items():
            if old in values and new not in values:
                values = {new if key == old else key: value for key, value in values.items()}
                notes.append(f"{section}.{old} is called {section}.{new} now")
        result[section] = values
    return result, notes


def _absolute_urls(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """A user's card names its files relative to itself; a shipped card, to the workspace, whose own card lies there."""
    source = data.get("source")
    if path.parent == CARDS or path.name == CARD_NAME or not isinstance(source, dict):
        return data
    folder, source = path.absolute().parent, dict(source)
    for key in PLACES:
        if key in source:
            names = source[key]
            source[key] = [_beside(folder, n) for n in names] if isinstance(names, list) else _beside(folder, names)
    return {**data, "source": source}


def _beside(folder: Path, name: Any) -> Any:
    """The full path of a file named relative to `folder`; what is no file name stays, for validation to refuse."""
    if not isinstance(name, str) or not name.strip() or "://" in name:
        return name
    try:
        return str(folder / Path(name).expanduser())
    except RuntimeError:  # ~ of a user that is not there
        return name


class _Loader(yaml.SafeLoader):
    """Safe YAML that also refuses a key given twice, and names the line of a value that is none."""

    def get_single_node(self) -> yaml.Node | None:
        """The whole card as nodes, checked before anything is built: aliases can stand for more than any memory."""
        node = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and self._size(node, sizes) > MOST_NODES:
            raise _at(node, f"aliases multiply this to more than {MOST_NODES:,} values")
        return node

    def _size(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """How many values a node stands for; `sizes` holds those known, by identity."""
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES  # an alias within its own anchor has no end
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                inner = [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            sizes[id(node)] = 1 + sum(self._size(each, sizes) for each in inner)
        return sizes[id(node)]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _at(key, f"the key {key.value} stands here a second time")
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError) as error:
            # How PyYAML fails on what looks like a date or a number and is none: 2020-13-45, 5,000 digits, !!int "".
            raise _at(node, f"this is no value: {str(error).partition(';')[0]}") from None
        if isinstance(value, str) and (odd := next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)):
            raise _at(node, f"a character that cannot be written (U+{ord(odd):04X})")
        return value


def _at(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
