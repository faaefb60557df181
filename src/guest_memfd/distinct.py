"""Named tuples of several types that mean different things: an exit, a stop, a fact.

A NamedTuple equals any tuple that holds the same, whatever its type: two exits without members would be one, and a set
or a table of such things would keep the first.
"""

from __future__ import annotations

from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type[Any])


def distinct(kind: Kind) -> Kind:
    """Let a NamedTuple equal what is of its own type alone (a class decorator)."""
    kind.__eq__ = _same  # type: ignore[assignment]
    kind.__ne__ = _differs  # type: ignore[assignment]
    return kind


def _same(one: tuple[Any, ...], other: object) -> bool:
    return type(one) is type(other) and tuple.__eq__(one, other)


def _differs(one: tuple[Any, ...], other: object) -> bool:
    return not _same(one, other)
