"""The operations of a run: which steps are one page fault, one conversion, one system call, and what each came to.

A step belongs to the outermost operation that its party is in, as the procedures that are under way say (explore/replay.py).
An operation ends where its party chooses what to do next, is in another one, or begins the same one again. What it
returns is what its tracepoint has said; an operation without one (designs keep what was posted) says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Replay
from guest_memfd.report.steps import lock_holders, result
from guest_memfd.words import facts
from guest_memfd.words.primitives import OPS

TITLES = {
    "create": "the file is made", "bind": "pages are bound to guest frames", "unbind": "a binding ends",
    "guest_fault": "a page fault of the guest", "user_fault": "a page fault in the VMM's mapping",
    "allocate": "fallocate()", "punch_hole": "fallocate(FALLOC_FL_PUNCH_HOLE)", "make_private": "conversion to private",
    "make_shared": "conversion to shared", "mmap": "mmap()", "munmap": "munmap()", "close": "close()",
    "evict": "the inode is evicted", "vm_teardown": "the VM ends", "error_folio": "memory failure of a page",
    "hibernate_prepare": "hibernation is announced", "hibernate_post": "hibernation is over",
    "demand_page": "a page fault of the guest, its page lent on demand", "abandon": "the bindings of a dying VM end",
    "gup_fast": "GUP-fast", "pin_user_page": "pin_user_pages()",
}
"""Procedure of a design, a driver or a party -> what it is to a reader."""


@dataclass
class OperationRun:
    """An operation of *party*: the procedure *name*, its steps by number, the pages it is about, what it came to.

    outcome: what it returned, in words; empty where nobody says. over: whether it is done when the run ends.
    """

    name: str
    party: str
    steps: list[int] = field(default_factory=list)
    pages: tuple[int, ...] = ()
    outcome: str = ""
    over: bool = True

    @property
    def title(self) -> str:
        """What it is, in words."""
        return TITLES[self.name]

    @property
    def came_to(self) -> str:
        """How it ended, in words."""
        if not self.over:
            return "under way when the run ends"
        return self.outcome or "done"


def operations(again: Replay) -> list[OperationRun]:
    """All operations of the steps that *again* could take, in the order in which they begin."""
    found: list[OperationRun] = []
    running: dict[str, tuple[OperationRun, set[str]]] = {}
    unended: dict[str, OperationRun] = {}
    numbers = {name: number for number, name in lock_holders(again.steps, again.initial).items()}
    before = again.initial
    for number, (step, inside) in enumerate(zip(again.steps, again.inside, strict=False), 1):
        name, begins = _outermost(inside), _begins(step, before, numbers.get(step.party))
        known = running.get(step.party)
        if known is None or known[0].name != name or step.choices or begins in known[1]:
            running.pop(step.party, None)
            if name:
                found.append(OperationRun(name, step.party))
                running[step.party] = found[-1], set()
        if step.party in running:
            operation, begun = running[step.party]
            operation.steps.append(number)
            if begins:
                begun.add(begins)
                operation.pages = operation.pages or _scope(step.shared, numbers[step.party])
        # The end is told with the primitive that follows, which may be nobody's or another operation's.
        for note in step.notes:
            if isinstance(note, facts.Ended) and (ends := unended.pop(step.party, running.get(step.party, [None])[0])):
                ends.outcome = f"returns {result(note.ret)}"
        if begins and step.party in running:
            unended[step.party] = running[step.party][0]
        before = step.shared
    for party, (operation, _) in running.items():
        operation.over = _outermost(again.standing.get(party, ())) != operation.name
    return found


# The party's own procedure may have any name.
def _outermost(inside: Sequence[str]) -> str:
    return next((name for name in inside[1:] if name in TITLES), "")


# The operation that tracepoints say begins in *step* of party *number*; empty for none.
def _begins(step: Step, before: bytes, number: int | None) -> str:
    if number is None:
        return ""
    old, new = st.State(before).ghost(number).op, st.State(step.shared).ghost(number).op
    ended = any(isinstance(note, facts.Ended) for note in step.notes)
    return OPS[new - 1] if new and (new != old or ended) else ""


def _scope(state: bytes, party: int) -> tuple[int, ...]:
    scope = st.State(state).ghost(party).scope
    return tuple(at for at in range(scope.bit_length()) if scope >> at & 1)
