"""What happened at least once in all that was explored: a verdict is worth no more than that.

A design that refuses everything breaks no law. So a verdict says what it has seen happen and what it has not, and where
something of `LEAST` is missing it is not ``holds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from guest_memfd.hosts.abstract.notes import Abort, Access, Contained, Ended, Freed, Refused

Seen = Callable[[Any], bool]


def _used(who: str, *, private: bool) -> Seen:
    return lambda note: isinstance(note, Access) and note.who == who and note.guests == private


def _reached(who: str) -> Seen:
    return lambda note: isinstance(note, Access) and note.who == who


def _done(op: str, what: Callable[[Ended], object]) -> Seen:
    return lambda note: isinstance(note, Ended) and note.op == op and not note.ret and bool(what(note))


def _refused(*ops: str) -> Seen:
    return lambda note: isinstance(note, Ended) and note.op in ops and note.ret < 0


EVENTS: Mapping[str, Seen] = {
    "the guest used a private page": _used("guest", private=True),
    "the guest used a shared page": _used("guest", private=False),
    "the VMM used a page": _reached("VMM"),
    "a page became private": _done("to_private", lambda end: end.toggled),
    "a page became shared": _done("to_shared", lambda end: end.toggled),
    "a punch removed a page": _done("punch", lambda end: end.removed),
    "an allocation added a page": _done("allocate", lambda end: end.left),
    "a binding ended": _done("unbind", lambda end: not all(end.bound)),
    "a VM was torn down": _done("teardown", lambda end: True),
    "a page was freed": lambda note: isinstance(note, Freed),
    "a conversion was refused": _refused("to_private", "to_shared"),
    "a punch was refused": _refused("punch"),
    "a failure was injected": lambda note: isinstance(note, Ended) and "a failure" in note.reasons,
    "the hypervisor refused a request": lambda note: isinstance(note, Refused),
    "an access of the kernel was aborted": lambda note: isinstance(note, Abort),
    "a device reached a page": _reached("device"),
    "a page of broken memory was contained": lambda note: isinstance(note, Contained),
}
"""What can happen -> whether a fact says that it did."""


def happened(facts: Iterable[tuple[str, Any]]) -> frozenset[str]:
    """Those of EVENTS that *facts*, of (party, note), tell of."""
    notes = [note for _party, note in facts]
    return frozenset(name for name, seen in EVENTS.items() if any(map(seen, notes)))
