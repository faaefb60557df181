"""What a host access ends in, the end of a VM, and its vCPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from gunyah_machine import (
    DEVICE,
    FULL,
    GIB,
    LENT,
    POOL,
    PRIVATE,
    RWX,
    Machine,
    Script,
    tables,
)

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import InternalError
from guest_memfd.machine.el2.gunyah import hypercalls as hc
from guest_memfd.machine.el2.gunyah.capabilities import VcpuRight
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import Donation
from guest_memfd.machine.el2.gunyah.el2 import FIRST_VMID, LAST_VMID
from guest_memfd.machine.el2.gunyah.errors import GunyahError as E
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.vcpu import Action, GunyahRun, VcpuState
from guest_memfd.machine.el2.gunyah.vm import Exit, Psci
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.descriptor import S2_WRITE
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.machine.hw.arm64.stop import Breakpoint, Bus, CpuAbort, Expired, Hvc, Smc, Stop, Svc, Undefined, Wfi
from guest_memfd.machine.hw.arm64.walk import walk
from guest_memfd.words.units import PAGE


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.fixture
def pa(m: Machine) -> int:
    return m.ram.base


# -- what a host access ends in ----------------------------------------------------------------------------------------


def host_fault(m: Machine, pa: int, access: Any, el: int = 1) -> Fault:
    with pytest.raises(Fault) as raised:
        walk(m.ram, pa, access, el, m.stage1, m.el2.stage2())
    return raised.value


@pytest.mark.parametrize(("kind", "access", "esr"), [
    ("sea", "r", 0x9600_0010), ("sea", "w", 0x9600_0010), ("sea", "x", 0x8600_0010),
    ("fixable", "r", 0x9600_0087), ("fixable", "w", 0x9600_00c7), ("fixable", "x", 0x8600_0087)])
def test_host_abort(kind: Any, access: Any, esr: int) -> None:
    m = Machine(inject=kind)
    pa = m.ram.base + 5 * PAGE
    m.lend(LENT, pa)
    fault = Fault("translation", 3, 2, va=pa + 16, ipa=pa + 16, access=access, el=1)
    if access != "x":
        found = host_fault(m, pa + 16, access)
        assert (found.kind, found.level, found.stage, found.ipa) == ("translation", 3, 2, pa + 16)
        fault = found
    assert m.el2.host_abort(fault, 1) == (esr, pa + 16)


def test_host_abort_of_user_space_names_the_lower_level(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    for access, esr in (("r", 0x9200_0010), ("x", 0x8200_0010)):
        fault = Fault("translation", 3, 2, va=0x1000, ipa=pa, access=access, el=0)
        assert m.el2.host_abort(fault, 0) == (esr, 0x1000)


def test_host_abort_where_nothing_is_wrong_any_more_is_retried(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    fault = host_fault(m, pa, "w")
    m.vm.kill()
    assert m.unmap(LENT, pa) == 0
    assert m.el2.host_abort(fault, 1) is not None
    assert m.from_protected(pa) == 0
    assert m.el2.host_abort(fault, 1) is None


def test_host_abort_asks_the_table_for_what_the_access_needs(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)                                            # so that its neighbour is a page of its own
    leaf = m.el2.hlos.table.leaf(pa + PAGE)
    m.el2.hlos.table.rewrite(leaf, leaf.value & ~S2_WRITE)
    refused = partial(Fault, "permission", 3, 2, va=pa, ipa=pa + PAGE, el=1)
    assert m.el2.host_abort(refused(access="w"), 1) == (0x9600_0010, pa)
    assert m.el2.host_abort(refused(access="r"), 1) is None
    assert m.el2.host_abort(refused(access="w", s1ptw=True), 1) is None, "a walk only reads"


def test_host_abort_of_the_wrong_kind_is_our_mistake(m: Machine, pa: int) -> None:
    with pytest.raises(InternalError):
        m.el2.host_abort(Fault("translation", 3, 1, va=pa, access="r"), 1)
    with pytest.raises(InternalError):
        m.el2.host_abort(Fault("access flag", 3, 2, va=pa, ipa=pa, access="r"), 1)


# -- VMs ---------------------------------------------------------------------------------------------------------------


def test_a_destroyed_vm_leaves_nothing(m: Machine, pa: int) -> None:
    before = m.snapshot()[:1]
    m.lend(LENT, pa, GIB)
    m.ram.write64(pa + 123 * PAGE, 9)
    m.share(DEVICE, pa + GIB)
    assert m.to_protected(pa + 2 * GIB) == 0
    assert m.guest_walk(LENT) == pa
    m.vm.destroy()
    assert m.snapshot()[:1] == before
    assert m.ram.read64(pa + 123 * PAGE) == 0
    assert all(m.host_reads(pa + at) for at in (0, GIB, 2 * GIB))
    assert m.to_protected(pa) == E.CSPACE_CAP_REVOKED
    assert not any(entry.vmid == m.vm.vmid for tlb in m.tlbs for entry in tlb.entries())
    assert m.pool.free_pages == POOL // PAGE - tables(m.ram, m.el2.hlos.table.pages.root, 0)
    assert m.el2.create_vm("next").vmid == FIRST_VMID


def test_destroying_without_memory_can_be_repeated(m: Machine, pa: int) -> None:
    other = m.el2.create_vm("other")
    assert m.to_protected(pa, GIB) == 0
    assert m.donate(Donation.TO_SIBLING, m.vm.caps.guest_private, other.caps.guest_private, pa + PAGE) == 0
    m.lend(LENT, pa + GIB)
    m.ram.write64(pa + GIB, 7)
    # The host has no tables for the rest of the gibibyte.
    for n in range(2):
        m.pool.fail_at(n)
        with pytest.raises(HypRefused, match="NOMEM"):
            m.vm.destroy()
        assert m.el2.owner(pa) == ("guest", m.vm)
        assert m.vm.ipa_of(pa + GIB) == LENT
    m.vm.destroy()
    assert m.el2.owner(pa) == "host"
    assert m.el2.owner(pa + PAGE) == ("guest", other)
    assert [m.host_reads(pa + at) for at in (0, PAGE, 2 * PAGE, GIB)] == [True, False, True, True]
    assert m.ram.read64(pa + GIB) == 0


def test_vmids_run_out(m: Machine) -> None:
    for _ in range(LAST_VMID - FIRST_VMID):
        m.el2.create_vm("another")
    with pytest.raises(HypRefused, match="NORESOURCES"):
        m.el2.create_vm("one too many")


def test_killing_twice_tells_once(m: Machine) -> None:
    said: list[Exit] = []
    m.vm.on_exit = said.append
    m.vm.kill(Exit.PLATFORM_OFF)
    m.vm.kill()
    assert said == [Exit.PLATFORM_OFF]
    assert not m.vm.running


def test_two_vms_do_not_see_each_other(m: Machine, pa: int) -> None:
    other = m.el2.create_vm("other")
    other.space.configure(RangeOp.ADD_PRIVATE, GIB, GIB)
    m.lend(LENT, pa)
    args = (PRIVATE, pa, PAGE)
    assert m.hvc(hc.ADDRSPACE_MAP, other.caps.addrspace, other.caps.guest_private, GIB, RWX, *args) == E.DENIED
    assert m.donate(Donation.FROM_PROTECTED, other.caps.guest_private, other.caps.host_private, pa) == E.MEMDB_NOT_OWNER
    assert m.el2.owner(pa) == ("guest", m.vm)
    assert other.ipa_of(pa) is None


# -- vCPUs -------------------------------------------------------------------------------------------------------------


def hole(ipa: int, access: str = "r", kind: str = "translation", s1ptw: bool = False) -> CpuAbort:
    return CpuAbort(Fault(kind, 3, 2, s1ptw, va=ipa, ipa=ipa, access=access, el=1), 0x1000)


def vcpu(m: Machine, *stops: Stop,
         transfers: list[Transfer | None] | None = None) -> tuple[Script, Callable[..., list[int]]]:
    script = Script(list(stops), transfers)
    cap = m.vm.add_vcpu(script)
    return script, lambda *resume: m.hvc_all(hc.VCPU_RUN, cap, *resume)[:5]


@pytest.mark.parametrize(("stop", "result"), [
    (Expired(), [0, VcpuState.READY, 0, 0, 0]),
    (Wfi(), [0, VcpuState.EXPECTS_WAKEUP, 0, 0, 0]),
    (hole(LENT + 0x123), [0, VcpuState.PAGE_FAULT, LENT, 0, 0]),
    (hole(LENT + 0x123, "w"), [0, VcpuState.PAGE_FAULT, LENT, 1, 0]),
    (hole(LENT, "x"), [0, VcpuState.PAGE_FAULT, LENT, 2, 0]),
    (hole(LENT, "w", "permission"), [0, VcpuState.PAGE_FAULT, LENT, 1, 1]),
    (hole(LENT, "w", "access flag"), [0, VcpuState.PAGE_FAULT, LENT, 1, 0]),
    (hole(LENT, "r", "address size"), [0, VcpuState.FAULT, LENT, 0, 0]),
    (hole(65 * GIB + 4), [0, VcpuState.FAULT, 65 * GIB + 4, 0, 0]),
    (hole(DEVICE + 8, "x"), [0, VcpuState.PAGE_FAULT, DEVICE, 2, 0]),
    (hole(DEVICE + 8, s1ptw=True), [0, VcpuState.PAGE_FAULT, DEVICE, 0, 0]),
])
def test_how_a_run_ends(m: Machine, stop: Stop, result: list[int]) -> None:
    _, run = vcpu(m, stop)
    assert run() == result


def test_page_fault_resume(m: Machine) -> None:
    script, run = vcpu(m, *[hole(LENT + 24, "w")] * 5)
    assert run()[1] == VcpuState.PAGE_FAULT
    assert run(Action.EMULATE)[1] == VcpuState.PAGE_FAULT
    assert run(Action.RETRY)[1] == VcpuState.PAGE_FAULT
    assert not script.taken
    assert run(0, 1)[0] == E.UNIMPLEMENTED
    assert run(0, 0, 1)[0] == E.UNIMPLEMENTED
    assert run(3)[0] == E.ARG_INVAL
    assert not script.taken
    assert run(Action.FAULT)[1] == VcpuState.PAGE_FAULT
    assert script.taken == [(0x9600_0010, LENT + 24)]


def test_a_device_read_is_answered_by_the_host(m: Machine) -> None:
    signed = Transfer(write=False, size=2, register=7, sign_extend=True, sixty_four=False)
    script, run = vcpu(m, hole(DEVICE + 2), hole(DEVICE + 2), hole(DEVICE + 2), transfers=[signed] * 3)
    assert run() == [0, VcpuState.VMMIO_READ, DEVICE + 2, 2, 0]
    assert run(0x9_8001, Action.EMULATE)[1] == VcpuState.VMMIO_READ
    assert script.regs[7] == 0xffff_8001
    assert script.pc == 0x1004
    assert run(5, Action.RETRY)[1] == VcpuState.VMMIO_READ
    assert (script.regs[7], script.pc) == (0xffff_8001, 0x1004)
    assert run(5, 7)[0] == E.ARG_INVAL
    assert run(5, Action.FAULT)[1] == VcpuState.READY
    assert script.taken == [(0x9600_0010, DEVICE + 2)]
    assert script.pc == 0x1004


def test_a_device_write_tells_the_value(m: Machine) -> None:
    store = Transfer(write=True, size=4, register=3, sign_extend=False, sixty_four=False)
    zero = store._replace(register=31)
    script, run = vcpu(m, hole(DEVICE, "w"), hole(DEVICE, "w"), transfers=[store, zero])
    script.regs[3] = 0x1_2345_6789
    assert run() == [0, VcpuState.VMMIO_WRITE, DEVICE, 4, 0x2345_6789]
    assert run(99, Action.EMULATE) == [0, VcpuState.VMMIO_WRITE, DEVICE, 4, 0]
    assert script.pc == 0x1004
    assert run(0, 0)[1] == VcpuState.READY
    assert script.regs[3] == 0x1_2345_6789


def test_a_device_access_without_a_syndrome_is_a_page_fault(m: Machine) -> None:
    _, run = vcpu(m, hole(DEVICE + 8, "w"), transfers=[None])
    assert run() == [0, VcpuState.PAGE_FAULT, DEVICE, 1, 0]


def test_psci(m: Machine) -> None:
    script, run = vcpu(m, Smc(0))
    script.regs[0] = Psci.VERSION
    assert run()[1] == VcpuState.READY
    assert script.regs[0] == 0x1_0001
    script.stops, script.regs[0] = [Hvc(0)], Psci.CPU_OFF
    assert run()[1] == VcpuState.POWERED_OFF
    assert run()[1] == VcpuState.POWERED_OFF
    assert m.vm.running


@pytest.mark.parametrize(("call", "state", "why"), [
    (Psci.SYSTEM_OFF, VcpuState.POWERED_OFF, Exit.PLATFORM_OFF),
    (Psci.SYSTEM_RESET, VcpuState.PSCI_SYSTEM_RESET, Exit.PLATFORM_RESET)])
def test_psci_ends_the_vm(m: Machine, call: int, state: int, why: Exit) -> None:
    script, run = vcpu(m, Hvc(0))
    _, other = vcpu(m)
    script.regs[0] = call
    assert run()[1] == state
    assert run()[1] == state
    assert other()[1] == VcpuState.BLOCKED
    assert m.vm.exit == why


def test_an_unknown_call_of_the_guest(m: Machine) -> None:
    script, run = vcpu(m, Hvc(7))
    script.regs[0], script.regs[5] = 0x8400_0055, 17
    assert run()[1] == VcpuState.READY
    assert (script.regs[0], script.regs[5]) == (FULL, 17)


def test_a_guest_unlocks_with_a_call(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    script, run = vcpu(m, Hvc(0))
    script.regs[:5] = [hc.ADDRSPACE_MODIFY_PAGES, 0, LENT, PAGE, 1]
    assert run()[1] == VcpuState.READY
    assert script.regs[:2] == [0, 0]
    assert not m.vm.locked(LENT)


def test_exceptions_of_the_guest_stay_in_it(m: Machine) -> None:
    own = Fault("translation", 2, 1, va=0x50, access="w", el=0)
    script, run = vcpu(m, Svc(3), Breakpoint(5), Undefined(0x1000), CpuAbort(own, 0), Bus(0x10, 0, 0x60, "r"), Wfi())
    assert run()[1] == VcpuState.EXPECTS_WAKEUP
    assert script.taken == [(0x5600_0003, None), (0xf200_0005, None), (0x0200_0000, None), (own.esr_el1(), 0x50),
                            (0x9600_0010, 0x60)]


def test_a_guest_that_only_traps_gives_way(m: Machine) -> None:
    script, run = vcpu(m)
    script.run = lambda budget: Svc(0)      # type: ignore[method-assign]
    assert run()[1] == VcpuState.READY


def test_a_stopped_vm_does_not_run(m: Machine) -> None:
    script, run = vcpu(m, Wfi())
    m.vm.kill()
    assert run()[1] == VcpuState.BLOCKED
    assert not script.budgets


def test_vcpu_run_needs_a_capability(m: Machine) -> None:
    assert m.hvc(hc.VCPU_RUN, m.vm.caps.addrspace) == E.CSPACE_WRONG_OBJECT_TYPE
    weak = m.el2.cspace.grant(m.vm, VcpuRight.RUN)
    assert m.hvc(hc.VCPU_RUN, weak) == E.CSPACE_WRONG_OBJECT_TYPE


def test_a_run_of_a_vcpu_reports_its_last_state(m: Machine) -> None:
    vcpu(m, hole(70 * GIB))
    one = m.vm.vcpus[0]
    assert one.run() == GunyahRun(VcpuState.FAULT, (70 * GIB, 0, 0))
    assert one.run() == GunyahRun(VcpuState.FAULT, (70 * GIB, 0, 0))


GUEST_PROGRAM = """
        ldr     x9, =0xa0000000
        ldr     x10, =0xfeedface
        str     x10, [x9, #16]          // lent on demand
        ldr     x11, =0x80000
        mov     w12, #0x55
        str     w12, [x11, #8]          // a device
        ldrh    w13, [x11, #10]
        ldr     x0, =0xc6008069         // ADDRSPACE_MODIFY_PAGES: unlock
        mov     x1, #0
        mov     x2, x9
        mov     x3, #0x1000
        mov     x4, #1
        hvc     #0
        mov     x14, x0
        wfi
        ldr     x15, [x9, #16]          // locks again
        ldr     x0, =0x84000008         // SYSTEM_OFF
        hvc     #0
"""


def test_pan_is_that_of_the_guest(m: Machine) -> None:
    pytest.importorskip("unicorn")
    core = GuestCore(m.ram, m.tlbs, 1, lambda: m.vm.space.table.registers)
    for pstate, pan in ((0x5, False), (0x5 | 1 << 22, True), (0x4, False), (0x0, False)):
        core.pstate = pstate
        assert core._stage1().pan == pan


def test_a_guest_that_runs(m: Machine, pa: int) -> None:
    pytest.importorskip("unicorn")
    code, data = pa, pa + PAGE
    m.ram.write(code, assemble(GUEST_PROGRAM, LENT).data)
    m.lend(LENT, code)
    core = GuestCore(m.ram, m.tlbs, 1, lambda: m.vm.space.table.registers)
    core.pc = LENT
    cap = m.vm.add_vcpu(core, budget=5)

    def run(*resume: int) -> list[int]:
        return m.hvc_all(hc.VCPU_RUN, cap, *resume)[:5]

    assert run() == [0, VcpuState.PAGE_FAULT, 0xA000_0000, 1, 0]
    m.lend(0xA000_0000, data)
    assert run() == [0, VcpuState.VMMIO_WRITE, DEVICE + 8, 4, 0x55]
    assert m.ram.read64(data + 16) == 0xFEED_FACE
    assert run(0, Action.EMULATE) == [0, VcpuState.VMMIO_READ, DEVICE + 10, 2, 0]
    assert run(0x1_1234, Action.EMULATE)[1] == VcpuState.EXPECTS_WAKEUP
    assert (core.x(13), core.x(14)) == (0x1234, 0)
    assert not m.vm.locked(0xA000_0000)
    assert run()[1] == VcpuState.POWERED_OFF
    assert core.x(15) == 0xFEED_FACE
    assert m.vm.locked(0xA000_0000)
    assert m.vm.exit == Exit.PLATFORM_OFF
    assert m.unmap(0xA000_0000, data) == 0
    assert m.ram.read64(data + 16) == 0
    m.check()
