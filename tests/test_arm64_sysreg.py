"""Encodings of system registers and TLBI, as the Arm ARM (chapters D22 and C5.5) gives them."""

from __future__ import annotations

from guest_memfd.machine.hw.arm64.sysreg import BY_FIELD, ENCODINGS, TLBI, TLBI_BY_FIELD

REGISTERS = """
SCTLR_EL1 S3_0_C1_C0_0    CPACR_EL1 S3_0_C1_C0_2    TTBR0_EL1 S3_0_C2_C0_0    TTBR1_EL1 S3_0_C2_C0_1
TCR_EL1 S3_0_C2_C0_2      SPSR_EL1 S3_0_C4_C0_0     ELR_EL1 S3_0_C4_C0_1      SP_EL0 S3_0_C4_C1_0
SPSEL S3_0_C4_C2_0        CURRENTEL S3_0_C4_C2_2    ESR_EL1 S3_0_C5_C2_0      FAR_EL1 S3_0_C6_C0_0
PAR_EL1 S3_0_C7_C4_0      MAIR_EL1 S3_0_C10_C2_0    VBAR_EL1 S3_0_C12_C0_0    CONTEXTIDR_EL1 S3_0_C13_C0_1
TPIDR_EL1 S3_0_C13_C0_4   NZCV S3_3_C4_C2_0         DAIF S3_3_C4_C2_1         TPIDR_EL0 S3_3_C13_C0_2
"""
OPERATIONS = """
VMALLE1IS S1_0_C8_C3_0  VAE1IS S1_0_C8_C3_1   ASIDE1IS S1_0_C8_C3_2  VAAE1IS S1_0_C8_C3_3
VALE1IS S1_0_C8_C3_5    VAALE1IS S1_0_C8_C3_7 VMALLE1 S1_0_C8_C7_0   VAE1 S1_0_C8_C7_1
ASIDE1 S1_0_C8_C7_2     VAAE1 S1_0_C8_C7_3    VALE1 S1_0_C8_C7_5     VAALE1 S1_0_C8_C7_7
"""


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def test_encodings_are_those_of_the_manual() -> None:
    assert {name: "S{}_{}_C{}_C{}_{}".format(*encoding) for name, encoding in ENCODINGS.items()} == _pairs(REGISTERS)
    assert {name: "S{}_{}_C{}_C{}_{}".format(*encoding) for name, encoding in TLBI.items()} == _pairs(OPERATIONS)


def test_a_field_is_bits_20_to_5_of_the_instruction() -> None:
    # MRS X0, TPIDR_EL0 is 0xd53bd040, MSR VBAR_EL1, X1 is 0xd518c001, TLBI VAALE1IS, X2 is 0xd50883e2.
    field = 0x1f_ffe0
    assert ENCODINGS["TPIDR_EL0"].field == 0xd53bd040 & field
    assert ENCODINGS["VBAR_EL1"].field == 0xd518c001 & field
    assert TLBI["VAALE1IS"].field == 0xd50883e2 & field
    assert {BY_FIELD[encoding.field] for encoding in ENCODINGS.values()} == set(ENCODINGS)
    assert {TLBI_BY_FIELD[encoding.field] for encoding in TLBI.values()} == set(TLBI)
