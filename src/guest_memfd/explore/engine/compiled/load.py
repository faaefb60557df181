"""Loading the loops: the first use compiles them, which is said, and every later one finds them."""

from __future__ import annotations

import fcntl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from guest_memfd.errors import EngineNotice
from guest_memfd.explore.engine.compiled.encoding import COUNTERS
from guest_memfd.explore.engine.compiled.flat import Flat
from guest_memfd.explore.engine.compiled.rows import Rows


@cache
def loops(name: str) -> Any:
    """The module of the loops *name*, numba or numpy, ready to be used; raises what importing or compiling raises."""
    began = time.perf_counter()
    if name == "numpy":
        return import_module("guest_memfd.explore.engine.compiled.loops_numpy")
    from guest_memfd.explore.engine.compiled.jit import folder

    kept = folder()
    with _alone(kept):
        module = import_module("guest_memfd.explore.engine.compiled.loops_numba")
        _compile(module)
    if module.expand.stats.cache_misses:
        where = f"once; it is kept in {kept}" if kept else (
            "and will be again: neither the package's folder nor the user's cache directory can be written")
        warnings.warn(f"the compiled engine was compiled in {time.perf_counter() - began:.0f} s, {where}", EngineNotice,
                      stacklevel=2)
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


# Has every loop compiled, or loaded, for the types that it is called with.
def _compile(module: Any) -> None:
    flat = Flat(b"\0", module)
    flat.learn([(0, 1)])
    flat.make_room()
    flat.add(0, 0, [(0, 1)], ())
    flat.put()
    rows = Rows(flat, 1, module)
    trees, of = flat.trees, np.zeros(1, np.int64)
    numbers, bytes_, table = np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros((0, 4), np.int64)
    same = rows.rows, trees, rows.room, rows.places, of
    module.expand(rows.rows, rows.table, *same[1:], bytes_, bytes_, table, 0, 0, bytes_, table, numbers,
                  np.zeros(COUNTERS + 1, np.int64), 1)
    module.before(*same, rows.rows, 0, 0, 0)
    module.breaking(*same, bytes_, 0, 0, table)
    module.clear(rows.rows, rows.table, *same[1:], 0, 0, bytes_)
    module.run_down(*same[:-1], 0, 0, bytes_, numbers, numbers, bytes_, numbers[:0], numbers, numbers, table)
