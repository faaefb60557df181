"""A procedure with some of its primitives left out: how mistakes of omission are planted in a design."""

from __future__ import annotations

from typing import Any

from guest_memfd.hosts.host import Steps


def without(procedure: Steps[Any], *names: str) -> Steps[Any]:
    """*procedure*, in which primitives of these names do nothing and return 0."""
    result: Any = None
    while True:
        try:
            primitive = procedure.send(result)
        except StopIteration as stop:
            return stop.value
        result = 0 if primitive.name in names else (yield primitive)
