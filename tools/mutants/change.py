"""One change of a syntax tree: which nodes go, what stands there instead, and both in words."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

Edits = Mapping[ast.AST, ast.AST | list[ast.stmt]]
"""A node -> what stands there instead: an expression for an expression, any number of statements for a statement."""

WIDTH = 110


class Change(NamedTuple):
    """What an operator does to a site."""

    edits: Edits
    was: str
    now: str


def source(node: ast.AST) -> str:
    """*node* as one line of Python; of a compound statement its first."""
    text = ast.unparse(node)
    return text if isinstance(node, ast.expr) else text.splitlines()[0]


def expression(text: str) -> ast.expr:
    """The tree of an expression."""
    return ast.parse(text, mode="eval").body


def replaced(node: ast.expr, text: str) -> Change:
    """An expression by another."""
    return Change({node: expression(f"({text})")}, source(node), text)


def rewritten(stmt: ast.stmt, text: str) -> Change:
    """A statement by others, as text."""
    body: list[ast.stmt] = ast.parse(f"def f():\n    {text}").body[0].body  # type: ignore[attr-defined]
    return Change({stmt: body}, source(stmt), text)


def dropped(*gone: ast.stmt) -> Change:
    """Statements that are not executed."""
    return Change({stmt: [] for stmt in gone}, "; ".join(map(source, gone)), "nothing")


def rebuilt(node: Any, edits: Edits) -> Any:
    """A copy of the tree *node* with *edits* made; unchanged parts keep their places in the file."""
    if node in edits:
        return edits[node]
    copy = type(node)()
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            setattr(copy, name, _rebuilt_list(value, edits))
        else:
            setattr(copy, name, rebuilt(value, edits) if isinstance(value, ast.AST) else value)
    return ast.copy_location(copy, node)


def _rebuilt_list(values: list[Any], edits: Edits) -> list[Any]:
    new: list[Any] = []
    for value in values:
        got = rebuilt(value, edits) if isinstance(value, ast.AST) else value
        new += got if isinstance(got, list) else [got]
    if not new and values and isinstance(values[0], ast.stmt):
        new.append(ast.Pass())
    return new


def clipped(text: str, width: int = WIDTH) -> str:
    """*text* on one line, no longer than *width*."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width - 3]}..."
