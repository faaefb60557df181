"""Compiling with numba, and where what is compiled is kept: beside the package, or in the user's cache directory.

The folder is named after the sources, so what an older version has left is never taken for this one.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

SOURCES = (
    "jit.py", "encoding.py", "loops_trees.py", "loops_table.py", "loops_ends.py", "loops_numba.py", "loops_threads.py")


@cache
def folder() -> Path | None:
    """Where compiled loops are kept; None where nothing can be written."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    for place in _places(here):
        try:
            (place / digest).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place / digest):
                return place / digest
        except OSError:
            continue
    return None


def _places(here: Path) -> Iterator[Path]:
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(named) / "guest-memfd"
    # Beside the package first, where who installs it can compile for all; that may be nobody's to write to.
    yield (Path(sys.pycache_prefix) if sys.pycache_prefix else here / "__pycache__") / "guest-memfd"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guest-memfd"


def compiled(function: F) -> F:
    """*function*, which makes no array and no list, compiled at its first call, or loaded where it has been before."""
    # Else numba counts references to every array that one loop hands to another, atomically: a fifth of all time, and more
    # where several threads count the same.
    return _compiled(function, _nrt=False)


def inlined(function: F) -> F:
    """*function*, a part of each loop that uses it: a call would hand over every array in seven words or more."""
    return _compiled(function, _nrt=False, inline="always")


def allocating(function: F) -> F:
    """*function*, which makes arrays or lists, compiled in the same way."""
    return _compiled(function)


def _compiled(function: F, **options: Any) -> F:
    kept, before = folder(), numba.config.CACHE_DIR
    # numba takes its folder from there, once, when a function is decorated.
    numba.config.CACHE_DIR = "" if kept is None else str(kept)
    try:
        done: F = numba.njit(cache=kept is not None, nogil=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = before
    return done
