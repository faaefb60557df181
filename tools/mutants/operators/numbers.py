"""Numbers that are off by one; a plus for a minus; a gfn for a page index; a clamp forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, replaced, source
from mutants.site import Site, called
from mutants.vocabulary import NUMBERS, PLACES

ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mod: "//", ast.LShift: "+"}
CLAMPS = {"max": "min", "min": "max"}
LENGTHS = frozenset({"nr", "size"})


def off_by_one(site: Site) -> Iterator[Change]:
    """A number, or a page index, gfn or length that is handed on or bounds a range, is one too large or too small."""
    answers = set(_answers(site))
    for node in site.nodes():
        if isinstance(node, ast.Constant) and type(node.value) is int and node not in answers:
            yield replaced(node, str(node.value + 1))
            yield replaced(node, str(node.value - 1))
    for node in _handed_on(site):
        yield replaced(node, f"{source(node)} + 1")
        if _name(node) in LENGTHS:
            yield replaced(node, f"{source(node)} - 1")


def arithmetic(site: Site) -> Iterator[Change]:
    """Another operation, or half of it left out."""
    for node in site.nodes():
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            yield replaced(node, f"({source(node.left)}) {ARITHMETIC[type(node.op)]} ({source(node.right)})")
            yield replaced(node, source(node.left))
            yield replaced(node, source(node.right))


def sign(site: Site) -> Iterator[Change]:
    """A minus is forgotten: +errno, or pages that leave where they come back."""
    for node in site.nodes():
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield replaced(node, source(node.operand))


def drop_clamp(site: Site) -> Iterator[Change]:
    """max() and min() left out, or taken for each other."""
    for node in site.nodes():
        if isinstance(node, ast.Call) and (name := called(node)) in CLAMPS:
            yield replaced(node, f"{CLAMPS[name]}({', '.join(map(source, node.args))})")
            for arg in node.args:
                yield replaced(node, source(arg))


def other_place(site: Site) -> Iterator[Change]:
    """A gfn where a page index is meant, or the other way round."""
    known = _numbers_of(site)
    for node in _numbers(site):
        name = _name(node)
        for here, there in (PLACES, PLACES[::-1]):
            if name in here and isinstance(node, ast.Name):
                yield from (replaced(node, other) for other in sorted(known & there))
            elif name in here and isinstance(node, ast.Attribute) and source(node.value) == "held":
                yield replaced(node, f"{source(node.value)}.{'pgoff' if name == 'gfn' else 'gfn'}")


def _numbers(site: Site) -> Iterator[ast.Name | ast.Attribute]:
    for node in site.nodes():
        if isinstance(node, ast.Name | ast.Attribute) and _name(node) in NUMBERS and isinstance(node.ctx, ast.Load):
            yield node


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


# 0 that is returned, or given to `Conversion`, is no number; other operators take it for an error.
def _answers(site: Site) -> Iterator[ast.AST]:
    for node in site.nodes():
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value
            yield from node.value.elts if isinstance(node.value, ast.Tuple) else ()
        elif isinstance(node, ast.Call) and called(node) == "Conversion":
            yield node.args[0]


# Arguments, and bounds of slices and subscripts; comparisons have an operator of their own.
def _handed_on(site: Site) -> Iterator[ast.Name | ast.Attribute]:
    users = {id(child) for node in site.nodes() for child in _used(node)}
    yield from (node for node in _numbers(site) if id(node) in users)


def _used(node: ast.AST) -> list[ast.expr | None]:
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Slice):
        return [node.lower, node.upper]
    return [node.slice] if isinstance(node, ast.Subscript) else []


def _numbers_of(site: Site) -> set[str]:
    if site.function is None:
        return set()
    local = {arg.arg for arg in site.function.args.args}
    local |= {node.id for node in site.nodes() if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return local & NUMBERS
