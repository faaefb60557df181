"""Plain KVM: a guest's stage 2 without a host's, and what a vCPU's run comes back with."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import Any

import pytest
from stopping_cpu import Script

from guest_memfd.machine.el2.kvm import vcpu as exits
from guest_memfd.machine.el2.kvm.guest import first_tables
from guest_memfd.machine.el2.kvm.vm import Kvm
from guest_memfd.machine.hw.arm64 import cpu as stops
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

MIB = 1 << 20
GFN = 0x4_0000
IPA = GFN * PAGE
FLAT = Stage1(Tcr(), 0, 0, enabled=False)


class Machine:
    def __init__(self, size: int = 64 * MIB) -> None:
        self.ram = Ram(size)
        self.kernel = Buddy(self.ram, self.ram.base, size)
        self.tlbs = [Tlb(), Tlb()]
        self.kvm = Kvm(self.ram, self.kernel, self.tlbs)
        self.vm = self.kvm.create_vm(lambda ipa: ipa >= IPA)

    def guest(self, ipa: int, access: Any = "r", cpu: int = 0) -> int:
        return Mmu(self.ram, self.tlbs[cpu]).translate(ipa, access, 1, FLAT, self.vm.registers()).pa

    def holds(self, ipa: int) -> bool:
        return any(tlb.holds_stage2(ipa, self.vm.vmid) for tlb in self.tlbs)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_the_host_has_no_stage_2(machine: Machine) -> None:
    assert machine.kvm.stage2() is None
    regs = [0xc600_001f] + [0] * 17
    machine.kvm.hvc(regs)
    assert regs[0] == (1 << 64) - 1
    assert machine.kvm.owner(machine.ram.base) == "host"
    assert machine.kvm.host_may(machine.ram.base)
    with pytest.raises(LookupError):
        machine.kvm.host_abort(Fault(TRANSLATION, 3, 2, va=0, ipa=0), 1)


def test_first_tables_as_kvm_picks_them() -> None:
    assert [first_tables(bits) for bits in (32, 36, 39, 40, 42, 43, 44, 48)] == [4, 1, 1, 2, 8, 16, 1, 1]


def test_map_and_unmap(machine: Machine) -> None:
    pa, tables = machine.kernel.alloc(), machine.kernel.free_pages
    assert machine.vm.map(GFN, pa // PAGE) == 0
    assert machine.vm.ipa_of(pa + 5) == IPA + 5
    for cpu in (0, 1):
        assert machine.guest(IPA + 5, "w", cpu) == pa + 5
    assert machine.vm.unmap(GFN) == 0
    assert machine.vm.ipa_of(pa) is None
    assert not machine.holds(IPA)
    assert machine.kernel.free_pages == tables, "empty tables are freed"
    with pytest.raises(Fault, match="translation"):
        machine.guest(IPA)
    assert not machine.vm.page_table.violations


def test_unmap_flushes_what_is_not_mapped(machine: Machine) -> None:
    """As guest_unmap() of the abstract host: a stale entry does not survive, whatever the table says."""
    pa = machine.kernel.alloc()
    assert machine.vm.map(GFN, pa // PAGE) == 0
    machine.guest(IPA)
    entry = machine.vm.pgt.leaf(IPA)
    machine.ram.write64(entry.address, 0)
    assert machine.holds(IPA)
    assert machine.vm.unmap(GFN) == 0
    assert not machine.holds(IPA)


def test_a_page_replaces_another_and_a_block_pages(machine: Machine) -> None:
    first, second, block = machine.kernel.alloc(), machine.kernel.alloc(), machine.kernel.alloc(9)
    for pa in (first, second):
        assert machine.vm.map(GFN, pa // PAGE) == 0
        assert machine.guest(IPA) == pa
    assert machine.vm.ipa_of(first) is None
    before = machine.kernel.free_pages
    assert machine.vm.map(GFN, block // PAGE, 512) == 0
    assert machine.guest(IPA + 7 * PAGE) == block + 7 * PAGE
    assert machine.kernel.free_pages == before + 1, "the table it replaced"
    assert machine.vm.ipa_of(second) is None
    assert machine.vm.ipa_of(block + 9 * PAGE) == IPA + 9 * PAGE
    assert machine.vm.map(GFN + 3, first // PAGE) == 0, "a page in a block: the rest is faulted in again"
    assert machine.guest(IPA + 3 * PAGE) == first
    assert machine.vm.ipa_of(block) is None
    with pytest.raises(Fault, match="translation"):
        machine.guest(IPA + 7 * PAGE)
    assert not machine.vm.page_table.violations


def test_unmap_of_a_range_takes_whole_blocks(machine: Machine) -> None:
    block, page = machine.kernel.alloc(9), machine.kernel.alloc()
    assert machine.vm.map(GFN, block // PAGE, 512) == 0
    assert machine.vm.map(GFN + 600, page // PAGE) == 0
    assert machine.vm.unmap(GFN + 100, 512) == 0
    assert machine.vm.ipa_of(block) is None
    assert machine.vm.ipa_of(page) is None
    assert machine.vm.pgt.tables == 0


def test_bad_ranges(machine: Machine) -> None:
    assert machine.vm.map(GFN, 0x80000, 2) == -EINVAL
    assert machine.vm.map(GFN + 1, 0x80000, 512) == -EINVAL
    assert machine.vm.map(1 << 28, 0x80000) == -EINVAL


def test_out_of_memory_at_every_table_loses_nothing(machine: Machine) -> None:
    free = machine.kernel.free_pages
    for nth in range(2):
        machine.kernel.fail_at(nth)
        assert machine.vm.map(GFN, 0x80000) == -ENOMEM
        assert machine.kernel.free_pages == free
        assert not machine.vm.pgt.leaf(IPA).value
    assert machine.vm.map(GFN, 0x80000) == 0


def test_prot(machine: Machine) -> None:
    assert machine.vm.map(GFN, 0x80000, 1, "r") == 0
    assert machine.guest(IPA) == 0x8000_0000
    with pytest.raises(Fault, match="permission"):
        machine.guest(IPA, "w")


def test_destroy_frees_every_table_and_forgets_the_vmid(machine: Machine) -> None:
    free = machine.kernel.free_pages
    for i in range(5):
        assert machine.vm.map(GFN + (i << 9), 0x80000 + i) == 0
        machine.guest(IPA + (i << 21))
    machine.vm.destroy()
    assert machine.kernel.free_pages == free
    assert not list(machine.tlbs[0].entries())


# -- vCPUs ---------------------------------------------------------------------------------------------------------

LDR_X1_X0, STRB_W2_X0, LDR_POST, LDP = 0xf940_0001, 0x3900_0002, 0xf840_8401, 0xa940_0801


def abort(ipa: int, access: str = "r", **more: Any) -> stops.CpuAbort:
    return stops.CpuAbort(Fault(TRANSLATION, 3, 2, va=ipa, ipa=ipa, access=access, **more), 0x1000)


def test_a_fault_where_memory_is_bound(machine: Machine) -> None:
    cpu = Script(abort(IPA), abort(IPA + 8, "w"), abort(IPA, "x"))
    vcpu = machine.vm.add_vcpu(cpu)
    assert vcpu.run() == exits.MemoryFaultExit(IPA, write=False, exec=False)
    assert vcpu.run() == exits.MemoryFaultExit(IPA + 8, write=True, exec=False)
    assert vcpu.run() == exits.MemoryFaultExit(IPA, write=False, exec=True)
    assert cpu.pc == 0x1000


def test_mmio_write_and_read(machine: Machine) -> None:
    cpu = Script(abort(0x900_0000, "w"), abort(0x900_0008), stops.Wfi(), words={0x1000: STRB_W2_X0})
    cpu.regs[2] = 0x1234
    vcpu = machine.vm.add_vcpu(cpu)
    assert vcpu.run() == exits.MmioAccess(0x900_0000, 1, True, 0x34, 2)
    assert cpu.pc == 0x1004
    cpu.words[0x1000] = LDR_X1_X0
    assert vcpu.run() == exits.MmioAccess(0x900_0008, 8, False, 0, 1)
    with pytest.raises(ValueError, match="waits for its data"):
        vcpu.run()
    cpu.pc = 0x1000
    vcpu.complete_mmio(0xfeed)
    assert (cpu.regs[1], cpu.pc) == (0xfeed, 0x1004)
    assert vcpu.run() == exits.WfiExit()
    with pytest.raises(ValueError, match="no MMIO read"):
        vcpu.complete_mmio(0)


@pytest.mark.parametrize("word", [LDR_POST, LDP])
def test_what_has_no_syndrome_is_no_mmio(machine: Machine, word: int) -> None:
    vcpu = machine.vm.add_vcpu(Script(abort(0x900_0000), words={0x1000: word}))
    assert isinstance(vcpu.run(), exits.InternalErrorExit)


def test_a_stage_1_walk_or_a_fetch_without_memory_is_aborted(machine: Machine) -> None:
    cpu = Script(abort(0x900_0000, s1ptw=True), abort(0x900_0000, "x"), stops.Wfi(), words={0x1000: LDR_X1_X0})
    vcpu = machine.vm.add_vcpu(cpu)
    assert vcpu.run() == exits.WfiExit()
    assert [esr for esr, _far in cpu.exceptions] == [0x96000010, 0x86000010]
    assert vcpu.aborts_injected == 2


@pytest.mark.parametrize("access", "rw")
def test_an_mmio_access_may_be_aborted(machine: Machine, access: str) -> None:
    word = {"r": LDR_X1_X0, "w": 0xf9000001}[access]
    cpu = Script(abort(0x900_0000, access), stops.Wfi(), words={0x1000: word})
    vcpu = machine.vm.add_vcpu(cpu)
    assert isinstance(vcpu.run(), exits.MmioAccess)
    vcpu.abort_mmio()
    assert (cpu.pc, [esr for esr, _far in cpu.exceptions]) == (0x1000, [0x96000010])
    assert vcpu.run() == exits.WfiExit()
    with pytest.raises(ValueError, match="no MMIO access"):
        vcpu.abort_mmio()


def test_a_guest_that_only_faults_is_interrupted(machine: Machine) -> None:
    class Forever(Script):
        def run(self, timeout: float | None = None, instructions: int | None = None) -> stops.Stop:
            return abort(0x900_0000, "x")

    assert machine.vm.add_vcpu(Forever()).run(timeout=0.05) == exits.ExpiredExit()


@pytest.mark.parametrize(("function", "version"), [(0x8400_0000, 0x1_0003), (0x8000_0000, 0x1_0001)],
                         ids=["PSCI_VERSION", "SMCCC_VERSION"])
def test_versions(machine: Machine, function: int, version: int) -> None:
    cpu = Script(stops.Hvc(0), stops.Wfi())
    cpu.regs[0] = function
    assert machine.vm.add_vcpu(cpu).run() == exits.WfiExit()
    assert cpu.regs[0] == version


def test_a_guest_that_has_no_time_runs_once(machine: Machine) -> None:
    assert machine.vm.add_vcpu(Script(stops.Wfi())).run(timeout=0) == exits.WfiExit()


def test_a_guest_that_has_time_goes_on_after_what_is_no_exit(machine: Machine) -> None:
    assert machine.vm.add_vcpu(Script(abort(0x900_0000, "x"), stops.Wfi())).run(timeout=3600) == exits.WfiExit()


def test_psci(machine: Machine) -> None:
    cpu = Script(stops.Hvc(0), stops.Wfi(), stops.Hvc(0), stops.Smc(0), stops.Hvc(0), stops.Wfi())
    vcpu = machine.vm.add_vcpu(cpu)
    cpu.regs[0] = 0x8400_0000
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == 0x1_0003
    cpu.regs[0] = 0x8400_0008
    assert vcpu.run() == exits.SystemEventExit("shutdown")
    cpu.regs[0] = 0x8400_0009
    assert vcpu.run() == exits.SystemEventExit("reset")
    cpu.regs[0] = 0xc600_0003
    assert vcpu.run() == exits.WfiExit()
    assert cpu.regs[0] == (1 << 64) - 1, "MEM_SHARE is protected KVM's"


def test_the_guests_own_exceptions_are_delivered(machine: Machine) -> None:
    fault = Fault(TRANSLATION, 1, 1, va=0xdead000, access="w")
    cpu = Script(stops.CpuAbort(fault, 0x1000), stops.Svc(7), stops.Breakpoint(9), stops.Undefined(0x1000), stops.Expired())
    assert machine.vm.add_vcpu(cpu).run() == exits.ExpiredExit()
    assert cpu.exceptions == [(0x96000045, 0xdead000), (0x56000007, None), (0xf2000009, None), (0x02000000, None)]


def test_stage_2_to_nowhere(machine: Machine) -> None:
    out = machine.vm.add_vcpu(Script(stops.Bus(0x1_0000_0000, 0x1000, 0x2000, "r"))).run()
    assert isinstance(out, exits.InternalErrorExit)
    assert "0x100000000" in out.why


def test_a_guest_program(machine: Machine) -> None:
    """A store, a load of a device, and power off: on the real CPU, through tables filled fault by fault."""
    pytest.importorskip("unicorn")
    words = (0xd2a8_0001,       # mov x1, #0x40000000
             0x5280_0542,       # mov w2, #42
             0xb901_0022,       # str w2, [x1, #0x100]
             0xd2a1_2003,       # mov x3, #0x9000000
             0xb940_0064,       # ldr w4, [x3]
             0xd280_0100,       # mov x0, #8
             0xf2b0_8000,       # movk x0, #0x8400, lsl #16
             0xd400_0002)       # hvc #0
    pa = machine.kernel.alloc()
    machine.ram.write(pa, b"".join(word.to_bytes(4, "little") for word in words))
    mmu = Mmu(machine.ram, machine.tlbs[0])

    def translate(va: int, access: Any, el: int) -> tuple[int, int, bool, bool, bool]:
        at = mmu.translate(va, access, el, FLAT, machine.vm.registers())
        return at.pa, at.size, at.readable, at.writable, at.executable

    cpu = stops.Cpu(machine.ram, translate)
    cpu.pc = IPA
    vcpu = machine.vm.add_vcpu(cpu)
    assert vcpu.run(timeout=300) == exits.MemoryFaultExit(IPA, write=False, exec=True)
    assert machine.vm.map(GFN, pa // PAGE) == 0
    out = vcpu.run(timeout=300)
    assert out == exits.MmioAccess(0x900_0000, 4, False, 0, 4)
    assert machine.ram.read(pa + 0x100, 4) == (42).to_bytes(4, "little")
    vcpu.complete_mmio(0xffff_ffff_8000_0001)
    assert vcpu.run(timeout=300) == exits.SystemEventExit("shutdown")
    assert cpu.x(4) == 0x8000_0001
