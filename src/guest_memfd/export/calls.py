"""The system calls of a trace, in the order in which they begin: what user space does to get there.

What interleaves within them is the kernel's, and no program can ask for it. A trace in which the kernel acts by itself (a
stray load, memory failure, hibernation) or a device does has no such program. Parties of others have one where they use the
choices and primitives of scenarios/vmm.py and scenarios/vcpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guest_memfd.errors import BadInput
from guest_memfd.explore.engine.finding import Step
from guest_memfd.report.choices import sentence
from guest_memfd.report.counterexample import Counterexample
from guest_memfd.scenarios import TEARDOWN
from guest_memfd.words.units import Index

CHANGES = frozenset({"allocate", "punch", "to_private", "to_shared", "bind", "unbind"})
"""Operations on a range of pages, as parties call them."""

_WHO = frozenset({"VMM", "odd", "thread", "then"})
_OF_USER = {"mmap": "map", "munmap": "unmap", "fd_close": "close"}
_OF_ITSELF = frozenset({
    "load_unaligned_zeropad", "copy_from_kernel_nofault", "image_copy", "freeze_processes", "read_folio", "delete_module",
    "gup_read_pte", "gup_try_get", "gup_recheck", "pin_access", "guest_consents", "alloc_inode", "vm_kill",
})
"""Primitives of parties that are no system call of a VMM with one file and one vCPU."""

HYPERVISORS = ("kvm", "pkvm")
"""Those whose device a released kernel has."""


class TracedCall(NamedTuple):
    """A system call or a guest's access: *what* on pages [start, start+nr), from step *step* on; *gfn* of slot or access."""

    step: int
    party: str
    what: str
    start: int = 0
    nr: int = 1
    gfn: int = 0


@dataclass
class _Asker:
    # What it has said so far: the operation that waits for its range, the page it is about, where its last fault was.
    pages: int
    pending: str = ""
    page: int = 0
    faulted: dict[str, int] = field(default_factory=dict)

    def chooses(self, choice: str) -> Iterator[tuple[str, int, int]]:
        """(operation, first page, pages) of *choice*, once all of it is known."""
        what, _, option = choice.partition(" ")
        if what == "range" and self.pending:
            self.page, nr = map(int, option.split())
            yield self.pending, self.page, nr
        elif what == "first" and self.pending:
            self.page = int(option.removeprefix("page "))
            yield self.pending, self.page, self.pages - self.page
        elif what == "page":
            self.page = int(option)
        elif what in _WHO and option in CHANGES:
            if what == "then":
                yield option, self.page, 1
            # An unbind of a thread may begin at any page: it waits for "first
            # page" (scenarios/vmm.py), if there is more than one.
            elif what == "thread" and (option != "unbind" or self.pages == 1):
                yield option, 0, self.pages
            else:
                self.pending = option

    def again(self, access: str, where: int, result: Any) -> bool:
        """Whether *access* is the one that has faulted before, and now goes on."""
        # After a fault the same instruction is taken up again. To user space
        # that is one access, and the fault is the kernel's.
        went_on = self.faulted.get(access) == where
        if result == "fault":
            self.faulted[access] = where
        else:
            self.faulted.pop(access, None)
        return went_on


def calls(example: Counterexample) -> list[TracedCall]:
    """The calls of *example*; raises BadInput where it has a step that is no one's system call, or nobody makes any."""
    if example.hypervisor not in HYPERVISORS:
        raise BadInput(f"the trace is of {example.hypervisor!r}, whose device no released kernel has; programs are made for "
                       f"{' and '.join(HYPERVISORS)}")
    if example.scene.files > 1 or not example.scene.made:
        raise BadInput(f"scene {example.scene.name!r}: a program has one file, which is there when it begins")
    parties: dict[str, _Asker] = {}
    found: list[TracedCall] = []
    for number, step in enumerate(example.finding.steps, 1):
        if step.party != TEARDOWN.name:                 # at the end of a process everything is closed
            found += _of(number, step, parties.setdefault(step.party, _Asker(example.scene.pages)), example)
    if not found:
        raise BadInput("the trace has no system call: nobody in it does what user space could ask for")
    return found


def _of(number: int, step: Step, party: _Asker, example: Counterexample) -> Iterator[TracedCall]:
    for choice in step.choices:
        for what, start, nr in party.chooses(choice):
            yield TracedCall(number, step.party, what, start, nr, example.scene.gfn(Index(start)))
    if step.primitive is None:
        return
    name, args = step.primitive.name, step.primitive.args
    if name in _OF_ITSELF:
        chosen = f" ({sentence(step.choices)})" if step.choices else ""
        raise BadInput(f"step {number}, {name} of {step.party}{chosen}, is no system call of a VMM")
    if name in _OF_USER:
        yield TracedCall(number, step.party, _OF_USER[name], 0, example.scene.pages)
    elif name == "user_access" and not party.again(name, args[0], step.result):
        yield TracedCall(number, step.party, "touch", args[0])
    elif name == "guest_access" and not party.again(name, args[0], step.result):
        yield TracedCall(number, step.party, "run", gfn=args[0])
