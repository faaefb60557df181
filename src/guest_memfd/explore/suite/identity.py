"""Which code answers: two answers belong together only if the same code, asked the same, gave them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

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


def head_of(worlds: Sequence[World], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Which code is *asked* what about *worlds*, for a journal; the states that they begin in are what their scenes make."""
    initial = hashlib.sha256(b"".join(world.initial for world in worlds)).hexdigest()[:16]
    pairs = dict.fromkeys(f"{world.design.name} on {world.hypervisor.name}" for world in worlds)
    return {"code": code_of(worlds), "designs": [*pairs], "scenes": [*dict.fromkeys(world.scene.name for world in worlds)],
            **asked, "initial states": initial}
