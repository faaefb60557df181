"""A procedure that is called without ``yield from`` does nothing: where that is written, found in the source.

Nothing is run, and in doubt nothing is reported. A procedure that is kept, or handed on, may be meant.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from guest_memfd.core.library import Library
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.plugins.guard import foreign, ours
from guest_memfd.words.primitives import PRIMITIVES, Host

OPERATIONS = frozenset(GuestMemfdOps.__abstractmethods__)
SCOPES = ast.FunctionDef | ast.Lambda | ast.ClassDef | ast.AsyncFunctionDef


def in_class(cls: type) -> str | None:
    """The first such place in a method that *cls* has of third parties, in words; None if there is none."""
    for each in cls.__mro__:
        for method in () if ours(each.__module__) else vars(each).values():
            function = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else method
            if isinstance(function, FunctionType) and (found := _in(function, each)) is not None:
                return found
    return None


def beside(procedure: Callable[..., Any]) -> str | None:
    """The first such place in *procedure*, a third party's, or in the procedures that lie in its module."""
    if not isinstance(procedure, FunctionType) or not foreign(procedure):
        return None
    module = vars(sys.modules.get(procedure.__module__, ast))
    others = [each for each in module.values() if isinstance(each, FunctionType) and inspect.isgeneratorfunction(each)
              and each.__module__ == procedure.__module__]
    return next((found for each in (procedure, *others) if (found := _in(each, None)) is not None), None)


@lru_cache(2048)
def _in(function: FunctionType, cls: type | None) -> str | None:
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):   # there is no source, or it is an expression's
        return None
    scope = tree.body[0]
    if not isinstance(scope, ast.FunctionDef):
        return None
    for call in _Search(function, cls, scope).forgotten():
        file = function.__code__.co_filename.rpartition("/")[2]
        return (f"{file}:{first + call.lineno - 1} in {function.__qualname__} calls {ast.unparse(call.func)}() without "
                "'yield from', so it is not done")
    return None


class _Search:
    # One function: what its names stand for, and the calls of procedures in it.

    def __init__(self, function: FunctionType, cls: type | None, scope: ast.FunctionDef) -> None:
        self.cls, self.scope, self.globals = cls, scope, function.__globals__
        parameters = [arg.arg for arg in scope.args.args]
        self.first = parameters[0] if parameters else None
        self.nodes = list(_inside(scope))
        self.generator = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in self.nodes)
        self.hosts = {
            target.id for node in self.nodes if isinstance(node, ast.Assign) and _is_host(node.value)
            for target in node.targets if isinstance(target, ast.Name)}

    def forgotten(self) -> Iterator[ast.Call]:
        for node in self.nodes:
            for child in (*_used(node, generator=self.generator), *self._kept(node)):
                if isinstance(child, ast.Call) and self._is_procedure(child.func):
                    yield child

    # A procedure may be kept under a name, if someone runs it, or hands it on.
    def _kept(self, node: ast.AST) -> list[ast.expr]:
        if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
            return []
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        taken = [used for each in self.nodes for used in _used(each, generator=self.generator)]
        return [node.value] if any(isinstance(used, ast.Name) and used.id in names for used in taken) else []

    def _is_procedure(self, called: ast.expr) -> bool:
        if isinstance(called, ast.Name):
            return inspect.isgeneratorfunction(self.globals.get(called.id))
        if not isinstance(called, ast.Attribute):
            return False
        name, of = called.attr, called.value
        if _is_host(of) or (isinstance(of, ast.Name) and (
                of.id in self.hosts or isinstance(self.globals.get(of.id), Host))):
            return name in PRIMITIVES
        if isinstance(of, ast.Attribute) and of.attr == "ops":
            return name in OPERATIONS
        if isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super":
            return self._is_method(name)
        return isinstance(of, ast.Name) and of.id == self.first and self._is_method(name)

    def _is_method(self, name: str) -> bool:
        found = inspect.getattr_static(self.cls or Library, name, None)
        return inspect.isgeneratorfunction(found) or (name in OPERATIONS and getattr(found, "__isabstractmethod__", False))


# `self.host`, `self.ops.host`, `design.host`.
def _is_host(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "host"


# What lies in a function, but for the functions in it.
def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, SCOPES):
            yield node
            yield from _inside(node)


# The expressions in *node* whose value, a procedure, would be thrown away, or taken for what it returns.
def _used(node: ast.AST, *, generator: bool) -> list[ast.expr]:
    if isinstance(node, ast.Expr | ast.Yield):
        return [node.value] if node.value is not None else []
    if isinstance(node, ast.Return):
        return [node.value] if generator and node.value is not None else []
    if isinstance(node, ast.Assign):
        return [node.value] if any(isinstance(target, ast.Tuple | ast.List) for target in node.targets) else []
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return [node.test]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Subscript | ast.Attribute | ast.AugAssign):
        return [node.value]
    return []
