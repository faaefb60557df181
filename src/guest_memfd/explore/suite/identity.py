"""Which code answers: two answers belong together only if the same code, asked the same, gave them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from guest_memfd.explore.world.scenario import World

PACKAGE = Path(__file__).resolve().parents[2]


def code_of(worlds: Sequence[World]) -> str:
    """A digest of all source of this package, of third parties' modules in *worlds*, and of the version of Python.

    Python has a part in it, as its bytecode says where a procedure stands. What third parties' modules import in turn is not
    looked at.
    """
    digest = hashlib.sha256(f"{sys.version_info[:2]} {_ours()}".encode())
    for world in worlds:
        digest.update(f"{world.design.__module__}.{world.design.__qualname__} ".encode())
    for name in sorted({name for world in worlds for name in world.foreign_modules()}):
        file = getattr(sys.modules.get(name), "__file__", None)
        digest.update(f"{name} {_digest([Path(file)]) if file else ''} ".encode())
    return digest.hexdigest()[:16]


@cache
def _ours() -> str:
    return _digest(sorted(PACKAGE.rglob("*.py")))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        text = file.read_bytes()
        digest.update(f"{file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.name} {len(text)} ".encode())
        digest.update(text)
    return digest.hexdigest()


def initial_of(worlds: Sequence[World]) -> str:
    """A digest of the states that *worlds* begin in, which their scenes make."""
    return hashlib.sha256(b"".join(world.initial for world in worlds)).hexdigest()[:16]
