"""Unicorn's AArch64 MMU as the one that answers: AT S12E* at EL2 over an array, real accesses at EL1, fetches at EL0.

UC_TLB_CPU with SCR_EL3.NS and HCR_EL2.VM; the memory is the Ram of the other side. Its core is QEMU 5.0: no address size
faults, and a stage-2 fault on a stage-1 walk carries a translation code with stage 1's level.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from oracle.scenes import CODE, RAM
from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_HOOK_MEM_UNMAPPED, UC_MODE_ARM, Uc, UcError
from unicorn.arm64_const import (
    UC_ARM64_REG_PSTATE,
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X1,
    UC_ARM64_REG_X2,
    UC_CPU_ARM64_A72,
)
from unicorn.unicorn_const import UC_PROT_ALL

from guest_memfd.machine.hw.ram import Ram

SYSREG = {
    "SCTLR_EL1": (3, 0, 1, 0, 0), "TTBR0_EL1": (3, 0, 2, 0, 0), "TTBR1_EL1": (3, 0, 2, 0, 1), "TCR_EL1": (3, 0, 2, 0, 2),
    "PAR_EL1": (3, 0, 7, 4, 0), "MAIR_EL1": (3, 0, 10, 2, 0), "HCR_EL2": (3, 4, 1, 1, 0), "VTTBR_EL2": (3, 4, 2, 1, 0),
    "VTCR_EL2": (3, 4, 2, 1, 2), "HPFAR_EL2": (3, 4, 6, 0, 4), "SCR_EL3": (3, 6, 1, 1, 0)}
EL0T, EL1H, EL2H = 0x3c0, 0x3c5, 0x3c9
# AT S12E1R, S12E1W, S12E0R, S12E0W of x3.
AT = {("r", 1): 0xd50c7883, ("w", 1): 0xd50c78a3, ("r", 0): 0xd50c78c3, ("w", 0): 0xd50c78e3}
NOP, ISB = 0xd503201f, 0xd5033fdf
LOAD, STORE, FLUSH, LOOPS = CODE, CODE + 0x10, CODE + 0x20, CODE + 0x100
ARRAYS = CODE + 0x1000
BATCH = 16384


class Abort(NamedTuple):
    """What a real access ended in: registers of the exception level it is taken to."""

    esr: int
    far: int
    el: int
    hpfar: int


class UnicornMmu:
    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        uc = self.uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        uc.ctl_set_cpu_model(UC_CPU_ARM64_A72)
        uc.mem_map_ptr(0, RAM, UC_PROT_ALL, ram.pointer)
        uc.hook_add(UC_HOOK_INTR, self._interrupt)
        uc.hook_add(UC_HOOK_MEM_UNMAPPED, lambda *_: False)
        self._raw: bytes | None = None
        self._exception = 0
        self._code(LOAD, 0xf9400001, NOP)                                   # ldr x1, [x0]
        self._code(STORE, 0xf9000001, NOP)                                  # str x1, [x0]
        self._code(FLUSH, 0xd50c879f, 0xd5033b9f, ISB, NOP)                 # tlbi alle1; dsb ish; isb
        for n, at in enumerate(AT.values()):
            # 1: ldr x3, [x0], #8; at ..., x3; isb; mrs x4, par_el1; str x4, [x1], #8; subs x2, x2, #1; b.ne 1b
            self._code(LOOPS + 64 * n, 0xf8408403, at, ISB, 0xd5387404, 0xf8008424, 0xf1000442,
                       0x54000001 | (-6 & 0x7ffff) << 5, NOP)

    def _code(self, at: int, *words: int) -> None:
        self.ram.write(at, struct.pack(f"<{len(words)}I", *words))

    def _interrupt(self, uc: Uc, *_: object) -> None:
        self._raw = bytes(uc.context_save())
        uc.emu_stop()

    def _run(self, at: int, words: int) -> None:
        self._raw = None
        self.uc.emu_start(at, at + 4 * words)

    def load(self, registers: dict[str, int]) -> None:
        """Enter a regime, with nothing cached."""
        uc = self.uc
        uc.cpr_write(*SYSREG["SCR_EL3"], 0x431)
        for name, value in registers.items():
            uc.cpr_write(*SYSREG[name], value)
        self._enter(EL2H)
        self._run(FLUSH, 3)

    # Any write of a system register makes Unicorn work out the state of the new exception level.
    def _enter(self, pstate: int) -> None:
        self.uc.reg_write(UC_ARM64_REG_PSTATE, pstate)
        self.uc.cpr_write(*SYSREG["PAR_EL1"], 0)

    def translate(self, vas: list[int], access: str, el: int) -> list[int]:
        """PAR_EL1 for every address."""
        loop = LOOPS + 64 * list(AT).index((access, el))
        found: list[int] = []
        for first in range(0, len(vas), BATCH):
            part = vas[first:first + BATCH]
            self.ram.write(ARRAYS, struct.pack(f"<{len(part)}Q", *part))
            out = ARRAYS + 8 * BATCH
            for register, value in ((UC_ARM64_REG_X0, ARRAYS), (UC_ARM64_REG_X1, out), (UC_ARM64_REG_X2, len(part))):
                self.uc.reg_write(register, value)
            self._run(loop, 7)
            assert self._raw is None, "the loop itself faulted"
            found += struct.unpack(f"<{len(part)}Q", self.ram.read(out, 8 * len(part)))
        return found

    # -- real accesses -------------------------------------------------------------------------------------------------

    def enter(self, el: int) -> None:
        """EL1 or EL0; from EL0 only fetches can be asked for."""
        self._enter(EL1H if el else EL0T)

    def access(self, va: int, access: str) -> Abort | None:
        """A load or store of x1 at [va], or a fetch from *va*; None: done."""
        if access == "x":
            return self._outcome(va, 1)
        self.uc.reg_write(UC_ARM64_REG_X0, va)
        self.uc.reg_write(UC_ARM64_REG_X1, 0xd503201fd503201f)
        return self._outcome(LOAD if access == "r" else STORE, 1)

    def _outcome(self, at: int, words: int) -> Abort | None:
        try:
            self._run(at, words)
        except UcError as error:
            raise AssertionError(f"Unicorn stopped at {at:#x}: {error}") from error
        if self._raw is None:
            return None
        syndrome, _, far, el = struct.unpack_from("<IIQI", self._raw, self._exception)
        return Abort(syndrome, far, el, self.uc.cpr_read(*SYSREG["HPFAR_EL2"]))

    def calibrate(self, unmapped: int) -> None:
        """Find env->exception (syndrome, fsr, vaddress, target_el) in a saved context by two loads that must fault."""
        found: set[int] | None = None
        for va in (unmapped, unmapped + 0x18):
            self.uc.reg_write(UC_ARM64_REG_X0, va)
            self._run(LOAD, 1)
            raw = self._raw
            assert raw is not None, f"{va:#x} does not fault"
            here = {at - 8 for at in range(8, len(raw) - 16, 4) if struct.unpack_from("<Q", raw, at)[0] == va
                    and struct.unpack_from("<I", raw, at - 8)[0] >> 26 in (0x24, 0x25)}
            found = here if found is None else found & here
        assert found is not None
        assert len(found) == 1, found
        self._exception = found.pop()
