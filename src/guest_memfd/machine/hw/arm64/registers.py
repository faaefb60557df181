"""The system registers that say how to translate, bit by bit. Here are encodings, and no meaning.

TCR_EL1 and VTCR_EL2 as in arch/arm64/tools/sysreg; the granule field has another encoding in each half of TCR_EL1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from guest_memfd.compat import override
from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule

PA_BITS = (32, 36, 40, 42, 44, 48, 52, 56)
"""Bits of address for each code of IPS, PS and ID_AA64MMFR0_EL1.PARange."""

# TG0 (TCR_EL1 and VTCR_EL2) and TG1 count differently; the reserved code reads as 4K here.
_TG0 = (K4, K64, K16, K4)
_TG1 = (K4, K16, K4, K64)
_TG0_CODE = {K4: 0, K64: 1, K16: 2}
_TG1_CODE = {K16: 1, K4: 2, K64: 3}

# name: (lowest bit, width). Granules are converted on the way in and out.
_TCR = {
    "t0sz": (0, 6), "epd0": (7, 1), "irgn0": (8, 2), "orgn0": (10, 2), "sh0": (12, 2), "tg0": (14, 2),
    "t1sz": (16, 6), "a1": (22, 1), "epd1": (23, 1), "irgn1": (24, 2), "orgn1": (26, 2), "sh1": (28, 2), "tg1": (30, 2),
    "ips": (32, 3), "as16": (36, 1), "tbi0": (37, 1), "tbi1": (38, 1), "ha": (39, 1), "hd": (40, 1),
    "hpd0": (41, 1), "hpd1": (42, 1), "e0pd0": (55, 1), "e0pd1": (56, 1), "ds": (59, 1),
}
_VTCR = {
    "t0sz": (0, 6), "sl0": (6, 2), "irgn0": (8, 2), "orgn0": (10, 2), "sh0": (12, 2), "tg0": (14, 2), "ps": (16, 3),
    "vs": (19, 1), "ha": (21, 1), "hd": (22, 1), "nsw": (29, 1), "nsa": (30, 1), "ds": (32, 1), "sl2": (33, 1),
}
_VTCR_RES1 = 1 << 31


@dataclass(frozen=True)
class CpuFeatures:
    """What an implementation has, where a walk depends on it.

    *pa_bits* is ID_AA64MMFR0_EL1.PARange; *xnx* FEAT_XNX (stage-2 XN has two bits); *ttst* FEAT_TTST (TxSZ up to 48).
    """

    pa_bits: int = 48
    xnx: bool = True
    ttst: bool = False


FEATURES = CpuFeatures()


class _Register:
    # Shared by both registers: a dataclass whose fields are named in LAYOUT.
    def _encode(self, layout: dict[str, tuple[int, int]]) -> int:
        value = 0
        for name, (low, width) in layout.items():
            field = getattr(self, name)
            if isinstance(field, Granule):
                field = (_TG1_CODE if name == "tg1" else _TG0_CODE)[field]
            if not 0 <= field < 1 << width:
                raise BadInput(f"{type(self).__name__}.{name} = {field} does not fit into {width} bits")
            value |= int(field) << low
        return value

    @staticmethod
    def _decode(layout: dict[str, tuple[int, int]], value: int) -> dict[str, int | Granule]:
        found: dict[str, int | Granule] = {}
        for name, (low, width) in layout.items():
            field = value >> low & ((1 << width) - 1)
            found[name] = (_TG1 if name == "tg1" else _TG0)[field] if name in ("tg0", "tg1") else field
        return found

    # Only what is not as usual, so that the line stays short.
    def _show(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Tcr(_Register):
    """TCR_EL1; the defaults are Linux's for 48-bit addresses and 4K pages (mm/proc.S), with IPS 48 bits."""

    t0sz: int = 16
    t1sz: int = 16
    tg0: Granule = K4
    tg1: Granule = K4
    ips: int = 5
    epd0: int = 0
    epd1: int = 0
    a1: int = 0
    as16: int = 1
    tbi0: int = 0
    tbi1: int = 0
    hpd0: int = 0
    hpd1: int = 0
    e0pd0: int = 0
    e0pd1: int = 0
    irgn0: int = 1
    orgn0: int = 1
    sh0: int = 3
    irgn1: int = 1
    orgn1: int = 1
    sh1: int = 3
    ha: int = 0
    hd: int = 0
    ds: int = 0

    @property
    def value(self) -> int:
        """The 64-bit register; raises BadInput when a field does not fit."""
        return self._encode(_TCR)

    @classmethod
    def decode(cls, value: int) -> Self:
        """The fields of *value*; bits that have no field here are dropped."""
        return cls(**cls._decode(_TCR, value))  # type: ignore[arg-type]

    @override
    def __repr__(self) -> str:
        return self._show()


@dataclass(frozen=True, repr=False)
class Vtcr(_Register):
    """VTCR_EL2; the defaults are 40 bits of IPA from level 1 on, two concatenated tables, PS 48 bits."""

    t0sz: int = 24
    sl0: int = 1
    tg0: Granule = K4
    ps: int = 5
    vs: int = 1
    irgn0: int = 1
    orgn0: int = 1
    sh0: int = 3
    ha: int = 0
    hd: int = 0
    nsw: int = 0
    nsa: int = 0
    ds: int = 0
    sl2: int = 0

    @property
    def value(self) -> int:
        """The 64-bit register, RES1 bit included; raises BadInput when a field does not fit."""
        return self._encode(_VTCR) | _VTCR_RES1

    @classmethod
    def decode(cls, value: int) -> Self:
        """The fields of *value*; bits that have no field here are dropped."""
        return cls(**cls._decode(_VTCR, value))  # type: ignore[arg-type]

    @property
    def start_level(self) -> int | None:
        """First level of lookup that SL0 names; None: a reserved code (Arm ARM, VTCR_EL2.SL0)."""
        codes = {K4: (2, 1, 0, 3), K16: (3, 2, 1, None), K64: (3, 2, 1, None)}
        return codes[self.tg0][self.sl0]

    @classmethod
    def for_ipa(cls, ipa_bits: int, granule: Granule = K4, ps: int = 5) -> Self:
        """As KVM picks it: at least two levels, the start level as low as 16 concatenated tables allow.

        arch/arm64/kvm/hyp/pgtable.c kvm_get_vtcr(), asm/stage2_pgtable.h.
        """
        levels = max(2, (ipa_bits - 8) // granule.stride)
        base = 2 if granule is K4 else 3
        return cls(t0sz=64 - ipa_bits, sl0=base - (4 - levels), tg0=granule, ps=ps)

    @override
    def __repr__(self) -> str:
        return self._show()
