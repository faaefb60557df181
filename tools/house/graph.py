"""Who imports whom: packages and modules, imports inside of functions and for type checkers counted as any other."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "guest_memfd"


@cache
def modules() -> dict[str, Path]:
    """Dotted names and files."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of ours."""
    return {name: {found for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                   for found in _named(node) if found in modules() and found != name}
            for name, path in modules().items()}


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [full if (full := f"{node.module}.{alias.name}") in modules() else str(node.module) for alias in node.names]
    return []


# Every directory is a package, with the modules in it; what lies at the top is each for itself.
def _package(module: str) -> str:
    if modules()[module].name == "__init__.py" or module.count(".") == 1:
        return module
    return module.rpartition(".")[0]


@cache
def _packages() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports().items():
        if name != SOURCE.name:                         # the public names: it names everything, and nothing uses it
            found[_package(name)] |= {_package(target) for target in targets} - {_package(name)}
    return dict(found)


def packages() -> int:
    """How many there are."""
    return len(_packages())


def packages_in_a_cycle() -> int:
    """How many reach themselves."""
    return sum(len(ring) for ring in rings(_packages()))


def cycles_of_modules() -> list[int]:
    """Sizes of the cycles, largest first."""
    return sorted((len(ring) for ring in rings(imports())), reverse=True)


def rings(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of more than one node that reach each other."""
    reach = {node: _reached(node, graph) for node in graph}
    found = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in graph}
    return {ring for ring in found if len(ring) > 1}


def _reached(node: str, graph: dict[str, set[str]]) -> set[str]:
    seen, left = set[str](), [node]
    while left:
        for follows in graph.get(left.pop(), set()) - seen:
            seen.add(follows)
            left.append(follows)
    return seen
