"""What a stage-2 table maps, forwards and backwards. Rule of this file: the reverse map is a cache of the table
(tests/gunyah_machine.py holds it: check_places).

Changes here are checked by the caller (addrspace.py, donate.py); they take their memory first and then cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from guest_memfd.compat import override
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.memextent import ExtentMapping
from guest_memfd.machine.el2.gunyah.rangemap import RangeMap
from guest_memfd.machine.el2.gunyah.stage2 import IA_BITS, GunyahLeaf, GunyahStage2Table, Stock
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Ipa, Pa

# Bits whose change is live (software bits, access flag).
_CHANGING = private.PRIVATE | private.LOCKED | private.NO_SANITISE | private.WRITABLE | 1 << 10
VISIBLE = 0x3FC | 3 << 53
"""Bits of a leaf that are attributes: MemAttr, S2AP, SH, XN."""


class Mappings:
    """The table of the VM with this VMID, and where each physical page appears. Raises HypRefused(NOMEM)."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: list[Tlb], vmid: int, name: str) -> None:
        self.ram, self.source, self.name = ram, source, name
        try:
            self.table = GunyahStage2Table(ram, source, tlbs, vmid)
        except OutOfMemory:
            raise HypRefused(GunyahError.NOMEM, f"no table for {name}") from None
        # Physical address -> distances at which guest addresses map it; tests compare it with the table.
        self._places: RangeMap[tuple[int, ...]] = RangeMap(())
        # Guest addresses unmapped with NOSYNC: TLBs may still have them.
        self._unsynced: RangeMap[bool] = RangeMap(False)
        self._abandoned = False

    @override
    def __repr__(self) -> str:
        return f"<address space of {self.name}>"

    def maps(self, pa: Pa) -> Ipa | None:
        """The lowest address that maps the page at *pa*, if any."""
        places = self._places.get(pa)
        return Ipa((pa & -PAGE) + places[0]) if places else None

    def maps_any(self, start: Pa, end: Pa) -> bool:
        """Whether any page of physical [start, end) is mapped."""
        return not self._places.only(start, end, ())

    def places(self, start: Pa, end: Pa) -> Iterator[tuple[Pa, Pa, int]]:
        """Where it shows physical [start, end): (pa, end, distance from there to its own address) of each run."""
        if not self._abandoned:
            for low, high, distances in self._places.runs(start, end):
                yield from ((low, high, distance) for distance in distances)

    @property
    def stale(self) -> bool:
        """Whether a TLB may still have what was unmapped with NOSYNC."""
        return not self._unsynced.only(Ipa(0), Ipa(1 << IA_BITS), False)

    def mappings(self) -> Iterator[GunyahLeaf]:
        """Every valid leaf, in order of addresses."""
        return (leaf for leaf in self.table.leaves(Ipa(0), Ipa(1 << IA_BITS)) if leaf.valid)

    # -- one piece -----------------------------------------------------------------------------------------------

    def others(self, vbase: Ipa, start: Pa, end: Pa) -> list[tuple[Pa, Pa, int]]:
        """What [vbase, ...) maps other than the pages of [start, end) in their order: (pa, end, descriptor)."""
        found = []
        for leaf in self.table.leaves(vbase, vbase + (end - start)):
            if leaf.valid and leaf.oa - leaf.ipa != start - vbase:
                low, high = max(leaf.ipa, vbase), min(leaf.ipa + leaf.size, vbase + (end - start))
                found.append((leaf.oa + (low - leaf.ipa), leaf.oa + (high - leaf.ipa), leaf.value))
        return found

    def sanitise(self, gone: list[tuple[Pa, Pa, int]]) -> None:
        """Zero what leaves the guest, unless it said otherwise."""
        for start, end, value in gone:
            if value & private.PRIVATE and not value & private.NO_SANITISE:
                self.ram.zero(start, end - start)

    def place(self, vbase: Ipa, start: Pa, end: Pa, bits: int) -> None:
        """Map physical [start, end) at *vbase* in place of whatever is there; private pages that go are sanitised.

        Entries that say so already stay, which is how a page is only locked again. Raises HypRefused(NOMEM).
        """
        stop = vbase + (end - start)
        found = list(self.table.leaves(vbase, stop))
        if all(leaf.valid and leaf.oa - leaf.ipa == start - vbase and vbase <= leaf.ipa and leaf.ipa + leaf.size <= stop
               and not (leaf.value ^ bits) & VISIBLE for leaf in found):
            # Only software bits and the access flag change, which may be done live. The page stays mapped all the
            # time: a guest that locks a page again must not fault on it.
            for leaf in found:
                self.table.rewrite(leaf, leaf.value & ~_CHANGING | bits & _CHANGING)
            return
        # To take the tables is all that can fail, and it comes before the first change.
        need = self.table.tables_for_cut(vbase, stop) + self.table.tables_for_fill(vbase, stop, start)
        with Stock(self.source, need) as stock:
            self._put(vbase, start, end, bits, stock)

    def _put(self, vbase: Ipa, start: Pa, end: Pa, bits: int, stock: Stock) -> None:
        stop = vbase + (end - start)
        # Asked before the table changes: afterwards it is not known what was there, and so not what has to be
        # sanitised.
        replaced = self.others(vbase, start, end)
        self.table.cut(vbase, stop, stock)
        # An unmap with NOSYNC may have left TLB entries for these addresses. With something new mapped there, they
        # would show the guest the old page.
        if not self._unsynced.only(vbase, stop, False):
            self.sync(vbase, stop)
        self._forget(vbase, stop)
        self.table.fill(vbase, stop, start, bits, stock)
        self._remember(start, end, vbase - start)
        # Last, when the guest cannot reach the pages any more.
        self.sanitise(replaced)

    def _remember(self, start: Pa, end: Pa, distance: int) -> None:
        self._places.update(start, end, lambda places: tuple(sorted({*places, distance})))

    def _forget(self, vbase: Ipa, stop: Ipa) -> None:
        for leaf in self.table.leaves(vbase, stop):
            if leaf.valid:
                distance = leaf.ipa - leaf.oa
                low = leaf.oa + (max(leaf.ipa, vbase) - leaf.ipa)
                high = leaf.oa + (min(leaf.ipa + leaf.size, stop) - leaf.ipa)
                self._places.update(low, high, partial(_without, distance))

    def remove(self, found: list[GunyahLeaf]) -> list[tuple[Pa, Pa, int]]:
        """Make whole leaves invalid, without TLBI: (pa, end, descriptor) of each."""
        for leaf in found:
            self._forget(leaf.ipa, leaf.ipa + leaf.size)
            self.table.rewrite(leaf, 0)
        return [(leaf.oa, leaf.oa + leaf.size, leaf.value) for leaf in found]

    def sync(self, start: Ipa, end: Ipa) -> None:
        """No TLB has anything of [start, end) afterwards."""
        self.table.sync(start, end)
        self._unsynced.set(start, end, False)

    def leave_stale(self, start: Ipa, end: Ipa) -> None:
        """[start, end) was unmapped with NOSYNC: a map there has to synchronise first."""
        self._unsynced.set(start, end, True)

    def sync_all(self) -> None:
        """What a series of NOSYNC calls ends with."""
        self.table.sync_all()
        self._unsynced = RangeMap(False)

    # -- recorded mappings of an extent ------------------------------------------------------------------------------

    def tables_for_mapping(self, mapping: ExtentMapping, base: Pa, ranges: list[tuple[Pa, Pa]]) -> int:
        """How many tables `apply` takes at most."""
        table = self.table
        places = [(mapping.vbase + (low - base), mapping.vbase + (high - base), low) for low, high in ranges]
        return sum(table.tables_for_cut(start, end) + table.tables_for_fill(start, end, pa) for start, end, pa in places)

    def apply(self, mapping: ExtentMapping, base: Pa, ranges: list[tuple[Pa, Pa]], stock: Stock) -> None:
        """Map physical *ranges* of an extent that begins at *base* where *mapping* says."""
        bits = private.encode(mapping.attributes)
        for low, high in ranges:
            self._put(mapping.vbase + (low - base), low, high, bits, stock)

    def withdraw(self, start: Pa, end: Pa, distance: int, stock: Stock) -> None:
        """Unmap physical [start, end) from where it is at *distance*; no TLBI."""
        vbase, stop = Ipa(start + distance), Ipa(end + distance)
        self.table.cut(vbase, stop, stock)
        self.remove([leaf for leaf in self.table.leaves(vbase, stop) if leaf.valid and leaf.oa - leaf.ipa == start - vbase])
        # The caller flushes; should something be mapped there before, `_put` does.
        self.leave_stale(vbase, stop)

    def destroy(self) -> None:
        """Unmap everything, sanitise what was private, and give the tables back."""
        gone = [(leaf.oa, leaf.oa + leaf.size, leaf.value) for leaf in self.mappings()]
        self.abandon()
        self._places = RangeMap(())
        self.sanitise(gone)

    def abandon(self) -> None:
        """Give the tables back; it maps nothing any more, and knows what it had."""
        self.table.destroy()
        self._abandoned = True


def _without(gone: int, places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(distance for distance in places if distance != gone)
