"""A machine small enough to be seen through: one byte, and whatever a test says its primitives do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.engine.naive import explore
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import Folio, Host, Primitive, Steps

PAGE = Folio(0)
US = Host("user")
PANIC = 255

Does = Callable[[int, int, tuple[Any, ...]], Sequence[Outcome]]
"""(the byte, party, arguments) -> outcomes."""


def end(result: Any, byte: int, *notes: Any, failed: bool = False) -> Outcome:
    return Outcome(result, bytes([byte]), notes, failed)


class Toy:
    """lock_folio and unlock_folio work; the test adds what else it needs."""

    def __init__(self, **more: Does) -> None:
        self.does: dict[str, Does] = {"lock_folio": self._lock, "unlock_folio": self._unlock, **more}

    def _lock(self, byte: int, party: int, args: tuple[Any, ...]) -> list[Outcome]:
        return [] if byte else [end(None, party + 1)]

    def _unlock(self, byte: int, party: int, args: tuple[Any, ...]) -> list[Outcome]:
        return [end(None, 0)]

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> Sequence[Outcome]:
        return self.does[primitive.name](shared[0], party, primitive.args)

    def halted(self, shared: bytes) -> bool:
        return shared[0] == PANIC


@dataclass
class ToyLaw:
    """A law of bytes: breaks in the states, by the notes, and at the ends that are listed."""

    name: str = "toy"
    states: tuple[int, ...] = ()
    notes: tuple[Any, ...] = ()
    ends: tuple[int, ...] = ()

    def in_state(self, shared: bytes) -> str | None:
        return f"byte {shared[0]}" if shared[0] in self.states else None

    def on_note(self, note: Any) -> str | None:
        return f"note {note}" if note in self.notes else None

    def at_end(self, shared: bytes) -> str | None:
        return f"ends with {shared[0]}" if shared[0] in self.ends else None


def explorer(
    machine: Toy, *procedures: Callable[[], Steps[Any]], law: ToyLaw | None = None,
    teardown: Callable[[], Steps[Any]] | None = None, byte: int = 0,
) -> Explorer:
    programs = [Program(i, f"p{i}", start) for i, start in enumerate(procedures)]
    last = Program(13, "teardown", teardown) if teardown else None
    return Explorer(Tables(machine, [law or ToyLaw()]), programs, bytes([byte]), last)


def run(machine: Toy, *procedures: Callable[[], Steps[Any]], **more: Any) -> Result:
    """Explore, and see that the reference engine counts the same."""
    engine = explorer(machine, *procedures, **more)
    result = engine.run()
    assert (result.states, result.transitions) == explore(machine, engine.programs, engine.initial)
    return result
