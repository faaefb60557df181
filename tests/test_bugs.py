"""Known bugs of the posted designs, found by exploring: numbers of reviewers' bugs (R) and code-read defects (S).

The default suite finds all of them; each is pinned here with the small scenario that shows it best, the law it breaks
and the length of the shortest trace. docs/bugs.md has the same table in words.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scripted import asked

from guest_memfd.designs import DESIGNS, Design
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words.primitives import Primitive


class Bug(NamedTuple):
    number: str
    design: str
    hypervisor: str
    parties: str
    law: str
    evidence: str
    steps: int


BUGS = [
    Bug("R3", "gunyah-v17", "gunyah", "vcpu", "library-alone", "module gunyah changes the direct map itself", 9),
    Bug("R4", "gunyah-v17", "gunyah", "vcpu power", "host-survives", "safe_copy_page takes a synchronous external", 21),
    Bug("R5", "gunyah-v17", "gunyah", "vcpu device", "pins-respected", "a page is donated while somebody holds", 25),
    Bug("S4a", "gunyah-v17", "gunyah", "vcpu vmm", "all-or-nothing", "punch returns 0 and a page of the hole", 6),
    Bug("S4b", "gunyah-v17", "gunyah", "vcpu vmm", "all-or-nothing", "punch removes the folio outside", 14),
    Bug("S5a", "gunyah-v17", "gunyah", "vcpu vmm", "all-or-nothing", "mmap takes the page from the guest outside", 14),
    Bug("S5b", "gunyah-v17", "gunyah", "vcpu vmm", "all-or-nothing", "unbind takes the page from the guest outside", 18),
    Bug("S6", "gunyah-v17", "gunyah", "vcpu vmm", "one-owner", "no longer owns, through a stale guest TLB entry", 18),
    Bug("S12", "gunyah-v17", "gunyah", "vmm", "nothing-lost", "the inode is held for ever", 18),
    Bug("S14a", "gunyah-v17", "gunyah", "vcpu vmm", "progress", "down_read invalidate, down_write bindings", 10),
    Bug("S14b", "gunyah-v17", "gunyah", "vcpu vmm", "progress", "down_read invalidate, lock_folio", 9),
    Bug("S19", "gunyah-v17", "gunyah", "vcpu zeropad", "host-survives", "load_unaligned_zeropad takes a synchronous", 14),
    Bug("2.5", "gunyah-v17", "gunyah", "vcpu stop", "nothing-lost", "a page is never freed (provided 1)", 53),
    Bug("R4", "guestmem-rfc1", "kvm", "vcpu power", "guest-private", "safe_copy_page reads a page", 15),
    Bug("R12", "guestmem-rfc1", "gunyah", "vcpu device", "pins-respected", "a page is donated while somebody holds", 22),
    Bug("R22", "guestmem-rfc1", "gunyah", "vcpu device", "host-survives", "clear_folio takes a translation fault", 16),
    Bug("R25", "guestmem-rfc1", "kvm", "vcpu zeropad", "guest-private", "load_unaligned_zeropad reads a page that is "
        "private to the guest, through a stale TLB entry", 14),
    Bug("R26", "guestmem-rfc1", "kvm", "vcpu", "host-survives", "BUG_ON(set_direct_map_invalid_noflush())", 8),
    Bug("S40", "guestmem-rfc1", "pkvm", "vcpu vmm", "all-or-nothing", "punch returns 0 and a page of the hole", 20),
    Bug("S41", "guestmem-rfc1", "gunyah", "device", "host-survives", "an error pointer from guest_memfd_grab", 5),
    Bug("S51a", "guestmem-rfc1", "gunyah", "vcpu vmm", "progress", "deadlock: down_write invalidate", 6),
    Bug("S51b", "guestmem-rfc1", "gunyah", "vcpu", "no-stale-data", "receives a page with somebody else's data", 10),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: f"{b.design}-{b.number}-{b.hypervisor}")
def test_bug_is_found(bug: Bug) -> None:
    names = bug.parties.split()
    world = World(DESIGNS[bug.design], HYPERVISORS[bug.hypervisor], [PARTIES[n] for n in names])
    findings = world.explorer(names).run(max_steps=bug.steps).findings
    lengths = [len(f.steps) for f in findings if f.law == bug.law and bug.evidence in f.evidence]
    assert lengths, f"{bug.number} is not found; {[(f.law, f.evidence) for f in findings]}"
    assert min(lengths) == bug.steps


@pytest.mark.long
@pytest.mark.parametrize(("hypervisor", "parties"), sorted({(bug.hypervisor, bug.parties) for bug in BUGS}))
def test_library_does_not_have_them(hypervisor: str, parties: str) -> None:
    names = parties.split()
    world = World(DESIGNS["library"], HYPERVISORS[hypervisor], [PARTIES[n] for n in names])
    assert world.explorer(names).run(max_states=60_000).findings == []


def test_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text()
    for bug in BUGS:
        parties = bug.parties.replace(" ", " + ")
        row = f"| {bug.number} | {bug.design} | {bug.hypervisor} | {parties} | {bug.law} | {bug.steps} |"
        assert row in page, f"docs/bugs.md lacks the row {row}"


# -- what the posted drivers did right must not be wrong here ----------------------------------------------------------


def posted(scene: str) -> tuple[Design, Callable[[Primitive], Any]]:
    """The Gunyah driver in *scene*, whose pages are bound as that says; and a host whose guest has been given none."""
    design = DESIGNS["gunyah-v17"](HYPERVISORS["gunyah"].ops(), SCENES[scene].pages)
    design.scene = SCENES[scene]
    bound = {slot.start + at: slot.gfn + at + 1 for slot in design.scene.slots for at in range(slot.nr)}

    def answer(primitive: Primitive) -> Any:
        if primitive.name != "tree_load":
            return 0
        tree, start, nr = primitive.args
        return tuple(bound.get(at, 0) if tree == "bindings" else 0 for at in range(start, start + nr))

    return design, answer


def test_v17_takes_lent_memory_back_from_the_gfns_it_is_bound_to() -> None:
    design, answer = posted("crossed")
    _, told = asked(design.mmap(), answer)
    assert [step for step in told if "provided" in step] == ["tree_load(provided, 2, 3)"]     # page 0 is at gfn 2; S5, S9


def test_v17_looks_at_all_gfns_when_its_vm_ends() -> None:
    design, answer = posted("crossed")
    _, told = asked(design.vm_teardown(), answer)
    assert [step for step in told if "provided" in step][-1] == f"tree_load(provided, 0, {design.scene.guest_frames})"
