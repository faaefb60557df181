"""Which engine explores: the one that was asked for, or Python for what is small and the fastest that is here for the rest.

All give the same `Result`. The compiled one takes a second to load, so it is not loaded for what Python does in less; a
process that has loaded it explores everything with it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import EngineNotice, HostUnavailable, UnknownName, describe
from guest_memfd.explore.engine.explorer import Explorer, never
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables

COMPILED, NUMPY, PYTHON = ENGINES = "compiled", "numpy", "python"
_NEEDS = {COMPILED: ("numpy", "numba"), NUMPY: ("numpy",), PYTHON: ()}
_LOOPS = {COMPILED: "numba", NUMPY: "numpy"}

MANY = 50_000
"""States that Python explores in half a second, on empty tables: a scenario that has more starts again, compiled."""

ADDRESS_SPACE = 2 << 30
"""Bytes that a process must be allowed for the libraries of the compiled engine to be loaded; they take half of that."""

_INSTALL = "pip install 'guest-memfd[fast]' installs what it needs"


def must_be_here(engine: str | None) -> None:
    """Raises UnknownName where there is no such engine, HostUnavailable where what it needs is not installed."""
    if engine is not None and engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    missing = [name for name in _NEEDS[engine or PYTHON] if find_spec(name) is None]
    if missing:
        raise HostUnavailable(f"the {engine} engine is not here: there is no {' and no '.join(missing)}; {_INSTALL}")


def explorer(
    engine: str | None, tables: Tables, programs: Sequence[Program], initial: bytes, teardown: Program | None,
    broken_before: Sequence[tuple[str, str]], threads: int = 1,
) -> Explorer:
    """The explorer of a scenario, for so many *threads* where the compiled engine explores.

    A machine without footprints is explored in Python, whatever was asked for.
    """
    if engine == PYTHON or not tables.footprints:
        return Explorer(tables, programs, initial, teardown, broken_before)
    if engine is None:
        return _Growing(tables, programs, initial, teardown, broken_before, threads)
    must_be_here(engine)
    try:
        loops = _load(engine)
    except Exception as error:
        raise HostUnavailable(f"the {engine} engine does not work here: {describe(error)}") from error
    return _compiled(tables, programs, initial, teardown, broken_before, loops=loops, threads=threads)


def prepare(engine: str | None) -> None:
    """Load what *engine* needs, for many scenarios: before processes are forked, which then need not."""
    if engine is None:
        _fastest()
    elif engine != PYTHON:
        _load(engine)


def _load(engine: str) -> Any:
    from guest_memfd.explore.engine.compiled.load import loops

    return loops(_LOOPS[engine])


# Whether so much address space is left to this process. A library that runs out of it while it is loaded says so in words of
# its own, or not at all.
def _room(bytes_: int) -> bool:
    try:
        import resource
    except ImportError:                                     # no Unix
        return True
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit == resource.RLIM_INFINITY or limit >= bytes_


# The fastest that works; None if it is Python.
@cache
def _fastest() -> Any:
    for engine in (COMPILED, NUMPY) if _room(ADDRESS_SPACE) else ():
        if all(find_spec(name) is not None for name in _NEEDS[engine]):
            try:
                return _load(engine)
            except Exception as error:
                warnings.warn(f"the {engine} engine does not work here, a slower one explores: {describe(error)}",
                              EngineNotice, stacklevel=2)
    return None


def _is_loaded() -> bool:
    return _fastest.cache_info().currsize > 0 and _fastest() is not None


class _Outgrown(Exception):  # noqa: N818 - a signal, not an error
    # There are too many states for Python.
    pass


class _Growing(Explorer):
    # Begins in Python, and again in compiled loops if there is more to it.

    def __init__(
        self, tables: Tables, programs: Sequence[Program], initial: bytes, teardown: Program | None,
        broken_before: Sequence[tuple[str, str]], threads: int,
    ) -> None:
        super().__init__(tables, programs, initial, teardown, broken_before)
        self.threads = threads

    @override
    def run(
        self, max_states: int = 1 << 40, max_seconds: float = 1e9, max_steps: int = 1 << 40, max_bytes: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Result:
        began = time.perf_counter()
        if not _is_loaded():
            try:
                return super().run(max_states, max_seconds, max_steps, max_bytes, stopped)
            except _Outgrown:
                self._give_up()
        again = _compiled(self.tables, self.programs, self.initial, self.teardown, self.broken_before, loops=_fastest(),
                          threads=self.threads)
        again.told = self.told
        return again.run(max_states, max_seconds - (time.perf_counter() - began), max_steps, max_bytes, stopped)

    @override
    def _visit(self, reached: Callable[[int], str | None]) -> tuple[int, int, str | None]:
        def reached_or_outgrown(states: int) -> str | None:
            limit = reached(states)
            if limit is None and states > MANY and _fastest() is not None:
                raise _Outgrown
            return limit

        return super()._visit(reached_or_outgrown)


# Its import needs numpy.
def _compiled(*arguments: Any, loops: Any, threads: int) -> Explorer:
    from guest_memfd.explore.engine.compiled.search import CompiledExplorer

    return CompiledExplorer(*arguments, loops=loops, threads=threads if loops.THREADED else 1)
