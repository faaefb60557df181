"""TLBI as an instruction: a name and a register. Here is how an operand is encoded.

Arm ARM C5.5 (TLB maintenance instructions); arch/arm64/include/asm/tlbflush.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.words.units import PAGE, Ipa, Va

Address = TypeVar("Address", Va, Ipa)


class Operand(NamedTuple, Generic[Address]):
    """The register of an operation by address: *start* and *size* in bytes, the TTL's *level* (None: no hint), the ASID."""

    start: Address
    size: int
    level: int | None
    asid: int


# TTL[3:2] is the granule, 0: no hint. Level 0 is none either without FEAT_LPA2.
def _ttl(ttl: int) -> int | None:
    return (ttl & 3 or None) if ttl >> 2 else None


def va_operand(value: int) -> Operand[Va]:
    """VAE1 and its kin: VA[55:12] in 43:0 (sign-extended here), TTL in 47:44, the ASID in 63:48."""
    va = (value & (1 << 44) - 1) << 12
    return Operand(Va(va | (0xff << 56 if va >> 55 else 0)), PAGE, _ttl(value >> 44 & 15), value >> 48)


def ipa_operand(value: int) -> Operand[Ipa]:
    """IPAS2E1 and its kin: IPA[51:12] in 39:0, TTL in 47:44; the address space bit 63 is ignored."""
    return Operand(Ipa((value & (1 << 40) - 1) << 12), PAGE, _ttl(value >> 44 & 15), 0)


def range_operand(value: int, signed: bool = True) -> Operand[Any] | None:
    """The range forms: BADDR 36:0, TTL 38:37, NUM 43:39, SCALE 45:44, TG 47:46, ASID 63:48; None when TG is reserved.

    Covers (NUM + 1) << (5 * SCALE + 1) pages of the granule TG names, BADDR in units of it. *signed*: a VA, whose upper
    bits are copies of the uppermost of BADDR.
    """
    granule = value >> 46 & 3
    if not granule:
        return None
    shift = (12, 14, 16)[granule - 1]
    base = (value & (1 << 37) - 1) << shift
    if signed and value >> 36 & 1:
        # A VA of the upper half: BADDR has no bits above, and they are all ones.
        base |= (1 << 64) - (1 << 37 + shift)
    size = ((value >> 39 & 31) + 1) << 5 * (value >> 44 & 3) + 1 + shift
    return Operand(base, size, value >> 37 & 3 or None, value >> 48)


# -- execution ---------------------------------------------------------------------------------------------------------

# By name without IS; each works on all TLBs it is given, with the operand and the VMID.
_BY_VA: dict[str, Callable[[Iterable[Tlb], Operand[Va], int], None]] = {
    "VAE1": lambda tlbs, o, vmid: tlbi.vae1is(tlbs, o.start, o.asid, vmid, o.level),
    "VALE1": lambda tlbs, o, vmid: tlbi.vale1is(tlbs, o.start, o.asid, vmid, o.level),
    "VAAE1": lambda tlbs, o, vmid: tlbi.vaae1is(tlbs, o.start, vmid, o.level),
    "VAALE1": lambda tlbs, o, vmid: tlbi.vaale1is(tlbs, o.start, vmid, o.level),
    "ASIDE1": lambda tlbs, o, vmid: tlbi.aside1is(tlbs, o.asid, vmid),
    "VMALLE1": lambda tlbs, o, vmid: tlbi.vmalle1is(tlbs, vmid),
    "VMALLS12E1": lambda tlbs, o, vmid: tlbi.vmalls12e1is(tlbs, vmid),
    "ALLE1": lambda tlbs, o, vmid: tlbi.alle1is(tlbs),
}
_BY_VA_RANGE: dict[str, Callable[[Iterable[Tlb], Operand[Va], int], None]] = {
    "RVAE1": lambda tlbs, o, vmid: tlbi.rvae1is(tlbs, o.start, o.size, o.asid, vmid, o.level),
    "RVALE1": lambda tlbs, o, vmid: tlbi.rvale1is(tlbs, o.start, o.size, o.asid, vmid, o.level),
    "RVAAE1": lambda tlbs, o, vmid: tlbi.rvaae1is(tlbs, o.start, o.size, vmid, o.level),
    "RVAALE1": lambda tlbs, o, vmid: tlbi.rvaale1is(tlbs, o.start, o.size, vmid, o.level),
}
_BY_IPA: dict[str, Callable[[Iterable[Tlb], Operand[Ipa], int], None]] = {
    "IPAS2E1": lambda tlbs, o, vmid: tlbi.ipas2e1is(tlbs, o.start, vmid, o.level),
    "IPAS2LE1": lambda tlbs, o, vmid: tlbi.ipas2le1is(tlbs, o.start, vmid, o.level),
}
_BY_IPA_RANGE: dict[str, Callable[[Iterable[Tlb], Operand[Ipa], int], None]] = {
    "RIPAS2E1": lambda tlbs, o, vmid: tlbi.ripas2e1is(tlbs, o.start, o.size, vmid, o.level),
    "RIPAS2LE1": lambda tlbs, o, vmid: tlbi.ripas2le1is(tlbs, o.start, o.size, vmid, o.level),
}


def execute(name: str, value: int, own: Tlb, domain: Iterable[Tlb], vmid: int) -> None:
    """Carry out TLBI *name* (in capitals, such as VAALE1IS) with its register, in the context of *vmid*.

    *own* is the TLB of the CPU that executes it, *domain* those of the inner shareable domain. A range whose TG is
    reserved removes nothing. Raises BadInput for a name that is no operation of this regime.
    """
    tlbs = domain if name.endswith("IS") else (own,)
    what = name.removesuffix("IS")
    if what in _BY_VA:
        _BY_VA[what](tlbs, va_operand(value), vmid)
    elif what in _BY_IPA:
        _BY_IPA[what](tlbs, ipa_operand(value), vmid)
    elif what in _BY_VA_RANGE or what in _BY_IPA_RANGE:
        operand = range_operand(value, signed=what in _BY_VA_RANGE)
        if operand is not None:
            (_BY_VA_RANGE | _BY_IPA_RANGE)[what](tlbs, operand, vmid)
    else:
        raise BadInput(f"TLBI {name} is no operation of the EL1&0 regime")
