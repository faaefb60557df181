"""The reference engine: no table, no packing, every path executed anew. Slow and obviously right.

It must report the same numbers of states and transitions as `explorer` on every model; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from guest_memfd.check.explorer import Machine, Program, local_key, resume
from guest_memfd.check.outcome import STAY
from guest_memfd.hosts.host import LOADS, SILENT

Paths = tuple[tuple[Any, ...], ...]


def explore(machine: Machine, programs: Sequence[Program], initial: bytes) -> tuple[int, int]:
    """Return (states, transitions) of all interleavings of *programs* on *machine* from *initial*."""
    start: Paths = tuple(() for _ in programs)
    visited = {_identity(initial, programs, start)}
    frontier = [(initial, start)]
    transitions = 0
    while frontier:
        following = []
        for shared, paths in frontier:
            for after, new_paths in _distinct(machine, programs, shared, paths):
                transitions += 1
                identity = _identity(after, programs, new_paths)
                if identity not in visited:
                    visited.add(identity)
                    following.append((after, new_paths))
        frontier = following
    return len(visited), transitions


def _identity(shared: bytes, programs: Sequence[Program], paths: Paths) -> Any:
    return shared, tuple(_stand(program, path) for program, path in zip(programs, paths, strict=True))


def _stand(program: Program, path: tuple[Any, ...]) -> Any:
    generator, primitive = resume(program, path)
    return local_key(generator) if primitive else "done"


# Two outcomes of one party that lead to the same state are one transition.
def _distinct(
    machine: Machine, programs: Sequence[Program], shared: bytes, paths: Paths
) -> Iterator[tuple[bytes, Paths]]:
    if machine.halted(shared):
        return
    for i, program in enumerate(programs):
        if resume(program, paths[i])[1] is None:
            continue
        seen = set()
        for after, path in _steps(machine, program, shared, paths[i]):
            where = (after, _stand(program, path))
            if where not in seen:
                seen.add(where)
                yield after, (*paths[:i], path, *paths[i + 1:])


def _steps(
    machine: Machine, program: Program, shared: bytes, path: tuple[Any, ...]
) -> Iterator[tuple[bytes, tuple[Any, ...]]]:
    _, primitive = resume(program, path)
    if primitive is None:
        yield shared, path
    elif primitive.name == "choose":
        for option in primitive.args[1:]:
            yield from _steps(machine, program, shared, (*path, option))
    else:
        for outcome in machine.outcomes(shared, program.number, primitive):
            longer = path if outcome.result is STAY else (*path, outcome.result)
            if primitive.name in SILENT:
                yield from _steps(machine, program, outcome.shared, longer)
            if primitive.name not in SILENT or primitive.name in LOADS:
                yield outcome.shared, longer
