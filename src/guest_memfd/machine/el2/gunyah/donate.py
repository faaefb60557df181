"""Handing memory from one extent to another. Ownership changes first, then the mappings; all of it or nothing.

Checks and their order: docs/api/gunyah_api.md and hyp/mem/memextent_sparse of the hypervisor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace, check_range
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.memextent import Extent
from guest_memfd.machine.el2.gunyah.stage2 import Stock
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.words.units import Ipa, Pa

if TYPE_CHECKING:
    from guest_memfd.machine.el2.gunyah.memdb import MemDb

NOSYNC = 1 << 31
_TYPE = 0xFF


class Donation(IntEnum):
    """Bits 7:0 of the options."""

    TO_CHILD = 0
    TO_PARENT = 1
    TO_SIBLING = 2
    TO_PROTECTED = 3
    FROM_PROTECTED = 4


class Options(NamedTuple):
    """Decoded options of MEMEXTENT_DONATE."""

    type: Donation
    sync: bool

    @classmethod
    def decode(cls, value: int) -> Options:
        """Raises HypRefused(ARG_INVAL) for reserved bits and types that do not exist."""
        if value & ~(_TYPE | NOSYNC) or value & _TYPE > max(Donation):
            raise HypRefused(GunyahError.ARG_INVAL, f"donate options {value:#x}")
        return cls(Donation(value & _TYPE), not value & NOSYNC)


def check_family(kind: Donation, source: Extent, to: Extent) -> None:
    """Raises HypRefused: DENIED unless they are relatives of the right degree, MEMEXTENT_TYPE unless both are sparse."""
    related = {
        Donation.TO_CHILD: to.parent is source,
        Donation.TO_PARENT: source.parent is to,
        Donation.TO_SIBLING: source.parent is not None and source.parent is to.parent,
        Donation.TO_PROTECTED: to.parent is source,
        Donation.FROM_PROTECTED: source.parent is to,
    }
    if source is to or not related[kind]:
        raise HypRefused(GunyahError.DENIED, f"{source!r} to {to!r} is no {kind.name}")
    if not (source.sparse and to.sparse):
        raise HypRefused(GunyahError.MEMEXTENT_TYPE, "only sparse extents give and take pages")


def donate(memdb: MemDb, pages: PageSource, spaces: Sequence[AddressSpace], options: Options, source: Extent, to: Extent,
           offset: int, size: int) -> None:
    """MEMEXTENT_DONATE: [offset, offset+size) of *source* becomes *to*'s; offsets of sparse extents are physical addresses.

    Raises HypRefused, and nothing has moved: ARG_ALIGN; ARG_SIZE; ARG_INVAL outside the extent; DENIED; MEMEXTENT_TYPE;
    MEMDB_NOT_OWNER; BUSY when pages that are one VM's alone are mapped in any of *spaces*; NOMEM. What else maps a page
    of *source* there does so no longer, however it was mapped.
    """
    start = Pa(offset)
    end = Pa(check_range(start, size, source.size, outside=GunyahError.ARG_INVAL))
    check_family(options.type, source, to)
    # Ownership first: it is one check of all pages, and can be taken back. A mapping of a page that its extent does
    # not own could not be explained to anyone.
    memdb.change(start, end, source, to)
    try:
        protected = options.type == Donation.FROM_PROTECTED or source.alone is not None
        # Pages of a protected extent are one VM's alone. While anything maps them the donation is refused, and never
        # unmaps by itself: the driver has to unmap, and the guest has a say in that.
        if protected and any(space.maps_any(start, end) for space in spaces):
            raise HypRefused(GunyahError.BUSY, f"[{offset:#x}, {end:#x}) is still mapped")
        _move_mappings(pages, spaces, source, to, start, end, options)
    except HypRefused:
        memdb.change(start, end, to, source)
        raise


# What both extents map at the same place stays as it is; that is how a shared page stays the host's to use. No one but its
# VM may reach a page that becomes one VM's alone, not even by what a TLB has kept of a mapping that is gone already.
def _move_mappings(pages: PageSource, spaces: Sequence[AddressSpace], source: Extent, to: Extent, start: Pa, end: Pa,
                   options: Options) -> None:
    # Both extents are recorded at the same place of the same space: the page leaves one and enters the other there,
    # and nothing has to change.
    kept = {(m.space, m.vbase - source.base) for m in source.mappings if m in to.mappings}
    gone = list(shown(spaces, start, end, kept))
    new = [m for m in to.mappings if m not in source.mappings]
    need = tables_for_withdrawal(gone) + sum(m.space.tables_for_mapping(m, to.base, [(start, end)]) for m in new)
    # For all spaces together. A donation that failed after the first space would leave a page that its old owner has
    # lost and its new owner does not have.
    with Stock(pages, need) as stock:
        for place in gone:
            place.space.withdraw(place.start, place.end, place.distance, stock)
        # NOSYNC is the caller's promise to flush before anyone relies on it. For a page that becomes one VM's alone
        # the promise is not enough: the hypervisor flushes.
        affected = {place.space for place in gone} if options.sync or to.alone is not None else set()
        if to.alone is not None:
            # Also what earlier calls with NOSYNC have left in TLBs: any of these entries may lead to this page.
            affected |= {space for space in spaces if space.stale and space is not to.alone}
        for space in affected:
            space.sync_all()
        for mapping in new:
            mapping.space.apply(mapping, to.base, [(start, end)], stock)


class Place(NamedTuple):
    """Physical [start, end) appears in *space*, *distance* further on."""

    space: AddressSpace
    start: Pa
    end: Pa
    distance: int


def shown(spaces: Iterable[AddressSpace], start: Pa, end: Pa,
          kept: Container[tuple[AddressSpace, int]]) -> Iterator[Place]:
    """Where *spaces* show physical [start, end); (space, distance) pairs of *kept* are left out."""
    return (Place(space, low, high, distance) for space in spaces for low, high, distance in space.places(start, end)
            if (space, distance) not in kept)


def tables_for_withdrawal(places: Iterable[Place]) -> int:
    """How many tables it takes at most to unmap *places*."""
    return sum(p.space.table.tables_for_cut(Ipa(p.start + p.distance), Ipa(p.end + p.distance)) for p in places)
