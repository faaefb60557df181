"""Classes: how deep they inherit from each other, and whether a name is one thing's alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache

from house.graph import modules

Known = tuple[str, str]
"""A class: its module and its name."""


@cache
def _classes() -> dict[Known, ast.ClassDef]:
    return {(name, node.name): node for name, path in modules().items()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)}


def shared_names() -> float:
    """The share of classes whose name a class of another file has, too."""
    files = defaultdict(set)
    for module, name in _classes():
        files[name].add(module)
    return sum(len(files[name]) > 1 for _, name in _classes()) / len(_classes())


def deepest(most: int = 3) -> list[int]:
    """Lengths of the longest chains of classes of ours, each the base of the next; no two of one chain."""
    chains = sorted((_chain(known) for known in _classes()), key=len, reverse=True)
    found: list[list[Known]] = []
    for chain in chains:
        if not any(set(chain) & set(longer) for longer in found):
            found.append(chain)
    return [len(chain) for chain in found[:most]]


@cache
def _chain(known: Known) -> list[Known]:
    bases = (_resolved(known[0], base) for base in _classes()[known].bases)
    return [known, *max((_chain(base) for base in bases if base is not None and base != known), key=len, default=[])]


# The class that *base* is in *module*: one of its own, or one that it has imported.
def _resolved(module: str, base: ast.expr) -> Known | None:
    written = ast.unparse(base).partition("[")[0]
    owner, _, name = written.rpartition(".")
    if not owner and (module, name) in _classes():
        return module, name
    place = _names(module).get(owner or name)
    if place is None:
        return None
    known = (place, name) if owner else (place.rpartition(".")[0], place.rpartition(".")[2])
    return known if known in _classes() else None


@cache
def _names(module: str) -> dict[str, str]:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return {alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
