"""Drive a procedure by answers that the test gives, primitive by primitive; no host is there."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from guest_memfd.words.primitives import Primitive


def asked(steps: Generator[Primitive, Any, Any], answer: Callable[[Primitive], Any]) -> tuple[Any, list[str]]:
    """What *steps* return when each primitive is answered by *answer*, and all they asked for, in order."""
    asked: list[str] = []
    result: Any = None
    try:
        while True:
            primitive = steps.send(result)
            asked.append(str(primitive))
            result = answer(primitive)
    except StopIteration as stop:
        return stop.value, asked


def script(steps: Generator[Primitive, Any, Any], *answers: Any) -> tuple[Any, list[str]]:
    """The same with *answers* one after the other; AssertionError unless exactly as many are asked for."""
    left = list(answers)

    def following(primitive: Primitive) -> Any:
        assert left, f"{primitive} is asked for, and nothing more was to be"
        return left.pop(0)

    result = asked(steps, following)
    assert not left, f"{len(left)} answers were not asked for"
    return result
