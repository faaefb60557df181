"""ESR_ELx as named fields. Here is what each bit of an abort's syndrome is called.

arch/arm64/include/asm/esr.h; Arm ARM, ESR_EL1, ISS encodings for Instruction and Data Aborts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from guest_memfd.compat import override

EC_NAMES = {
    0x00: "unknown", 0x15: "SVC64", 0x16: "HVC64", 0x17: "SMC64", 0x18: "MSR/MRS", 0x20: "IABT (lower EL)",
    0x21: "IABT (current EL)", 0x22: "PC alignment", 0x24: "DABT (lower EL)", 0x25: "DABT (current EL)",
    0x26: "SP alignment", 0x2f: "SError", 0x3c: "BRK64",
}
_BY_LEVEL = ((0x00, "address size fault"), (0x04, "translation fault"), (0x08, "access flag fault"),
             (0x0c, "permission fault"), (0x14, "synchronous external abort on a walk"), (0x1c, "parity error on a walk"))
_SINGLE = {0x10: "synchronous external abort", 0x11: "tag check fault", 0x18: "parity error", 0x21: "alignment fault",
           0x28: "granule protection fault", 0x30: "TLB conflict abort", 0x31: "unsupported atomic hardware update",
           0x35: "unsupported exclusive or atomic"}
_SIZES = ("byte", "halfword", "word", "doubleword")


def fsc_name(fsc: int) -> str:
    """A fault status code in words."""
    if fsc in _SINGLE:
        return _SINGLE[fsc]
    for base, name in _BY_LEVEL:
        if base <= fsc < base + 4:
            return f"{name}, level {fsc - base}"
    return "reserved"


@dataclass(frozen=True, repr=False)
class Syndrome:
    """A 64-bit ESR: EC, IL, ISS and ISS2; the abort fields are properties and read as 0 or False elsewhere."""

    ec: int
    il: int = 1
    iss: int = 0
    iss2: int = 0

    @property
    def value(self) -> int:
        """The 64 bits of ESR_ELx: ISS2 55:32, EC 31:26, IL 25, ISS 24:0."""
        return self.iss2 << 32 | self.ec << 26 | self.il << 25 | self.iss

    @classmethod
    def decode(cls, value: int) -> Self:
        """The fields of a register value."""
        return cls(value >> 26 & 63, value >> 25 & 1, value & 0x1ffffff, value >> 32 & 0xffffff)

    @property
    def data_abort(self) -> bool:
        """Whether EC says Data Abort."""
        return self.ec in (0x24, 0x25)

    @property
    def instruction_abort(self) -> bool:
        """Whether EC says Instruction Abort."""
        return self.ec in (0x20, 0x21)

    @property
    def abort(self) -> bool:
        """Whether EC says either abort."""
        return self.data_abort or self.instruction_abort

    @property
    def fsc(self) -> int:
        """DFSC or IFSC, bits 5:0: which fault it was, and at which level; 0 where it is no abort."""
        return self.iss & 63 if self.abort else 0

    @property
    def s1ptw(self) -> bool:
        """A stage-2 fault on a stage-1 walk."""
        return self.abort and bool(self.iss >> 7 & 1)

    @property
    def fnv(self) -> bool:
        """FAR is not valid."""
        return self.abort and bool(self.iss >> 10 & 1)

    @property
    def ea(self) -> bool:
        """EA, bit 9: the external abort's type, which the implementation chooses."""
        return self.abort and bool(self.iss >> 9 & 1)

    @property
    def write(self) -> bool:
        """WnR of a data abort."""
        return self.data_abort and bool(self.iss >> 6 & 1)

    @property
    def cache_maintenance(self) -> bool:
        """CM of a data abort."""
        return self.data_abort and bool(self.iss >> 8 & 1)

    @property
    def isv(self) -> bool:
        """SAS, SSE, SRT, SF and AR are valid."""
        return self.data_abort and bool(self.iss >> 24 & 1)

    @property
    def sas(self) -> int:
        """log2 of the bytes accessed."""
        return self.iss >> 22 & 3 if self.isv else 0

    @property
    def sse(self) -> bool:
        """SSE, bit 21: the load sign-extends."""
        return self.isv and bool(self.iss >> 21 & 1)

    @property
    def srt(self) -> int:
        """The register loaded or stored."""
        return self.iss >> 16 & 31 if self.isv else 0

    @property
    def sf(self) -> bool:
        """The register is 64 bits wide."""
        return self.isv and bool(self.iss >> 15 & 1)

    @property
    def ar(self) -> bool:
        """Acquire or release semantics."""
        return self.isv and bool(self.iss >> 14 & 1)

    @override
    def __repr__(self) -> str:
        parts = [EC_NAMES.get(self.ec, f"EC={self.ec:#04x}"), f"IL={32 if self.il else 16} bits"]
        if not self.abort:
            return f"ESR {self.value:#010x}: {', '.join([*parts, f'ISS={self.iss:#x}'])}"
        parts.append(f"{'DFSC' if self.data_abort else 'IFSC'}={self.fsc:#04x} {fsc_name(self.fsc)}")
        if self.data_abort:
            parts.append("write" if self.write else "read")
        if self.isv:
            parts.append(f"{_SIZES[self.sas]} of {'x' if self.sf else 'w'}{self.srt}{' sign-extended' * self.sse}"
                         f"{' acquire/release' * self.ar}")
        flags = (("S1PTW", self.s1ptw), ("FnV", self.fnv), ("EA", self.ea), ("CM", self.cache_maintenance))
        parts += [name for name, on in flags if on]
        return f"ESR {self.value:#010x}: {', '.join(parts)}"
