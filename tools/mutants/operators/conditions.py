"""Conditions turned round, always or never true, half asked."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, replaced, source
from mutants.site import Site

INVERSE: dict[type[ast.cmpop], str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: ">=", ast.GtE: "<", ast.Gt: "<=", ast.LtE: ">", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}
NEAR: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Eq: (">=", "<="), ast.Lt: ("<=", "=="), ast.LtE: ("<", "=="), ast.Gt: (">=", "=="), ast.GtE: (">", "=="),
    ast.NotEq: ("<", ">"),
}


def negate(site: Site) -> Iterator[Change]:
    """A condition, or a part of one, is turned round."""
    for test, loops in tests(site):
        if not loops:
            yield replaced(test, negated(test))
    for node in site.nodes():
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                yield replaced(part, negated(part))


def drop_condition(site: Site) -> Iterator[Change]:
    """A condition always holds, or never."""
    for test, loops in tests(site):
        if not loops:
            yield replaced(test, "True")
        yield replaced(test, "False")


def drop_operand(site: Site) -> Iterator[Change]:
    """A part of a condition is not asked."""
    for node in site.nodes():
        if isinstance(node, ast.BoolOp):
            word = " and " if isinstance(node.op, ast.And) else " or "
            for left_out in node.values:
                kept = [f"({source(part)})" for part in node.values if part is not left_out]
                yield replaced(node, word.join(kept))


def and_or(site: Site) -> Iterator[Change]:
    """`and` for `or`, and the other way round."""
    for node in site.nodes():
        if isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield replaced(node, word.join(f"({source(part)})" for part in node.values))


def compare(site: Site) -> Iterator[Change]:
    """A comparison is another one; of numbers, one that differs in one case only."""
    for node in site.nodes():
        if isinstance(node, ast.Compare):
            for at, operator in enumerate(node.ops):
                near = () if _words(node) else NEAR.get(type(operator), ())
                for word in (INVERSE[type(operator)], *near):
                    yield replaced(node, _compared(node, at, word))


def tests(site: Site) -> Iterator[tuple[ast.expr, bool]]:
    """All conditions, and whether a loop goes on while it holds."""
    for node in site.nodes():
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test, isinstance(node, ast.While)
        elif isinstance(node, ast.comprehension):
            yield from ((test, False) for test in node.ifs)


def negated(test: ast.expr) -> str:
    """The opposite of *test*."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return source(test.operand)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _compared(test, 0, INVERSE[type(test.ops[0])])
    return f"not {source(test)}" if isinstance(test, ast.Name | ast.Attribute | ast.Call) else f"not ({source(test)})"


def _compared(node: ast.Compare, at: int, word: str) -> str:
    text = f"({source(node.left)})" if isinstance(node.left, ast.YieldFrom) else source(node.left)
    for n, (operator, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
        text += f" {word if n == at else _WORDS[type(operator)]} {source(right)}"
    return text


_WORDS = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}


# Strings and None are the same or not; more or less means nothing.
def _words(node: ast.Compare) -> bool:
    return any(isinstance(part, ast.Constant) and not isinstance(part.value, int) for part in [node.left, *node.comparators])
