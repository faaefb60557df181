"""Aborts of a CPU that executes, and what the kernel prints."""

from __future__ import annotations

from errno import EFAULT, EPERM
from typing import Any

import pytest
from aborts import BASE, DABT, DABT_USER, EL0, EL1, IABT, PC, S1PTW, U64, VA, FakeKernel, Regs

from guest_memfd.machine.hw.arm64.cpu import Cpu, CpuAbort
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.extable import ExceptionEntry, ExType
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.linux.mem_abort import (
    KernelDied,
    MmFault,
    Oops,
    Panic,
    Retry,
    do_mem_abort,
)
from guest_memfd.machine.linux.text import KIMAGE_VADDR, ROUTINES, KernelText
from guest_memfd.words.units import PAGE

# -- the same with a CPU -----------------------------------------------------------------------------------------------


RETURN = 0xFFFF_9000_0000_0000


class Machine(FakeKernel):
    """A kernel of nothing but its text, on a CPU, with a linear map; `donated` pages are behind stage 2."""

    def __init__(self, hypervisor: str = "none", **options: Any) -> None:
        super().__init__(**options)
        self.hypervisor, self.pkvm = hypervisor, hypervisor == "pkvm"
        self.ram = Ram(64 << 20)
        self.buddy = Buddy(self.ram, BASE + (32 << 20), 32 << 20)
        self.tlb = Tlb()
        self.map = LinearMap(self.ram, self.buddy, [self.tlb])
        self.text = KernelText(self.ram, BASE)
        self.map.map_text(self.text.start, BASE, self.text.size)
        self.extable = self.text.extable
        self.s1 = Stage1(Tcr(), self.buddy.alloc_table(), self.map.root, mair=0xFF)
        self.mmu = Mmu(self.ram, self.tlb)
        self.donated: set[int] = set()
        self.retries = 0
        self.regs = self.processor = Cpu(self.ram, self._translate)
        self.processor.pstate = EL1

    def _translate(self, va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        found = self.mmu.translate(va, access, el, self.s1)  # type: ignore[arg-type]
        if found.pa & -PAGE in self.donated:
            raise Fault(TRANSLATION, 3, 2, va=va, ipa=found.pa, access=access, el=el)
        return found.pa, found.size, found.readable, found.writable, found.executable

    def _esr(self, fault: Fault) -> int:
        if fault.stage == 1:
            return fault.esr_el1()
        return DABT | 0x10 if self.hypervisor == "gunyah" else fault.esr_el1() | S1PTW

    def call(self, name: str, *args: int) -> tuple[int, int]:
        """Run a routine to its end: x0 and x1. Raises KernelDied."""
        cpu = self.processor
        for n, value in enumerate(args):
            cpu.set_x(n, value)
        cpu.set_x(30, RETURN)
        cpu.pc = self.text.va(name)
        while True:
            stop = cpu.run(timeout=300)
            assert isinstance(stop, CpuAbort), stop
            if stop.pc == RETURN:
                return cpu.x(0), cpu.x(1)
            outcome = do_mem_abort(self._esr(stop.fault), stop.fault.far, cpu, self)
            if isinstance(outcome, Oops | Panic):
                raise KernelDied(outcome)
            self.retries += isinstance(outcome, Retry)

    def read_aligned(self, va: int) -> int:
        cpu = self.processor
        saved, pc = [cpu.x(n) for n in range(31)], cpu.pc
        value, _ = self.call("ex_handler_load_unaligned_zeropad", va)
        for n, old in enumerate(saved):
            cpu.set_x(n, old)
        cpu.pc = pc
        return value

    def at_s1e1r(self, va: int) -> int | None:
        try:
            return self.mmu.translate(va, "r", 1, self.s1).pa
        except Fault:
            return None

    def force_reclaim(self, pa: int) -> int:
        self.reclaims.append(pa & -PAGE)
        self.ram.zero(pa & -PAGE, PAGE)
        self.donated.discard(pa & -PAGE)
        return self.reclaim_result

    def symbol_at(self, pc: int) -> str:
        return self.text.symbol_at(pc)

    def page_table(self, va: int) -> Any:
        return self.map.root, self.map.path(va)

    def va(self, pa: int) -> int:
        return self.map.va(pa)

    def hole(self, pa: int) -> None:
        assert self.map.set_direct_map_invalid_noflush(pa) == 0
        self.map.flush_tlb_kernel_range(self.va(pa), self.va(pa) + PAGE)


PAGE_A, PAGE_B = BASE + (8 << 20), BASE + (8 << 20) + PAGE


def loaded(hypervisor: str = "none", **options: Any) -> Machine:
    machine = Machine(hypervisor, **options)
    machine.ram.write(PAGE_A, bytes(n % 251 for n in range(2 * PAGE)))
    return machine


def test_text_is_where_it_says() -> None:
    machine = Machine()
    table = machine.text.extable
    assert len(table) == 5
    code = machine.ram.read(BASE, machine.text.size)
    first = machine.text.extable_va - KIMAGE_VADDR
    decoded = [ExceptionEntry.decode(KIMAGE_VADDR + at, code[at:at + 12]) for at in range(first, first + 60, 12)]
    assert [table.search(entry.insn) for entry in decoded] == decoded == sorted(decoded)
    assert sorted((machine.text.symbol_at(entry.insn).split("+")[0], entry.type, entry.data) for entry in decoded) == [
        ("__get_user", ExType.UACCESS_ERR_ZERO, 2 | 1 << 5), ("__put_user", ExType.UACCESS_ERR_ZERO, 2 | 31 << 5),
        *[("copy_from_kernel_nofault", ExType.KACCESS_ERR_ZERO, 9 | 3 << 5)] * 2,
        ("load_unaligned_zeropad", ExType.LOAD_UNALIGNED_ZEROPAD, 0)]
    for routine in ROUTINES:
        va = machine.text.va(routine.name)
        assert machine.text.symbol_at(va + 4) == f"{routine.name}+0x4/{4 * len(routine.words):#x}"
    assert machine.text.symbol_at(machine.text.end) == f"{machine.text.end:#x}"
    with pytest.raises(KeyError):
        machine.text.va("vmalloc")


def test_routines_do_what_they_are_named_after() -> None:
    machine = loaded()
    a, b, c = machine.va(PAGE_A), machine.va(PAGE_B), machine.va(PAGE_B + PAGE)
    word = int.from_bytes(machine.ram.read(PAGE_A + 24, 8), "little")
    assert machine.call("plain_read", a + 24)[0] == machine.call("load_unaligned_zeropad", a + 24)[0] == word
    machine.call("plain_write", a + 24, 0x1122_3344_5566_7788)
    assert machine.ram.read64(PAGE_A + 24) == 0x1122_3344_5566_7788
    for length in (0, 1, 7, 8, 9, 23):
        machine.ram.zero(PAGE_B, PAGE)
        assert machine.call("copy_from_kernel_nofault", b + 1, a + 3, length)[0] == 0
        assert machine.ram.read(PAGE_B, 40) == b"\0" + machine.ram.read(PAGE_A + 3, length) + bytes(39 - length)
    machine.call("copy_page", c, a)
    assert machine.ram.read(PAGE_B + PAGE, PAGE) == machine.ram.read(PAGE_A, PAGE)
    assert machine.call("do_copy_page", b, a)[0] == 0
    assert machine.ram.read(PAGE_B, PAGE) == machine.ram.read(PAGE_A, PAGE)
    machine.call("clear_page", b)
    assert machine.ram.read(PAGE_B, 2 * PAGE) == bytes(PAGE) + machine.ram.read(PAGE_A, PAGE)
    assert machine.call("do_copy_page", c, b)[0] == 1
    pattern = 0xAAAA_AAAA_AAAA_AAAA
    machine.call("memset_page", b, pattern)
    assert machine.ram.read(PAGE_B - 1, PAGE + 2) == machine.ram.read(PAGE_A + PAGE - 1, 1) + b"\xaa" * PAGE + b"\0"
    assert machine.call("memchr_inv_page", b, pattern)[0] == 0
    machine.ram.write(PAGE_B + PAGE - 3, b"\xab")
    assert machine.call("memchr_inv_page", b, pattern)[0] == b + PAGE - 8


@pytest.mark.parametrize("offset", range(1, 8))
def test_a_word_load_into_a_hole_is_padded_with_zeros(offset: int) -> None:
    machine = loaded()
    machine.hole(PAGE_B)
    at = machine.va(PAGE_B) - 8 + offset
    expected = int.from_bytes(machine.ram.read(PAGE_B - 8 + offset, 8 - offset), "little")
    assert machine.call("load_unaligned_zeropad", at)[0] == expected
    machine.map.set_direct_map_default_noflush(PAGE_B)
    assert machine.call("load_unaligned_zeropad", at)[0] >> 8 * (8 - offset) != 0


@pytest.mark.parametrize("hypervisor", ["pkvm", "gunyah"])
def test_a_word_load_into_a_donated_page(hypervisor: str) -> None:
    for sea_fixup in (False, True):
        machine = loaded(hypervisor, sea_fixup=sea_fixup)
        machine.donated.add(PAGE_B)
        at = machine.va(PAGE_B) - 3
        if hypervisor == "pkvm" or sea_fixup:
            assert machine.call("load_unaligned_zeropad", at)[0] == int.from_bytes(machine.ram.read(PAGE_B - 3, 3), "little")
            assert not machine.reclaims
            continue
        with pytest.raises(KernelDied) as died:
            machine.call("load_unaligned_zeropad", at)
        lines = died.value.outcome.text.splitlines()
        assert lines[0] == "Internal error: synchronous external abort: 0000000096000010 [#1] SMP"
        assert "pc : load_unaligned_zeropad+0x0/0x8" in lines


def test_a_hole_in_front_of_a_donated_page_saves_the_kernel() -> None:
    machine = loaded("gunyah")
    machine.donated.add(PAGE_B)
    machine.hole(PAGE_B)
    assert machine.call("load_unaligned_zeropad", machine.va(PAGE_B) - 3)[0] < 1 << 24


def test_a_word_load_that_begins_in_a_hole_dies_in_the_handler() -> None:
    machine = loaded()
    machine.hole(PAGE_A)
    with pytest.raises(KernelDied) as died:
        machine.call("load_unaligned_zeropad", machine.va(PAGE_A) + 16)
    assert "pc : ex_handler_load_unaligned_zeropad+0x0/0x8" in died.value.outcome.text
    assert died.value.outcome.text.count("Internal error") == 1


def test_a_plain_access_to_a_donated_page_takes_it_from_the_guest() -> None:
    machine = loaded("pkvm")
    machine.donated.add(PAGE_B)
    assert machine.call("plain_read", machine.va(PAGE_B) + 8)[0] == 0
    assert (machine.reclaims, machine.retries) == ([PAGE_B], 1)
    machine.donated.add(PAGE_A)
    machine.reclaim_result = -EPERM
    with pytest.raises(KernelDied, match="access to hypervisor-protected memory"):
        machine.call("plain_write", machine.va(PAGE_A), 1)


@pytest.mark.parametrize("name", [
    "clear_page", "memset_page", "memchr_inv_page", "plain_write", "copy_page", "do_copy_page"])
def test_plain_routines_die_at_a_hole(name: str) -> None:
    machine = loaded()
    machine.hole(PAGE_B)
    with pytest.raises(KernelDied, match=rf"paging request(?s:.*)pc : {name}\+"):
        machine.call(name, machine.va(PAGE_B), machine.va(PAGE_A))


def test_kcore_style_copy_of_a_hole() -> None:
    machine = loaded()
    machine.hole(PAGE_B)
    to = machine.va(PAGE_B + PAGE)
    assert machine.call("copy_from_kernel_nofault", to, machine.va(PAGE_B), 16)[0] == -EFAULT & U64
    assert machine.call("copy_from_kernel_nofault", to, machine.va(PAGE_B) - 3, 3)[0] == 0
    assert machine.call("copy_from_kernel_nofault", to, machine.va(PAGE_B) - 3, 5)[0] == -EFAULT & U64
    gunyah = loaded("gunyah")
    gunyah.donated.add(PAGE_B)
    with pytest.raises(KernelDied, match="synchronous external abort"):
        gunyah.call("copy_from_kernel_nofault", gunyah.va(PAGE_A), gunyah.va(PAGE_B), 8)


def test_uaccess_returns_efault_and_zero() -> None:
    machine = loaded()
    assert machine.call("__get_user", 0x40_0000, 7) == (-EFAULT & U64, 0)
    assert machine.call("__put_user", 0x40_0000, 7) == (-EFAULT & U64, 7)
    assert machine.asked == [(0x40_0000, "r", False), (0x40_0000, "w", False)]


def test_the_whole_oops() -> None:
    machine = loaded()
    machine.hole(PAGE_B)
    at = machine.va(PAGE_B) + 0x10
    with pytest.raises(KernelDied) as died:
        machine.call("plain_write", at, 0xCAFE)
    entries = [entry.value for entry in machine.map.path(at)]
    lines = died.value.outcome.text.splitlines()
    assert lines[:15] == [
        f"Unable to handle kernel paging request at virtual address {at:016x}",
        "Mem abort info:",
        "  ESR = 0x0000000096000047",
        "  EC = 0x25: DABT (current EL), IL = 32 bits",
        "  SET = 0, FnV = 0",
        "  EA = 0, S1PTW = 0",
        "  FSC = 0x07: level 3 translation fault",
        "Data abort info:",
        "  ISV = 0, ISS = 0x00000047, ISS2 = 0x00000000",
        "  CM = 0, WnR = 1, TnD = 0, TagAccess = 0",
        "  GCS = 0, Overlay = 0, DirtyBit = 0, Xs = 0",
        f"swapper pgtable: 4k pages, 48-bit VAs, pgdp={machine.map.root:016x}",
        f"[{at:016x}] pgd={entries[0]:016x}, p4d={entries[0]:016x}, pud={entries[1]:016x}, pmd={entries[2]:016x}, "
        f"pte=00e8000080801f06",
        "Internal error: Oops: 0000000096000047 [#1] SMP",
        "Modules linked in: gunyah",
    ]
    assert lines[15] == "CPU: 0 UID: 0 PID: 123 Comm: cat Not tainted 7.3.4 #1"
    assert lines[16].startswith("Hardware name: emulated machine of guest-memfd")
    assert lines[18:20] == ["pc : plain_write+0x0/0x8", f"lr : {RETURN:#x}"]
    assert lines[30] == f"x2 : {machine.processor.x(2):016x} x1 : 000000000000cafe x0 : {at:016x}"
    assert lines[-1] == "---[ end trace 0000000000000000 ]---"


def test_the_tag_of_a_user_address_is_ignored() -> None:
    kernel = FakeKernel(mm_fault=MmFault.DONE)
    do_mem_abort(DABT_USER | 7, 0x5A00_0000_0000_1000, Regs(pstate=EL0), kernel)
    assert kernel.asked == [(0x1000, "r", True)]


def test_where_no_table_is_shown() -> None:
    kernel = FakeKernel(pagefault_disabled=True)
    between = do_mem_abort(DABT | 4, 0x0FFF_0000_0000_1000, Regs(), kernel)
    assert "address between user and kernel address ranges" in between.text  # type: ignore[union-attr]
    first = do_mem_abort(DABT | 4, 1 << 48, Regs(), kernel)
    assert "[0001000000000000] address between user and kernel address ranges" in first.text  # type: ignore[union-attr]
    user = do_mem_abort(DABT | 4, 0x1000, Regs(), kernel)
    assert "[0000000000001000] user address but active_mm is swapper" in user.text  # type: ignore[union-attr]


def test_every_field_of_a_syndrome_is_printed() -> None:
    def lines(esr: int) -> list[str]:
        return do_mem_abort(esr, VA, Regs(), FakeKernel()).text.splitlines()[2:11]  # type: ignore[union-attr]

    nothing = lines(DABT | 7)
    assert "  FSC = 0x07: level 3 translation fault" in nothing
    for bit, shown in ((11, "SET = 1"), (12, "SET = 2"), (10, "FnV = 1"), (9, "EA = 1"), (7, "S1PTW = 1"), (8, "CM = 1"),
                       (6, "WnR = 1"), (42, "TnD = 1"), (41, "TagAccess = 1"), (40, "GCS = 1"), (38, "Overlay = 1"),
                       (37, "DirtyBit = 1"), (32, "Xs = 1"), (36, "Xs = 16")):
        one = lines(DABT | 7 | 1 << bit)
        assert any(shown in line for line in one)
        assert not any(shown in line for line in nothing)
    assert "  EC = 0x25: DABT (current EL), IL = 16 bits" in lines(DABT & ~(1 << 25) | 7)
    assert "  EC = 0x21: IABT (current EL), IL = 32 bits" in lines(IABT | 7)
    assert not any("Data abort info" in line for line in lines(IABT | 7))


def test_registers_are_printed_from_x29_down() -> None:
    regs = Regs(file=list(range(31)))
    regs.pstate = 1 << 30 | 1 << 28 | 1 << 9 | 1 << 7 | 1 << 22 | 1 << 24 | 5
    lines = do_mem_abort(DABT | 0x10, VA, regs, FakeKernel()).text.splitlines()  # type: ignore[union-attr]
    assert lines[4] == "pstate: 51400285 (nZcV DaIf +PAN -UAO -TCO +DIT -SSBS BTYPE=--)"
    regs.pstate = 0b1010 << 28 | 1 << 23 | 1 << 25 | 1 << 12 | 1 << 8 | 1 << 6 | 5
    other = do_mem_abort(DABT | 0x10, VA, regs, FakeKernel()).text.splitlines()  # type: ignore[union-attr]
    assert other[4] == "pstate: a2801145 (NzCv dAiF -PAN +UAO +TCO -DIT +SSBS BTYPE=--)"
    assert lines[5:9] == [f"pc : {PC:#x}", "lr : 0x1e", f"sp : {regs.sp:016x}",
                          "x29: 000000000000001d x28: 000000000000001c x27: 000000000000001b"]
    assert lines[17] == "x2 : 0000000000000002 x1 : 0000000000000001 x0 : 0000000000000000"
    assert lines[18:] == ["Call trace:", f" {PC:#x} (P)", " 0x1e", "---[ end trace 0000000000000000 ]---"]


def test_a_syndrome_with_an_instruction_in_it() -> None:
    text = do_mem_abort(0x97C18087, VA, Regs(), FakeKernel()).text  # type: ignore[union-attr]
    for line in ("  Access size = 8 byte(s)", "  SSE = 0, SRT = 1", "  SF = 1, AR = 0", "  EA = 0, S1PTW = 1"):
        assert line in text.splitlines()
