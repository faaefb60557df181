"""What a third party's procedure asks for: a primitive that there is, given what words/primitives.py says that it takes.

Only types are looked at. Whether a page, a gfn or an errno makes sense is the host's to say, and the laws'.
"""

from __future__ import annotations

import inspect
import types
from functools import cache
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from guest_memfd.errors import shown
from guest_memfd.words.primitives import Entries, Host, Primitive

WIDEST = 64
"""Bits of a number that a kernel could be given."""


def unlike(primitive: Primitive) -> str | None:
    """What *primitive* is given that it does not take, in words; None if all is well."""
    if primitive.name in ("choose", "hyp_call"):
        what, *given = primitive.args
        wrong = [shown(each) for each in (what, *given) if not _is_plain(each)]
        return f"{primitive.name}() is given {wrong[0]}; numbers, words and tuples of them can be told in a trace" if (
            wrong) else None
    wanted = _takes(primitive.name)
    if len(wanted) != len(primitive.args):
        return f"{primitive.name}() takes {len(wanted)} arguments, {', '.join(wanted)}, and is given {len(primitive.args)}"
    for (name, annotation), given in zip(wanted.items(), primitive.args, strict=True):
        if not _is(given, annotation):
            hint = "; is a 'yield from' missing?" if inspect.isgenerator(given) else ""
            return f"{primitive.name}() is given {shown(given)} for {name}, which is {_called(annotation)}{hint}"
    return None


@cache
def _takes(name: str) -> dict[str, Any]:
    hints = get_type_hints(getattr(Host, name))
    hints.pop("return")
    return hints


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, str, Entries) or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, bool) and value.bit_length() <= WIDEST


def _is(value: Any, annotation: Any) -> bool:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_is(value, member) for member in members)
    if origin is Literal:
        return type(value) is str and value in members
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(each, members[0]) for each in value)
    if annotation is int or isinstance(annotation, NewType):        # words/units.py: numbers, all of them
        return _is_number(value)
    if isinstance(value, tuple):
        return isinstance(value, annotation) and _is_plain(value)
    return type(value) is (types.NoneType if annotation is None else annotation)


_WORDS = {int: "a whole number", str: "a word", bool: "True or False", types.NoneType: "None"}


def _called(annotation: Any) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_called, members))
    if origin is Literal:
        return " or ".join(map(repr, members))
    if origin is tuple:
        return f"a tuple of {members[0].__name__}"
    kind = getattr(annotation, "__supertype__", annotation)
    return _WORDS.get(kind) or f"a {kind.__name__}"
