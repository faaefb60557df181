"""The memory database: which extent owns each page. Every page has one owner, always.

Source: hyp/mem/memdb_gpt of the hypervisor; errors as its MEMEXTENT hypercalls report them.
"""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.memextent import END, START, Extent
from guest_memfd.machine.el2.gunyah.rangemap import RangeMap
from guest_memfd.words.units import Pa


class MemDb:
    """Physical addresses (bytes) to extents; at first everything is in *nowhere*, the extent of what is no memory."""

    def __init__(self, nowhere: Extent) -> None:
        self._owners: RangeMap[Extent] = RangeMap(nowhere)

    def insert(self, start: Pa, end: Pa, owner: Extent) -> None:
        """Boot: these pages are there and belong to *owner*."""
        self._owners.set(start, end, owner)

    def owner(self, pa: Pa) -> Extent:
        """Who owns the page at *pa*."""
        return self._owners.get(pa)

    def owns(self, extent: Extent, start: Pa, end: Pa) -> bool:
        """Whether all of [start, end) is in *extent*."""
        return self._owners.only(start, end, extent)

    def change(self, start: Pa, end: Pa, old: Extent, new: Extent) -> None:
        """Hand [start, end) over; raises HypRefused(MEMDB_NOT_OWNER), and nothing moves, if any page is not *old*'s."""
        # All pages are asked before the first moves.
        if not self.owns(old, start, end):
            raise HypRefused(GunyahError.MEMDB_NOT_OWNER, f"[{start:#x}, {end:#x}) is not all in {old!r}")
        self._owners.set(start, end, new)

    def ranges(self, extent: Extent, start: Pa = START, end: Pa = END) -> Iterator[tuple[Pa, Pa]]:
        """What *extent* owns of [start, end), as maximal ranges in order."""
        return ((low, high) for low, high, owner in self._owners.runs(start, end) if owner is extent)
