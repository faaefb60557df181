"""Aborts of the kernel: the fault table, the exception table, and kernel text that really executes and really faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from guest_memfd.machine.hw.arm64.cpu import Cpu, CpuAbort
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import PAGE, Ram
from guest_memfd.machine.linux.extable import ExceptionEntry, ExceptionTable, ExType, registers
from guest_memfd.machine.linux.fault_info import (
    BUS_ADRALN,
    BUS_ADRERR,
    BUS_MCEERR_AR,
    BUS_OBJERR,
    SEGV_ACCERR,
    SEGV_MAPERR,
    SEGV_MTESERR,
    SI_KERNEL,
    SIGBUS,
    SIGKILL,
    SIGSEGV,
    fault_info,
)
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.linux.mem_abort import (
    Fixed,
    KernelDied,
    MmFault,
    Oops,
    Panic,
    Retry,
    UserSignal,
    do_mem_abort,
)
from guest_memfd.machine.linux.text import KIMAGE_VADDR, ROUTINES, KernelText
from guest_memfd.words.primitives import EAGAIN, EFAULT, EPERM

U64 = (1 << 64) - 1
BASE = 0x8000_0000
VA = 0xFFFF_0000_0123_4560
PC = 0xFFFF_8000_8000_0040
DABT, IABT, DABT_USER, IABT_USER = 0x96000000, 0x86000000, 0x92000000, 0x82000000
S1PTW, WNR, FNV = 1 << 7, 1 << 6, 1 << 10
EL1, EL0 = 0x60400005, 0x60000000


@dataclass
class Regs:
    pc: int = PC
    sp: int = 0xFFFF_8000_8000_3F00
    pstate: int = EL1
    file: list[int] = field(default_factory=lambda: [0] * 31)

    def x(self, n: int) -> int:
        return self.file[n]

    def set_x(self, n: int, value: int) -> None:
        self.file[n] = value


class FakeKernel:
    """Answers as told and remembers what it was asked."""

    pkvm = sea_fixup = pagefault_disabled = panic_on_oops = in_interrupt = False
    die_counter = cpu = 0
    pid, comm, uname = 123, "cat", "7.3.4 #1"

    def __init__(self, *entries: ExceptionEntry, **options: Any) -> None:
        self.extable = ExceptionTable(entries)
        self.words: dict[int, int] = {}
        self.stage1: dict[int, int] = {}
        self.reclaims: list[int] = []
        self.reclaim_result = 0
        self.mm_fault = MmFault.BADMAP
        self.asked: list[tuple[int, str, bool]] = []
        for name, value in options.items():
            setattr(self, name, value)

    def read_aligned(self, va: int) -> int:
        if va not in self.words:
            raise KernelDied(Oops(f"nested abort at {va:#x}"))
        return self.words[va]

    def at_s1e1r(self, va: int) -> int | None:
        return self.stage1.get(va)

    def force_reclaim(self, pa: int) -> int:
        self.reclaims.append(pa)
        return self.reclaim_result

    def handle_mm_fault(self, va: int, access: str, user: bool) -> MmFault:
        self.asked.append((va, access, user))
        return self.mm_fault

    def symbol_at(self, pc: int) -> str:
        return f"{pc:#x}"

    def page_table(self, va: int) -> None:
        return None

    def modules(self) -> str:
        return " gunyah"


ZEROPAD = ExceptionEntry(PC, PC + 4, ExType.LOAD_UNALIGNED_ZEROPAD, registers(3, 4))
KACCESS = ExceptionEntry(PC, PC + 8, ExType.KACCESS_ERR_ZERO, registers(9, 2))
UACCESS = ExceptionEntry(PC, PC + 8, ExType.UACCESS_ERR_ZERO, registers(9, 31))


def zeropad(**options: Any) -> tuple[FakeKernel, Regs]:
    """A load of x3 from VA + 5 that may run into the next page."""
    kernel, regs = FakeKernel(ZEROPAD, **options), Regs()
    kernel.words[VA] = 0x8877_6655_4433_2211
    regs.file[4] = VA + 5
    return kernel, regs


# -- the exception table -----------------------------------------------------------------------------------------


def never(va: int) -> int:
    raise AssertionError(f"read of {va:#x}")


@pytest.mark.parametrize("offset", range(8))
def test_zeropad_shifts_and_pads(offset: int) -> None:
    table, regs = ExceptionTable([ZEROPAD]), Regs()
    regs.file[4] = VA + offset
    asked = []
    assert table.fixup(regs, DABT | 7, lambda va: asked.append(va) or 0x8877_6655_4433_2211)
    assert asked == [VA]
    assert regs.file[3] == 0x8877_6655_4433_2211 >> 8 * offset
    assert regs.pc == PC + 4


@pytest.mark.parametrize("entry", [KACCESS, UACCESS])
def test_error_and_zero_registers(entry: ExceptionEntry) -> None:
    table, regs = ExceptionTable([entry]), Regs(file=[77] * 31)
    assert table.fixup(regs, DABT | 7, never)
    assert regs.file[9] == -EFAULT & U64
    assert [n for n in range(31) if regs.file[n] != 77] == ([2, 9] if entry is KACCESS else [9])
    assert regs.pc == PC + 8


def test_bpf_clears_its_register_unless_there_is_none() -> None:
    for data, cleared in ((7, [7]), (5, [])):
        table, regs = ExceptionTable([ExceptionEntry(PC, PC + 4, ExType.BPF, data)]), Regs(file=[77] * 31)
        assert table.fixup(regs, DABT | 7, never)
        assert [n for n in range(31) if regs.file[n] != 77] == cleared


@pytest.mark.parametrize(("data", "esr", "fixed"), [
    (1, DABT | WNR | 7, True), (0, DABT | 7, True), (1, DABT | 7, False), (0, DABT | WNR | 7, False)])
def test_cpy_is_fixed_only_on_its_user_side(data: int, esr: int, fixed: bool) -> None:
    table, regs = ExceptionTable([ExceptionEntry(PC, PC + 4, ExType.UACCESS_CPY, data)]), Regs()
    assert table.fixup(regs, esr, never) is fixed
    assert regs.pc == PC + 4 * fixed


def test_an_entry_without_a_type_is_a_bug() -> None:
    with pytest.raises(ValueError, match="BUG"):
        ExceptionTable([ExceptionEntry(PC, PC, ExType.NONE, 0)]).fixup(Regs(), DABT | 7, never)


def test_search_finds_the_exact_instruction() -> None:
    table = ExceptionTable([KACCESS._replace(insn=PC + 8 * n) for n in (5, 1, 3)])
    table.add([ZEROPAD._replace(insn=PC + 16)])
    found = {offset: entry.type for offset in range(0, 64, 4) if (entry := table.search(PC + offset))}
    assert found == {8: ExType.KACCESS_ERR_ZERO, 16: ExType.LOAD_UNALIGNED_ZEROPAD, 24: ExType.KACCESS_ERR_ZERO,
                     40: ExType.KACCESS_ERR_ZERO}
    assert not table.fixup(Regs(), DABT | 7, never)


def test_entries_are_twelve_bytes_relative_to_themselves() -> None:
    assert ZEROPAD.encode(PC + 0x100) == bytes.fromhex("00ffffff 00ffffff 0500 8300")
    assert ExceptionEntry.decode(PC + 0x100, ZEROPAD.encode(PC + 0x100)) == ZEROPAD
    with pytest.raises(ValueError, match="6"):
        ExceptionEntry.decode(PC, bytes.fromhex("00000000 00000000 0600 0000"))


# -- the fault table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fsc", "handler", "signal", "code", "name"), [
    (0x00, "do_bad", SIGKILL, SI_KERNEL, "ttbr address size fault"),
    (0x03, "do_bad", SIGKILL, SI_KERNEL, "level 3 address size fault"),
    (0x04, "do_translation_fault", SIGSEGV, SEGV_MAPERR, "level 0 translation fault"),
    (0x07, "do_translation_fault", SIGSEGV, SEGV_MAPERR, "level 3 translation fault"),
    (0x09, "do_page_fault", SIGSEGV, SEGV_ACCERR, "level 1 access flag fault"),
    (0x0F, "do_page_fault", SIGSEGV, SEGV_ACCERR, "level 3 permission fault"),
    (0x10, "do_sea", SIGBUS, BUS_OBJERR, "synchronous external abort"),
    (0x11, "do_tag_check_fault", SIGSEGV, SEGV_MTESERR, "synchronous tag check fault"),
    (0x12, "do_bad", SIGKILL, SI_KERNEL, "unknown 18"),
    (0x13, "do_sea", SIGKILL, SI_KERNEL, "level -1 (translation table walk)"),
    (0x17, "do_sea", SIGKILL, SI_KERNEL, "level 3 (translation table walk)"),
    (0x18, "do_sea", SIGBUS, BUS_OBJERR, "synchronous parity or ECC error"),
    (0x1A, "do_bad", SIGKILL, SI_KERNEL, "unknown 26"),
    (0x1B, "do_sea", SIGKILL, SI_KERNEL, "level -1 synchronous parity error (translation table walk)"),
    (0x1F, "do_sea", SIGKILL, SI_KERNEL, "level 3 synchronous parity error (translation table walk)"),
    (0x20, "do_bad", SIGKILL, SI_KERNEL, "unknown 32"),
    (0x21, "do_alignment_fault", SIGBUS, BUS_ADRALN, "alignment fault"),
    (0x29, "do_bad", SIGKILL, SI_KERNEL, "level -1 address size fault"),
    (0x2B, "do_translation_fault", SIGSEGV, SEGV_MAPERR, "level -1 translation fault"),
    (0x30, "do_bad", SIGKILL, SI_KERNEL, "TLB conflict abort"),
    (0x31, "do_bad", SIGKILL, SI_KERNEL, "Unsupported atomic hardware update fault"),
    (0x34, "do_bad", SIGKILL, SI_KERNEL, "implementation fault (lockdown abort)"),
    (0x3D, "do_bad", SIGKILL, SI_KERNEL, "section domain fault"),
    (0x3E, "do_bad", SIGKILL, SI_KERNEL, "page domain fault"),
    (0x35, "do_bad", SIGBUS, BUS_OBJERR, "implementation fault (unsupported exclusive)"),
    (0x3F, "do_bad", SIGKILL, SI_KERNEL, "unknown 63"),
])
def test_rows_of_the_fault_table(fsc: int, handler: str, signal: int, code: int, name: str) -> None:
    row = fault_info[fsc]
    assert (row.handler, row.signal, row.code, row.name) == (handler, signal, code, name)


# What survives a kernel access of a kernel address: with an entry of type 5, and without any.
FIXED = [*range(0x04, 0x10), 0x11, 0x21, 0x2B]


@pytest.mark.parametrize("fsc", range(64))
def test_every_abort_of_the_kernel(fsc: int) -> None:
    kernel, regs = zeropad()
    outcome = do_mem_abort(DABT | fsc, VA + 5, regs, kernel)
    if fsc in FIXED:
        assert outcome == Fixed(PC + 4)
        assert (regs.pc, regs.file[3]) == (PC + 4, 0x88_7766)
    else:
        assert isinstance(outcome, Oops)
        assert regs.pc == PC
    plain = do_mem_abort(DABT | fsc, VA + 5, Regs(), FakeKernel())
    assert isinstance(plain, Retry if fsc == 0x11 else Oops)
    # An instruction abort never looks at the table.
    assert isinstance(do_mem_abort(IABT | fsc, PC, Regs(), FakeKernel(ZEROPAD)), Oops)


@pytest.mark.parametrize("fsc", range(64))
def test_every_abort_of_user_space_is_a_signal(fsc: int) -> None:
    kernel = FakeKernel()
    outcome = do_mem_abort(DABT_USER | fsc, VA, Regs(pstate=EL0), kernel)
    assert isinstance(outcome, UserSignal)
    row = fault_info[fsc]
    # A kernel address has no VMA, whatever else was wrong with the access.
    expected = SEGV_MAPERR if row.handler == "do_page_fault" else row.code
    assert (outcome.signal, outcome.code, outcome.address) == (row.signal, expected, VA)
    assert not kernel.asked


@pytest.mark.parametrize("hole", [VA + 8, VA])
def test_zeropad_does_not_ask_which_page_faulted(hole: int) -> None:
    kernel, regs = zeropad()
    if hole == VA:
        kernel.words.clear()
        assert do_mem_abort(DABT | 7, VA + 5, regs, kernel) == Oops(f"nested abort at {VA:#x}")
        assert regs.pc == PC
    else:
        assert do_mem_abort(DABT | 7, VA + 8, regs, kernel) == Fixed(PC + 4)


# -- stage 2 -----------------------------------------------------------------------------------------------------


def test_zeropad_behind_stage_2_is_fixed_and_nothing_is_reclaimed() -> None:
    kernel, regs = zeropad(pkvm=True)
    kernel.stage1[VA + 8] = BASE
    assert do_mem_abort(DABT | S1PTW | 7, VA + 8, regs, kernel) == Fixed(PC + 4)
    assert not kernel.reclaims


@pytest.mark.parametrize(("result", "retried"), [(0, True), (-EAGAIN, True), (-EPERM, False), (-EFAULT, False)])
def test_plain_access_behind_stage_2_reclaims_by_force(result: int, retried: bool) -> None:
    kernel = FakeKernel(pkvm=True, reclaim_result=result)
    kernel.stage1[VA] = BASE + 0x560
    outcome = do_mem_abort(DABT | S1PTW | WNR | 7, VA, Regs(), kernel)
    assert kernel.reclaims == [BASE + 0x560]
    if retried:
        assert outcome == Retry("the page was reclaimed by force")
    else:
        assert isinstance(outcome, Oops)
        assert outcome.text.startswith(
            f"Unable to handle kernel access to hypervisor-protected memory at virtual address {VA:016x}\n")


@pytest.mark.parametrize("fsc", [4, 5, 6, 7, 0x2B])
def test_translation_faults_of_every_level_are_reclaimed(fsc: int) -> None:
    kernel = FakeKernel(pkvm=True)
    kernel.stage1[VA] = BASE
    assert isinstance(do_mem_abort(DABT | S1PTW | fsc, VA, Regs(), kernel), Retry)
    assert kernel.reclaims == [BASE]


@pytest.mark.parametrize(("esr", "kernel"), [
    (DABT | S1PTW | 0x0F, FakeKernel(pkvm=True)),       # a permission fault is none of it
    (IABT | S1PTW | 7, FakeKernel(pkvm=True)),          # nor is an instruction abort
    (DABT | S1PTW | 0x10, FakeKernel(pkvm=True)),       # nor an external abort
    (DABT | 7, FakeKernel(pkvm=True)),
])
def test_what_is_never_reclaimed(esr: int, kernel: FakeKernel) -> None:
    if esr & 63 != 7 or esr & S1PTW:
        kernel.stage1[VA] = BASE
    assert isinstance(do_mem_abort(esr, VA, Regs(), kernel), Oops)
    assert not kernel.reclaims


@pytest.mark.parametrize(("esr", "pkvm"), [(DABT | 7, False), (DABT | 7, True), (DABT | S1PTW | 7, False)])
def test_a_spurious_fault_is_ignored_with_a_warning(esr: int, pkvm: bool) -> None:
    kernel = FakeKernel(pkvm=pkvm)
    kernel.stage1[VA] = BASE
    outcome = do_mem_abort(esr, VA, Regs(), kernel)
    assert isinstance(outcome, Retry)
    assert outcome.warning == f"Ignoring spurious kernel translation fault at virtual address {VA:016x}"
    assert not kernel.reclaims


def test_user_space_and_uaccess_behind_stage_2() -> None:
    for esr in (DABT_USER, IABT_USER):
        kernel = FakeKernel(pkvm=True)
        assert do_mem_abort(esr | S1PTW | 7, 0x1000, Regs(pstate=EL0), kernel) == UserSignal(SIGSEGV, SEGV_ACCERR, 0x1000)
        assert not kernel.asked
    kernel, regs = FakeKernel(UACCESS, pkvm=True), Regs()
    assert do_mem_abort(DABT | S1PTW | 7, 0x1000, regs, kernel) == Fixed(PC + 8)
    assert regs.file[9] == -EFAULT & U64


# -- external aborts ---------------------------------------------------------------------------------------------

SEAS = [0x10, *range(0x13, 0x18), 0x18, *range(0x1B, 0x20)]


@pytest.mark.parametrize("fsc", SEAS)
@pytest.mark.parametrize("entry", [ZEROPAD, KACCESS, UACCESS])
def test_no_external_abort_is_fixed_up_by_a_real_kernel(fsc: int, entry: ExceptionEntry) -> None:
    kernel, regs = FakeKernel(entry), Regs()
    kernel.words[VA] = 1
    regs.file[4] = VA
    outcome = do_mem_abort(DABT | fsc, VA, regs, kernel)
    assert isinstance(outcome, Oops)
    assert outcome.text.startswith(f"Internal error: {fault_info[fsc].name}: {DABT | fsc:016x} [#1] SMP\n")
    assert regs.pc == PC


@pytest.mark.parametrize("fsc", SEAS)
def test_a_design_may_ask_for_fixups_of_external_aborts(fsc: int) -> None:
    kernel, regs = zeropad(sea_fixup=True)
    assert do_mem_abort(DABT | fsc, VA + 8, regs, kernel) == Fixed(PC + 4)
    assert regs.file[3] == 0x88_7766
    for esr, where in ((DABT | FNV | fsc, PC), (IABT | fsc, PC), (DABT | fsc, PC + 4)):
        kernel, regs = zeropad(sea_fixup=True)
        regs.pc = where
        assert isinstance(do_mem_abort(esr, VA + 8, regs, kernel), Oops)


@pytest.mark.parametrize(("esr", "address"), [(DABT_USER | 0x10, 0x1234), (DABT_USER | FNV | 0x10, 0)])
def test_external_abort_of_user_space(esr: int, address: int) -> None:
    for sea_fixup in (False, True):
        kernel = FakeKernel(sea_fixup=sea_fixup)
        assert do_mem_abort(esr, 0x1234, Regs(pstate=EL0), kernel) == UserSignal(SIGBUS, BUS_OBJERR, address)


# -- user addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "outcome"), [
    (MmFault.DONE, Retry("the fault was handled")),
    (MmFault.OOM, Retry("the OOM killer has run")),
    (MmFault.SIGBUS, UserSignal(SIGBUS, BUS_ADRERR, 0x1000)),
    (MmFault.HWPOISON, UserSignal(SIGBUS, BUS_MCEERR_AR, 0x1000)),
    (MmFault.BADMAP, UserSignal(SIGSEGV, SEGV_MAPERR, 0x1000)),
    (MmFault.BADACCESS, UserSignal(SIGSEGV, SEGV_ACCERR, 0x1000)),
])
def test_faults_of_user_space(fault: MmFault, outcome: object) -> None:
    kernel = FakeKernel(mm_fault=fault)
    assert do_mem_abort(DABT_USER | WNR | 7, 0x1000, Regs(pstate=EL0), kernel) == outcome
    assert kernel.asked == [(0x1000, "w", True)]


@pytest.mark.parametrize(("esr", "access"), [
    (DABT_USER | 7, "r"), (DABT_USER | WNR | 0xF, "w"), (DABT_USER | WNR | 1 << 8 | 7, "r"), (IABT_USER | 7, "x")])
def test_what_a_fault_is_handled_as(esr: int, access: str) -> None:
    kernel = FakeKernel(mm_fault=MmFault.DONE)
    do_mem_abort(esr, 0x1000, Regs(pstate=EL0), kernel)
    assert kernel.asked == [(0x1000, access, True)]


@pytest.mark.parametrize("fault", [f for f in MmFault if f is not MmFault.DONE])
def test_uaccess_that_fails_is_efault(fault: MmFault) -> None:
    kernel, regs = FakeKernel(UACCESS, mm_fault=fault), Regs()
    assert do_mem_abort(DABT | 7, 0x1000, regs, kernel) == Fixed(PC + 8)
    assert regs.file[9] == -EFAULT & U64
    assert kernel.asked == [(0x1000, "r", False)]


def test_uaccess_with_page_faults_disabled_asks_no_vma() -> None:
    kernel = FakeKernel(UACCESS, pagefault_disabled=True)
    assert do_mem_abort(DABT | 7, 0x1000, Regs(), kernel) == Fixed(PC + 8)
    assert not kernel.asked


@pytest.mark.parametrize(("esr", "far", "kernel", "message"), [
    (DABT | 0xF, 0x1000, FakeKernel(), "access to user memory outside uaccess routines"),
    (IABT | 0xF, 0x1000, FakeKernel(), "execution of user memory"),
    (DABT | WNR | 0xF, VA, FakeKernel(), "write to read-only memory"),
    (IABT | 0xF, VA, FakeKernel(), "execute from non-executable memory"),
    (DABT | 0xF, VA, FakeKernel(), "read from unreadable memory"),
    (DABT | 6, 0x10, FakeKernel(pagefault_disabled=True), "NULL pointer dereference"),
    (DABT | S1PTW | 7, VA, FakeKernel(pkvm=True), "access to hypervisor-protected memory"),
    (DABT | S1PTW | 7, VA, FakeKernel(), "paging request"),
    (DABT | 0, VA, FakeKernel(), "ttbr address size fault"),
    (DABT | 0x30, VA, FakeKernel(), "TLB conflict abort"),
])
def test_the_first_line_of_an_oops(esr: int, far: int, kernel: FakeKernel, message: str) -> None:
    outcome = do_mem_abort(esr, far, Regs(), kernel)
    assert isinstance(outcome, Oops)
    assert outcome.text.splitlines()[0] == f"Unable to handle kernel {message} at virtual address {far:016x}"


@pytest.mark.parametrize("level", range(4))
def test_permission_faults_of_every_level_say_so(level: int) -> None:
    outcome = do_mem_abort(DABT | 0x0C + level, VA, Regs(), FakeKernel())
    assert "Unable to handle kernel read from unreadable memory" in outcome.text  # type: ignore[union-attr]
    assert "paging request" in do_mem_abort(DABT | 0x08 + level, VA, Regs(), FakeKernel()).text  # type: ignore[union-attr]


@pytest.mark.parametrize(("far", "asked"), [((1 << 48) - 1, True), (1 << 48, False)])
@pytest.mark.parametrize("fsc", [7, 0xB])
def test_user_addresses_end_at_task_size(fsc: int, far: int, asked: bool) -> None:
    kernel = FakeKernel(UACCESS, mm_fault=MmFault.BADMAP)
    assert do_mem_abort(DABT | fsc, far, Regs(), kernel) == Fixed(PC + 8)
    assert bool(kernel.asked) is asked


@pytest.mark.parametrize(("options", "last"), [
    ({"panic_on_oops": True}, "Oops: Fatal exception"),
    ({"in_interrupt": True}, "Oops: Fatal exception in interrupt"),
    ({"in_interrupt": True, "panic_on_oops": True}, "Oops: Fatal exception in interrupt"),
    ({"pid": 0}, "Attempted to kill the idle task!"),
    ({"pid": 1}, "Attempted to kill init! exitcode=0x0000000b"),
])
def test_where_an_oops_is_a_panic(options: dict[str, Any], last: str) -> None:
    outcome = do_mem_abort(DABT | 7, VA, Regs(), FakeKernel(**options))
    assert isinstance(outcome, Panic)
    assert outcome.text.splitlines()[-1] == f"Kernel panic - not syncing: {last}"


def test_oopses_are_counted() -> None:
    kernel = FakeKernel()
    texts = [do_mem_abort(DABT | 0x10, VA, Regs(), kernel).text for _ in range(2)]  # type: ignore[union-attr]
    assert ["[#1]" in texts[0], "[#2]" in texts[1]] == [True, True]


# -- the same with a CPU -----------------------------------------------------------------------------------------

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
