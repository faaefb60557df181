"""Steps left out, taken twice, taken in another order; undo forgotten; results ignored."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from mutants.change import Change, dropped, replaced, rewritten, source
from mutants.site import Site, called
from mutants.vocabulary import ABSTRACTION, CALM, COUNTED, PASSED_ON, SUCCESS, TRACEPOINTS

ERRORS = frozenset({"ret", "result", "busy"})
"""Variables whose truth is an error."""

LEAVES = (ast.Return, ast.Break, ast.Continue)


def drop_undo(site: Site) -> Iterator[Change]:
    """A step on the way out after an error is left out; all of them are."""
    for node in site.nodes():
        if isinstance(node, ast.If) and _on_error(node.test):
            acts = [stmt for stmt in node.body if is_act(stmt)]
            yield from map(dropped, acts)
            if len(acts) > 1:
                yield dropped(*acts)


def drop_step(site: Site) -> Iterator[Change]:
    """A step is left out; where its result is used, it seems to have gone well."""
    for stmt in site.statements():
        if is_act(stmt):
            yield dropped(stmt)
        elif (target := target_of_step(stmt)) in CALM:
            yield rewritten(stmt, f"{target} = {CALM[target]}")
        elif returns_step(stmt) and site.returns in SUCCESS:
            yield rewritten(stmt, f"return {SUCCESS[site.returns]}")
    for node in nested_steps(site):
        yield replaced(node, "0")
        yield replaced(node, "1")


def ignore_result(site: Site) -> Iterator[Change]:
    """A step is taken, and whatever it says it seems to have gone well."""
    for stmt in site.statements():
        if (target := target_of_step(stmt)) in CALM:
            yield rewritten(stmt, f"{source(stmt)}; {target} = {CALM[target]}")
        elif isinstance(stmt, ast.Return) and stmt.value and returns_step(stmt) and site.returns in SUCCESS:
            yield rewritten(stmt, f"{source(stmt.value)}; return {SUCCESS[site.returns]}")
    for node in nested_steps(site):
        yield replaced(node, f"({source(node)}, 0)[1]")
        yield replaced(node, f"({source(node)}, 1)[1]")


def repeat_step(site: Site) -> Iterator[Change]:
    """A step that counts is taken twice."""
    for stmt in site.statements():
        if is_act(stmt) and called(stmt) in COUNTED:
            yield rewritten(stmt, f"{source(stmt)}; {source(stmt)}")


def swap_steps(site: Site) -> Iterator[Change]:
    """Two steps that follow each other are taken in the other order, each with the look at its result.

    Not in a hypercall's own code: all of that is one step, and no one can look in between. Nor in the abstraction, which
    changes nothing.
    """
    if site.is_hypercall or site.file == ABSTRACTION:
        return
    for block in site.blocks():
        units = _units(block)
        for one, other in pairwise(units):
            if _acts(one) and _acts(other) and not _depend(one, other) and not _cases(one[0], other[0]):
                gone: dict[ast.AST, ast.AST | list[ast.stmt]] = {stmt: [] for stmt in other + one[1:]}
                yield Change({**gone, one[0]: [*other, *one]}, f"{source(one[0])}; {source(other[0])}",
                             f"{source(other[0])}; {source(one[0])}")


def drop_assignment(site: Site) -> Iterator[Change]:
    """A variable keeps the value it had."""
    known: set[str] = {arg.arg for arg in site.function.args.args} if site.function else set()
    for stmt in sorted(site.statements(), key=lambda stmt: stmt.lineno):
        names = written(stmt)
        if isinstance(stmt, ast.Assign | ast.AugAssign) and called(stmt) is None and names and names <= known:
            yield dropped(stmt)
        known |= names


def return_early(site: Site) -> Iterator[Change]:
    """An error is returned at once, where something was to be done first."""
    for block in site.blocks():
        for stmt, following in pairwise(block):
            target = target_of_step(stmt)
            if target in ("ret", "result", "(ret, index)") and not isinstance(following, ast.If | ast.Return):
                failed = "result.ret" if target == "result" else "ret"
                passed = "result" if target == "result" else PASSED_ON.get(site.returns)
                if passed:
                    change = rewritten(stmt, f"{source(stmt)}\n    if {failed}: return {passed}")
                    yield change._replace(now=f"{source(stmt)}; if {failed}: return {passed}")


def is_act(stmt: ast.stmt) -> bool:
    """Whether *stmt* is a step whose result is not used, or a call."""
    return isinstance(stmt, ast.Expr) and called(stmt) is not None and called(stmt) not in TRACEPOINTS


def target_of_step(stmt: ast.stmt) -> str | None:
    """What is given the result, if *stmt* is a step whose result is kept."""
    if isinstance(stmt, ast.Assign) and isinstance(stmt.value, ast.YieldFrom):
        return ast.unparse(stmt.targets[0]) if not isinstance(stmt.targets[0], ast.Tuple) else source(stmt.targets[0])
    return None


def returns_step(stmt: ast.stmt) -> bool:
    """Whether *stmt* returns what a step says."""
    return isinstance(stmt, ast.Return) and isinstance(stmt.value, ast.YieldFrom)


def nested_steps(site: Site) -> Iterator[ast.YieldFrom]:
    """Steps inside of larger expressions."""
    whole = {id(stmt.value) for stmt in site.statements() if isinstance(stmt, ast.Expr | ast.Assign | ast.Return)}
    for node in site.nodes():
        if isinstance(node, ast.YieldFrom) and id(node) not in whole and called(node):
            yield node


def written(*stmts: ast.stmt) -> set[str]:
    """The variables that *stmts* give values to."""
    return _variables(stmts, ast.Store)


def _variables(stmts: tuple[ast.stmt, ...] | list[ast.stmt], context: type[ast.expr_context]) -> set[str]:
    return {node.id for stmt in stmts for node in ast.walk(stmt)
            if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def _on_error(test: ast.expr) -> bool:
    asked = _variables([ast.Expr(test)], ast.Load) & ERRORS
    return bool(asked) and not any(f"not {name}" in source(test) for name in asked)


# A statement, and the ifs after it that look at what it says.
def _units(block: list[ast.stmt]) -> list[list[ast.stmt]]:
    units: list[list[ast.stmt]] = []
    for stmt in block:
        looks = isinstance(stmt, ast.If) and units and _variables([ast.Expr(stmt.test)], ast.Load) & written(units[-1][0])
        if looks:
            units[-1].append(stmt)
        else:
            units.append([stmt])
    return units


def _acts(unit: list[ast.stmt]) -> bool:
    first = unit[0]
    return not isinstance(first, LEAVES) and any(isinstance(node, ast.Call | ast.YieldFrom) for node in ast.walk(first))


# Two cases of one question: only one of them is true, in whatever order they are asked.
def _cases(one: ast.stmt, other: ast.stmt) -> bool:
    asked = [stmt.test for stmt in (one, other) if isinstance(stmt, ast.If)]
    names = [source(test.args[0]) for test in asked if isinstance(test, ast.Call) and called(test) == "isinstance"]
    return len(names) == 2 and names[0] == names[1]


def _depend(one: list[ast.stmt], other: list[ast.stmt]) -> bool:
    def reads(unit: list[ast.stmt]) -> set[str]:
        return _variables(unit[:1], ast.Load) | (_variables(unit[1:], ast.Load) - written(unit[0]))
    return bool(reads(other) & written(*one) or reads(one) & written(*other))
