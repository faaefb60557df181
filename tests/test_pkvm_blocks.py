"""pKVM's EL2 and a block of 2 MiB, held against the abstract host's EL2 and a folio of two pages.

The first page of the folio is the first of the block, and the second stands for all others: what is asked about it is asked
about each of them, and each has to say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, ENOMEM

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st_
from pkvm_machine import GFN, Machine

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.el2.pkvm import transitions as t
from guest_memfd.words.pagestate import DYING, OWNERS
from guest_memfd.words.primitives import Folio
from guest_memfd.words.scene import Scene, Slot
from guest_memfd.words.units import PAGE

NR = 512
SCENE = Scene("one-folio", "a folio of two pages", pages=2, frames=2, shared=(), slots=(Slot(0, 0, 2),), order=1)
WHOLE, FIRST, REST = Folio(0, 1), Folio(0), Folio(1)
PKVM = HYPERVISORS["pkvm"]


class Both:
    """The same calls on the abstract host's EL2 and on this one."""

    def __init__(self) -> None:
        self.abstract = AbstractHost(PKVM, SCENE, 1)
        self.abstract.state = st.State(self.abstract.initial())
        self.abstract.file, self.abstract.vm = self.abstract.state.file(), self.abstract.state.vm()
        self.abstract.notes = []
        self.machine = Machine(offered=16)
        self.pfn = self.machine.page(9)

    def pages(self, folio: Folio) -> range:
        return range(1, NR) if folio == REST else range(1)

    def emulated(self, name: str, folio: Folio, *more: bool) -> int:
        el2, vm = self.machine.el2, self.machine.vm
        calls: dict[str, Callable[[int, int], int]] = {
            "donate_guest": lambda at, nr: t.donate_guest(el2, vm, self.pfn + at, GFN + at, nr),
            "share_guest": lambda at, nr: t.share_guest(el2, vm, self.pfn + at, GFN + at, nr),
            "unshare_guest": lambda at, nr: t.unshare_guest(el2, vm, GFN + at, nr),
            "reclaim_dying_guest_page": lambda at, nr: t.reclaim_dying_guest_page(el2, vm, GFN + at, nr),
            "check_consent": lambda at, nr: t.check_consent(el2, vm, GFN + at, nr, *more),
            "unshare": lambda at, _nr: t.unshare(el2, vm, GFN + at),
            "split_guest": lambda at, _nr: t.split_guest(el2, vm, GFN + at),
        }
        if folio == WHOLE:
            return calls[name](0, NR)
        said = {calls[name](at, 1) for at in self.pages(folio)}
        assert len(said) == 1, f"{name}: pages that are alike are told {said}"
        return said.pop()

    # As the host does it that EL2 asks for a split.
    def shares(self, folio: Folio) -> None:
        el2, vm = self.machine.el2, self.machine.vm
        PKVM.guest_consents(self.abstract, folio.pfn)
        for at in self.pages(folio):
            if t.guest_share_host(el2, vm, GFN + at) == -E2BIG:
                assert t.split_guest(el2, vm, GFN + at) == 0
                assert t.guest_share_host(el2, vm, GFN + at) == 0

    def step(self, name: str, folio: Folio) -> None:
        gfn = folio.pfn
        if name == "die":
            self.abstract.vm.vm, self.machine.vm.dying = DYING, True
        elif name == "force_reclaim":
            done = PKVM.force_reclaim(self.abstract, folio.pfn)
            taken = {t.force_reclaim_guest_page(self.machine.el2, (self.pfn + at) * PAGE) == 0 for at in self.pages(folio)}
            assert taken == {done}
        elif name == "guest_share_host":
            self.shares(Folio(folio.pfn))
        else:
            call, *more = name.split()
            words = [word == "converting" for word in more]
            expected = self.abstract.hyp_call(call, gfn, folio, *words)
            assert self.emulated(call, folio, *words) == expected, name
        self.compare()

    def compare(self) -> None:
        el2, vm, state = self.machine.el2, self.machine.vm, self.abstract.state
        for frame in state.frames():
            for at in self.pages(Folio(frame.number)):
                pa = (self.pfn + at) * PAGE
                mapped = vm.ipa_of(pa)
                assert el2.owner(pa) == OWNERS[frame.owner]
                assert el2.host_may(pa) == frame.s2
                assert mapped == ((GFN + at) * PAGE if frame.gmap else None)
                assert vm.poisoned((GFN + at) * PAGE) == state.gfn(frame.number).gpoison
                leaf = vm.pgt.leaf((GFN + at) * PAGE)
                if leaf.valid:
                    assert bool(leaf.order) == bool(state.folio(frame.number).guest_leaf)
        assert not self.machine.violations()


# share_guest of a whole folio is none of these: what is shared is a single page (core/large.py).
CALLS = [(name, folio) for folio in (WHOLE, FIRST, REST) for name in (
    "donate_guest", "reclaim_dying_guest_page", "check_consent converting", "check_consent dying")]
CALLS += [(name, folio) for folio in (FIRST, REST) for name in (
    "share_guest", "unshare_guest", "unshare", "guest_share_host", "guest_share_host", "force_reclaim")]
CALLS += [("donate_guest", WHOLE)] * 4 + [("split_guest", WHOLE), ("die", WHOLE)]
DONATED = ("donate_guest", WHOLE)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st_.lists(st_.sampled_from(CALLS), max_size=12))
@example([DONATED, ("guest_share_host", REST), ("check_consent converting", WHOLE), ("die", WHOLE),
          ("reclaim_dying_guest_page", WHOLE)])
@example([DONATED, ("force_reclaim", REST)])
@example([DONATED, ("split_guest", WHOLE), ("die", WHOLE), ("reclaim_dying_guest_page", REST),
          ("reclaim_dying_guest_page", WHOLE)])
@example([DONATED, ("split_guest", WHOLE), ("force_reclaim", REST), ("die", WHOLE), ("reclaim_dying_guest_page", WHOLE)])
@example([DONATED, ("die", WHOLE), ("reclaim_dying_guest_page", REST), ("split_guest", WHOLE),
          ("reclaim_dying_guest_page", REST), ("donate_guest", REST), ("donate_guest", WHOLE)])
def test_el2_does_to_a_block_what_the_abstract_el2_does_to_a_folio(steps: list[tuple[str, Folio]]) -> None:
    both = Both()
    for name, folio in steps:
        both.step(name, folio)


def test_without_memory_for_its_tables_a_block_stays_one() -> None:
    both = Both()
    both.step(*DONATED)
    machine = both.machine
    machine.vm.memcache.refill(4)
    kept, machine.vm.memcache.pages[:] = [*machine.vm.memcache.pages], []
    machine.vm.memcache.offered.clear()
    before = machine.vm.pgt.leaf(GFN * PAGE)
    assert t.split_guest(machine.el2, machine.vm, GFN) == -ENOMEM
    assert machine.vm.pgt.leaf(GFN * PAGE) == before
    both.compare()
    machine.vm.memcache.pages += kept
    both.step("split_guest", WHOLE)


def test_for_the_hosts_half_of_a_split_device_mappings_make_room() -> None:
    both = Both()
    both.step(*DONATED)
    both.machine.pool.fail_at(0)
    both.step("split_guest", WHOLE)


@pytest.mark.parametrize("at", [0, 1, 511])
def test_each_page_of_a_split_note_names_its_own_gfn(at: int) -> None:
    both = Both()
    both.step(*DONATED)
    both.step("split_guest", WHOLE)
    note = both.machine.el2.host.note((both.pfn + at) * PAGE)
    assert note is not None
    assert (note.gfn, note.handle) == (GFN + at, both.machine.vm.handle)
