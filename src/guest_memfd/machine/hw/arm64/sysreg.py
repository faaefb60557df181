"""System registers by name. An encoding is written once, for the assembler and for the CPU.

Source: Arm ARM (DDI 0487) chapter D22, "AArch64 System Register Descriptions": op0, op1, CRn, CRm, op2.
"""

from __future__ import annotations

from typing import NamedTuple


class Encoding(NamedTuple):
    """How MRS and MSR name a register."""

    op0: int
    op1: int
    crn: int
    crm: int
    op2: int

    @property
    def field(self) -> int:
        """Bits 20:5 of the instruction."""
        return (self.op0 << 19 | self.op1 << 16 | self.crn << 12 | self.crm << 8 | self.op2 << 5) & 0x1f_ffe0


ENCODINGS = {
    "SCTLR_EL1": Encoding(3, 0, 1, 0, 0),
    "CPACR_EL1": Encoding(3, 0, 1, 0, 2),
    "TTBR0_EL1": Encoding(3, 0, 2, 0, 0),
    "TTBR1_EL1": Encoding(3, 0, 2, 0, 1),
    "TCR_EL1": Encoding(3, 0, 2, 0, 2),
    "SPSR_EL1": Encoding(3, 0, 4, 0, 0),
    "ELR_EL1": Encoding(3, 0, 4, 0, 1),
    "SP_EL0": Encoding(3, 0, 4, 1, 0),
    "SPSEL": Encoding(3, 0, 4, 2, 0),
    "CURRENTEL": Encoding(3, 0, 4, 2, 2),
    "ESR_EL1": Encoding(3, 0, 5, 2, 0),
    "FAR_EL1": Encoding(3, 0, 6, 0, 0),
    "PAR_EL1": Encoding(3, 0, 7, 4, 0),
    "MAIR_EL1": Encoding(3, 0, 10, 2, 0),
    "VBAR_EL1": Encoding(3, 0, 12, 0, 0),
    "TPIDR_EL1": Encoding(3, 0, 13, 0, 4),
    "CONTEXTIDR_EL1": Encoding(3, 0, 13, 0, 1),
    "NZCV": Encoding(3, 3, 4, 2, 0),
    "DAIF": Encoding(3, 3, 4, 2, 1),
    "TPIDR_EL0": Encoding(3, 3, 13, 0, 2),
}

BY_FIELD = {encoding.field: name for name, encoding in ENCODINGS.items()}

TLBI = {
    "VMALLE1IS": Encoding(1, 0, 8, 3, 0), "VAE1IS": Encoding(1, 0, 8, 3, 1), "ASIDE1IS": Encoding(1, 0, 8, 3, 2),
    "VAAE1IS": Encoding(1, 0, 8, 3, 3), "VALE1IS": Encoding(1, 0, 8, 3, 5), "VAALE1IS": Encoding(1, 0, 8, 3, 7),
    "VMALLE1": Encoding(1, 0, 8, 7, 0), "VAE1": Encoding(1, 0, 8, 7, 1), "ASIDE1": Encoding(1, 0, 8, 7, 2),
    "VAAE1": Encoding(1, 0, 8, 7, 3), "VALE1": Encoding(1, 0, 8, 7, 5), "VAALE1": Encoding(1, 0, 8, 7, 7),
}
"""TLBI operations that EL1 may use; bits 20:19 are 01 (SYS)."""

TLBI_BY_FIELD = {encoding.field: name for name, encoding in TLBI.items()}
