"""A translation fault as hardware reports it. Here is which fault gives which status code and registers.

FSC: EncodeLDFSC of the Arm ARM (arch/arm64/mm/fault.c fault_info[]); HPFAR_EL2: IPAValid (kvm/hyp/include/hyp/fault.h).
The syndrome's layout is in syndrome.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64.syndrome import Syndrome as Syndrome
from guest_memfd.words.units import Ipa, Va

TRANSLATION = "translation"
ACCESS_FLAG = "access flag"
PERMISSION = "permission"
ADDRESS_SIZE = "address size"
EXTERNAL_ABORT = "external abort"
TLB_CONFLICT = "tlb conflict"
ALIGNMENT = "alignment"

# FSC of level 0; the level is added.
_BY_LEVEL = {ADDRESS_SIZE: 0x00, TRANSLATION: 0x04, ACCESS_FLAG: 0x08, PERMISSION: 0x0c, EXTERNAL_ABORT: 0x14}
# Without a level: an external abort of the access itself and not of a walk.
_WITHOUT = {EXTERNAL_ABORT: 0x10, ALIGNMENT: 0x21, TLB_CONFLICT: 0x30}
# Stage-2 faults whose IPA is in HPFAR_EL2; a permission fault is among them only on a stage-1 walk.
_IPA_VALID = (ADDRESS_SIZE, TRANSLATION, ACCESS_FLAG)

_EC_IABT, _EC_DABT = 0x20, 0x24
_SIZES = {1: 0, 2: 1, 4: 2, 8: 3}


@dataclass(frozen=True)
class LoadStore:
    """A load or store of one general-purpose register, as ISV describes it: *size* bytes to or from x*register*."""

    register: int
    size: int = 8
    sixty_four: bool = True
    sign_extend: bool = False
    acquire_release: bool = False


class Fault(Exception):  # noqa: N818 - named after what it is
    """One fault: *kind* at *level* (None: it has none) of *stage*, of an access ``r``, ``w`` or ``x`` from *el*.

    *s1ptw*: a stage-2 fault on the fetch of a stage-1 descriptor; *ipa* is then the descriptor's.
    """

    def __init__(self, kind: str, level: int | None, stage: int, s1ptw: bool = False, va: Va | None = None,
                 ipa: Ipa | None = None, access: str = "r", el: int = 1) -> None:
        super().__init__(kind, level, stage, s1ptw, va, ipa, access, el)
        self.kind, self.level, self.stage, self.s1ptw = kind, level, stage, s1ptw
        self.va, self.ipa, self.access, self.el = va, ipa, access, el

    @property
    def fsc(self) -> int:
        """DFSC or IFSC, 6 bits."""
        if self.level is None:
            return _WITHOUT[self.kind]
        if self.kind in _BY_LEVEL:
            return _BY_LEVEL[self.kind] + self.level
        return _WITHOUT[self.kind]

    # WnR says what the access was, on a stage-1 walk too (AArch64.FaultSyndrome); IABT has no such bit.
    def _esr(self, same_el: int, far_valid: bool, rest: int = 0) -> int:
        ec = _EC_IABT if self.access == "x" else _EC_DABT
        fnv = self.kind == EXTERNAL_ABORT and self.level is None and not far_valid
        return ((ec | same_el) << 26 | 1 << 25 | rest | fnv << 10 | self.s1ptw << 7 | (self.access == "w") << 6 | self.fsc)

    def esr_el1(self, far_valid: bool = True) -> int:
        """ESR_EL1 when taken to EL1: EC says lower EL for EL0 and same EL for EL1; ISV is never set.

        *far_valid*: whether the implementation writes FAR for an external abort of the access itself; if not, FnV is set.
        """
        return self._esr(1 if self.el else 0, far_valid)

    def esr_el2(self, instruction: LoadStore | None = None, far_valid: bool = True) -> int:
        """ESR_EL2 when taken to EL2; ISV..AR only for a stage-2 fault of a simple load or store, not on a stage-1 walk."""
        rest = 0
        # A hypervisor emulates a device from these bits. On a walk the fault is not about the instruction's own
        # operand, so the bits would be wrong.
        if instruction is not None and self.stage == 2 and not self.s1ptw and self.access != "x" \
                and self.kind != EXTERNAL_ABORT:
            rest = 1 << 24 | _SIZES[instruction.size] << 22 | instruction.sign_extend << 21 | instruction.register << 16 \
                | instruction.sixty_four << 15 | instruction.acquire_release << 14
        return self._esr(0, far_valid, rest)

    @property
    def far(self) -> Va:
        """FAR_ELx: the virtual address that was accessed; raises ValueError when the fault knows none."""
        if self.va is None:
            raise ValueError(f"{self!r} was raised without a virtual address")
        return self.va

    @property
    def hpfar(self) -> int | None:
        """HPFAR_EL2 (IPA[51:12] from bit 4 on); None where the architecture leaves it UNKNOWN."""
        if self.stage != 2 or self.ipa is None:
            return None
        # An ordinary stage-2 permission fault does not write HPFAR_EL2: a hypervisor has to find the IPA with AT
        # S1E1R.
        if self.kind in _IPA_VALID or (self.s1ptw and self.kind == PERMISSION):
            return (self.ipa >> 12) << 4
        return None

    @override
    def __repr__(self) -> str:
        parts = [f"{self.kind} fault" if "abort" not in self.kind else self.kind]
        if self.level is not None:
            parts.append(f"L{self.level}")
        parts.append(f"stage {self.stage}")
        if self.s1ptw:
            parts.append("on a stage-1 walk")
        parts.append({"r": "read", "w": "write", "x": "fetch"}[self.access] + f" at EL{self.el}")
        parts += [f"{name}={at:#x}" for name, at in (("VA", self.va), ("IPA", self.ipa)) if at is not None]
        return f"<{' '.join(parts)}>"

    __str__ = __repr__


class Inject(NamedTuple):
    """An exception that EL1 takes: what its ESR_EL1 and, unless None, its FAR_EL1 say."""

    esr: int
    far: int | None
