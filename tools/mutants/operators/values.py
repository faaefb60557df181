"""Arguments in the wrong order, tables with an entry missing or two exchanged, values left to their defaults."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from mutants.change import Change, replaced, source
from mutants.site import Site, called
from mutants.vocabulary import NUMBERS, OPTIONAL


def swap_arguments(site: Site) -> Iterator[Change]:
    """Two numbers beside each other are handed on in the other order."""
    for node in site.nodes():
        if isinstance(node, ast.Call) and called(node) not in ("max", "min"):
            for one, other in pairwise(node.args):
                if _is_number(one) and _is_number(other):
                    yield Change({one: other, other: one}, f"{source(one)}, {source(other)}",
                                 f"{source(other)}, {source(one)}")


def drop_entry(site: Site) -> Iterator[Change]:
    """A table lacks an entry."""
    for node in site.nodes():
        if isinstance(node, ast.Dict):
            for key, value in _entries(node):
                rest = ", ".join(f"{source(k)}: {source(v)}" for k, v in _entries(node) if k is not key)
                yield replaced(node, f"{{{rest}}}")._replace(was=f"{source(key)}: {source(value)}", now="nothing")


def swap_entries(site: Site) -> Iterator[Change]:
    """Two entries of a table are exchanged."""
    for node in site.nodes():
        if isinstance(node, ast.Dict):
            for one, other in pairwise(node.values):
                if source(one) != source(other):
                    yield Change({one: other, other: one}, f"{source(one)}, {source(other)}",
                                 f"{source(other)}, {source(one)}")


def drop_keyword(site: Site) -> Iterator[Change]:
    """A value is left to its default."""
    for node in site.nodes():
        if isinstance(node, ast.Call):
            for keyword in (k for k in node.keywords if k.arg in OPTIONAL):
                kept = [k for k in node.keywords if k is not keyword]
                args = [*map(source, node.args), *(f"{k.arg}={source(k.value)}" for k in kept)]
                text = f"{source(node.func)}({', '.join(args)})"
                yield replaced(node, text)._replace(was=f"{keyword.arg}={source(keyword.value)}", now="its default")


def _entries(node: ast.Dict) -> list[tuple[ast.expr, ast.expr]]:
    return [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]


def _is_number(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return name in NUMBERS or (isinstance(node, ast.Constant) and type(node.value) is int)
