"""Where a suspended procedure stands, as a key: two histories with one key go on alike.

Python says what the locals of a generator are, and the garbage collector what is on its stack. Values that change are
written down by what they hold.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Generator, Iterator
from types import CellType, CodeType, FrameType, FunctionType, GeneratorType
from typing import Any


def local_key(generator: Generator[Any, Any, Any]) -> Any:
    """Where a procedure stands: bytecode offset, locals and value stack of every nested frame, ``done`` at its end.

    The value stack holds what has no name: the iterator of a loop, operands of a half-evaluated expression.
    """
    frames = []
    inner: Any = generator
    while inner is not None and inspect.isgenerator(inner):
        frame = inner.gi_frame
        if frame is None:
            return "done"
        named = frame.f_locals
        values = tuple((name, freeze(value)) for name, value in named.items())
        frames.append((id(frame.f_code), frame.f_lasti, values, _stack(inner, named)))
        inner = inner.gi_yieldfrom
    return tuple(frames)


# A generator refers to its locals (again), its stack and some machinery, and only the garbage collector can tell.
def _stack(generator: GeneratorType[Any, Any, Any], named: dict[str, Any]) -> tuple[Any, ...]:
    inner = generator.gi_yieldfrom
    return tuple(
        freeze(value) for value in gc.get_referents(generator)
        if value is not named and value is not inner and not isinstance(value, _MACHINERY)
    )


_MACHINERY = (FrameType, CodeType, FunctionType, CellType)


def freeze(value: Any) -> Any:
    """*value* as part of a dictionary key: equal for equal contents, another for another type."""
    kind = type(value)
    how = _FROZEN_BY.get(kind)
    if how is None:
        how = _FROZEN_BY[kind] = _frozen_by(kind)
    return how(value)


_FROZEN_BY: dict[type, Callable[[Any], Any]] = {}


def _frozen_by(kind: type) -> Callable[[Any], Any]:
    for base, how in _CONTAINERS.items():
        if issubclass(kind, base):
            return how
    # True == 1 and 0 == False as dictionary keys, so the type goes along.
    return lambda value: (kind, value)


# A closure that is made anew in every run is the same one. It may refer to itself, or to what refers to it.
def _freeze_function(function: FunctionType, above: tuple[FunctionType, ...]) -> Any:
    above = (*above, function)
    holds = [cell.cell_contents for cell in function.__closure__ or ()]
    return (id(function.__code__), *(
        freeze(value) if not isinstance(value, FunctionType)
        else above.index(value) if value in above else _freeze_function(value, above)
        for value in holds
    ))


# How it would be pickled says where it is. What cannot be pickled is not seen; see Automaton._intern.
def _freeze_iterator(value: Iterator[Any]) -> Any:
    try:
        reduced: Any = value.__reduce__()
    except TypeError:
        return type(value)
    return (type(value), *map(freeze, reduced[1:]))


_CONTAINERS: dict[type, Callable[[Any], Any]] = {
    list: lambda value: ("list", *map(freeze, value)),
    dict: lambda value: ("dict", *((k, freeze(v)) for k, v in value.items())),
    set: lambda value: ("set", *sorted(map(repr, value))),
    tuple: lambda value: tuple(map(freeze, value)),
    GeneratorType: local_key,
    Iterator: _freeze_iterator,
    FunctionType: lambda value: _freeze_function(value, ()),
}
