"""Which names the code around a class mentions, so that what no one mentions can be told from what someone calls.

Nothing is run. A name counts wherever it stands in code, whatever it is asked of; so what is said not to be mentioned is
not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from types import CodeType, FunctionType
from typing import Any


def mentioned(name: str, classes: Sequence[type], beside: type) -> bool:
    """Whether *name* is mentioned by *classes* outside of what they call so, or by what lies in a module with one of them.

    Subclasses of *beside* do not count among the latter: they speak of names of their own.
    """
    around = [
        value for each in classes for other, value in vars(each).items() if other != name
    ] + [
        value for module in {each.__module__ for each in classes} & sys.modules.keys()
        for value in vars(sys.modules[module]).values()
        if getattr(value, "__module__", None) == module and not (isinstance(value, type) and issubclass(value, beside))
    ]
    things = [vars(each)[name] for each in classes if name in vars(each)]
    return any(_lists(value, name, things) or name in names(value) for value in around)


# A table may list methods, or their names.
def _lists(table: Any, name: str, things: Sequence[object]) -> bool:
    members = [*table, *table.values()] if isinstance(table, dict) else table
    return isinstance(members, list | tuple | set | frozenset) and any(
        member is thing or member == name for member in members for thing in things)


def names(thing: object) -> set[str]:
    """The names in the code of *thing*; where it asks for attributes by name, its strings as well."""
    found: set[str] = set()
    for code in codes(thing):
        found |= {*code.co_names}
        if "getattr" in code.co_names:
            found |= {const for const in code.co_consts if isinstance(const, str)}
    return found


def codes(thing: object) -> Iterator[CodeType]:
    """The code of a function, of what wraps one, or of a class, and of the functions inside of it."""
    waiting, seen = [thing], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            waiting += _inside(each)
            if isinstance(each, CodeType):
                yield each


def _inside(thing: object) -> list[Any]:
    if isinstance(thing, CodeType):
        return [const for const in thing.co_consts if isinstance(const, CodeType)]
    if isinstance(thing, FunctionType):
        return [thing.__code__, *_cells(thing), getattr(thing, "__wrapped__", None)]
    if isinstance(thing, property):
        return [thing.fget, thing.fset, thing.fdel]
    if isinstance(thing, staticmethod | classmethod):
        return [thing.__func__]
    if isinstance(thing, partial | cached_property):
        return [thing.func]
    return [*vars(thing).values()] if isinstance(thing, type) else []


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):                      # it is filled later
            yield cell.cell_contents
