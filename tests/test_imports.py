"""Who may import whom, read from the source: arrows run one way, and nothing but the front doors reaches the lab."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each room may import beside itself. Stages (download, embed, filter; trainer, decode) never import each other,
# but for the networks: `decode` runs the prior, and CLIP is run by whoever needs a text's features.
MAY = {
    "pipeline.core": set(),
    "pipeline.cache": {"pipeline.core"},
    "pipeline.images": {"pipeline.core", "pipeline.cache"},
    "pipeline.report": {"pipeline.core", "pipeline.cache", "pipeline.images"},
    "pipeline.download": {"pipeline.core", "pipeline.cache", "pipeline.images", "pipeline.report"},
    "pipeline.embed": {"pipeline.core", "pipeline.cache", "pipeline.images", "pipeline.report"},
    "pipeline.filter": {"pipeline.core", "pipeline.cache", "pipeline.images", "pipeline.report", "pipeline.embed.clip"},
    "trainer": {"pipeline.core", "pipeline.cache", "pipeline.report", "pipeline.embed.clip"},
    "decode": {
        "pipeline.core",
        "pipeline.cache",
        "pipeline.report",
        "pipeline.embed.clip",
        "trainer.model",
    },
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "trainer", "decode", "lab", "bench")
    for path in (ROOT / folder).rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The project's modules that a module imports, at its top or when a function runs; not those for types alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    for node in pending:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("eclipse.")):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *str(node.module or "").removeprefix("eclipse.").split(".")]).rstrip(".")
            found |= {name if (name := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return found & set(MODULES)


IMPORTS = {name: imported(name) for name in MODULES}


def test_arrows_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for room, may in MAY.items()
        if name.startswith(f"{room}.")
        for other in others
        if not any(other == allowed or other.startswith(f"{allowed}.") for allowed in {room, *may})
    ]
    assert wrong == []
    assert "pipeline.core.files" in IMPORTS["pipeline.cache.part"], "imports are found at all"


def test_nothing_but_the_front_doors_reaches_the_lab():
    reaching: dict[str, set[str]] = defaultdict(set)
    for name, others in IMPORTS.items():
        for other in others:
            if other.startswith("lab"):
                reaching[name.partition(".")[0]].add(name)
    assert set(reaching) <= {"lab", "bench"} and "lab" in reaching


def test_there_is_no_circle_of_imports():
    list(TopologicalSorter(IMPORTS).static_order())  # CycleError names the circle
