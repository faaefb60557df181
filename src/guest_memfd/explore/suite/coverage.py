"""What happened at least once in all that was explored: a verdict is worth no more than that.

A design that refuses everything breaks no law. So a report says what has happened and what never has, and where something
of `LEAST` is missing it proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from errno import EOPNOTSUPP
from typing import Any

from guest_memfd.words.facts import Abort, Access, Contained, Ended, Freed, Refused, Returned

Seen = Callable[[Any], object]


def _reached(who: str, **how: bool) -> Seen:
    return lambda note: isinstance(note, Access) and note.who == who and all(getattr(note, k) == v for k, v in how.items())


def _done(op: str, what: Callable[[Ended], object] = bool) -> Seen:
    return lambda note: isinstance(note, Ended) and note.op == op and not note.ret and what(note)


def _refused(*ops: str) -> Seen:
    return lambda note: isinstance(note, Ended) and note.op in ops and note.ret < 0


USED = "the guest used a page"

EVENTS: Mapping[str, Seen] = {
    USED: _reached("guest"),
    "the guest used a private page": _reached("guest", guests=True),
    "the guest used a shared page": _reached("guest", guests=False),
    "the VMM used a page": _reached("VMM"),
    "a page was converted to private": _done("to_private", lambda end: end.toggled),
    "a page was converted to shared": _done("to_shared", lambda end: end.toggled),
    "a punch removed a page": _done("punch", lambda end: end.removed),
    "an allocation added a page": _done("allocate", lambda end: end.left),
    "a binding ended": _done("unbind", lambda end: not all(end.bound)),
    "a VM gave its pages back": _done("teardown"),
    "a page was freed": lambda note: isinstance(note, Freed),
    "a conversion was refused": _refused("to_private", "to_shared"),
    "a punch was refused": _refused("punch"),
    "an operation met a failure": lambda note: isinstance(note, Ended) and "a failure" in note.reasons,
    "the hypervisor refused as a rule": lambda note: isinstance(note, Refused),
    "an access of the kernel was aborted": lambda note: isinstance(note, Abort),
    "a device reached a page": _reached("device"),
    "an image of memory was written": _reached("image"),
    "broken memory was contained": lambda note: isinstance(note, Contained),
}
"""What can happen -> whether a fact says that it did."""

LEAST: Mapping[str, str] = {
    "the guest used a private page": "fault",
    "a page was converted to private": "to_private",
    "a page was converted to shared": "to_shared",
    "a punch removed a page": "punch",
    "an allocation added a page": "allocate",
}
"""What must have happened in the suite -> the operation that does it; if a design has none, no one misses it."""


@dataclass(frozen=True)
class Coverage:
    """Names of EVENTS that happened, and operations that someone asked for, with whatever result."""

    events: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()

    def __or__(self, other: Coverage) -> Coverage:
        return Coverage(self.events | other.events, self.asked | other.asked)

    def never(self) -> tuple[str, ...]:
        """The events that have not happened."""
        return tuple(event for event in EVENTS if event not in self.events)

    def missing(self, *, suite: bool) -> tuple[str, ...]:
        """What should have happened in the *suite*, or in one scenario, and has not."""
        least = LEAST if suite else {USED: "fault"}
        return tuple(event for event, op in least.items() if op in self.asked and event not in self.events)


def covered(facts: Iterable[tuple[str, Any]]) -> Coverage:
    """What *facts*, of (party, note), tell of."""
    notes = [note for _party, note in facts]
    asked = frozenset(note.op for note in notes if isinstance(note, Ended | Returned) and note.ret != -EOPNOTSUPP)
    return Coverage(frozenset(event for event, seen in EVENTS.items() if any(map(seen, notes))), asked)
