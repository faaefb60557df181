"""A procedure with some of its primitives left out, or answered here: how mistakes of omission are planted in a design."""

from __future__ import annotations

from typing import Any

from guest_memfd.words.primitives import Steps


def without(procedure: Steps[Any], *names: str) -> Steps[Any]:
    """*procedure*, in which primitives of these names do nothing and return 0."""
    return answered(procedure, dict.fromkeys(names, 0))


def answered(procedure: Steps[Any], answers: dict[str, Any]) -> Steps[Any]:
    """*procedure*, in which primitives of these names do nothing and return what is said here."""
    result: Any = None
    while True:
        try:
            primitive = procedure.send(result)
        except StopIteration as stop:
            return stop.value
        result = answers[primitive.name] if primitive.name in answers else (yield primitive)
