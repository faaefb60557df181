"""Only the first, only the last, one too few; a loop left too early or too late."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, dropped, replaced, rewritten, source
from mutants.site import Site, called
from mutants.vocabulary import BATCHES

PARTS, REVERSED, ONE_LESS = ("[:1]", "[-1:]", "[1:]"), "[::-1]", ("[1:]",)


def part_of_batch(site: Site) -> Iterator[Change]:
    """Only the first of a batch is handled, only the last, all but the first; or from the last to the first."""
    for node, parts in _batches(site):
        yield from (replaced(node, f"{_sequence(node)}{part}") for part in parts)


def leave_loop(site: Site) -> Iterator[Change]:
    """A loop is not left, or goes on where it should be, or runs once."""
    for stmt in site.statements():
        if isinstance(stmt, ast.Break):
            yield dropped(stmt)
            yield rewritten_in_loop(stmt, "continue")
        elif isinstance(stmt, ast.Continue):
            yield dropped(stmt)
            yield rewritten_in_loop(stmt, "break")
        elif isinstance(stmt, ast.While):
            yield Change({stmt.body[-1]: [stmt.body[-1], ast.Break()]}, source(stmt), f"{source(stmt)} once")


def return_in_loop(site: Site) -> Iterator[Change]:
    """A loop goes on to the next, or is left, where the procedure should return."""
    for node in site.nodes():
        if isinstance(node, ast.For | ast.While):
            for stmt in ast.walk(node):
                if isinstance(stmt, ast.Return):
                    yield rewritten_in_loop(stmt, "continue")
                    yield rewritten_in_loop(stmt, "break")


def rewritten_in_loop(stmt: ast.stmt, word: str) -> Change:
    """*stmt* by `break` or `continue`, which are no Python outside of a loop."""
    change = rewritten(stmt, "pass")
    return change._replace(edits={stmt: ast.Break() if word == "break" else ast.Continue()}, now=word)


# A zip or a generator has no parts, and what fails for that is no mistake that anyone makes.
def _sequence(node: ast.expr) -> str:
    return source(node) if isinstance(node, ast.Name) or called(node) == "range" else f"[*({source(node)})]"


def _batches(site: Site) -> Iterator[tuple[ast.expr, tuple[str, ...]]]:
    for node in site.nodes():
        if isinstance(node, ast.For | ast.comprehension):
            counts = called(node.iter) == "range"
            yield node.iter, ONE_LESS if counts else PARTS if isinstance(node, ast.comprehension) else (*PARTS, REVERSED)
        elif isinstance(node, ast.Call) and called(node) != "len":
            yield from ((arg, PARTS) for arg in node.args if isinstance(arg, ast.Name) and arg.id in BATCHES)
