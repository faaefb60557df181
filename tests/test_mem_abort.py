"""What an abort leads to: exception table, fault table, stage 2, external aborts, user addresses."""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EPERM
from typing import Any

import pytest
from aborts import BASE, DABT, DABT_USER, EL0, FNV, IABT, IABT_USER, PC, S1PTW, U64, VA, WNR, FakeKernel, Regs

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
from guest_memfd.machine.linux.mem_abort import (
    Fixed,
    MmFault,
    Oops,
    Panic,
    Retry,
    UserSignal,
    do_mem_abort,
)

ZEROPAD = ExceptionEntry(PC, PC + 4, ExType.LOAD_UNALIGNED_ZEROPAD, registers(3, 4))
KACCESS = ExceptionEntry(PC, PC + 8, ExType.KACCESS_ERR_ZERO, registers(9, 2))
UACCESS = ExceptionEntry(PC, PC + 8, ExType.UACCESS_ERR_ZERO, registers(9, 31))


def zeropad(**options: Any) -> tuple[FakeKernel, Regs]:
    """A load of x3 from VA + 5 that may run into the next page."""
    kernel, regs = FakeKernel(ZEROPAD, **options), Regs()
    kernel.words[VA] = 0x8877_6655_4433_2211
    regs.file[4] = VA + 5
    return kernel, regs


# -- the exception table -----------------------------------------------------------------------------------------------


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


# -- the fault table ---------------------------------------------------------------------------------------------------


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


# -- stage 2 -----------------------------------------------------------------------------------------------------------


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


# -- external aborts ---------------------------------------------------------------------------------------------------


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


# -- user addresses ----------------------------------------------------------------------------------------------------


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
