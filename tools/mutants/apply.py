"""A mutant takes the place of the code it was made of, in this process and for good.

A function gets other code: all that is made already - classes, tables of functions - has the mutant then. A value may
have been read and copied by anybody, so for one the whole package is imported anew, with the file changed.
"""

from __future__ import annotations

import errno
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mutants.mutant import Mutant
from mutants.targets import PACKAGE, SOURCES


def apply(mutant: Mutant) -> None:
    """Let *mutant* be the code."""
    file = mutant.site.file
    code = compile(mutant.tree(), str(SOURCES / file), "exec")
    if mutant.site.function is None:
        import_anew(file, code)
    else:
        swap(file, code)


def swap(file: str, code: CodeType) -> None:
    """Give the functions of *file* the code they have in *code*, a compiled version of the file or of some of it."""
    module = importlib.import_module(module_of(file))
    _know_errnos(module)
    for name, changed in _functions(code):
        thing: Any = module
        for part in name.split("."):
            thing = vars(thing)[part]
        for function in _behind(thing):
            if function.__code__.co_firstlineno == changed.co_firstlineno:
                function.__code__ = changed


def module_of(file: str) -> str:
    """The module in *file*."""
    return f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}"


# The functions of a property, and what decorators of Python's have wrapped.
def _behind(thing: Any) -> Iterator[FunctionType]:
    if isinstance(thing, property):
        yield from (part for part in (thing.fget, thing.fset, thing.fdel) if isinstance(part, FunctionType))
    while not isinstance(thing, FunctionType) and hasattr(thing, "__wrapped__"):
        thing = thing.__wrapped__
    if isinstance(thing, FunctionType):
        yield thing


# Not lambdas and comprehensions of a module or a class: they have run, or are in some table.
def _functions(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_name.startswith("<"):
                continue
            if inner.co_flags & 0x1:                    # CO_OPTIMIZED: a function, not a class body
                yield inner.co_qualname, inner
            else:
                yield from _functions(inner)


# An errno that the file has not imported may be the one that is returned now.
def _know_errnos(module: ModuleType) -> None:
    from guest_memfd.errors import EHWPOISON  # not before: pytest rewrites what the package asserts

    for name, value in {**vars(errno), "EHWPOISON": EHWPOISON}.items():
        if name.startswith("E") and name.isupper():
            vars(module).setdefault(name, value)


def import_anew(file: str, code: CodeType) -> None:
    """Let the package be imported a second time, *code* being what is in *file*."""
    for known in [known for known in sys.modules if known.partition(".")[0] == PACKAGE]:
        del sys.modules[known]
    sys.meta_path.insert(0, _Finder(module_of(file), code))
    importlib.import_module(module_of(file))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self.code.co_filename, loader=_Loader(name, self.code.co_filename, self.code)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def exec_module(self, module: ModuleType) -> None:
        _know_errnos(module)
        super().exec_module(module)
