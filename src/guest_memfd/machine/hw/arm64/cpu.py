"""One AArch64 CPU. Unicorn executes, our tables translate; after every stop the CPU is in the state that the manual says.

Unicorn is used with UC_TLB_VIRTUAL: it asks for every translation and knows nothing of tables. Exceptions are never
delivered by it; each ends `run` as one of the `Stop` tuples below, and the caller, which is EL2, decides what happens next.
What hypervisors trap is trapped here by the same bits (HCR_EL2.TWI, TVM, TTLB), Arm ARM D22.2 "HCR_EL2".
"""

from __future__ import annotations

import importlib
import mmap
import sys
import time
from collections.abc import Callable
from typing import Any

from guest_memfd.errors import HostUnavailable
from guest_memfd.machine.hw.arm64 import sysreg
from guest_memfd.machine.hw.arm64.access import Transfer, access_of, address_of
from guest_memfd.machine.hw.arm64.fault import ALIGNMENT, Fault
from guest_memfd.machine.hw.arm64.stop import (
    Breakpoint,
    Bus,
    Counted,
    CpuAbort,
    Expired,
    Hvc,
    Smc,
    Stop,
    Svc,
    Undefined,
    Wfi,
)
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Pa, Va

__all__ = [
    "Breakpoint",
    "Bus",
    "Counted",
    "Cpu",
    "CpuAbort",
    "Expired",
    "Hvc",
    "Smc",
    "Stop",
    "Svc",
    "Transfer",
    "Translate",
    "Undefined",
    "Wfi",
    "access_of",
]

Translate = Callable[[Va, Any, int], tuple[Pa, int, bool, bool, bool]]
"""(va, access, el) -> (pa, bytes for which that is linear, readable, writable, executable at el); raises Fault."""

_MASK = 0xffff_ffff_ffff_ffff
_WFI, _MSR, _SYS = 0xd503_207f, 0xd510_0000, 0xd508_0000
# QEMU's exception numbers (target/arm/cpu.h): what the interrupt hook is called with.
_UDEF, _SWI, _DATA_ABORT, _BKPT, _HVC, _SMC = 1, 2, 4, 7, 11, 13
# EL2 and EL3 as a hypervisor leaves them for a guest: EL1 is AArch64 and non-secure, HVC is on, WFI, TLBI and writes of the
# translation registers trap.
_SCR_EL3, _HCR_EL2 = (3, 6, 1, 1, 0), (3, 4, 1, 1, 0)
_SCR = 1 << 10 | 1 << 8 | 3 << 4 | 1
_HCR = 1 << 31 | 1 << 26 | 1 << 25 | 1 << 13
_SCTLR_RESET = 0x30d0_0800
_EL1H, _DAIF, _NZCV = 5, 0xf << 6, 0xf << 28
# Instructions between two looks at the clock. It begins with few, because an exclusive pair costs as much as a thousand
# additions, and doubles as long as a slice stays below some milliseconds.
_FIRST, _MOST, _SECONDS = 1 << 12, 1 << 24, 0.005
# Bytes for code as Unicorn has translated it, which it takes at once and begins anew when they are full; its own choice is
# 1 GiB. And bytes for all else that it asks for.
_TRANSLATED, _SPARE = 32 << 20, 32 << 20
# Translations between two looks at who waits: an instruction or more is executed in every run.
_FILLS = 64
_PERMISSION = {"r": 0, "w": 1, "x": 2}


# Untyped on purpose: Unicorn is an extra, and its annotations lack what the AArch64 class adds.
def _unicorn() -> tuple[Any, Any]:
    try:
        return importlib.import_module("unicorn"), importlib.import_module("unicorn.arm64_const")
    except ModuleNotFoundError as error:
        raise HostUnavailable("the emulated host executes on Unicorn, which is not installed; "
                              "pip install -e '.[emu]'") from error
    except ImportError as error:
        raise HostUnavailable(f"the emulated host executes on Unicorn, which does not load: {error}") from error


# Unicorn ends this process by itself where it finds no memory, so there has to be enough before it is asked for anything.
def _look_for_room() -> None:
    try:
        mmap.mmap(-1, _TRANSLATED + _SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise HostUnavailable(f"a CPU that executes on Unicorn needs {_TRANSLATED + _SPARE >> 20} MiB of address space: "
                              f"{error.strerror}; ulimit -v may allow more") from error


class Cpu:
    """A CPU at EL1 with the MMU off, on *ram*; *translate* is asked for every page it touches.

    *tlbi* is told of each TLB invalidation that EL1 executes: its name in capitals and the value of its register.
    Raises HostUnavailable when Unicorn is missing, or the memory for it.
    """

    def __init__(self, ram: Ram, translate: Translate, tlbi: Callable[[str, int], None] | None = None) -> None:
        unicorn, reg = _unicorn()
        _look_for_room()
        self.ram, self.translate, self.tlbi = ram, translate, tlbi
        self._error: type[Exception] = unicorn.UcError
        self._access = {unicorn.UC_MEM_READ: "r", unicorn.UC_MEM_WRITE: "w", unicorn.UC_MEM_FETCH: "x"}
        self._x = [getattr(reg, f"UC_ARM64_REG_X{n}") for n in range(31)]
        self._pc, self._sp, self._pstate = reg.UC_ARM64_REG_PC, reg.UC_ARM64_REG_SP, reg.UC_ARM64_REG_PSTATE
        self._bank = (reg.UC_ARM64_REG_SP_EL0, reg.UC_ARM64_REG_SP_EL1)
        self._flush = (unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        uc = self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        # Armv8.0: no large-system atomics, no PAN. The model that has them ends this process on some undefined words.
        uc.ctl_set_cpu_model(reg.UC_CPU_ARM64_A72)
        uc.ctl_set_page_size(PAGE)
        uc.ctl_set_tcg_buffer_size(_TRANSLATED)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        uc.ctl_exits_enabled(True)                          # and there are none: no address is special
        uc.mem_map_ptr(ram.base, ram.size, unicorn.UC_PROT_ALL, ram.pointer)
        uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._exception)
        uc.cpr_write(*_SCR_EL3, _SCR)
        uc.cpr_write(*_HCR_EL2, _HCR)
        # Registers that only trapped instructions change: kept here, because every translation may ask for them.
        self._kept = dict.fromkeys(("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1"), 0)
        self.set_sysreg("SCTLR_EL1", _SCTLR_RESET)
        self._code: dict[Pa, bytes] = {}                    # pages that Unicorn has translated, as they were
        self._seen: set[Pa] = set()                         # of these, the ones compared in this run
        self._fetched: dict[Va, Pa] = {}                    # where this run's instructions come from, by page
        self._deadline: float | None = None
        self._fills = 0                                     # of this run
        self.kicked: Callable[[], bool] = lambda: False
        """Whether `run` is to come back before its time, asked between slices."""
        self._forget()

    def release(self) -> None:
        """Give Unicorn's instance back, megabytes of memory; the CPU is of no use afterwards."""
        # The object is part of a cycle of ctypes', which the collector may find much later. Closed without it, the handle,
        # which the object's finalizer has as well, is cleared.
        handle = self._uc._uch
        self._uc.release_handle(handle)
        handle.value = None
        del self._uc

    # -- registers -----------------------------------------------------------------------------------------------

    def x(self, n: int) -> int:
        """General register *n*, 0..30."""
        return int(self._uc.reg_read(self._x[n]))

    def set_x(self, n: int, value: int) -> None:
        """Write general register *n*, 0..30."""
        self._uc.reg_write(self._x[n], value & _MASK)

    @property
    def pc(self) -> int:
        """Address of the next instruction."""
        return int(self._uc.reg_read(self._pc))

    @pc.setter
    def pc(self, value: int) -> None:
        self._uc.reg_write(self._pc, value & _MASK)

    @property
    def sp(self) -> int:
        """The stack pointer that PSTATE selects."""
        return int(self._uc.reg_read(self._sp))

    @sp.setter
    def sp(self, value: int) -> None:
        self._uc.reg_write(self._sp, value & _MASK)

    @property
    def pstate(self) -> int:
        """PSTATE in the layout of SPSR_EL1."""
        return int(self._uc.reg_read(self._pstate)) & 0xffff_ffff

    # Unicorn's SP is a copy of the bank that PSTATE.SP selects. Writing a system register makes it look at PSTATE again.
    @pstate.setter
    def pstate(self, value: int) -> None:
        old, new = self.pstate & 1, value & 1
        if old != new:
            self._uc.reg_write(self._bank[old], self.sp)
            sp = self._uc.reg_read(self._bank[new])
        self._uc.reg_write(self._pstate, value)
        self._uc.cpr_write(*sysreg.ENCODINGS["PAR_EL1"], self.sysreg("PAR_EL1"))
        if old != new:
            self.sp = int(sp)

    @property
    def el(self) -> int:
        """Exception level, 0 or 1."""
        return int(self._uc.reg_read(self._pstate)) >> 2 & 3

    def sysreg(self, name: str) -> int:
        """A system register by its name in the manual, such as ``TTBR0_EL1``; those of translation are cheap to read."""
        kept = self._kept.get(name)
        return int(self._uc.cpr_read(*sysreg.ENCODINGS[name])) if kept is None else kept

    def set_sysreg(self, name: str, value: int) -> None:
        """Write a system register; no TLB is emptied."""
        self._uc.cpr_write(*sysreg.ENCODINGS[name], value & _MASK)
        if name in self._kept or name == "SCTLR_EL1":
            self._kept[name] = value & _MASK

    # -- memory --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Drop all that Unicorn remembers of translations; also done when `run` begins."""
        self._uc.ctl(*self._flush)

    def fetch(self, va: Va) -> int:
        """The instruction at *va*; raises Fault or BusError as executing it would."""
        return int.from_bytes(self.ram.read(self.translate(va, "x", self.el)[0], 4), "little")

    def _forget(self) -> None:
        self._miss: tuple[Va, str, int] | None = None      # the page that was refused last, how it was accessed, by whom
        self._raised: BaseException | None = None
        self._stop: Stop | None = None
        self._changed = False                               # refused because translated code is out of date

    # Called by Unicorn with the address of the page. It must not raise; False makes the access fail.
    def _fill(self, uc: Any, va: Va, kind: int, entry: Any, _: object) -> bool:
        self._miss = None
        access = self._access[kind]
        el = self.el
        try:
            self._fills += 1
            late = self._deadline is not None and time.monotonic() >= self._deadline
            # Asked here as well as between slices: code that misses the TLB in every instruction makes a slice very
            # long.
            if late or (self._fills % _FILLS == 0 and self.kicked()):
                self._stop = Expired()
                uc.emu_stop()
            pa, _size, *permissions = self.translate(va, access, el)
            pa &= -PAGE
            # Outside of RAM there may be a device, and Unicorn knows none: refuse, and find out afterwards what the
            # access was.
            if not (self.ram.base <= pa < self.ram.end and permissions[_PERMISSION[access]]):
                self._miss = va, access, el
                return False
            # The page has changed since Unicorn translated it, by a store that was not the CPU's. Its translation is
            # thrown away, and the slice starts again.
            if access == "x" and not self._current(pa):
                return False
            read, write, execute = permissions
            entry.paddr = pa
            # A page that was filled for a load must be filled again for a fetch, so that its code is compared.
            execute = execute and pa in self._seen
            entry.perms = read | write << 1 | execute << 2
            if execute:
                self._fetched[va] = pa
            return True
        except Fault:
            self._miss = va, access, el
        # An exception must not pass through Unicorn's C code; it is raised when that has returned.
        except BaseException as error:
            self._raised = error
        return False

    # Unicorn sees the CPU's own stores to code that it translated, but not ours to the same RAM: compare.
    def _current(self, pa: Pa) -> bool:
        if pa in self._seen:
            return True
        now = self.ram.read(pa, PAGE)
        self._seen.add(pa)
        before = self._code.setdefault(pa, now)
        if before == now:
            return True
        self._changed = True
        return False

    def _forget_code(self) -> None:
        self._uc.ctl_flush_tb()
        self._code.clear()
        self._seen.clear()
        self.flush()

    # -- execution -----------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None, instructions: int | None = None) -> Stop:
        """Execute until something stops it: *timeout* seconds, a number of *instructions*, or an exception.

        What *translate* raises other than Fault leaves `run` as it is. Without either limit this may never return unless
        it is `kicked`, but always sees ^C.
        """
        self._fills = 0
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._seen.clear()
        self._fetched.clear()
        self.flush()
        try:
            return self._slices(instructions)
        finally:
            # What Unicorn keeps of these pages is what they hold now: the CPU's own stores it has seen.
            for pa in self._seen:
                self._code[pa] = self.ram.read(pa, PAGE)

    def _slices(self, instructions: int | None) -> Stop:
        slice_, now = _FIRST, time.monotonic()
        while instructions is None or instructions > 0:
            # The last instruction is run on its own: whether the next one can be fetched is not its business.
            count = slice_ if instructions is None else max(1, min(slice_, instructions - 1))
            stop = self._slice(count)
            if not isinstance(stop, Counted):
                return stop
            if instructions is not None:
                instructions -= count
            before, now = now, time.monotonic()
            late = self._deadline is not None and now >= self._deadline
            if instructions != 0 and (late or self.kicked()):
                return Expired()
            if now - before < _SECONDS and slice_ < _MOST:
                slice_ *= 2
        return Counted()

    def _slice(self, count: int) -> Stop:
        start = self.pc
        while True:
            self._forget()
            failed = False
            told, sys.unraisablehook = sys.unraisablehook, self._lost
            try:
                self._uc.emu_start(self.pc, 0, count=count)
            except self._error:
                failed = True
            finally:
                sys.unraisablehook = told
            if self._raised is not None:
                raise self._raised
            if self._changed:
                self._forget_code()
                # The one instruction was executed, and what failed is the fetch of the next: that is the next run's
                # business.
                if count == 1 and self.pc != start:
                    return Counted()
                continue
            if self._stop is not None:
                return self._stop
            if not failed:
                return Counted()
            stop = self._refused()
            if count == 1 and self.pc != start:
                return Counted()
            if stop is not None:
                return stop
            self.flush()

    # What a signal raises while Unicorn calls us, before or after our own code, comes here and nowhere else.
    def _lost(self, what: sys.UnraisableHookArgs) -> None:
        self._raised = self._raised or what.exc_value or what.exc_type()

    # What the refused access was, exactly. The page was asked for; now ask for the byte.
    def _refused(self) -> Stop | None:
        if self._miss is None:
            raise RuntimeError(f"Unicorn stopped at {self.pc:#x} for no reason of ours")
        # Unicorn asks for pages. The fault's address must be exact to the byte, since FAR and the zero-padding
        # handler depend on it.
        page, access, el = self._miss
        pc = Va(self.pc)
        va = pc if access == "x" else self._address(page, pc)
        try:
            pa, _size, *permissions = self.translate(va, access, el)
        except Fault as fault:
            return CpuAbort(fault, pc)
        if not permissions[_PERMISSION[access]]:
            raise ValueError(f"translate({va:#x}, {access!r}, {el}) neither raised nor allowed the access")
        return None if self.ram.contains(pa) else Bus(pa, pc, va, access)

    # The first byte of the access that lies in the page: an access that came over from the page before begins there.
    def _address(self, page: Va, pc: Va) -> Va:
        word = self._executed(pc)
        va = address_of(word, pc, lambda n: 0 if n == 31 else self.x(n), lambda: self.sp)
        # An access that crosses into a page reports the first byte of that page, not where it began.
        return Va(va) if va is not None and page <= va < page + PAGE else page

    # Called by Unicorn for everything that is an exception; the state is that of the instruction, or after a call.
    def _exception(self, uc: Any, number: int, _: object) -> None:
        try:
            pc = self.pc
            # The PC is already after a call; for everything else it is at the instruction.
            if number in _CALLS:
                self._stop = _CALLS[number](self._executed(pc - 4) >> 5 & 0xffff)
            elif number == _BKPT:
                self._stop = Breakpoint(self._executed(pc) >> 5 & 0xffff)
            elif number == _DATA_ABORT:
                self._stop = self._misaligned(pc)
            elif number == _UDEF and not pc & 3 and self._trapped(pc):
                return
            elif self._stop is None:
                self._stop = Undefined(pc)
        except BaseException as error:
            self._raised = error
        uc.emu_stop()

    # The instruction that this run executed at *pc*; the tables may say something else by now.
    def _executed(self, pc: int) -> int:
        return int.from_bytes(self.ram.read(self._fetched[Va(pc & -PAGE)] + pc % PAGE, 4), "little")

    # What HCR_EL2 makes trap. True: done, execution goes on after it.
    def _trapped(self, pc: int) -> bool:
        word = self._executed(pc)
        # HCR_EL2.TWI: a guest that waits gives the CPU back instead of stopping it.
        if word == _WFI:
            self.pc = pc + 4
            self._stop = Wfi()
            return False
        if self.el != 1:
            return False
        value = 0 if word & 31 == 31 else self.x(word & 31)
        if word & 0xfff0_0000 == _MSR and word & 0x1f_ffe0 in sysreg.BY_FIELD:
            self.set_sysreg(sysreg.BY_FIELD[word & 0x1f_ffe0], value)
        elif word & 0xfff8_0000 == _SYS and word & 0x1f_ffe0 in sysreg.TLBI_BY_FIELD:
            if self.tlbi is not None:
                self.tlbi(sysreg.TLBI_BY_FIELD[word & 0x1f_ffe0], value)
        else:
            return False
        self.flush()
        self.pc = pc + 4
        return True

    def _misaligned(self, pc: int) -> Stop:
        word = self._executed(pc)
        va = address_of(word, pc, lambda n: 0 if n == 31 else self.x(n), lambda: self.sp)
        where = None if va is None else Va(va)
        return CpuAbort(Fault(ALIGNMENT, None, 1, va=where, access="r" if word >> 22 & 1 else "w", el=self.el), pc)

    def take_exception(self, esr: int, far: int | None = None) -> None:
        """Deliver a synchronous exception to EL1 as the architecture does: the instruction at PC is its cause.

        *far* None leaves FAR_EL1 alone. Arm ARM D1.3 "AArch64.TakeException".
        """
        pstate = self.pstate
        offset = (0x200 if pstate & 1 else 0) if self.el else 0x400
        self.set_sysreg("ELR_EL1", self.pc)
        self.set_sysreg("SPSR_EL1", pstate)
        self.set_sysreg("ESR_EL1", esr)
        if far is not None:
            self.set_sysreg("FAR_EL1", far)
        self.pstate = pstate & _NZCV | _DAIF | _EL1H
        self.pc = self.sysreg("VBAR_EL1") + offset


_CALLS: dict[int, Callable[[int], Stop]] = {_HVC: Hvc, _SMC: Smc, _SWI: Svc}
