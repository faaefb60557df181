"""A driver that lends on demand: what it must do, and what is seen when it does not (hypervisors/gunyah/driver.py)."""

from __future__ import annotations

from dataclasses import replace

import mistaken_drivers as mistaken
import pytest

from guest_memfd.core.hypervisor import LendingDriver
from guest_memfd.designs import DESIGNS
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.gunyah import driver
from guest_memfd.hypervisors.gunyah.client import GUNYAH
from guest_memfd.hypervisors.names import lacks
from guest_memfd.scenarios import PARTIES, SCENES

SCENE = SCENES["on-demand"]


MISTAKES = {
    mistaken.LendsWithoutLock: ("vcpu2 pinner", "guest-private", "the guest is lent page 0, and the host shares it"),
    mistaken.MapsWithoutLock: ("vcpu2 pinner", "guest-private", "the guest is lent page 0, and the host shares it"),
    mistaken.AbandonsAsUnbind: ("vcpu2 stop", "nothing-lost",
                                "a page that the hypervisor keeps is not given up properly (cache 1)"),
    mistaken.LendsWithoutConverting: ("vcpu2", "guest-private", "the guest is lent page 0, and the host shares it"),
    mistaken.UnbindDoesNotHold: ("vmm-life", "lifetimes", "use after free of the inode, in down_write"),
    mistaken.NeverReleases: ("stop", "nothing-lost", "what the hypervisor keeps of the file is held for ever"),
}


def explored(with_driver: LendingDriver | None, parties: str, design: str = "library") -> Result:
    names = parties.split()
    hypervisor = GUNYAH if with_driver is None else replace(GUNYAH, driver=with_driver)
    there = World(DESIGNS[design], hypervisor, [PARTIES[name] for name in names], scene=SCENE)
    return there.explorer(names).run(max_states=60_000)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_seen(mistake: type[mistaken.GunyahsDriver]) -> None:
    parties, law, evidence = MISTAKES[mistake]
    assert (law, evidence) in {(found.law, found.evidence) for found in explored(mistake(), parties).findings}


# The last: an mmap() that does not hold the file maps one that another thread has closed and the last binding has left.
@pytest.mark.parametrize("parties", [*sorted({parties for parties, *_ in MISTAKES.values()}), "vmm-life page-cache-reader"])
def test_and_the_driver_as_it_is_holds(parties: str) -> None:
    assert explored(None, parties).findings == []


def test_one_that_is_taken_procedure_by_procedure_is_the_same() -> None:
    mine, ours = explored(mistaken.GunyahsDriver(), "vcpu2 pinner"), explored(None, "vcpu2 pinner")
    assert (mine.states, mine.transitions) == (ours.states, ours.transitions)


@pytest.mark.parametrize(("design", "hypervisor", "scene", "lends"), [
    ("library", "gunyah", "on-demand", True), ("none", "gunyah", "on-demand", True),
    ("library", "gunyah", "two-pages", False),              # user space converts there
    ("library", "pkvm", "on-demand", False), ("library", "kvm", "on-demand", False),
    ("gunyah-v17", "gunyah", "on-demand", False),           # a driver of its own
    ("guestmem-rfc1", "kvm", "on-demand", False),
])
def test_who_lends(design: str, hypervisor: str, scene: str, lends: bool) -> None:
    there = world(design, hypervisor, scene=scene)
    assert there.library.lender is (HYPERVISORS[hypervisor].driver if lends else None)


def test_a_guest_gets_its_page_and_gives_it_back() -> None:
    there = world(OurLibrary, "gunyah", scene=SCENE)
    there.explorer(("vcpu", "vmm")).run()
    told = {type(note).__name__: note for _, note in there.tables.facts}
    returned = [note for _, note in there.tables.facts if type(note).__name__ == "Returned" and note.op == "lend"]
    assert {note.ret for note in returned} >= {0, -12}
    assert "MadePrivate" in told


def test_a_driver_without_all_procedures_is_refused() -> None:
    assert lacks(replace(GUNYAH, name="mine", driver=driver)) is None
    wrong = lacks(replace(GUNYAH, name="mine", driver=object()))        # type: ignore[arg-type]
    assert wrong is not None
    assert "driver" in wrong
    assert "demand_page, mmap, unbind, abandon" in wrong
