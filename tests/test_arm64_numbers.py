"""Numbers of the architecture and of Linux on it, as the Arm ARM and Linux's headers give them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.registers import Tcr, Vtcr
from guest_memfd.machine.hw.arm64.syndrome import Syndrome, fsc_name
from guest_memfd.machine.hw.arm64.sysreg import BY_FIELD, ENCODINGS, TLBI, TLBI_BY_FIELD
from guest_memfd.machine.linux import direct_map, fault_info, text
from guest_memfd.words.units import PAGE

# Arm ARM, chapters D22 and C5.5
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


# Arm ARM, TCR_EL1 and VTCR_EL2; granules are no numbers here, and are tested with the walk.
TCR = """T0SZ 5:0, EPD0 7:7, IRGN0 9:8, ORGN0 11:10, SH0 13:12, T1SZ 21:16, A1 22:22, EPD1 23:23, IRGN1 25:24, ORGN1 27:26,
SH1 29:28, IPS 34:32, AS16 36:36, TBI0 37:37, TBI1 38:38, HA 39:39, HD 40:40, HPD0 41:41, HPD1 42:42, E0PD0 55:55,
E0PD1 56:56, DS 59:59"""
VTCR = """T0SZ 5:0, SL0 7:6, IRGN0 9:8, ORGN0 11:10, SH0 13:12, PS 18:16, VS 19:19, HA 21:21, HD 22:22, NSW 29:29, NSA 30:30,
DS 32:32, SL2 33:33"""


@pytest.mark.parametrize(("register", "layout"), [(Tcr, TCR), (Vtcr, VTCR)], ids=["TCR_EL1", "VTCR_EL2"])
def test_fields_of_a_register(register: type[Tcr | Vtcr], layout: str) -> None:
    named = {}
    for name, high, low in re.findall(r"(\w+) (\d+):(\d+)", layout):
        mask = (2 << int(high)) - (1 << int(low))
        found = {n: v for n, v in vars(register.decode(mask)).items() if not isinstance(v, Granule) and v}
        assert found == {name.lower(): mask >> int(low)}
        named[name.lower()] = mask >> int(low)
        only = register.decode(0)
        assert type(only)(**{**vars(only), name.lower(): mask >> int(low)}).value & ~(1 << 31) == mask
    assert set(named) == {n for n, v in vars(register()).items() if not isinstance(v, Granule)}
    bits = sum((2 << int(high)) - (1 << int(low)) for _, high, low in re.findall(r"(\w+) (\d+):(\d+)", layout))
    assert not any(v for v in vars(register.decode(~bits)).values() if not isinstance(v, Granule))


def test_granules_of_a_register() -> None:
    for low, register, field in ((14, Tcr, "tg0"), (14, Vtcr, "tg0"), (30, Tcr, "tg1")):
        codes = (K4, K64, K16) if field == "tg0" else (None, K16, K4, K64)
        for code, granule in enumerate(codes):
            if granule is not None:
                found = register.decode(code << low)
                assert getattr(found, field) is granule
                assert found.value >> low & 3 == code
                assert getattr(register.decode(~(3 << low) | code << low), field) is granule


# Arm ARM, ESR_ELx, ISS encoding for an exception from a Data Abort, DFSC
DFSC = {0x10: "synchronous external abort", 0x11: "tag check fault", 0x18: "parity error", 0x21: "alignment fault",
        0x28: "granule protection fault", 0x30: "TLB conflict abort", 0x31: "unsupported atomic hardware update",
        0x35: "unsupported exclusive or atomic"}
LEVELS = {0x00: "address size fault", 0x04: "translation fault", 0x08: "access flag fault", 0x0C: "permission fault",
          0x14: "synchronous external abort on a walk", 0x1C: "parity error on a walk"}


def test_fault_status_codes() -> None:
    for fsc in range(64):
        level = f"{LEVELS[fsc & ~3]}, level {fsc & 3}" if fsc & ~3 in LEVELS else "reserved"
        assert fsc_name(fsc) == DFSC.get(fsc, level)


# Arm ARM, ESR_ELx.EC
CLASSES = {0x00: "unknown", 0x15: "SVC64", 0x16: "HVC64", 0x17: "SMC64", 0x18: "MSR/MRS", 0x20: "IABT (lower EL)",
           0x21: "IABT (current EL)", 0x22: "PC alignment", 0x24: "DABT (lower EL)", 0x25: "DABT (current EL)",
           0x26: "SP alignment", 0x2F: "SError", 0x3C: "BRK64"}


def test_exception_classes() -> None:
    for ec in range(64):
        assert f": {CLASSES.get(ec, f'EC={ec:#04x}')}, IL" in repr(Syndrome.decode(ec << 26))


def test_signals_and_their_codes() -> None:
    # include/uapi/asm-generic/siginfo.h and signal.h
    assert (fault_info.SIGBUS, fault_info.SIGKILL, fault_info.SIGSEGV) == (7, 9, 11)
    assert (fault_info.SEGV_MAPERR, fault_info.SEGV_ACCERR, fault_info.SEGV_MTESERR) == (1, 2, 9)
    assert (fault_info.BUS_ADRALN, fault_info.BUS_ADRERR, fault_info.BUS_OBJERR, fault_info.BUS_MCEERR_AR) == (1, 2, 3, 4)
    assert fault_info.SI_KERNEL == 0x80


def test_sizes_of_the_direct_map() -> None:
    # asm/pgtable-hwdef.h with 4 KiB pages; arch/arm64/mm/mmu.c for the flags
    assert PAGE == 4 << 10
    assert direct_map.CONT_PTE_SIZE == 64 << 10
    assert direct_map.PMD_SIZE == 2 << 20
    assert direct_map.CONT_PMD_SIZE == 32 << 20
    assert direct_map.PUD_SIZE == 1 << 30
    assert direct_map.PGDIR_SIZE == 512 << 30
    assert (direct_map.NO_BLOCK, direct_map.NO_CONT) == (1, 2)


def test_kernel_text_is_what_is_written_beside_it() -> None:
    assert text.__file__ is not None
    source = Path(text.__file__).read_text(encoding="utf-8")
    for routine in text.ROUTINES:
        listing = source.partition(f'Routine("{routine.name}", (')[2].partition("    )")[0]
        lines = []
        for word, said in re.findall(r"^        (\w+), +#? ?(.*)$", listing.replace("_RET,\n", "_RET, \n"), re.M):
            label, instruction = re.fullmatch(r" *(\d:)? *(.*)", said).groups()      # type: ignore[union-attr]
            unknown = instruction.startswith(("ldtr", "sttr", "sxtw"))                  # to our assembler
            lines.append(f"{label or ''} {f'.word {word}' if unknown else 'ret' if word == '_RET' else instruction}")
        code = assemble("\n".join(lines), text.KIMAGE_VADDR).data
        assert [int.from_bytes(code[at:at + 4], "little") for at in range(0, len(code), 4)] == [*routine.words], routine.name
