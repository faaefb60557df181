"""Which fields of the last state a finding is about: the ones that a counterexample marks.

A law that judges facts is asked through the fact; a law that judges states is asked again with one field at a time put
back to what it was at first, and what changes the verdict is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from guest_memfd.check.explorer import Finding
from guest_memfd.hosts.abstract import notes
from guest_memfd.hosts.abstract import state as st
from guest_memfd.laws import LAWS

_REACHED_THROUGH = {
    "direct map": ("s1",), "stale TLB entry": ("stale",), "user mapping": ("user",), "DMA": ("pin", "get"),
    "guest mapping": ("gmap",), "stale guest TLB entry": ("gstale",),
}
_LOCKS = ("lock", "invalidate_w", "invalidate_r", "invalidate_q", "bindings_w", "bindings_r", "bindings_q",
          "gpc_readers", "frozen")


def offending(finding: Finding) -> frozenset[str]:
    """Names (``pfn0.owner``) of the fields of the last state that break the law; empty when no field says it."""
    law = LAWS.get(finding.law)
    if law is None or not finding.steps:
        return frozenset()
    last = finding.steps[-1]
    blamed: set[str] = set()
    for note in last.notes:
        if law.on_note(note) == finding.evidence:
            blamed.update(_of_note(note))
    if blamed:
        return frozenset(field for field in blamed if _says_something(field, last.shared))
    for judge in (law.in_state, law.at_end):
        if judge(last.shared) == finding.evidence:
            return frozenset(_of_state(last.shared, finding.initial, judge))
    return frozenset(_held(last.shared)) if finding.law == "progress" else frozenset()


# A flag or a count that is zero is no part of the trouble; an owner or a mapping of 0 may be.
def _says_something(field: str, last: bytes) -> bool:
    number = next(number for at, number in enumerate(last) if st.field_name(at) == field)
    return bool(number) or field.rpartition(".")[2] in ("owner", "content", "s1", "s2", "cached", "slot")


def _of_note(note: Any) -> Iterator[str]:
    if isinstance(note, notes.OutOfScope):
        yield from (f"page{note.pgoff}.attr", f"page{note.pgoff}.cached")
    elif isinstance(note, notes.Ended):
        yield from (f"page{i}.attr" for i in note.toggled or note.scope)
        yield from (f"page{i}.cached" for i in (*note.removed, *note.left))
    elif isinstance(note, notes.Broken):
        yield "panic"
    else:
        yield from ("gpc",) if isinstance(note, notes.MadePrivate) and note.cached_mapping else ()
        yield from (f"pfn{note.pfn}.{name}" for name in _of_frame(note))


def _of_frame(note: Any) -> tuple[str, ...]:
    if isinstance(note, notes.Abort):
        return ("s1",) if note.stage == 1 else ("s1", "stale", "s2", "owner")
    if isinstance(note, notes.Access):
        return ("owner", "content", *_REACHED_THROUGH.get(note.via, ()))
    if isinstance(note, notes.Freed):
        return ("owner", "content", "gmap", "gstale")
    if isinstance(note, notes.MadePrivate):
        return ("owner", "pin", "get", "user")
    if isinstance(note, notes.StrayGuest):
        return ("owner", "slot", "gmap", "gstale")
    return ("s1",) if isinstance(note, notes.DirectMapChange) else ("content",)


# A field is to blame when the law no longer says the same once this field alone is as it was at first, or is content
# once it alone is turned over. Ghosts are nothing of the machine.
def _of_state(last: bytes, initial: bytes, judge: Callable[[bytes], str | None]) -> Iterator[str]:
    evidence = judge(last)

    def with_byte(at: int, number: int) -> str | None:
        return judge(last[:at] + bytes([number]) + last[at + 1:])

    for at, number in enumerate(last):
        field = st.field_name(at)
        if field.startswith("party"):
            continue
        put_back = number != initial[at] and with_byte(at, initial[at]) != evidence
        turned = field.endswith(".s1") and with_byte(at, 1 - number) is None
        if put_back or turned:
            yield field


def _held(last: bytes) -> Iterator[str]:
    for at, number in enumerate(last):
        field = st.field_name(at)
        if number and field.rpartition(".")[2] in _LOCKS:
            yield field
