"""Loading the loops: the first use compiles them, which is said, and every later one finds them."""

from __future__ import annotations

import fcntl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from guest_memfd.errors import EngineNotice, HostUnavailable
from guest_memfd.explore.engine.compiled.encoding import COUNTERS, Level, LoopNotes, StepTables
from guest_memfd.explore.engine.compiled.flat import Flat
from guest_memfd.explore.engine.compiled.memo import Memo
from guest_memfd.explore.engine.compiled.rows import Rows


@cache
def loops(name: str) -> Any:
    """The module of the loops *name*, numba or numpy, ready to be used; raises what importing or compiling raises."""
    if name == "numpy":
        return import_module("guest_memfd.explore.engine.compiled.loops_numpy")
    return _ready("loops_numba", _compile, "the compiled engine was compiled")


@cache
def threaded() -> Any:
    """The module of the loops of several threads, as `loops` has the others."""
    loops("numba")                                      # before this one locks: what is there is not compiled twice
    return _ready("loops_threads", _compile_threaded, "what several threads need was compiled")


def _ready(name: str, compile_: Callable[[Any], Any], done: str) -> Any:
    from numba import config

    from guest_memfd.explore.engine.compiled.jit import folder

    if config.DISABLE_JIT:
        raise HostUnavailable("NUMBA_DISABLE_JIT is set, and numba compiles nothing")
    began, kept = time.perf_counter(), folder()
    with _alone(kept):
        module = import_module(f"guest_memfd.explore.engine.compiled.{name}")
        last = compile_(module)
    if last.stats.cache_misses:
        where = f"once; it is kept in {kept}" if kept else (
            "and will be again: neither the package's folder nor the user's cache directory can be written")
        warnings.warn(f"{done} in {time.perf_counter() - began:.0f} s, {where}", EngineNotice, stacklevel=2)
    return module


# Of several processes one compiles, and the others find what it has compiled.
@contextmanager
def _alone(kept: Path | None) -> Iterator[None]:
    if kept is None:
        yield
        return
    with open(kept / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Have every loop compiled, or loaded, for the types that it is called with; one of them.
def _compile(module: Any) -> Any:
    rows, lookup, level, told = _small(module)
    numbers, bytes_, table = np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros((0, 4), np.int64)
    same = rows.rows, lookup.trees, rows.room, rows.places, lookup.of
    module.expand(rows.rows, rows.table, lookup, bytes_, table, 0, level, told, 1)
    module.move_apart(rows.rows, 0, 1)
    module.before(*same, rows.rows, 0, 0, 0)
    module.breaking(*same, bytes_, 0, 0, table)
    module.walk_to_ends(rows.rows, rows.table, lookup, 0, 0, bytes_)
    module.clear(rows.rows, rows.table, lookup, 0, 0, bytes_)
    module.run_down(*same[:-1], 0, 0, bytes_, numbers, numbers, bytes_, numbers[:0], numbers, numbers, table)
    return module.expand


def _compile_threaded(module: Any) -> Any:
    rows, lookup, level, told = _small(loops("numba"))
    numbers, hashes, pairs = np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros((0, 2), np.int64)
    module.enter(rows.rows, hashes, pairs, numbers, 0, 0, rows.table, 0, 0, numbers, numbers, np.zeros(1, np.int64))
    module.enter_left(rows.rows, hashes, pairs, numbers, 0, rows.table, numbers)
    module.wake(level, pairs, 0)
    module.settle(rows.rows, pairs, numbers, 0, 0, 0, rows.rows, rows.table, lookup, level, told)
    return module.settle


# Rows of one party, where a byte has two values.
def _small(module: Any) -> tuple[Rows, StepTables, Level, LoopNotes]:
    flat = Flat(b"\0", module)
    flat.learn([(0, 1)])
    flat.make_room()
    flat.add(0, 0, [(0, 1)], ())
    flat.put()
    rows, memo, bytes_ = Rows(flat, 1, module), Memo(0, 1), np.zeros(1, np.uint8)
    lookup = StepTables(flat.trees, rows.room, rows.places, np.zeros(1, np.int64), memo.looks, memo.entries)
    told = LoopNotes(bytes_, np.zeros((0, 3), np.int64), np.zeros(1, np.int64), np.zeros(COUNTERS, np.int64))
    return rows, lookup, Level(0, 0, np.zeros(0, np.uint16), 0, bytes_), told
