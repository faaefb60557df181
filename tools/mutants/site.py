"""Sites: the functions of a file, and the values that its classes and the file itself give to names.

What cannot go wrong is no part of a site: annotations, docstrings, abstract methods, protocols, words for people, what
can be injected, and the tracepoints that only the laws read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants.vocabulary import TEXT, TRACEPOINTS

Value = ast.Assign | ast.AnnAssign
SKIPPED = frozenset({"annotation", "returns", "decorator_list", "args", "type_params"})
"""Fields of a function or an assignment that are no code of it. (`args` of a call is a list and is looked at.)"""


@dataclass(frozen=True, eq=False)
class Site:
    """One function or one value: where it is (file as in names of mutants), its qualified name, its tree in the file's."""

    file: str
    name: str
    node: ast.FunctionDef | Value
    module: ast.Module

    @property
    def function(self) -> ast.FunctionDef | None:
        """The function, if it is one."""
        return self.node if isinstance(self.node, ast.FunctionDef) else None

    @property
    def returns(self) -> str:
        """The type of what it returns at its end."""
        function = self.function
        text = ast.unparse(function.returns) if function and function.returns else ""
        return text.removeprefix("Steps[").removesuffix("]") if text.startswith("Steps[") else text

    @property
    def is_hypercall(self) -> bool:
        """Whether it is code of the hypervisor's own half, behind a hypercall."""
        return self.function is not None and bool(self.function.args.args) and (
            self.function.args.args[0].arg.strip("_") == "stage2")

    @property
    def generator(self) -> bool:
        """Whether it is a procedure."""
        return any(isinstance(node, ast.YieldFrom | ast.Yield) for node in ast.walk(self.node))

    def nodes(self) -> Iterator[ast.AST]:
        """All of it that can go wrong, in the order of the file."""
        yield from _walk(self.node)

    def blocks(self) -> Iterator[list[ast.stmt]]:
        """Statements that follow each other."""
        for node in self.nodes():
            for name in ("body", "orelse"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block:
                    yield [stmt for stmt in block if not _left_alone(stmt)]

    def inner_blocks(self) -> Iterator[list[ast.stmt]]:
        """The same, but for the function's own: what stands under a condition or in a loop."""
        own = {id(stmt) for stmt in self.node.body} if isinstance(self.node, ast.FunctionDef) else set()
        yield from (block for block in self.blocks() if block and id(block[0]) not in own)

    def statements(self) -> Iterator[ast.stmt]:
        """Every statement."""
        for block in self.blocks():
            yield from block


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in SKIPPED and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _left_alone(child):
                yield from _walk(child)


def _left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.expr_context):
        return True
    if isinstance(node, ast.keyword):
        return node.arg in TEXT
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or called(node.value) in TRACEPOINTS
    return False


def called(node: ast.AST) -> str | None:
    """The name of what *node* calls or yields from, None when it does neither."""
    inner: Any = node.value if isinstance(node, ast.YieldFrom | ast.Expr | ast.Assign | ast.Return) else node
    inner = inner.value if isinstance(inner, ast.YieldFrom) else inner
    if not isinstance(inner, ast.Call):
        return None
    return inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", None)


def sites(file: str, path: Path) -> list[Site]:
    """All sites of the file at *path*, which mutants call *file*."""
    module = ast.parse(path.read_text(), str(path))
    return [Site(file, name, node, module) for name, node in _named("", module)]


def _named(prefix: str, node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.FunctionDef | Value]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not _names(child.bases) & {"Protocol"}:
            yield from _named(f"{prefix}{child.name}.", child)
        elif isinstance(child, ast.FunctionDef) and "abstractmethod" not in _names(child.decorator_list):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.Assign | ast.AnnAssign) and _is_value(child):
            yield f"{prefix}{assigned(child)}", child


def _is_value(node: Value) -> bool:
    name = assigned(node)
    return not (node.value is None or name in TEXT or name.startswith("__") or isinstance(node.value, ast.Subscript))


def assigned(node: Value) -> str:
    """The name that is given a value."""
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def _names(nodes: list[ast.expr]) -> set[str]:
    return {ast.unparse(node) for node in nodes}
