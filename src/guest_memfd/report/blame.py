"""Which fields of the last state a finding is about: the ones that a counterexample marks.

A law that judges facts is asked through the fact; a law that judges states is asked again with one field at a time put
back to what it was at first, and what changes the verdict is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.laws import LAWS
from guest_memfd.words import facts

_REACHED_THROUGH = {
    "direct map": ("s1",), "stale TLB entry": ("stale",), "user mapping": ("user",), "DMA": ("pin", "get"),
    "guest mapping": ("gmap",), "stale guest TLB entry": ("gstale",),
}
_ZERO_SAYS = ("owner", "content", "s1", "s2", "cached", "slot", "allocated")
_LOCKS = ("lock", "invalidate_w", "invalidate_r", "invalidate_q", "bindings_w", "bindings_r", "bindings_q",
          "slots_lock", "mmu_w", "mmu_r", "mmu_q", "srcu", "gpc_readers", "frozen")


def offending(finding: Finding) -> frozenset[str]:
    """Names (``pfn0.owner``) of the fields of the last state that break the law; empty when no field says it."""
    law = LAWS.get(finding.law)
    if law is None or not finding.steps:
        return frozenset()
    last = finding.steps[-1]
    blamed: set[str] = set()
    for note in last.notes:
        if law.on_note(note) == finding.evidence:
            blamed.update(_of_note(note, _About(last)))
    # The facts first. They name what was accessed; a state breaks the same law with everything that is amiss in it.
    if blamed:
        return frozenset(field for field in blamed if _says_something(field, last.shared))
    for judge in (law.in_state, law.at_end):
        if judge(last.shared) == finding.evidence:
            return frozenset(_of_state(last.shared, finding.initial, judge))
    return frozenset(_held(last.shared)) if finding.law == "progress" else frozenset()


# A flag or a count that is zero is no part of the trouble; an owner or a mapping of 0 may be.
def _says_something(field: str, last: bytes) -> bool:
    return bool(st.fields_of(last).get(field)) or field.rpartition(".")[2] in _ZERO_SAYS


class _About:
    # The records that a step is about: those of its file, and of the VM that the file belongs to.

    def __init__(self, step: Step) -> None:
        self.sizes = st.layout_of(step.shared).sizes
        self.state = st.State(step.shared)
        self.file = step.primitive.file if step.primitive else 0
        self.vm = self.file                             # each VM has one file (words/scene.py)

    def page(self, index: int) -> str:
        return f"page{self.file * self.sizes.pages + index}"


def _of_note(note: Any, about: _About) -> Iterator[str]:
    if isinstance(note, (facts.OutOfScope, facts.Unannounced)):
        yield from (f"{about.page(note.pgoff)}.{name}" for name in ("attr", "cached"))
    elif isinstance(note, facts.Ended):
        yield from _of_operation(note, about)
    elif isinstance(note, facts.Broken):
        yield "panic"
    elif isinstance(note, facts.UseAfterFree):
        inode = (f"file{about.file}.inode", f"file{about.file}.evictor")
        yield from inode if "inode" in note.what else (f"vm{about.vm}.vm",)
    elif hasattr(note, "pfn"):
        if isinstance(note, (facts.MadePrivate, facts.Contained)):
            yield from (f"vm{vm.number}.gpc" for vm in about.state.vms() if vm.gpc == note.pfn + 1)
        yield from (f"pfn{note.pfn}.{name}" for name in _of_frame(note))


# What an operation was about, or what it left there: attributes, bindings, pages that are or are not in the file.
def _of_operation(note: facts.Ended, about: _About) -> Iterator[str]:
    if note.op in ("fault", "bind", "unbind", "teardown"):
        yield from (f"{about.page(i)}.binding" for i in note.scope)
    yield from (f"{about.page(i)}.attr" for i in note.toggled or note.scope)
    yield from (f"{about.page(i)}.cached" for i in (*note.removed, *note.left))


def _of_frame(note: Any) -> tuple[str, ...]:
    if isinstance(note, facts.Abort):
        return ("s1",) if note.stage == 1 else ("s1", "stale", "s2", "owner")
    if isinstance(note, facts.Access):
        broken = ("poison", "handled") if note.broken else ()
        return ("owner", "content", *(("allocated",) if note.free else ()), *broken, *_REACHED_THROUGH.get(note.via, ()))
    if isinstance(note, facts.Freed):
        return ("owner", "content", "gmap", "gstale")
    if isinstance(note, facts.MadePrivate):
        return ("owner", "pin", "get", "user")
    if isinstance(note, facts.StrayGuest):
        return ("owner", "slot", "gmap", "gstale")
    if isinstance(note, facts.Given):
        return ("poison", "handled", "gmap", "user")
    if isinstance(note, facts.Contained):
        return ("poison", "handled", "user", "gmap", "gstale")
    return ("s1",) if isinstance(note, facts.DirectMapChange) else ("content",)


# A field is to blame when the law no longer says the same once this field alone is as it was at first, or is content
# once it alone is turned over. Ghosts are nothing of the machine.
def _of_state(last: bytes, initial: bytes, judge: Callable[[bytes], str | None]) -> Iterator[str]:
    evidence = judge(last)

    def with_byte(at: int, number: int) -> str | None:
        return judge(last[:at] + bytes([number]) + last[at + 1:])

    names = st.layout_of(last).names
    for at, number in enumerate(last):
        field = names[at]
        if field.startswith(("party", "number of")):
            continue
        put_back = number != initial[at] and with_byte(at, initial[at]) != evidence
        turned = field.endswith(".s1") and with_byte(at, 1 - number) is None
        if put_back or turned:
            yield field


def _held(last: bytes) -> Iterator[str]:
    for field, number in st.fields_of(last).items():
        if number and field.rpartition(".")[2] in _LOCKS:
            yield field
