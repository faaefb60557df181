"""Where a suspended procedure stands, as a key: two histories with one key go on alike.

Theory of operation. The explorer must know when two runs have brought a party to the same point; otherwise it would
explore every history by itself and never end. A procedure is a Python generator. It cannot be copied or saved, and two
generators are never equal. But it reaches the world through primitives only, so what it does next depends on where it is
in its code, on what it holds, and on the results that it will be sent. The first two can be read from outside.

The key (`local_key`) has one entry for each nested generator, the outermost first: a procedure that says ``yield from`` is
suspended in all of them. An entry has four parts:

    the code object            which function this is; its identity, as the code objects live as long as the process
    the bytecode offset        at which of its primitives it waits
    names and values           of the local variables
    the value stack            what has no name: the iterator of a ``for`` loop, operands of a half-evaluated expression

Python tells the first three. The stack can be read only through the garbage collector: it lists what a generator refers
to, and what is not already known, nor machinery of the interpreter, lies on the stack.

`freeze` writes a value down by what it holds, because the value itself may change after the key was made. Containers
become tuples of their contents; numbers and strings keep their type, as True and 1 are one key to a dictionary and two
answers to a procedure; a generator becomes its own key; an iterator becomes what pickling would save, its position
included; a closure becomes its code and what it captures, as each run of the procedure makes a new one.

Invariant: from equal keys, equal results lead to equal primitives. A key that says too much costs time: one place is
explored twice. A key that says too little would hide interleavings, so that is checked and not assumed:
`automaton.Automaton._intern` compares the next primitive of every history that arrives at a known key, and refuses the
procedure (DesignRaised) where they differ. It also refuses a value without a hash.

Left out: what is kept outside of the procedure (an attribute of the design, a global variable), that two names hold one
object, and an iterator that cannot be pickled. None of these is in the key. A procedure that depends on one of them is
refused when its next primitive shows it; the library and all designs keep their state in local variables and in the host.

Tests: tests/test_explorer.py for loops, expressions, closures and each refusal; tests/test_engines.py for the counts. The
naive engine uses the same keys, so a key that says too little is not found there but by the comparison of primitives.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Generator, Iterator
from functools import cache
from types import BuiltinMethodType, CellType, CodeType, FrameType, FunctionType, GeneratorType, MethodType
from typing import Any

from guest_memfd.explore.engine.liveness import live_at


def chain_of(generator: Generator[Any, Any, Any]) -> list[GeneratorType[Any, Any, Any]]:
    """The generators of a suspended procedure, from the outermost down to the one that waits on the primitive."""
    chain = []
    inner: Any = generator
    # Each of them is suspended at its own ``yield from``.
    while inner is not None and inspect.isgenerator(inner):
        chain.append(inner)
        inner = inner.gi_yieldfrom
    return chain


def frame_key(generator: Any, *, live: bool = False) -> Any:
    """Where one generator of a chain is suspended: its code, bytecode offset, locals and value stack.

    live: only those locals that may still be read (liveness.py).
    """
    frame, below = generator.gi_frame, generator.gi_yieldfrom
    named = _named(frame, live=live)
    # A name for what it waits in says no more than that one's own frame.
    values = [(name, freeze(value) if value is not below else _BELOW) for name, value in named.items()]
    # The identity of the code object, not its name: two designs may have methods of one name.
    return id(frame.f_code), frame.f_lasti, tuple(values), tuple(map(freeze, _stack(generator)))


def keeps_to_itself(generator: Any, *, live: bool = False) -> bool:
    """Whether nobody outside of one generator of a chain can change what its frame holds, nor it what others hold."""
    below, named = generator.gi_yieldfrom, _named(generator.gi_frame, live=live)
    # An iterator that has no name was made by the loop that goes through it.
    return all(value is below or _fixed(value) for value in named.values()) and all(
        _fixed(value) or isinstance(value, Iterator) for value in _stack(generator))


# Whether *value* cannot change, as far as a key can tell: what has a hash may be taken for that.
def _fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return _fixed(value.__self__)
    return not isinstance(value, (list, dict, set, Iterator, FunctionType))


def local_key(generator: Any, *, live: bool = False) -> Any:
    """Where a procedure stands: bytecode offset, locals and value stack of every nested frame, ``done`` at its end.

    The value stack holds what has no name: the iterator of a loop, operands of a half-evaluated expression.
    """
    if generator.gi_frame is None:
        return "done"
    return tuple([frame_key(each, live=live) for each in chain_of(generator)])


# In the order of the code: that of the dictionary depends on when it was first asked for.
def _named(frame: FrameType, *, live: bool) -> dict[str, Any]:
    there, wanted = frame.f_locals, live_at(frame.f_code, frame.f_lasti) if live else None
    return {name: there[name] for name in _names(frame.f_code) if name in there and (wanted is None or name in wanted)}


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*code.co_varnames, *code.co_cellvars, *code.co_freevars)))


@cache
def _in_place(code: CodeType) -> tuple[str, ...]:
    return tuple(name for name in code.co_varnames if name not in code.co_cellvars)


# A generator refers to its locals, its stack and some machinery, and only the garbage collector can tell.
def _stack(generator: GeneratorType[Any, Any, Any]) -> list[Any]:
    frame: Any = generator.gi_frame
    inner, named, code = generator.gi_yieldfrom, frame.f_locals, frame.f_code
    values = [value for value in gc.get_referents(generator)
              if value is not named and value is not inner and not isinstance(value, _MACHINERY)]
    # Each local variable once: the stack may hold the same object, too.
    for name in _in_place(code):
        value = named.get(name)
        for at, other in enumerate(values):
            if other is value:
                del values[at]
                break
    return values


_BELOW = object()
_MACHINERY = (FrameType, CodeType, FunctionType, CellType)


def freeze(value: Any) -> Any:
    """*value* as part of a dictionary key: equal for equal contents, another for another type."""
    kind = type(value)
    # How a type is frozen is found once; asking each value for its bases would cost more than the freezing.
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
    # Two runs make two function objects, which are never equal. What they do follows from the code and the cells.
    holds = [cell.cell_contents for cell in function.__closure__ or ()]
    return (id(function.__code__), *(
        freeze(value) if not isinstance(value, FunctionType)
        # A function that captures itself, or one of the functions around it, would be frozen without end: then its
        # distance is enough.
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
    # In a fixed order: two equal sets may be gone through in different orders. As text, because values of different
    # types cannot be compared.
    set: lambda value: ("set", *sorted(map(repr, value))),
    tuple: lambda value: tuple(map(freeze, value)),
    GeneratorType: local_key,
    Iterator: _freeze_iterator,
    FunctionType: lambda value: _freeze_function(value, ()),
}
