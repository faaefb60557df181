"""Protected KVM at EL2: every transition and every refusal, aborts, tables, TLBs, and no table page lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from effort import calls
from hypothesis import given, settings
from hypothesis import strategies as st_

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.errors import BadInput
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.el2.kvm import vcpu as exits
from guest_memfd.machine.el2.pkvm import checks
from guest_memfd.machine.el2.pkvm import hypercalls as hc
from guest_memfd.machine.el2.pkvm import transitions as t
from guest_memfd.machine.el2.pkvm.annotation import LOCKED, POISONED, Annotation, AnnotationType, PageOwner
from guest_memfd.machine.el2.pkvm.el2 import El2
from guest_memfd.machine.el2.pkvm.host_stage2 import MachineDead, Region
from guest_memfd.machine.el2.pkvm.states import HypPage, PkvmState, Vmemmap
from guest_memfd.machine.el2.pkvm.vm import MEM_SHARE, MEM_UNSHARE, PkvmHypVm
from guest_memfd.machine.hw.arm64 import cpu as stops
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault, Inject
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import PAGE, Ram
from guest_memfd.words.pagestate import DYING, OWNERS
from guest_memfd.words.primitives import EAGAIN, EBUSY, EFAULT, EHWPOISON, EINVAL, ENOENT, ENOMEM, EPERM, Folio
from guest_memfd.words.scene import Scene

MIB, GIB = 1 << 20, 1 << 30
GFN = 0x4_0000
# Stage 1 off: the host's virtual addresses are the IPAs.
FLAT = Stage1(Tcr(), 0, 0, enabled=False)


class Machine:
    """RAM, two CPUs' TLBs, EL2 with a pool of its own, and a protected VM with pages for tables."""

    def __init__(self, size: int = 64 * MIB, *, protected: bool = True, offered: int = 64, **kwargs: Any) -> None:
        self.ram = Ram(size)
        base = self.ram.base
        half = min(32 * MIB, size // 2)
        self.pool = Buddy(self.ram, base, half)
        self.kernel = Buddy(self.ram, base + half, size - half)
        self.tlbs = [Tlb(), Tlb()]
        self.el2 = El2(self.ram, self.pool, self.tlbs, reserved=[(base, half)], **kwargs)
        self.cpus = [Mmu(self.ram, tlb) for tlb in self.tlbs]
        self.vm = self.el2.create_vm(self.kernel.alloc(1), lambda ipa: ipa >= 0x4000_0000, protected=protected)
        self.vm.topup([self.kernel.alloc() for _ in range(offered)])

    def page(self, order: int = 0) -> int:
        return self.kernel.alloc(order) // PAGE

    def touch(self, pa: int, access: Any = "r", cpu: int = 0) -> Inject | None:
        """An access of the host, as often as EL2 says that it shall be tried again; what it is answered with."""
        for _ in range(3):
            try:
                assert self.cpus[cpu].translate(pa, access, 1, FLAT, self.el2.stage2()).pa == pa
            except Fault as fault:
                inject = self.el2.host_abort(fault, 1)
                if inject is not None:
                    return inject
            else:
                return None
        raise AssertionError("an abort that EL2 handles again and again")

    def guest(self, ipa: int, access: Any = "r", cpu: int = 1) -> int:
        """An access of the guest; the physical address."""
        return self.cpus[cpu].translate(ipa, access, 1, FLAT, self.vm.registers()).pa

    def states(self, pfn: int, *gfns: int) -> tuple[PkvmState, ...]:
        page = self.el2.vmemmap.page(pfn)
        return page.host, page.hyp, *(checks.guest_page_state(self.vm.pgt.leaf(gfn * PAGE)) for gfn in gfns)

    def violations(self) -> list[Any]:
        return [*self.el2.host.page_table.violations, *self.vm.page_table.violations]

    def known(self) -> str:
        """Everything EL2 knows that a refusal must not change."""
        return repr((sorted((order, sorted(words.items())) for order, words in self.el2.vmemmap._words.items()),
                     self.tree(self.el2.host.pgt.root, 0, 1), self.tree(self.vm.pgt.root, 1, 2)))

    def tree(self, base: int, level: int, pages: int) -> list[Any]:
        found: list[Any] = []
        for at in range(base, base + pages * PAGE, 8):
            value = self.ram.read64(at)
            if value & 3 == 3 and level < 3:
                found.append((at - base, self.tree(value & ((1 << 48) - PAGE), level + 1, 1)))
            elif value:
                found.append((at - base, value))
        return found


@pytest.fixture
def machine() -> Machine:
    return Machine()


# -- formats -------------------------------------------------------------------------------------------------------


def test_a_vmemmap_word_is_struct_hyp_page() -> None:
    assert HypPage().value == 0, "all zeros is the host's page"
    page = HypPage(refcount=3, order=9, host=PkvmState.SHARED_OWNED, hyp=PkvmState.SHARED_BORROWED, guests=7)
    assert page.value == 7 << 32 | (2 ^ 3) << 28 | 1 << 24 | 9 << 16 | 3
    assert HypPage.decode(page.value) == page
    assert repr(page) == "<host SHARED_OWNED hyp SHARED_BORROWED guests=7 refcount=3>"


def test_the_vmemmap_keeps_one_word_for_a_range_and_opens_it_for_one_page() -> None:
    frames, away = Vmemmap(), HypPage(host=PkvmState.NOPAGE)
    frames.set(1 << 18, 18, away)
    assert len(frames) == 1
    assert frames.page((1 << 18) + 12345) == away
    assert list(frames.pages(1 << 18, 18)) == [away]
    frames.set((1 << 18) + 5, 0, HypPage())
    assert len(frames) == 511 + 511
    assert frames.page((1 << 18) + 5) == HypPage()
    assert frames.page((1 << 18) + 6) == away
    assert set(frames.pages(1 << 18, 18)) == {HypPage(), away}
    assert list(frames.pages((1 << 18) + 512, 9)) == [away]
    frames.set(1 << 18, 18, HypPage())
    assert len(frames) == 0


def test_the_vmemmap_finds_the_few_words_of_a_range_among_the_many_of_others() -> None:
    frames, away = Vmemmap(), HypPage(host=PkvmState.NOPAGE)
    frames.set(1 << 18, 9, away)
    frames.set((1 << 18) + 5, 0, HypPage(refcount=1))          # 512 words for pages
    there = 2 << 18
    assert list(frames.pages(there, 9)) == [HypPage()]
    frames.set(there + 7, 0, away)
    assert set(frames.pages(there, 9)) == {HypPage(), away}
    frames.set(there, 9, away)
    assert len(frames) == 512 + 1
    assert list(frames.pages(there, 9)) == [away]
    frames.set(there, 9, HypPage())
    assert frames.page(there + 7) == HypPage()
    assert frames.page((1 << 18) + 4) == away


def test_the_annotations_of_7_3() -> None:
    note = Annotation(AnnotationType.DONATION, PageOwner.GUEST, handle=0x1000, gfn=0x80010)
    assert note.encode() == 2 << 60 | 2 << 1 | (0x1000 | 0x80010 << 16) << 4
    assert Annotation.decode(note.encode()) == note
    assert repr(note) == "<DONATION to guest 0x1000 gfn 0x80010>"
    assert LOCKED.encode() == 1 << 60
    assert POISONED.encode() == 3 << 60
    assert repr(Annotation(AnnotationType.DONATION, PageOwner.HYP)) == "<DONATION to hyp>"
    assert Annotation.decode(0) is None
    assert Annotation.decode(0x8000_0707) is None


def test_the_annotations_of_6_12() -> None:
    note = Annotation(AnnotationType.DONATION, PageOwner.HYP)
    assert note.encode("6.12") == 1 << 2
    assert Annotation.decode(1 << 2, "6.12") == note
    assert LOCKED.encode("6.12") == 1 << 10
    assert Annotation.decode(1 << 10, "6.12") == LOCKED
    with pytest.raises(ValueError, match="no annotation"):
        POISONED.encode("6.12")


# -- faults of the host --------------------------------------------------------------------------------------------


def test_the_host_table_starts_empty_and_faults_in_blocks() -> None:
    machine = Machine(4 * GIB)
    pa = machine.ram.base + 2 * GIB + 0x1234000
    assert not machine.el2.host.pgt.leaf(pa).value
    assert machine.el2.host_may(pa)
    assert machine.touch(pa, "x") is None
    leaf = machine.el2.host.pgt.leaf(pa)
    assert (leaf.level, leaf.oa) == (1, machine.ram.base + 2 * GIB)
    assert machine.touch(machine.ram.base + 2 * GIB, "w") is None


def test_a_block_never_leaves_its_memory_region() -> None:
    ram = Ram(8 * MIB)
    pool = Buddy(ram, ram.base, 2 * MIB)
    regions = [Region(ram.base, 3 * MIB), Region(ram.base + 3 * MIB, 5 * MIB)]
    el2 = El2(ram, pool, [], regions=regions)
    at = (0, 3 * MIB, 2 * MIB, 4 * MIB)
    for offset in at:
        assert el2.host_abort(Fault(TRANSLATION, 2, 2, va=0, ipa=ram.base + offset), 1) is None
    assert [el2.host.pgt.leaf(ram.base + offset).level for offset in at] == [2, 3, 3, 2]


def test_devices_are_mapped_as_pages_that_cannot_be_executed(machine: Machine) -> None:
    device = 0x0900_0000
    assert machine.touch(device, "w") is None
    assert machine.el2.host.pgt.leaf(device).level == 3
    with pytest.raises(Fault, match="permission"):
        machine.cpus[0].translate(device, "x", 1, FLAT, machine.el2.stage2())


def test_an_empty_pool_gives_up_the_device_mappings_once() -> None:
    machine = Machine()
    for device in range(0, 1 << 28, 1 << 26):
        machine.touch(device)
    assert machine.vm.memcache_ready()
    tables = machine.el2.host.pgt.tables
    pfn = machine.page(9)
    machine.pool.fail_at(0)
    assert t.donate_guest(machine.el2, machine.vm, pfn, GFN) == 0, "tried once more, with pages of the device tables"
    assert not any(machine.el2.host.pgt.leaf(device).value for device in range(0, 1 << 28, 1 << 26))
    assert machine.el2.host.pgt.tables == tables - 5 + 1


def test_a_pool_that_stays_empty_is_the_end_of_the_machine(machine: Machine) -> None:
    while machine.pool.free_pages:
        machine.pool.alloc()
    with pytest.raises(MachineDead, match="ENOMEM"):
        machine.touch(0x0900_0000)


def test_a_donated_page_is_refused_with_the_syndrome_of_7_3(machine: Machine) -> None:
    pfn = machine.page()
    assert t.donate_guest(machine.el2, machine.vm, pfn, GFN) == 0
    with pytest.raises(Fault) as caught:
        machine.cpus[0].translate(pfn * PAGE, "r", 1, FLAT, machine.el2.stage2())
    fault = caught.value
    assert (fault.kind, fault.level, fault.esr_el2()) == (TRANSLATION, 3, 0x92000007)
    assert machine.el2.host_abort(fault, 1) == Inject(0x96000087, pfn * PAGE)
    assert machine.el2.host_abort(fault, 0) == Inject(0x92000087, pfn * PAGE)
    load = Transfer(write=False, size=8, register=1, sign_extend=False, sixty_four=True)
    assert machine.el2.host_abort(fault, 1, load) == Inject(0x97c18087, pfn * PAGE)
    fetch = Fault(TRANSLATION, 3, 2, va=pfn * PAGE, ipa=pfn * PAGE, access="x")
    assert machine.el2.host_abort(fetch, 1) == Inject(0x86000087, pfn * PAGE)
    write = machine.touch(pfn * PAGE, "w")
    assert write is not None
    assert write.esr == 0x960000c7


def test_6_12_has_a_bug_instead() -> None:
    machine = Machine(release="6.12")
    pfn = machine.page()
    assert t.donate_hyp(machine.el2, pfn, 1) == 0
    assert machine.el2.host.pgt.leaf(pfn * PAGE).value == PageOwner.HYP << 2
    with pytest.raises(MachineDead, match=r"EPERM.*<DONATION to hyp>"):
        machine.touch(pfn * PAGE)
    assert not machine.violations()


def test_a_block_comes_apart_around_one_page_and_the_rest_is_faulted_in_again(machine: Machine) -> None:
    pfn = machine.page(9)
    for offset in (0, 5 * PAGE):
        machine.touch(pfn * PAGE + offset)
    assert machine.el2.host.pgt.leaf(pfn * PAGE).level == 2
    assert t.donate_guest(machine.el2, machine.vm, pfn + 5, GFN) == 0
    assert machine.el2.host.note((pfn + 5) * PAGE) == Annotation(
        AnnotationType.DONATION, PageOwner.GUEST, machine.vm.handle, GFN)
    assert machine.el2.host.pgt.leaf(pfn * PAGE).value == 0
    assert machine.touch(pfn * PAGE) is None
    assert machine.el2.host.pgt.leaf(pfn * PAGE).level == 3
    assert machine.touch((pfn + 5) * PAGE) is not None
    assert not machine.violations()


# -- the table of transitions --------------------------------------------------------------------------------------

NOPAGE, OWNED, POISON = PkvmState.NOPAGE, PkvmState.OWNED, PkvmState.POISON
LENT, BORROWED = PkvmState.SHARED_OWNED, PkvmState.SHARED_BORROWED

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
    "consent": lambda m, p: t.check_consent(m.el2, m.vm, GFN, converting=True),
    "consent to die": lambda m, p: t.check_consent(m.el2, m.vm, GFN, converting=False),
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
    assert machine.vm.guest_maps(pa + 8) == (None if gfn is None else gfn * PAGE + 8)
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
    assert machine.vm.guest_maps(pfn * PAGE + 12345) == gfn * PAGE + 12345
    inject = machine.touch(pfn * PAGE + 123 * PAGE)
    assert inject is not None
    assert inject.esr == 0x96000085, "a level-1 fault: the annotation is that large"
    assert t.guest_share_host(machine.el2, machine.vm, gfn + 3) == -checks.E2BIG
    assert machine.vm.start_teardown() == 0
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, gfn + 3) == -checks.E2BIG
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
    assert [el2.owner((pfn + i) * PAGE) for i in (4, 5, 6)] == ["host", "shared", "host"]
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
    assert t.unshare_guest(machine.el2, machine.vm, GFN, 512) == -checks.E2BIG
    assert t.reclaim_dying_guest_page(machine.el2, machine.vm, GFN) == -EPERM


@pytest.mark.parametrize("call", ["donate_guest", "share_guest"])
def test_a_poisoned_entry_is_not_filled_again(call: str) -> None:
    machine = Machine()
    assert t.donate_guest(machine.el2, machine.vm, machine.page(), GFN) == 0
    assert t.force_reclaim_guest_page(machine.el2, machine.vm.pgt.leaf(GFN * PAGE).oa) == 0
    assert CALLS[call](machine, machine.page()) == -EPERM
    assert machine.vm.poisoned(GFN * PAGE)


# -- the abstract host -----------------------------------------------------------------------------------------------


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
            return (self.abstract.hypercall("check_consent", gfn, folio, converting),
                    t.check_consent(el2, vm, gfn, converting))
        emulated = {
            "donate_guest": lambda: t.donate_guest(el2, vm, pfn, gfn),
            "share_guest": lambda: t.share_guest(el2, vm, pfn, gfn),
            "unshare_guest": lambda: t.unshare_guest(el2, vm, gfn),
            "unshare": lambda: t.unshare(el2, vm, gfn),
            "reclaim_dying_guest_page": lambda: t.reclaim_dying_guest_page(el2, vm, gfn),
        }[name]
        return self.abstract.hypercall(name, gfn, folio), emulated()

    def step(self, name: str, gfn: int) -> None:
        el2, vm, abstract = self.machine.el2, self.machine.vm, self.abstract
        frame = self.held[gfn]
        if name == "die":
            abstract.vm.vm, vm.dying = DYING, True
        elif name == "replace":                                 # the file has another page there: both hosts' free frames
            spare = ({0, 1, 2} - set(self.held)).pop()
            if abstract.owner(frame) == "host" and abstract.guest_maps(frame) is None:
                self.held[gfn] = spare
        elif name == "force_reclaim":
            done = HYPERVISORS["pkvm"].force_reclaim(abstract, frame)
            assert (t.force_reclaim_guest_page(el2, self.frames[frame] * PAGE) == 0) == done
        elif name == "guest_share_host":
            if abstract.guest_maps(frame) == gfn:
                HYPERVISORS["pkvm"].guest_consents(abstract, frame)
                t.guest_share_host(el2, vm, gfn)
        else:
            expected, seen = self.call(name, gfn)
            assert seen == expected, name
        self.compare()

    def compare(self) -> None:
        el2, vm, state = self.machine.el2, self.machine.vm, self.abstract.state
        for frame, pfn in zip(state.frames(), self.frames, strict=True):
            gmap = vm.guest_maps(pfn * PAGE)
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


# -- TLBs ----------------------------------------------------------------------------------------------------------


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


# -- memory runs out -----------------------------------------------------------------------------------------------

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


# -- hypercalls ----------------------------------------------------------------------------------------------------


def hvc(machine: Machine, number: int, *args: int, cpu: int = 0) -> int:
    regs = [hc.BASE | number, *args] + [0] * (17 - len(args))
    machine.el2.hvc(regs, cpu)
    assert regs[0] in (0, (1 << 64) - 1)
    if regs[0]:
        raise LookupError(number)
    return regs[1] - (1 << 64) if regs[1] >> 63 else regs[1]


class Script:
    """A CPU that stops as told: each entry is a stop, or a function that is called first and returns it."""

    def __init__(self, *script: Any) -> None:
        self.script, self.regs, self.pc = list(script), [0] * 31, 0x1000
        self.words: dict[int, int] = {}
        self.exceptions: list[tuple[int, int | None]] = []

    def run(self, timeout: float | None = None, instructions: int | None = None) -> Any:
        stop = self.script.pop(0)
        return stop() if callable(stop) and not isinstance(stop, tuple) else stop

    def x(self, n: int) -> int:
        return self.regs[n]

    def set_x(self, n: int, value: int) -> None:
        self.regs[n] = value & ((1 << 64) - 1)

    def fetch(self, va: int) -> int:
        return self.words[va]

    def take_exception(self, esr: int, far: int | None = None) -> None:
        self.exceptions.append((esr, far))

    def call(self, number: int, *args: int) -> Any:
        def stop() -> Any:
            self.regs[:4] = [number, *args, 0, 0, 0][:4]
            self.pc += 4
            return stops.Hvc(0)
        return stop


def loaded(machine: Machine, *script: Any) -> tuple[Any, Script]:
    cpu = Script(*script)
    vcpu = machine.vm.add_vcpu(cpu)
    assert hvc(machine, hc.VCPU_LOAD, machine.vm.handle, len(machine.vm.vcpus) - 1) == 0
    return vcpu, cpu


def test_the_life_of_a_page_in_hypercalls(machine: Machine) -> None:
    pfn, handle = machine.page(), machine.vm.handle
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN) == -EINVAL, "no vCPU is loaded"
    loaded(machine)
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN) == 0
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN) == -EPERM
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN, cpu=1) == -EINVAL, "loaded on another CPU"
    assert hvc(machine, hc.CHECK_CONSENT, handle, GFN, 1) == -EBUSY
    assert t.guest_share_host(machine.el2, machine.vm, GFN) == 0
    assert hvc(machine, hc.CHECK_CONSENT, handle, GFN, 1) == 0
    assert hvc(machine, hc.UNSHARE, handle, GFN) == 0
    assert hvc(machine, hc.UNSHARE, handle, GFN) == -EPERM
    assert hvc(machine, hc.RECLAIM_DYING, handle, GFN) == -EPERM
    assert hvc(machine, hc.START_TEARDOWN, handle) == -EBUSY, "loaded"
    assert hvc(machine, hc.VCPU_PUT) == 0
    assert hvc(machine, hc.START_TEARDOWN, handle) == 0
    assert hvc(machine, hc.RECLAIM_DYING, handle, GFN) == 0
    assert hvc(machine, hc.FINALIZE_TEARDOWN, handle) == 0
    assert hvc(machine, hc.FINALIZE_TEARDOWN, handle) == -ENOENT


def test_a_block_is_reclaimed_by_the_number_of_its_pages(machine: Machine) -> None:
    pfn, handle = machine.page(9), machine.vm.handle
    loaded(machine)
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN, 512) == 0
    assert hvc(machine, hc.VCPU_PUT) == 0
    assert hvc(machine, hc.START_TEARDOWN, handle) == 0
    assert hvc(machine, hc.RECLAIM_DYING, handle, GFN) == -checks.E2BIG, "one page of a block"
    assert hvc(machine, hc.RECLAIM_DYING, handle, GFN, 512) == 0
    assert machine.el2.owner(pfn * PAGE + 511 * PAGE) == "host"
    assert hvc(machine, hc.RECLAIM_DYING, 0x7777, GFN) == -EINVAL


def test_hypercalls_of_sharing(machine: Machine) -> None:
    pfn, handle = machine.page(), machine.vm.handle
    assert hvc(machine, hc.SHARE_GUEST, pfn, GFN, 1, 7) == -EINVAL, "no vCPU is loaded"
    loaded(machine)
    assert hvc(machine, hc.SHARE_GUEST, pfn, GFN, 1, 8) == -EINVAL
    assert hvc(machine, hc.SHARE_GUEST, pfn, GFN, 1, 7) == 0
    assert hvc(machine, hc.FORCE_RECLAIM, pfn * PAGE) == -EAGAIN
    assert hvc(machine, hc.UNSHARE_GUEST, handle, GFN, 1) == 0
    assert hvc(machine, hc.UNSHARE_GUEST, handle, GFN, 1) == -ENOENT
    assert hvc(machine, hc.SHARE_HYP, pfn) == 0
    assert hvc(machine, hc.UNSHARE_HYP, pfn) == 0
    assert hvc(machine, hc.DONATE_GUEST, pfn, GFN, 1) == 0
    assert hvc(machine, hc.FORCE_RECLAIM, pfn * PAGE) == 0
    assert hvc(machine, hc.IN_POISON_FAULT, GFN * PAGE) == 1
    assert hvc(machine, hc.IN_POISON_FAULT, GFN * PAGE + PAGE) == 0


def test_bad_handles_and_numbers(machine: Machine) -> None:
    for number, expected in ((hc.UNSHARE_GUEST, -ENOENT), (hc.RECLAIM_DYING, -EINVAL), (hc.START_TEARDOWN, -ENOENT),
                             (hc.FINALIZE_TEARDOWN, -ENOENT), (hc.UNSHARE, -ENOENT), (hc.CHECK_CONSENT, -ENOENT)):
        assert hvc(machine, number, 0x7777, GFN, 1) == expected
    for number in [*range(hc.MIN_PKVM), 50, 53, 999]:
        with pytest.raises(LookupError):
            hvc(machine, number)
    regs = [0x8400_0000] + [0] * 17
    machine.el2.hvc(regs)
    assert regs[0] == (1 << 64) - 1
    assert hvc(machine, hc.IN_POISON_FAULT, 0) == -EINVAL


def test_an_unprotected_vm_is_not_donated_to() -> None:
    machine = Machine(protected=False)
    vcpu, cpu = loaded(machine)
    assert hvc(machine, hc.DONATE_GUEST, machine.page(), GFN) == -EINVAL
    assert hvc(machine, hc.SHARE_GUEST, machine.page(), GFN, 1, 7) == 0
    cpu.script = [cpu.call(MEM_SHARE, GFN * PAGE), stops.Wfi()]
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == (1 << 64) - 1, "its guest has no such call"


def test_a_vcpu_is_loaded_once(machine: Machine) -> None:
    vcpu, _ = loaded(machine, stops.Wfi())
    assert hvc(machine, hc.VCPU_LOAD, machine.vm.handle, 0, cpu=1) == 0
    assert hvc(machine, hc.DONATE_GUEST, machine.page(), GFN, cpu=1) == -EINVAL, "the load was refused, in silence"
    assert vcpu.run() == exits.WfiExit()
    machine.vm.add_vcpu(Script())
    assert hvc(machine, hc.VCPU_LOAD, machine.vm.handle, 1) == 0
    assert not machine.vm.vcpus[1].loaded, "this CPU has one"
    assert hvc(machine, hc.VCPU_PUT) == 0
    assert isinstance(vcpu.run(), exits.InternalErrorExit)
    assert machine.vm.start_teardown() == 0
    assert hvc(machine, hc.VCPU_LOAD, machine.vm.handle, 1) == 0
    assert not machine.vm.vcpus[1].loaded, "it is dying"


# -- the guest's calls ---------------------------------------------------------------------------------------------


def test_mem_share_of_a_page_that_is_not_there_yet(machine: Machine) -> None:
    vcpu, cpu = loaded(machine)
    ipa = GFN * PAGE
    cpu.script = [cpu.call(MEM_SHARE, ipa), cpu.call(MEM_SHARE, ipa)]
    assert vcpu.run() == exits.MemoryFaultExit(ipa, write=True, exec=False)
    assert cpu.pc == 0x1000, "the call is made again"
    assert hvc(machine, hc.DONATE_GUEST, machine.page(), GFN) == 0
    assert vcpu.run() == exits.Hypercall(MEM_SHARE, ipa)
    assert (cpu.regs[0], cpu.pc) == (0, 0x1004)
    assert checks.guest_page_state(machine.vm.pgt.leaf(ipa)) is LENT


@pytest.mark.parametrize(("completed", "result"), [(True, 0), (False, (1 << 64) - 3)])
def test_mem_unshare_completes_when_the_host_has_let_go(machine: Machine, completed: bool, result: int) -> None:
    vcpu, cpu = loaded(machine)
    ipa = GFN * PAGE
    assert hvc(machine, hc.DONATE_GUEST, machine.page(), GFN) == 0
    cpu.script = [cpu.call(MEM_SHARE, ipa), cpu.call(MEM_UNSHARE, ipa), stops.Wfi()]
    assert vcpu.run() == exits.Hypercall(MEM_SHARE, ipa)
    assert vcpu.run() == exits.Hypercall(MEM_UNSHARE, ipa)
    assert checks.guest_page_state(machine.vm.pgt.leaf(ipa)) is LENT
    if completed:
        assert hvc(machine, hc.UNSHARE, machine.vm.handle, GFN) == 0
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == result


def test_guest_calls_that_are_refused(machine: Machine) -> None:
    vcpu, cpu = loaded(machine)
    ipa, refused = GFN * PAGE, (1 << 64) - 3
    assert hvc(machine, hc.DONATE_GUEST, machine.page(), GFN) == 0
    for number, *args in ((MEM_SHARE, ipa + 1), (MEM_SHARE, ipa, 1), (MEM_UNSHARE, ipa), (MEM_SHARE, 1 << 45)):
        cpu.script = [cpu.call(number, *args), stops.Wfi()]
        assert vcpu.run() == exits.WfiExit()
        assert cpu.regs[0] == refused
    cpu.script = [cpu.call(MEM_UNSHARE, ipa + PAGE)]
    assert vcpu.run() == exits.MemoryFaultExit(ipa + PAGE, write=True, exec=False)
    cpu.script = [cpu.call(MEM_SHARE, 0x1000)]
    assert isinstance(vcpu.run(), exits.InternalErrorExit), "no memory there, ever"
    assert t.force_reclaim_guest_page(machine.el2, machine.vm.guest_maps(machine.vm.pgt.leaf(ipa).oa)
                                      and machine.vm.pgt.leaf(ipa).oa) == 0
    cpu.script = [cpu.call(MEM_SHARE, ipa), stops.Wfi()]
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == refused, "poisoned"


# -- cost ----------------------------------------------------------------------------------------------------------


def cost(machine: Machine, vm: PkvmHypVm, first: int, nr: int, order: int, gfn: int) -> tuple[float, float]:
    """Function calls to donate and to reclaim a leaf of 1 << *order* pages: the mean of the last 100 of *nr*."""
    el2 = machine.el2

    def donate(i: int) -> None:
        while len(vm.memcache.offered) < 2:
            vm.topup([machine.kernel.alloc()])
        assert t.donate_guest(el2, vm, first + (i << order), gfn + (i << order), 1 << order) == 0

    def reclaim(i: int) -> None:
        assert t.reclaim_dying_guest_page(el2, vm, gfn + (i << order), 1 << order) == 0

    def last(step: Callable[[int], None]) -> float:
        for i in range(nr - 100):
            step(i)
        return sum(calls(lambda i=i: step(i)) for i in range(nr - 100, nr)) / 100      # type: ignore[misc]

    donated = last(donate)
    vm.dying = True
    reclaimed = last(reclaim)
    vm.dying = False
    return donated, reclaimed


@pytest.mark.long
def test_cost_per_folio_is_flat() -> None:
    each = []
    for nr in (10_000, 100_000):
        machine = Machine(2 * GIB)
        each.append(cost(machine, machine.vm, machine.page(17), nr, 0, GFN))
        assert not machine.violations()
    assert each[1][0] < 1.5 * each[0][0]        # ten times, if it went with the number
    assert each[1][1] < 1.5 * each[0][1]


@pytest.mark.long
def test_one_tebibyte_in_gigabytes() -> None:
    machine = Machine(1027 * GIB)
    vm = machine.el2.create_vm(machine.kernel.alloc(1), lambda ipa: True, ipa_bits=40)
    tables = machine.el2.host.pgt.tables
    cost(machine, vm, (machine.ram.base + 2 * GIB) // PAGE, 1024, 18, 0)
    assert vm.pgt.tables == 0
    assert machine.el2.host.pgt.tables <= tables + 2
    assert not [*machine.violations(), *vm.page_table.violations]
