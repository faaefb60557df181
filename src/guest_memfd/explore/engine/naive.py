"""The reference engine: no table, no packing, every path executed anew. Slow and obviously right.

It must report the same numbers of states and transitions as `explorer` on every model; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from guest_memfd.explore.engine.place import local_key
from guest_memfd.explore.engine.program import ExploredHost, Program, resume
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import LOADS, SILENT, Primitive

Path = tuple[Any, ...]
Paths = tuple[Path, ...]
Here = tuple[bytes, Path]
"""The host, and the results that led one party to where it stands."""


def explore(machine: ExploredHost, programs: Sequence[Program], initial: bytes) -> tuple[int, int]:
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


def _stand(program: Program, path: Path) -> Any:
    # From the start, each time. That is what makes this engine slow, and what leaves nothing to be wrong about.
    generator, primitive = resume(program, path)
    return local_key(generator) if primitive else "done"


# Two outcomes of one party that lead to the same state are one transition.
def _distinct(
    machine: ExploredHost, programs: Sequence[Program], shared: bytes, paths: Paths
) -> Iterator[tuple[bytes, Paths]]:
    if machine.halted(shared):
        return
    for i, program in enumerate(programs):
        if resume(program, paths[i])[1] is None:
            continue
        seen = set()
        for after, path in _steps(machine, program, (shared, paths[i])):
            # By the place and not by the path: two paths to one place are one transition, as the explorer counts
            # them.
            where = (after, _stand(program, path))
            if where not in seen:
                seen.add(where)
                yield after, (*paths[:i], path, *paths[i + 1:])


# A step goes on through silent primitives, each place once, and as far as one that it can never come out of.
def _steps(machine: ExploredHost, program: Program, start: Here) -> Iterator[Here]:
    ahead, passed = [start], set()
    while ahead:
        here = ahead.pop()
        primitive = resume(program, here[1])[1]
        if primitive is None or machine.halted(here[0]) or _goes_round(machine, program, here):
            yield here
        elif primitive.name not in SILENT:
            yield from _ends(machine, program, here, primitive)
        elif (place := (here[0], _stand(program, here[1]))) not in passed:
            passed.add(place)
            ends = _ends(machine, program, here, primitive)
            ahead += ends
            if primitive.name in LOADS:
                yield from ends


def _ends(machine: ExploredHost, program: Program, here: Here, primitive: Primitive) -> list[Here]:
    shared, path = here
    if primitive.name == "choose":
        return [(shared, (*path, option)) for option in primitive.args[1:]]
    outcomes = machine.outcomes(shared, program.number, primitive)
    return [(o.shared, path if o.result is STAY or machine.halted(o.shared) else (*path, o.result)) for o in outcomes]


# Whether nothing follows from here but choices and tracepoints, without end.
def _goes_round(machine: ExploredHost, program: Program, start: Here) -> bool:
    ahead, passed = [start], set()
    while ahead:
        here = ahead.pop()
        primitive = resume(program, here[1])[1]
        if primitive is None or primitive.name not in SILENT or machine.halted(here[0]):
            return False
        ends = _ends(machine, program, here, primitive)
        if primitive.name in LOADS or not ends:
            return False
        place = (here[0], _stand(program, here[1]))
        if place not in passed:
            passed.add(place)
            ahead += ends
    return True
