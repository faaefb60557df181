"""Memory aborts as Linux handles them on arm64: which abort, with which syndrome, from where, ends how.

Theory of operation. The project's first law, host-survives, depends on this file: the same stray load is harmless or a
panic, and the difference is the syndrome that EL1 sees. The dispatch is the kernel's own: the fault status code (ESR bits
5:0) picks a row of fault_info[] (fault_info.py), and the row names a handler. What is printed is in oops.py.

A handler has five ends: `Fixed` (an exception table entry moved the PC), `Retry` (run the instruction again), a signal
for EL0, an oops, a panic. For an access of the kernel's own to a kernel address:

    translation fault      exception table; else is the fault spurious, or pKVM's; else oops
      with S1PTW, on pKVM  exception table; else take the page from its guest by force, and retry; else oops
    permission, AF fault,  exception table; else oops
      alignment
    external abort (SEA)   die, and no exception table is asked: for Linux this is a hardware error
    other codes            die

This table is why the designs differ. Gunyah reports an access to a lent page as a SEA, so load_unaligned_zeropad() kills
the host although it has an exception table entry. pKVM (7.3) reports a translation fault, with the mark S1PTW that no abort
of EL1's own can have. With a hole in stage 1, stage 2 is not asked for the page, and it is an ordinary translation fault on
both. Instruction aborts of the kernel never ask the exception table.
`sea_fixup` is the design that lets do_sea() ask the exception table; no kernel does.

Order in do_kernel_fault(), which decides who loses the page: the exception table comes first, so a load that can be fixed
up leaves the guest its page. Only then AT S1E1R asks stage 1 again. If it fails the fault is real. If it succeeds, the
fault is spurious (another CPU was faster), or with S1PTW stage 2 withholds the page, and pKVM is asked to reclaim it by
force. 0 and -EAGAIN both mean: try again, something has changed. Anything else is an oops.

A fix-up can fault itself: the handler of load_unaligned_zeropad() reads the aligned word that begins in the *first* page.
If the hole is there, this second abort has no entry and the kernel dies in the handler (`KernelDied`).

Left out: KFENCE, kprobes, MTE beyond "tag checks are off from now on", and how a VMA handles its fault: only the result
of *handle_mm_fault* counts here.

Source: arch/arm64/mm/fault.c and extable.c of 7.3. Tests: tests/test_mem_abort.py
(test_every_abort_of_the_kernel, test_no_external_abort_is_fixed_up_by_a_real_kernel,
test_zeropad_behind_stage_2_is_fixed_and_nothing_is_reclaimed); tests/test_oops.py executes kernel text that really faults
(test_a_word_load_that_begins_in_a_hole_dies_in_the_handler).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from errno import EAGAIN
from typing import Protocol

from guest_memfd.machine.hw.arm64.syndrome import Syndrome
from guest_memfd.machine.linux import oops
from guest_memfd.machine.linux.extable import ExceptionTable
from guest_memfd.machine.linux.fault_info import (
    BUS_ADRERR,
    BUS_MCEERR_AR,
    SEGV_ACCERR,
    SEGV_MAPERR,
    SIGBUS,
    SIGSEGV,
    fault_info,
)
from guest_memfd.machine.linux.oops import TASK_SIZE, Oops, Panic, PtRegs, die, user_mode
from guest_memfd.words.units import PAGE, Pa, Va

_EC_IABT_LOWER, _EC_IABT, _EC_DABT = 0x20, 0x21, 0x25
_TRANSLATION = (0x04, 0x05, 0x06, 0x07, 0x2B)
_PERMISSION = (0x0C, 0x0D, 0x0E, 0x0F)
_TAG_CHECK = 0x11
_TAG = 0xFF << 56


@dataclass(frozen=True)
class Fixed:
    """An exception table entry took care of it; execution continues at `pc`."""

    pc: int


@dataclass(frozen=True)
class Retry:
    """Run the instruction again; `why` says what has changed, `warning` what the kernel printed."""

    why: str
    warning: str = ""


@dataclass(frozen=True)
class UserSignal:
    """The task at EL0 gets a signal."""

    signal: int
    code: int
    address: int


Outcome = Fixed | Retry | UserSignal | Oops | Panic


class KernelDied(Exception):  # noqa: N818 - named after what happened
    """A nested abort ended the kernel; raised by `Kernel.read_aligned`."""

    def __init__(self, outcome: Oops | Panic) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class MmFault(Enum):
    """What handle_mm_fault() found for a user address; each leads to another end of do_page_fault()."""

    DONE = "done"
    OOM = "oom"
    SIGBUS = "sigbus"
    HWPOISON = "hwpoison"
    BADMAP = "badmap"
    BADACCESS = "badaccess"


class AbortKernel(oops.Reporter, Protocol):
    """What the handlers ask of the kernel they run in.

    pkvm                    is_pkvm_initialized()
    sea_fixup               do_sea() consults the exception table (no kernel does; a design asks for it)
    pagefault_disabled      faulthandler_disabled(), or no user address space
    """

    extable: ExceptionTable
    pkvm: bool
    sea_fixup: bool
    pagefault_disabled: bool

    def read_aligned(self, va: Va) -> int:
        """The zero-padding handler's own read of an aligned doubleword; raises KernelDied when that dies."""

    def at_s1e1r(self, va: Va) -> Pa | None:
        """Physical address by AT S1E1R, stage 1 only; None when PAR_EL1 reports a translation fault."""

    def force_reclaim(self, pa: Pa) -> int:
        """__pkvm_force_reclaim_guest_page: 0 or a negative errno."""

    def handle_mm_fault(self, va: Va, access: str, user: bool) -> MmFault:
        """Look for the VMA of user address *va* and let it handle the fault; *access* is r, w or x."""


Handler = Callable[[Va, int, PtRegs, AbortKernel], "Outcome | None"]


def do_mem_abort(esr: int, far: Va, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """do_mem_abort(): an abort taken to EL1. *regs* are changed when the outcome is Fixed."""
    info = fault_info[esr & 63]
    try:
        outcome = _HANDLERS[info.handler](far, esr, regs, kernel)
    except KernelDied as dead:
        return dead.outcome
    # None: the handler has nothing to offer, which is do_bad() alone.
    if outcome is not None:
        return outcome
    if not user_mode(regs):
        return die_kernel_fault(info.name, far, esr, regs, kernel)
    return UserSignal(info.signal, info.code, untagged(far))


def untagged(far: Va) -> Va:
    """untagged_addr(): without the tag of a user address; kernel addresses stay as they are."""
    return far if far >> 55 & 1 else far & ~_TAG


# -- handlers ----------------------------------------------------------------------------------------------------


def do_translation_fault(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """A user address may have a VMA; a kernel address has no second chance but the exception table."""
    if untagged(far) < TASK_SIZE:
        return do_page_fault(far, esr, regs, kernel)
    return do_bad_area(far, esr, regs, kernel)


def do_page_fault(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """Permission and access flag faults, and translation faults of user addresses."""
    va, user = untagged(far), user_mode(regs)
    # To handle a fault may sleep, which is not allowed here. Only the exception table is left.
    if kernel.pagefault_disabled:
        return do_kernel_fault(far, esr, regs, kernel)
    # Before the VMA is asked. Stage 1 maps the page, so the VMA would find nothing to do, and the access would fault
    # without end.
    if is_pkvm_stage2_abort(esr, kernel):
        return UserSignal(SIGSEGV, SEGV_ACCERR, far) if user else do_kernel_fault(far, esr, regs, kernel)
    # The kernel may touch user memory only by its uaccess routines, which have an exception table entry each.
    if va < TASK_SIZE and is_el1_permission_fault(esr):
        if is_el1_instruction_abort(esr):
            return die_kernel_fault("execution of user memory", far, esr, regs, kernel)
        if kernel.extable.search(regs.pc) is None:
            return die_kernel_fault("access to user memory outside uaccess routines", far, esr, regs, kernel)
    fault = kernel.handle_mm_fault(va, access_of(esr), user) if va < TASK_SIZE else MmFault.BADMAP
    if fault is MmFault.DONE:
        return Retry("the fault was handled")
    # copy_from_user() and its like then report a short copy. No signal is sent for an access of the kernel's own.
    if not user:
        return do_kernel_fault(far, esr, regs, kernel)
    if fault is MmFault.OOM:
        return Retry("the OOM killer has run")
    return UserSignal(*_SIGNALS[fault], far)


_SIGNALS = {MmFault.SIGBUS: (SIGBUS, BUS_ADRERR), MmFault.HWPOISON: (SIGBUS, BUS_MCEERR_AR),
            MmFault.BADMAP: (SIGSEGV, SEGV_MAPERR), MmFault.BADACCESS: (SIGSEGV, SEGV_ACCERR)}


def do_bad_area(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """A signal at EL0; at EL1 the exception table or the end."""
    if user_mode(regs):
        info = fault_info[esr & 63]
        return UserSignal(info.signal, info.code, far)
    return do_kernel_fault(far, esr, regs, kernel)


def do_alignment_fault(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """As any bad address."""
    return do_bad_area(far, esr, regs, kernel)


def do_tag_check_fault(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """As any bad address; do_kernel_fault() knows how to go on."""
    return do_bad_area(far, esr, regs, kernel)


def do_sea(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """A synchronous external abort is a hardware error: at EL1 the kernel dies, and no exception table is asked.

    With `sea_fixup` it is, for a data abort at EL1 whose FAR is valid.
    """
    syndrome = Syndrome.decode(esr)
    info = fault_info[esr & 63]
    if user_mode(regs):
        return UserSignal(info.signal, info.code, 0 if syndrome.fnv else untagged(far))
    if kernel.sea_fixup and syndrome.data_abort and not syndrome.fnv and fixup_exception(esr, regs, kernel):
        return Fixed(regs.pc)
    return die(info.name, esr, regs, kernel)


def do_bad(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> None:
    """fault_info[]'s handler for faults that nothing can handle; it returns, so do_mem_abort() reports them."""


# -- the kernel's own faults -------------------------------------------------------------------------------------


def do_kernel_fault(far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Outcome:
    """__do_kernel_fault(): fixup, spurious or pKVM, tag check, and then the oops with the best guess."""
    # First, as nothing is changed by it. is_spurious_el1_translation_fault() may take the page from its guest.
    if not is_el1_instruction_abort(esr) and fixup_exception(esr, regs, kernel):
        return Fixed(regs.pc)
    spurious = is_spurious_el1_translation_fault(far, esr, kernel)
    if spurious is not None:
        return spurious
    if esr >> 26 & 63 == _EC_DABT and esr & 63 == _TAG_CHECK:
        return Retry("tag checks are off from now on", "BUG: KASAN: invalid-access")
    return die_kernel_fault(_best_guess(far, esr, kernel), far, esr, regs, kernel)


def _best_guess(far: Va, esr: int, kernel: AbortKernel) -> str:
    if is_el1_permission_fault(esr):
        if Syndrome.decode(esr).write:
            return "write to read-only memory"
        return "execute from non-executable memory" if is_el1_instruction_abort(esr) else "read from unreadable memory"
    if untagged(far) < PAGE:
        return "NULL pointer dereference"
    return "access to hypervisor-protected memory" if is_pkvm_stage2_abort(esr, kernel) else "paging request"


def fixup_exception(esr: int, regs: PtRegs, kernel: AbortKernel) -> bool:
    """fixup_exception() of arch/arm64/mm/extable.c: whether the PC had an entry and was moved to its fixup."""
    return kernel.extable.fixup(regs, esr, kernel.read_aligned)


def is_spurious_el1_translation_fault(far: Va, esr: int, kernel: AbortKernel) -> Retry | None:
    """A translation fault that stage 1 does not confirm: another CPU was faster, or stage 2 withholds it.

    Under pKVM the page is then taken from its guest by force; -EAGAIN, too, is worth another try.
    """
    if esr >> 26 & 63 != _EC_DABT or esr & 63 not in _TRANSLATION:
        return None
    # AT S1E1R looks at stage 1 alone, so a success says: not stage 1's fault.
    pa = kernel.at_s1e1r(far)
    if pa is None:
        return None
    if not is_pkvm_stage2_abort(esr, kernel):
        return Retry("stage 1 translates it by now",
                     f"Ignoring spurious kernel translation fault at virtual address {far:016x}")
    # -EAGAIN: the state of the page has changed meanwhile, or its VM is being torn down.
    if kernel.force_reclaim(pa) in (0, -EAGAIN):
        return Retry("the page was reclaimed by force")
    return None


def die_kernel_fault(what: str, far: Va, esr: int, regs: PtRegs, kernel: AbortKernel) -> Oops | Panic:
    """die_kernel_fault(): the syndrome and the tables first."""
    before = [f"Unable to handle kernel {what} at virtual address {far:016x}",
              *oops.mem_abort_decode(esr, fault_info[esr & 63].name), *oops.show_pte(untagged(far), kernel)]
    return die("Oops", esr, regs, kernel, before)


def is_el1_instruction_abort(esr: int) -> bool:
    """EC: instruction abort without a change of exception level."""
    return esr >> 26 & 63 == _EC_IABT


def is_el1_permission_fault(esr: int) -> bool:
    """A permission fault taken from EL1."""
    return esr >> 26 & 63 in (_EC_DABT, _EC_IABT) and esr & 63 in _PERMISSION


def is_pkvm_stage2_abort(esr: int, kernel: AbortKernel) -> bool:
    """pKVM marks the stage-2 faults that it injects with S1PTW (host_inject_mem_abort, 7.3)."""
    return kernel.pkvm and Syndrome.decode(esr).s1ptw


def access_of(esr: int) -> str:
    """What the fault is to be handled as: x, w or r; cache maintenance counts as a read."""
    syndrome = Syndrome.decode(esr)
    if syndrome.ec == _EC_IABT_LOWER:
        return "x"
    return "w" if syndrome.write and not syndrome.cache_maintenance else "r"


_HANDLERS: dict[str, Handler] = {handler.__name__: handler for handler in (
    do_translation_fault, do_page_fault, do_sea, do_tag_check_fault, do_alignment_fault, do_bad)}
