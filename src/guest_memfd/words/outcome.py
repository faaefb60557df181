"""What a machine answers to a primitive."""

from __future__ import annotations

from typing import Any, NamedTuple

from guest_memfd.compat import override


class _Stay:
    @override
    def __repr__(self) -> str:
        return "waits"

    @override
    def __reduce__(self) -> str:                        # one object, in every process
        return "STAY"


STAY = _Stay()
"""Result of a step that changed the host but leaves the party where it is (a writer that queues)."""


class Blocked(Exception):  # noqa: N818 - a signal, not an error
    """The primitive has to wait; nothing has changed."""


class Outcome(NamedTuple):
    """One way a primitive can end: its result, the host afterwards, what the laws should know, was it a failure."""

    result: Any
    shared: bytes
    notes: tuple[Any, ...] = ()
    failed: bool = False
