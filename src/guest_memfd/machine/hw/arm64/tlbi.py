"""TLB maintenance. Here is what each TLBI operation removes, and from which TLBs.

The functions are named after the operations; those that end in ``is`` are broadcast to the inner shareable domain and
take the TLBs of all its CPUs, those without take the one of the CPU that executes them. Addresses and sizes are bytes,
not operands; tlbi_instruction.py takes the register apart. *level* is the TTL hint: only leaves of that level go, so that
a wrong one removes nothing. Operations whose name has an L leave table descriptors alone.
Arm ARM C5.5 (TLB maintenance instructions); arch/arm64/include/asm/tlbflush.h.
"""

from __future__ import annotations

from collections.abc import Iterable

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.words.units import PAGE, Ipa, Va

# -- by VA ------------------------------------------------------------------------------------------------------------


def vae1(tlb: Tlb, va: Va, asid: int, vmid: int, level: int | None = None) -> None:
    """The page of *va*, of *asid* or global, with the tables that lead to it for *asid*."""
    tlb.drop_va(vmid, asid, va & -PAGE, PAGE, level, last_only=False)


def vale1(tlb: Tlb, va: Va, asid: int, vmid: int, level: int | None = None) -> None:
    """The leaf of *va*, of *asid* or global."""
    tlb.drop_va(vmid, asid, va & -PAGE, PAGE, level, last_only=True)


def vaae1(tlb: Tlb, va: Va, vmid: int, level: int | None = None) -> None:
    """The page of *va* for all ASIDs, with the tables that lead to it."""
    tlb.drop_va(vmid, None, va & -PAGE, PAGE, level, last_only=False)


def vaale1(tlb: Tlb, va: Va, vmid: int, level: int | None = None) -> None:
    """The leaf of *va* for all ASIDs."""
    tlb.drop_va(vmid, None, va & -PAGE, PAGE, level, last_only=True)


def vae1is(tlbs: Iterable[Tlb], va: Va, asid: int, vmid: int, level: int | None = None) -> None:
    """`vae1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vae1(tlb, va, asid, vmid, level)


def vale1is(tlbs: Iterable[Tlb], va: Va, asid: int, vmid: int, level: int | None = None) -> None:
    """`vale1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vale1(tlb, va, asid, vmid, level)


def vaae1is(tlbs: Iterable[Tlb], va: Va, vmid: int, level: int | None = None) -> None:
    """`vaae1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vaae1(tlb, va, vmid, level)


def vaale1is(tlbs: Iterable[Tlb], va: Va, vmid: int, level: int | None = None) -> None:
    """`vaale1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vaale1(tlb, va, vmid, level)


def rvae1is(tlbs: Iterable[Tlb], start: Va, size: int, asid: int, vmid: int, level: int | None = None) -> None:
    """All pages of the range, of *asid* or global, with their tables; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_va(vmid, asid, start, size, level, last_only=False)


def rvale1is(tlbs: Iterable[Tlb], start: Va, size: int, asid: int, vmid: int, level: int | None = None) -> None:
    """All leaves of the range, of *asid* or global; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_va(vmid, asid, start, size, level, last_only=True)


def rvaae1is(tlbs: Iterable[Tlb], start: Va, size: int, vmid: int, level: int | None = None) -> None:
    """All pages of the range for all ASIDs, with their tables; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_va(vmid, None, start, size, level, last_only=False)


def rvaale1is(tlbs: Iterable[Tlb], start: Va, size: int, vmid: int, level: int | None = None) -> None:
    """All leaves of the range for all ASIDs; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_va(vmid, None, start, size, level, last_only=True)


# A range operation covers at most 32 << 16 pages, 128 GiB with 64K ones; a caller who means more has passed an end.
def _check(size: int) -> None:
    if not 0 < size <= 32 << 16 + 16:
        raise BadInput(f"no range operation covers {size:#x} bytes")


# -- by ASID, VMID, everything ----------------------------------------------------------------------------------------


def aside1(tlb: Tlb, asid: int, vmid: int) -> None:
    """Everything of *asid* that is not global."""
    tlb.drop_asid(vmid, asid)


def vmalle1(tlb: Tlb, vmid: int) -> None:
    """All stage-1 information of *vmid*, combined entries included; stage-2-only entries stay."""
    tlb.drop_all_stage1(vmid)


def vmalls12e1(tlb: Tlb, vmid: int) -> None:
    """Both stages of *vmid*."""
    tlb.drop_vmid(vmid)


def alle1(tlb: Tlb) -> None:
    """Both stages of all VMIDs."""
    tlb.clear()


def aside1is(tlbs: Iterable[Tlb], asid: int, vmid: int) -> None:
    """`aside1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        aside1(tlb, asid, vmid)


def vmalle1is(tlbs: Iterable[Tlb], vmid: int) -> None:
    """`vmalle1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vmalle1(tlb, vmid)


def vmalls12e1is(tlbs: Iterable[Tlb], vmid: int) -> None:
    """`vmalls12e1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        vmalls12e1(tlb, vmid)


def alle1is(tlbs: Iterable[Tlb]) -> None:
    """`alle1`, broadcast to every CPU of the inner shareable domain."""
    for tlb in tlbs:
        alle1(tlb)


# -- by IPA: combined entries stay, so a hypervisor follows with VMALLE1IS --------------------------------------------


def ipas2e1(tlb: Tlb, ipa: Ipa, vmid: int, level: int | None = None) -> None:
    """The stage-2-only entries of the page of *ipa*, with the stage-2 tables that lead to it."""
    tlb.drop_ipa(vmid, ipa & -PAGE, PAGE, level, last_only=False)


def ipas2le1(tlb: Tlb, ipa: Ipa, vmid: int, level: int | None = None) -> None:
    """The stage-2-only leaf of *ipa*."""
    tlb.drop_ipa(vmid, ipa & -PAGE, PAGE, level, last_only=True)


def ipas2e1is(tlbs: Iterable[Tlb], ipa: Ipa, vmid: int, level: int | None = None) -> None:
    """`ipas2e1`, broadcast to every CPU; the caller follows with `vmalle1is` for combined entries."""
    for tlb in tlbs:
        ipas2e1(tlb, ipa, vmid, level)


def ipas2le1is(tlbs: Iterable[Tlb], ipa: Ipa, vmid: int, level: int | None = None) -> None:
    """`ipas2le1`, broadcast to every CPU; the caller follows with `vmalle1is` for combined entries."""
    for tlb in tlbs:
        ipas2le1(tlb, ipa, vmid, level)


def ripas2e1is(tlbs: Iterable[Tlb], start: Ipa, size: int, vmid: int, level: int | None = None) -> None:
    """The stage-2-only entries of the range with their tables; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_ipa(vmid, start, size, level, last_only=False)


def ripas2le1is(tlbs: Iterable[Tlb], start: Ipa, size: int, vmid: int, level: int | None = None) -> None:
    """The stage-2-only leaves of the range; raises BadInput for a size no range has."""
    _check(size)
    for tlb in tlbs:
        tlb.drop_ipa(vmid, start, size, level, last_only=True)
