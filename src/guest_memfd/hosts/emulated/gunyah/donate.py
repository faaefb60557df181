"""Handing memory from one extent to another. Rule of this file: ownership first, then mappings, and all of it or nothing.

Checks and their order: docs/api/gunyah_api.md and hyp/mem/memextent_sparse of the hypervisor.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.hosts.emulated.gunyah.addrspace import AddressSpace, check_range
from guest_memfd.hosts.emulated.gunyah.errors import GunyahError, Refused
from guest_memfd.hosts.emulated.gunyah.memextent import Extent, Mapping
from guest_memfd.hosts.emulated.gunyah.stage2 import Stock

if TYPE_CHECKING:
    from guest_memfd.hosts.emulated.gunyah.memdb import MemDb
    from guest_memfd.hosts.emulated.gunyah.stage2 import PageSource

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
        """Raises Refused(ARG_INVAL) for reserved bits and types that do not exist."""
        if value & ~(_TYPE | NOSYNC) or value & _TYPE > max(Donation):
            raise Refused(GunyahError.ARG_INVAL, f"donate options {value:#x}")
        return cls(Donation(value & _TYPE), not value & NOSYNC)


def check_family(kind: Donation, source: Extent, to: Extent) -> None:
    """Raises Refused: DENIED unless they are relatives of the right degree, MEMEXTENT_TYPE unless both are sparse."""
    related = {
        Donation.TO_CHILD: to.parent is source,
        Donation.TO_PARENT: source.parent is to,
        Donation.TO_SIBLING: source.parent is not None and source.parent is to.parent,
        Donation.TO_PROTECTED: to.parent is source,
        Donation.FROM_PROTECTED: source.parent is to,
    }
    if source is to or not related[kind]:
        raise Refused(GunyahError.DENIED, f"{source!r} to {to!r} is no {kind.name}")
    if not (source.sparse and to.sparse):
        raise Refused(GunyahError.MEMEXTENT_TYPE, "only sparse extents give and take pages")


def donate(memdb: MemDb, pages: PageSource, spaces: Iterable[AddressSpace], options: Options, source: Extent, to: Extent,
           offset: int, size: int) -> None:
    """MEMEXTENT_DONATE: [offset, offset+size) of *source* becomes *to*'s; offsets of sparse extents are physical addresses.

    Raises Refused, and nothing has moved: ARG_ALIGN; ARG_SIZE; ARG_INVAL outside the extent; DENIED; MEMEXTENT_TYPE;
    MEMDB_NOT_OWNER; BUSY when FROM_PROTECTED meets a mapping in any of *spaces*; NOMEM.
    """
    end = check_range(offset, size, source.size, outside=GunyahError.ARG_INVAL)
    check_family(options.type, source, to)
    memdb.change(offset, end, source, to)
    try:
        if options.type == Donation.FROM_PROTECTED and any(space.maps_any(offset, end) for space in spaces):
            raise Refused(GunyahError.BUSY, f"[{offset:#x}, {end:#x}) is still mapped")
        _move_mappings(pages, source, to, offset, end, options)
    except Refused:
        memdb.change(offset, end, to, source)
        raise


# What both extents map at the same place stays as it is; that is how a shared page stays the host's to use.
def _move_mappings(pages: PageSource, source: Extent, to: Extent, start: int, end: int, options: Options) -> None:
    gone = [m for m in source.mappings if m not in to.mappings]
    new = [m for m in to.mappings if m not in source.mappings]
    with Stock(pages, _tables(gone, new, to.base, start, end)) as stock:
        for mapping in gone:
            mapping.space.withdraw(mapping, source.base, start, end, stock)
        if options.sync or options.type == Donation.TO_PROTECTED:
            for space in {mapping.space: None for mapping in gone}:
                space.sync_all()
        for mapping in new:
            mapping.space.apply(mapping, to.base, [(start, end)], stock)


def _tables(gone: list[Mapping], new: list[Mapping], base: int, start: int, end: int) -> int:
    cuts = sum(m.space.table.tables_for_cut(start + m.vbase, end + m.vbase) for m in gone)
    return cuts + sum(m.space.tables_for_mapping(m, base, [(start, end)]) for m in new)
