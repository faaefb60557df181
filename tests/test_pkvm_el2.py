"""pKVM's EL2 on real tables: formats, faults of the host, hypercalls, the guest's calls, what a folio costs."""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EAGAIN, EBUSY, EINVAL, ENOENT, EPERM
from typing import Any

import pytest
from effort import calls
from pkvm_machine import FLAT, GFN, GIB, LENT, MIB, Machine, hvc
from stopping_cpu import Script

from guest_memfd.machine.el2.kvm import vcpu as exits
from guest_memfd.machine.el2.pkvm import checks
from guest_memfd.machine.el2.pkvm import hypercalls as hc
from guest_memfd.machine.el2.pkvm import transitions as t
from guest_memfd.machine.el2.pkvm.annotation import LOCKED, POISONED, Annotation, AnnotationType, PageOwner
from guest_memfd.machine.el2.pkvm.el2 import El2
from guest_memfd.machine.el2.pkvm.host_stage2 import MachineDead, Region
from guest_memfd.machine.el2.pkvm.states import HypPage, PkvmState, Vmemmap
from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm
from guest_memfd.machine.hw.arm64 import cpu as stops
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault, Inject
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.uapi.kvm_arm64 import HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE
from guest_memfd.words.units import PAGE


@pytest.fixture
def machine() -> Machine:
    return Machine()


# -- formats -----------------------------------------------------------------------------------------------------------


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


# -- faults of the host ------------------------------------------------------------------------------------------------


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


# -- hypercalls --------------------------------------------------------------------------------------------------------


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
    assert hvc(machine, hc.CHECK_CONSENT, handle, GFN, 1, 1) == -EBUSY
    assert t.guest_share_host(machine.el2, machine.vm, GFN) == 0
    assert hvc(machine, hc.CHECK_CONSENT, handle, GFN, 1, 1) == 0
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
    assert hvc(machine, hc.RECLAIM_DYING, handle, GFN) == -E2BIG, "one page of a block"
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
    for number in [*range(hc.MIN_PKVM), 50, 54, 999]:
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


# -- the guest's calls -------------------------------------------------------------------------------------------------


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
    for number, *args in ((MEM_SHARE, ipa + 1), (MEM_SHARE, ipa, 1), (MEM_UNSHARE, ipa), (MEM_SHARE, 1 << 45),
                          (MEM_UNSHARE, ipa + PAGE), (HYP_MEMINFO, 1), (HYP_MEMINFO, 0, 1)):
        cpu.script = [cpu.call(number, *args), stops.Wfi()]
        assert vcpu.run() == exits.WfiExit()
        assert cpu.regs[0] == refused
    cpu.script = [cpu.call(HYP_MEMINFO), stops.Wfi()]
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == PAGE
    cpu.script = [cpu.call(MEM_SHARE, 0x1000)]
    assert isinstance(vcpu.run(), exits.InternalErrorExit), "no memory there, ever"
    assert t.force_reclaim_guest_page(machine.el2, machine.vm.ipa_of(machine.vm.pgt.leaf(ipa).oa)
                                      and machine.vm.pgt.leaf(ipa).oa) == 0
    cpu.script = [cpu.call(MEM_SHARE, ipa), stops.Wfi()]
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == refused, "poisoned"


# -- cost --------------------------------------------------------------------------------------------------------------


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
