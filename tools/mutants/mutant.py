"""Mutants: every change of every site, with names that stay when other functions change."""

from __future__ import annotations

import ast
import fnmatch
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mutants.change import Change, clipped, rebuilt, source
from mutants.operators import OPERATORS
from mutants.site import Site, sites
from mutants.targets import SOURCES, Target

Place = tuple[str, int, int]
"""A statement: file, line, column."""


@dataclass(frozen=True, eq=False)
class Mutant:
    """A site with one change; *ordinal* counts what the operator does to the site."""

    site: Site
    operator: str
    ordinal: int
    change: Change

    @property
    def id(self) -> str:
        """``core/convert.py:make_private_locked:drop-step:3``."""
        return f"{self.site.file}:{self.site.name}:{self.operator}:{self.ordinal}"

    @property
    def description(self) -> str:
        """Before -> after, and the statement it is in where that is more."""
        text = clipped(f"{clipped(self.change.was)} -> {clipped(self.change.now)}", 150)
        around = [stmt for stmt in self._statements() if stmt not in self.change.edits]
        return f"{text}   in: {clipped(source(around[0]), 80)}" if around and around[0] is not self.site.node else text

    def places(self) -> set[Place]:
        """The statements that are not what they were; the mutant is none while none of them is reached."""
        return {(self.site.file, stmt.lineno, stmt.col_offset) for stmt in self._statements()}

    # The innermost statement around each edit.
    def _statements(self) -> list[ast.stmt]:
        around = dict(_innermost(self.site.node, self.site.node))
        return [around[node] for node in self.change.edits]

    def tree(self) -> ast.Module:
        """The whole file, with the change made; of a function, the file with nothing else in it."""
        changed = mutated(self.site, self.change)
        if self.site.function is None:
            whole: ast.Module = rebuilt(self.site.module, {self.site.node: changed})
            return ast.fix_missing_locations(whole)
        for name in reversed(self.site.name.split(".")[:-1]):
            within: Any = ast.parse(f"class {name}: pass").body[0]
            within.body, changed = [changed], within
        alone = ast.parse("from __future__ import annotations")
        alone.body.append(changed)
        return ast.fix_missing_locations(alone)


def mutated(site: Site, change: Change) -> Any:
    """The tree of the site, with the change made; a procedure stays one even when no step is left."""
    node = rebuilt(site.node, change.edits)
    if site.generator and not any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node)):
        node.body.append(ast.Expr(ast.YieldFrom(ast.Tuple([], ast.Load()))))
    return node


def mutants(target: Target, name: str | None = None) -> list[Mutant]:
    """All mutants of a target, in the order of its files; only those whose file fits that of *name*, a pattern of names."""
    file, _, rest = (name or "*").partition(":")
    fits = file if rest and file.endswith(".py") else "*"           # a * may stand for more than a file
    return [mutant for path in target.paths() if fnmatch.fnmatch(path, fits)
            for site in sites(path, SOURCES / path) for mutant in of_site(site)]


def of_site(site: Site) -> Iterator[Mutant]:
    """All mutants of a site; no two with the same code, none with the code there is."""
    seen = {ast.dump(site.node)}
    count: Counter[str] = Counter()
    for name, operator in OPERATORS.items():
        for change in operator(site):
            code = ast.dump(mutated(site, change))
            if code not in seen:
                seen.add(code)
                count[name] += 1
                yield Mutant(site, name, count[name], change)


def _innermost(node: ast.AST, stmt: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    here = node if isinstance(node, ast.stmt) else stmt
    yield node, here
    for child in ast.iter_child_nodes(node):
        yield from _innermost(child, here)
