"""0 for an error, an error for 0; the index beside an error lost or wrong; another errno."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, dropped, replaced, source
from mutants.site import Site, called
from mutants.vocabulary import FAILURE, OTHER_ERRNO, SUCCESS


def return_zero(site: Site) -> Iterator[Change]:
    """An error is returned as success."""
    if calm := SUCCESS.get(site.returns):
        yield from (replaced(value, calm) for value in _returned(site) if not isinstance(value, ast.YieldFrom))


def return_error(site: Site) -> Iterator[Change]:
    """Success is returned as an error."""
    if error := FAILURE.get(site.returns):
        calm = ast.unparse(ast.parse(SUCCESS.get(site.returns, "None")))
        yield from (replaced(value, error) for value in _returned(site) if source(value) == calm)


def drop_return(site: Site) -> Iterator[Change]:
    """Goes on where it should return."""
    for block in site.inner_blocks():
        if len(block) > 1 and isinstance(block[-1], ast.Return):
            yield dropped(block[-1])


def drop_index(site: Site) -> Iterator[Change]:
    """The page that refused is not named."""
    for node in site.nodes():
        if isinstance(node, ast.Call) and called(node) == "Conversion" and len(node.args) > 1:
            yield replaced(node, f"Conversion({source(node.args[0])})")


def index_off_by_one(site: Site) -> Iterator[Change]:
    """The page beside the one that refused is named."""
    for node in site.nodes():
        index = None
        if isinstance(node, ast.Call) and called(node) == "Conversion" and len(node.args) > 1:
            index = node.args[1]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and site.returns == "tuple[int, Index]":
            index = node.value.elts[1]
        if index is not None and source(index) != "FIRST_PAGE":
            yield replaced(index, f"{source(index)} + 1")
            yield replaced(index, f"{source(index)} - 1")


def other_errno(site: Site) -> Iterator[Change]:
    """An errno for another."""
    for node in site.nodes():
        if isinstance(node, ast.Name) and node.id in OTHER_ERRNO:
            yield replaced(node, OTHER_ERRNO[node.id])


def _returned(site: Site) -> Iterator[ast.expr]:
    for stmt in site.statements():
        if isinstance(stmt, ast.Return) and stmt.value is not None:
            yield stmt.value
