"""The table of transitions of pKVM: every call in every situation, against the abstract host, TLBs, memory running out."""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EAGAIN, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, EPERM
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st_
from pkvm_machine import BORROWED, FLAT, GFN, GIB, LENT, Machine, hvc

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.errors import EHWPOISON, BadInput
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.el2.pkvm import hypercalls as hc
from guest_memfd.machine.el2.pkvm import transitions as t
from guest_memfd.machine.el2.pkvm.annotation import Annotation, AnnotationType, PageOwner
from guest_memfd.machine.el2.pkvm.states import HypPage, PkvmState
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.words.pagestate import DYING, OWNERS
from guest_memfd.words.primitives import Folio
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import PAGE


@pytest.fixture
def machine() -> Machine:
    return Machine()


# -- the table of transitions ------------------------------------------------------------------------------------------


NOPAGE, OWNED, POISON = PkvmState.NOPAGE, PkvmState.OWNED, PkvmState.POISON
Step = tuple[str, int]


class Situation:
    """One page in one state (host, hypervisor, guest at GFN, guest at GFN + 1), reached by legal calls only."""

    def __init__(self, name: str, states: tuple[PkvmState, ...], *calls: str, protected: bool = True) -> None:
        self.name, self.states, self.calls, self.protected = name, states, calls, protected

    def reach(self) -> tuple[Machine, int]:
        machine = Machine(protected=self.protected)
        pfn = machine.page()
        for call in self.calls:
            assert CALLS[call](machine, pfn) == 0, call
        assert machine.states(pfn, GFN, GFN + 1) == self.states
        return machine, pfn


def _dying(machine: Machine, pfn: int) -> int:
    return machine.vm.start_teardown()


CALLS: dict[str, Callable[[Machine, int], int]] = {
    "donate_hyp": lambda m, p: t.donate_hyp(m.el2, p, 1),
    "hyp_donate_host": lambda m, p: t.hyp_donate_host(m.el2, p, 1),
    "share_hyp": lambda m, p: t.share_hyp(m.el2, p),
    "unshare_hyp": lambda m, p: t.unshare_hyp(m.el2, p),
    "pin": lambda m, p: t.pin_shared_mem(m.el2, p),
    "share_ffa": lambda m, p: t.share_ffa(m.el2, p, 1),
    "unshare_ffa": lambda m, p: t.unshare_ffa(m.el2, p, 1),
    "share_guest": lambda m, p: t.share_guest(m.el2, m.vm, p, GFN),
    "share_guest+1": lambda m, p: t.share_guest(m.el2, m.vm, p, GFN + 1),
    "unshare_guest": lambda m, p: t.unshare_guest(m.el2, m.vm, GFN),
    "donate_guest": lambda m, p: t.donate_guest(m.el2, m.vm, p, GFN),
    "donate_guest+1": lambda m, p: t.donate_guest(m.el2, m.vm, p, GFN + 1),
    "guest_share_host": lambda m, p: t.guest_share_host(m.el2, m.vm, GFN),
    "guest_unshare_host": lambda m, p: t.guest_unshare_host(m.el2, m.vm, GFN),
    "unshare": lambda m, p: t.unshare(m.el2, m.vm, GFN),
    "force_reclaim": lambda m, p: t.force_reclaim_guest_page(m.el2, p * PAGE),
    "dying": _dying,
    "reclaim": lambda m, p: t.reclaim_dying_guest_page(m.el2, m.vm, GFN),
    "consent": lambda m, p: t.check_consent(m.el2, m.vm, GFN, 1, converting=True),
    "consent to die": lambda m, p: t.check_consent(m.el2, m.vm, GFN, 1, converting=False),
}
SITUATIONS = {situation.name: situation for situation in (
    Situation("the host's", (OWNED, NOPAGE, NOPAGE, NOPAGE)),
    Situation("the hypervisor's", (NOPAGE, OWNED, NOPAGE, NOPAGE), "donate_hyp"),
    Situation("shared with the hypervisor", (LENT, BORROWED, NOPAGE, NOPAGE), "share_hyp"),
    Situation("pinned by the hypervisor", (LENT, BORROWED, NOPAGE, NOPAGE), "share_hyp", "pin"),
    Situation("shared by FF-A", (LENT, NOPAGE, NOPAGE, NOPAGE), "share_ffa"),
    Situation("shared with a guest", (LENT, NOPAGE, BORROWED, NOPAGE), "share_guest", protected=False),
    Situation("shared twice", (LENT, NOPAGE, BORROWED, BORROWED), "share_guest", "share_guest+1", protected=False),
    Situation("shared with a protected guest", (LENT, NOPAGE, BORROWED, NOPAGE), "share_guest"),
    Situation("donated", (NOPAGE, NOPAGE, OWNED, NOPAGE), "donate_guest"),
    Situation("donated, shared back", (BORROWED, NOPAGE, LENT, NOPAGE), "donate_guest", "guest_share_host"),
    Situation("donated, dying", (NOPAGE, NOPAGE, OWNED, NOPAGE), "donate_guest", "dying"),
    Situation("donated, shared back, dying", (BORROWED, NOPAGE, LENT, NOPAGE), "donate_guest", "guest_share_host", "dying"),
    Situation("shared, dying", (LENT, NOPAGE, BORROWED, NOPAGE), "share_guest", "dying"),
    Situation("reclaimed by force", (OWNED, NOPAGE, POISON, NOPAGE), "donate_guest", "force_reclaim"),
)}
# Per situation: call -> 0 or the errno that it returns. Calls that a row does not name return -EPERM.
LAWS: dict[str, dict[str, int]] = {
    "the host's": {
        "donate_hyp": 0, "share_hyp": 0, "share_ffa": 0, "share_guest": 0, "share_guest+1": 0, "donate_guest": 0,
        "donate_guest+1": 0, "unshare_guest": ENOENT, "guest_share_host": ENOENT, "guest_unshare_host": ENOENT,
        "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
    "the hypervisor's": {
        "hyp_donate_host": 0, "unshare_guest": ENOENT, "guest_share_host": ENOENT, "guest_unshare_host": ENOENT,
        "reclaim": 0, "consent": 0, "consent to die": 0},
    "shared with the hypervisor": {
        "unshare_hyp": 0, "pin": 0, "unshare_guest": ENOENT, "guest_share_host": ENOENT, "guest_unshare_host": ENOENT,
        "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
    "pinned by the hypervisor": {
        "unshare_hyp": EBUSY, "pin": 0, "unshare_guest": ENOENT, "guest_share_host": ENOENT,
        "guest_unshare_host": ENOENT, "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
    "shared by FF-A": {
        "unshare_ffa": 0, "unshare_guest": ENOENT, "guest_share_host": ENOENT, "guest_unshare_host": ENOENT,
        "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
    "shared with a guest": {
        "share_guest+1": 0, "unshare_guest": 0, "force_reclaim": EAGAIN, "consent": 0, "consent to die": 0},
    "shared twice": {"unshare_guest": 0, "force_reclaim": EAGAIN, "consent": 0, "consent to die": 0},
    "shared with a protected guest": {
        "unshare_guest": 0, "force_reclaim": EAGAIN, "consent": 0, "consent to die": 0},
    "donated": {
        "guest_share_host": 0, "force_reclaim": 0, "unshare_guest": ENOENT, "consent": EBUSY, "consent to die": EBUSY},
    "donated, shared back": {
        "guest_unshare_host": 0, "unshare": 0, "force_reclaim": EAGAIN, "unshare_guest": ENOENT, "consent": 0,
        "consent to die": EBUSY},
    "donated, dying": {
        "guest_share_host": 0, "force_reclaim": 0, "unshare_guest": ENOENT, "reclaim": 0, "consent": EBUSY,
        "consent to die": 0},
    "donated, shared back, dying": {
        "guest_unshare_host": 0, "unshare": 0, "force_reclaim": EAGAIN, "unshare_guest": ENOENT, "reclaim": 0,
        "consent": 0, "consent to die": 0},
    "shared, dying": {
        "unshare_guest": 0, "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
    "reclaimed by force": {
        "donate_hyp": 0, "share_hyp": 0, "share_ffa": 0, "share_guest+1": 0, "donate_guest+1": 0,
        "unshare_guest": ENOENT, "guest_share_host": EHWPOISON, "guest_unshare_host": EHWPOISON,
        "force_reclaim": EAGAIN, "reclaim": 0, "consent": 0, "consent to die": 0},
}


@pytest.mark.parametrize("call", [name for name in CALLS if name != "dying"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_call_in_every_situation(situation: str, call: str) -> None:
    """pkvm_ownership_selftest(), and more: what is refused says why, and changes nothing."""
    machine, pfn = SITUATIONS[situation].reach()
    before = machine.known()
    expected = LAWS[situation].get(call, EPERM)
    assert CALLS[call](machine, pfn) == -expected
    if expected:
        assert machine.known() == before
    assert not machine.violations()


EFFECTS: list[tuple[str, str, tuple[PkvmState, ...], str]] = [
    ("the host's", "donate_hyp", (NOPAGE, OWNED, NOPAGE, NOPAGE), "hyp"),
    ("the host's", "share_hyp", (LENT, BORROWED, NOPAGE, NOPAGE), "host"),
    ("the host's", "share_ffa", (LENT, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("the host's", "donate_guest", (NOPAGE, NOPAGE, OWNED, NOPAGE), "guest"),
    ("the host's", "share_guest", (LENT, NOPAGE, BORROWED, NOPAGE), "shared"),
    ("the hypervisor's", "hyp_donate_host", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("shared with the hypervisor", "unshare_hyp", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("shared by FF-A", "unshare_ffa", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("shared with a guest", "unshare_guest", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("shared twice", "unshare_guest", (LENT, NOPAGE, NOPAGE, BORROWED), "shared"),
    ("shared with a protected guest", "unshare_guest", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("donated", "guest_share_host", (BORROWED, NOPAGE, LENT, NOPAGE), "borrowed"),
    ("donated", "force_reclaim", (OWNED, NOPAGE, POISON, NOPAGE), "host"),
    ("donated, shared back", "guest_unshare_host", (NOPAGE, NOPAGE, OWNED, NOPAGE), "guest"),
    ("donated, shared back", "unshare", (NOPAGE, NOPAGE, OWNED, NOPAGE), "guest"),
    ("donated, dying", "reclaim", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("donated, shared back, dying", "reclaim", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
    ("shared, dying", "reclaim", (OWNED, NOPAGE, NOPAGE, NOPAGE), "host"),
]


@pytest.mark.parametrize(("situation", "call", "after", "owner"), EFFECTS)
def test_what_a_transition_does(situation: str, call: str, after: tuple[PkvmState, ...], owner: str) -> None:
    machine, pfn = SITUATIONS[situation].reach()
    pa = pfn * PAGE
    machine.ram.write(pa + 100, b"left over")
    assert CALLS[call](machine, pfn) == 0
    assert machine.states(pfn, GFN, GFN + 1) == after
    assert machine.el2.owner(pa) == owner
    assert machine.el2.host_may(pa) == (machine.touch(pa) is None) == (after[0] is not NOPAGE)
    gfn = next((GFN + i for i in (0, 1) if after[2 + i] in (OWNED, LENT, BORROWED)), None)
    assert machine.vm.ipa_of(pa + 8) == (None if gfn is None else gfn * PAGE + 8)
    if gfn is not None:
        assert [machine.guest(gfn * PAGE + 8, access) for access in "rwx"] == [pa + 8] * 3
    assert (machine.ram.read(pa + 100, 9) == bytes(9)) == (call in ("force_reclaim", "reclaim"))
    assert machine.vm.poisoned(GFN * PAGE) == (call == "force_reclaim")


def test_ranges_are_leaves_on_both_sides() -> None:
    machine = Machine(4 * GIB)
    pfn, gfn = (machine.ram.base + 2 * GIB) // PAGE, 1 << 18
    machine.touch(pfn * PAGE + 77 * PAGE)
    tables = machine.el2.host.pgt.tables, machine.vm.pgt.tables
    assert t.donate_guest(machine.el2, machine.vm, pfn, gfn, 1 << 18) == 0
    assert machine.el2.host.pgt.leaf(pfn * PAGE + GIB - 1).level == 1
    assert machine.vm.pgt.leaf(gfn * PAGE + GIB - 1).level == 1
    assert (machine.el2.host.pgt.tables, machine.vm.pgt.tables) == tables
    assert machine.el2.owner(pfn * PAGE + 123 * PAGE) == "guest"
    assert machine.vm.ipa_of(pfn * PAGE + 12345) == gfn * PAGE + 12345
    inject = machine.touch(pfn * PAGE + 123 * PAGE)
    assert inject is not None
    assert inject.esr == 0x96000085, "a level-1 fault: the annotation is that large"
    assert t.guest_share_host(machine.el2, machine.vm, gfn + 3) == -E2BIG
    assert machine.vm.start_teardown() == 0
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, gfn + 3) == -E2BIG
    machine.ram.write(pfn * PAGE + 555 * PAGE, b"secret")
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, gfn, 1 << 18) == 0
    assert machine.ram.read(pfn * PAGE + 555 * PAGE, 6) == bytes(6)
    assert machine.touch(pfn * PAGE + 555 * PAGE) is None
    assert len(machine.vm.pgt._used) == 0
    assert not machine.violations()


def test_a_borrowed_block_is_zeroed_to_its_end(machine: Machine) -> None:
    pfn = machine.page(9)
    assert t.share_guest(machine.el2, machine.vm, pfn, GFN, 512) == 0
    machine.ram.write(pfn * PAGE + 511 * PAGE, b"secret")
    assert machine.vm.start_teardown() == 0
    assert hvc(machine, hc.RECLAIM_DYING, machine.vm.handle, GFN, 512) == 0
    assert machine.ram.read(pfn * PAGE + 511 * PAGE, 6) == bytes(6)
    assert machine.states(pfn + 511, GFN + 511) == (PkvmState.OWNED, PkvmState.NOPAGE, PkvmState.NOPAGE)
    assert not machine.violations()


def test_a_range_whose_pages_differ_is_refused(machine: Machine) -> None:
    pfn, gfn = machine.page(9), GFN
    assert t.share_hyp(machine.el2, pfn + 3) == 0
    assert t.donate_guest(machine.el2, machine.vm, pfn, gfn, 512) == -EPERM
    assert t.share_guest(machine.el2, machine.vm, pfn, gfn, 512) == -EPERM
    assert t.unshare_hyp(machine.el2, pfn + 3) == 0
    other = machine.page()
    assert t.donate_guest(machine.el2, machine.vm, other, gfn + 7) == 0
    assert t.donate_guest(machine.el2, machine.vm, pfn, gfn, 512) == -EPERM, "the guest has a page there"
    assert machine.vm.start_teardown() == 0
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, gfn + 7) == 0
    assert t.donate_guest(machine.el2, machine.vm, pfn, gfn, 512) == 0
    assert not machine.violations()


def test_a_range_over_tables_of_the_host_replaces_them(machine: Machine) -> None:
    pfn = machine.page(9)
    assert t.donate_guest(machine.el2, machine.vm, pfn + 1, GFN) == 0
    assert machine.vm.start_teardown() == 0
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, GFN) == 0
    machine.touch((pfn + 2) * PAGE, cpu=1)
    tables, free = machine.el2.host.pgt.tables, machine.pool.free_pages
    assert t.donate_guest(machine.el2, machine.vm, pfn, GFN, 512) == 0
    assert machine.el2.host.pgt.leaf(pfn * PAGE).level == 2
    assert (machine.el2.host.pgt.tables, machine.pool.free_pages) == (tables - 1, free + 1)
    assert machine.touch((pfn + 2) * PAGE, cpu=1) is not None
    assert not machine.violations()


def test_arguments_that_are_no_range(machine: Machine) -> None:
    el2, vm, pfn = machine.el2, machine.vm, machine.page()
    beyond = machine.ram.end // PAGE
    assert t.donate_guest(el2, vm, pfn, GFN, 2) == -EINVAL
    assert t.donate_guest(el2, vm, pfn, GFN, 0) == -EINVAL
    assert t.donate_guest(el2, vm, pfn | 1, GFN, 512) == -EINVAL
    assert t.donate_guest(el2, vm, 5, GFN) == -EPERM, "no memory"
    assert t.donate_guest(el2, vm, beyond, GFN) == -EPERM
    assert t.donate_hyp(el2, beyond - 1, 2) == -EINVAL, "the range leaves its region"
    assert t.donate_guest(el2, vm, pfn, 1 << 28) == -EINVAL, "no such IPA"
    assert t.share_guest(el2, vm, pfn, GFN, 1, "rwz") == -EINVAL
    assert t.force_reclaim_guest_page(el2, 5 * PAGE) == -EFAULT
    assert t.unshare_guest(el2, vm, GFN, 7) == -EINVAL
    assert t.share_guest(el2, vm, pfn, GFN, 7) == -EINVAL
    assert t.share_guest(el2, vm, pfn, 1 << 28) == -EINVAL
    assert t.unshare_guest(el2, vm, 1 << 40) == -ENOENT


def test_a_count_of_guests_that_is_full(machine: Machine) -> None:
    pfn = machine.page()
    full = HypPage(host=LENT, guests=(1 << 32) - 1)
    machine.vm.protected = False
    machine.el2.vmemmap.set(pfn, 0, full)
    assert t.share_guest(machine.el2, machine.vm, pfn, GFN) == -EBUSY
    machine.el2.vmemmap.set(pfn, 0, full._replace(guests=full.guests - 1))
    assert t.share_guest(machine.el2, machine.vm, pfn, GFN) == 0
    assert machine.el2.vmemmap.page(pfn) == full


def test_a_block_and_one_of_its_pages_shared_with_two_guests() -> None:
    machine = Machine(protected=False)
    el2, pfn = machine.el2, machine.page(9)
    other = el2.create_vm(machine.kernel.alloc(1), lambda ipa: True, protected=False)
    other.topup([machine.kernel.alloc() for _ in range(4)])
    assert t.share_guest(el2, machine.vm, pfn, GFN, 512) == 0
    assert machine.vm.pgt.leaf(GFN * PAGE).level == 2
    assert t.share_guest(el2, other, pfn + 5, GFN) == 0
    assert [el2.vmemmap.page(pfn + i).guests for i in (4, 5, 6)] == [1, 2, 1]
    assert t.unshare_guest(el2, machine.vm, GFN, 512) == 0
    shared = [i for i in range(-1, 513) if el2.owner((pfn + i) * PAGE) != "host"]
    assert shared == [5], "each of the block's pages is one guest less, and none beside it"
    assert el2.vmemmap.page(pfn - 1) == el2.vmemmap.page(pfn + 512) == el2.vmemmap.page(pfn)
    assert t.share_guest(el2, machine.vm, pfn, GFN, 512) == 0, "each page is the host's, or shared already"
    assert t.unshare_guest(el2, machine.vm, GFN, 512) == 0
    assert t.unshare_guest(el2, other, GFN) == 0
    assert el2.owner((pfn + 5) * PAGE) == "host"


def test_el2_never_gives_its_own_pool_away(machine: Machine) -> None:
    assert t.hyp_donate_host(machine.el2, machine.ram.base // PAGE + 3, 1) == -EINVAL


def test_a_smaller_address_space() -> None:
    machine = Machine(pa_bits=40)
    assert machine.el2.host.page_table.concatenated == 2
    pfn = machine.page()
    assert machine.touch(pfn * PAGE) is None
    assert CALLS["donate_guest"](machine, pfn) == 0
    assert machine.touch(pfn * PAGE) is not None


def test_prot_of_a_shared_page() -> None:
    machine = Machine(protected=False)
    pfn = machine.page()
    assert t.share_guest(machine.el2, machine.vm, pfn, GFN, 1, "r") == 0
    assert machine.guest(GFN * PAGE) == pfn * PAGE
    for access in "wx":
        with pytest.raises(Fault, match="permission"):
            machine.guest(GFN * PAGE, access)
    assert t.unshare_guest(machine.el2, machine.vm, GFN, 512) == -E2BIG
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, GFN) == -EPERM


@pytest.mark.parametrize("call", ["donate_guest", "share_guest"])
def test_a_poisoned_entry_is_not_filled_again(call: str) -> None:
    machine = Machine()
    assert t.donate_guest(machine.el2, machine.vm, machine.page(), GFN) == 0
    assert t.force_reclaim_guest_page(machine.el2, machine.vm.pgt.leaf(GFN * PAGE).oa) == 0
    assert CALLS[call](machine, machine.page()) == -EPERM
    assert machine.vm.poisoned(GFN * PAGE)


# -- the abstract host -------------------------------------------------------------------------------------------------


class Both:
    """The same calls on the abstract host's EL2 and on this one; gfn i holds frame `held[i]`."""

    def __init__(self) -> None:
        self.abstract = AbstractHost(HYPERVISORS["pkvm"], Scene(), 1)
        self.abstract.state = st.State(self.abstract.initial())
        self.abstract.file, self.abstract.vm = self.abstract.state.file(), self.abstract.state.vm()
        self.abstract.notes = []
        self.machine = Machine()
        block = self.machine.page(9)
        self.frames = [block + 3 * i for i in range(Scene().frames)]
        self.held = [0, 1]

    def call(self, name: str, gfn: int) -> tuple[int, int]:
        folio, el2, vm = Folio(self.held[gfn]), self.machine.el2, self.machine.vm
        pfn = self.frames[folio.pfn]
        if name in ("consent", "consent to die"):
            converting = name == "consent"
            return (self.abstract.hyp_call("check_consent", gfn, folio, converting),
                    t.check_consent(el2, vm, gfn, 1, converting))
        emulated = {
            "donate_guest": lambda: t.donate_guest(el2, vm, pfn, gfn),
            "share_guest": lambda: t.share_guest(el2, vm, pfn, gfn),
            "unshare_guest": lambda: t.unshare_guest(el2, vm, gfn),
            "unshare": lambda: t.unshare(el2, vm, gfn),
            "reclaim_dying_guest_page": lambda: t.reclaim_dying_guest_page(el2, vm, gfn),
        }[name]
        return self.abstract.hyp_call(name, gfn, folio), emulated()

    def step(self, name: str, gfn: int) -> None:
        el2, vm, abstract = self.machine.el2, self.machine.vm, self.abstract
        frame = self.held[gfn]
        if name == "die":
            abstract.vm.vm, vm.dying = DYING, True
        elif name == "replace":                                 # the file has another page there: both hosts' free frames
            spare = ({0, 1, 2} - set(self.held)).pop()
            if abstract.owner(frame) == "host" and abstract.gfn_of(frame) is None:
                self.held[gfn] = spare
        elif name == "force_reclaim":
            done = HYPERVISORS["pkvm"].force_reclaim(abstract, frame)
            assert (t.force_reclaim_guest_page(el2, self.frames[frame] * PAGE) == 0) == done
        elif name == "guest_share_host":
            if abstract.gfn_of(frame) == gfn:
                HYPERVISORS["pkvm"].guest_consents(abstract, frame)
                t.guest_share_host(el2, vm, gfn)
        else:
            expected, seen = self.call(name, gfn)
            assert seen == expected, name
        self.compare()

    def compare(self) -> None:
        el2, vm, state = self.machine.el2, self.machine.vm, self.abstract.state
        for frame, pfn in zip(state.frames(), self.frames, strict=True):
            gmap = vm.ipa_of(pfn * PAGE)
            assert el2.owner(pfn * PAGE) == OWNERS[frame.owner]
            assert el2.host_may(pfn * PAGE) == frame.s2
            assert (0 if gmap is None else gmap // PAGE + 1) == frame.gmap
        for gfn in state.gfns():
            assert vm.poisoned(gfn.number * PAGE) == gfn.gpoison
        assert not self.machine.violations()


STEPS = st_.lists(st_.tuples(st_.sampled_from((
    "donate_guest", "share_guest", "unshare_guest", "unshare", "reclaim_dying_guest_page", "consent", "consent to die",
    "force_reclaim", "guest_share_host", "guest_share_host", "donate_guest", "replace", "die")), st_.sampled_from((0, 1))),
    max_size=25)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS)
def test_el2_does_what_the_abstract_el2_does(steps: list[tuple[str, int]]) -> None:
    both = Both()
    for name, gfn in steps:
        both.step(name, gfn)


# -- TLBs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["donate_guest", "donate_hyp", "unshare", "guest_unshare_host"])
def test_a_page_taken_from_the_host_is_in_no_tlb_of_its(call: str) -> None:
    machine = Machine()
    pfn = machine.page()
    pa = pfn * PAGE
    if call in ("unshare", "guest_unshare_host"):
        assert CALLS["donate_guest"](machine, pfn) == 0
        assert CALLS["guest_share_host"](machine, pfn) == 0
    for cpu in (0, 1):
        machine.touch(pa, cpu=cpu)
    assert all(tlb.holds_stage2(pa, 0) for tlb in machine.tlbs)
    assert CALLS[call](machine, pfn) == 0
    assert not any(tlb.holds_stage2(pa, 0) for tlb in machine.tlbs)
    assert all(machine.touch(pa, cpu=cpu) is not None for cpu in (0, 1))


def test_donation_empties_the_stage_1_entries_of_the_host(machine: Machine) -> None:
    """A page that the host never touched, and a stage-1 entry for something else: the abstract host's host_maps()."""
    table, pfn = machine.kernel.alloc_table(), machine.page()
    other = machine.kernel.alloc()
    level = table
    for _ in range(3):
        below = machine.kernel.alloc_table()
        machine.ram.write64(level, below | 3)
        assert machine.touch(level) is None
        level = below
    machine.ram.write64(level, other | 0x707)
    assert [machine.touch(level), machine.touch(other)] == [None, None]
    stage1 = Stage1(Tcr(), table, 0)
    assert machine.cpus[0].translate(8, "r", 1, stage1, machine.el2.stage2()).pa == other + 8
    assert machine.tlbs[0].holds_stage1(8, None, 0)
    assert t.donate_guest(machine.el2, machine.vm, pfn, GFN) == 0
    assert not machine.tlbs[0].holds_stage1(8, None, 0)


@pytest.mark.parametrize("call", ["force_reclaim", "reclaim"])
def test_a_page_taken_from_the_guest_is_in_no_tlb_of_its(call: str) -> None:
    machine = Machine()
    pfn = machine.page()
    assert CALLS["donate_guest"](machine, pfn) == 0
    for cpu in (0, 1):
        machine.guest(GFN * PAGE, cpu=cpu)
    assert machine.tlbs[0].holds_stage2(GFN * PAGE, machine.vm.vmid)
    if call == "reclaim":
        machine.vm.start_teardown()
    assert CALLS[call](machine, pfn) == 0
    assert not any(tlb.holds_stage2(GFN * PAGE, machine.vm.vmid) for tlb in machine.tlbs)
    with pytest.raises(Fault, match="translation"):
        machine.guest(GFN * PAGE)


def test_force_reclaim_poisons_before_it_zeroes_before_it_gives_back(machine: Machine, monkeypatch: Any) -> None:
    pfn = machine.page()
    assert CALLS["donate_guest"](machine, pfn) == 0
    order: list[tuple[str, ...]] = []

    def zero(pa: int, nr: int) -> None:
        if pa == pfn * PAGE:
            order.append(("zero", *(state.name for state in machine.states(pfn, GFN))))
            assert not machine.el2.host_may(pa)

    monkeypatch.setattr(machine.ram, "zero", zero)
    assert CALLS["force_reclaim"](machine, pfn) == 0
    assert order == [("zero", "NOPAGE", "NOPAGE", "POISON")]
    assert not machine.vm._gfns


# -- memory runs out ---------------------------------------------------------------------------------------------------


FALLIBLE = ("donate_hyp", "donate_guest", "share_guest", "unshare", "guest_unshare_host", "force_reclaim", "reclaim",
            "hyp_donate_host", "guest_share_host")
BEFORE = {"unshare": ("donate_guest", "guest_share_host"), "guest_unshare_host": ("donate_guest", "guest_share_host"),
          "force_reclaim": ("donate_guest",), "reclaim": ("donate_guest", "dying"), "hyp_donate_host": ("donate_hyp",),
          "guest_share_host": ("donate_guest",)}


@pytest.mark.parametrize("call", FALLIBLE)
def test_out_of_memory_at_every_allocation_loses_nothing(call: str) -> None:
    failures = 0
    for nth in range(20):
        machine = Machine(4 * GIB)
        pfn = machine.page(18)
        for first in BEFORE.get(call, ()):
            assert CALLS[first](machine, pfn) == 0
        machine.touch((pfn ^ 1) * PAGE)
        assert machine.vm.memcache_ready(), "what it takes from the host is not part of this"
        before, free = machine.known(), machine.pool.free_pages
        machine.pool.fail_at(nth)
        allocations = machine.pool.allocations
        # Both tries have to fail: the second begins with the allocation after the first failure.
        original = machine.el2.host.unmap_devices
        machine.el2.host.unmap_devices = lambda m=machine, o=original: (o(), m.pool.fail_at(0))[0]  # type: ignore[method-assign,misc]
        ret = CALLS[call](machine, pfn)
        assert not machine.violations()
        if ret == 0:
            assert machine.pool.allocations - allocations <= nth
            break
        failures += 1
        assert ret == -ENOMEM
        assert (machine.known(), machine.pool.free_pages) == (before, free)
        assert CALLS[call](machine, pfn) == 0, "and then it works"
    else:
        raise AssertionError("it never succeeded")
    assert failures == (2 if call in ("donate_hyp", "donate_guest") else 0)


def test_a_range_for_the_hypervisor_is_taken_as_a_whole_or_not_at_all() -> None:
    machine = Machine(4 * GIB)
    pfn = machine.page(18) + 511
    machine.touch(pfn * PAGE)
    machine.pool.fail_at(2)
    machine.el2.host.unmap_devices = lambda: machine.pool.fail_at(0)    # type: ignore[method-assign]
    assert t.donate_hyp(machine.el2, pfn, 2) == -ENOMEM
    assert {machine.states(at) for at in (pfn, pfn + 1)} == {(OWNED, NOPAGE)}
    assert [machine.touch(at * PAGE) for at in (pfn, pfn + 1)] == [None, None]
    assert t.donate_hyp(machine.el2, pfn, 2) == 0
    assert t.hyp_donate_host(machine.el2, pfn, 2) == 0
    assert not machine.violations()


def test_without_memcache_pages_nothing_is_mapped() -> None:
    machine = Machine(offered=1)
    pfn, before = machine.page(), None
    for call in ("donate_guest", "share_guest"):
        assert CALLS[call](machine, pfn) == -ENOMEM
        assert before in (None, machine.known())
        before = machine.known()
        assert machine.el2.owner(pfn * PAGE) == "host"
    machine.vm.topup([machine.kernel.alloc()])
    assert CALLS["donate_guest"](machine, pfn) == 0
    assert machine.vm.pgt.tables == 2


def test_tables_of_a_vm_are_the_hypervisors_until_teardown() -> None:
    machine = Machine(offered=8)
    offered = list(machine.vm.memcache.offered)
    pages = [machine.page() for _ in range(3)]
    for i, pfn in enumerate(pages):
        assert t.donate_guest(machine.el2, machine.vm, pfn, GFN + (i << 9)) == 0
    taken = [pa for pa in offered if machine.el2.owner(pa) == "hyp"]
    assert len(taken) == machine.vm.pgt.tables + len(machine.vm.memcache.pages)
    assert all(machine.touch(pa) is not None for pa in taken)
    assert machine.vm.finalize_teardown() == -EBUSY
    assert machine.vm.start_teardown() == 0
    for i in range(3):
        assert t.reclaim_dying_guest_page(machine.el2, machine.vm, GFN + (i << 9)) == 0
    assert machine.vm.finalize_teardown() == 0
    assert sorted(machine.vm.teardown) == sorted(taken + machine.vm.pgd)
    assert {machine.el2.owner(pa) for pa in machine.vm.teardown + [p * PAGE for p in pages]} == {"host"}
    assert all(machine.touch(pa) is None for pa in machine.vm.teardown)
    assert len(machine.el2.vmemmap) == 16, "EL2's own 32 MiB and nothing else"


def test_a_page_left_behind_stays_withheld(machine: Machine) -> None:
    pfn = machine.page()
    assert CALLS["donate_guest"](machine, pfn) == 0
    machine.guest(GFN * PAGE)
    machine.vm.start_teardown()
    assert machine.vm.finalize_teardown() == 0
    assert not machine.tlbs[1].holds_stage2(GFN * PAGE, machine.vm.vmid)
    assert machine.touch(pfn * PAGE) is not None
    assert t.force_reclaim_guest_page(machine.el2, pfn * PAGE) == -EAGAIN


def test_a_vm_needs_pages_that_are_the_hosts(machine: Machine) -> None:
    with pytest.raises(BadInput, match="first-level tables"):
        machine.el2.create_vm(machine.ram.base, lambda ipa: True)


def test_two_vms_and_the_host_are_flushed_apart(machine: Machine) -> None:
    other = machine.el2.create_vm(machine.kernel.alloc(1), lambda ipa: True)
    other.topup([machine.kernel.alloc() for _ in range(4)])
    first, second = machine.page(), machine.page()
    assert t.donate_guest(machine.el2, machine.vm, first, GFN) == 0
    assert t.donate_guest(machine.el2, other, second, GFN) == 0
    machine.guest(GFN * PAGE)
    machine.cpus[0].translate(GFN * PAGE, "r", 1, FLAT, other.registers())
    assert t.force_reclaim_guest_page(machine.el2, first * PAGE) == 0
    assert not machine.tlbs[1].holds_stage2(GFN * PAGE, machine.vm.vmid)
    assert machine.tlbs[0].holds_stage2(GFN * PAGE, other.vmid)
    assert t.donate_guest(machine.el2, other, first, GFN + 1) == 0
    assert machine.el2.host.note(first * PAGE) == Annotation(AnnotationType.DONATION, PageOwner.GUEST, other.handle, GFN + 1)
