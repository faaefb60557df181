"""A VM's stage-2 page table under Gunyah, as ranges of leaves: memory is taken before anything is changed.

Theory of operation. Gunyah's calls name ranges: any number of pages, at any address, over what is mapped already. The table
has to hold them in blocks of 2 MiB and 1 GiB where it can, or a machine of one TiB would need 2 GiB of tables. So a call
may have to cut blocks at both ends of its range, and may make a block where a table was. Every one of these changes can
need table pages, and every one can go wrong for a CPU that walks meanwhile.

Memory is counted, taken, and then used. `tables_for_cut` and `tables_for_fill` say how many pages an operation needs at
most; the caller adds them up over all tables that it will change, and takes them all (`Stock`). If they are not there it
is refused (NOMEM) with nothing changed. From then on `cut`, `clear` and `fill` cannot fail. What the stock has left over
goes back at its end. The counts are upper bounds: a fill may find that a cut has made a table that it needs.

The order within a map (mappings.py) is cut, then fill; within an unmap it is cut, make invalid, and sync, or no sync yet:

- `cut` splits blocks until no entry reaches across an end of the range. What was mapped stays mapped.
- `fill` maps with the largest blocks that address and size allow. What is mapped there is cleared and synchronised first,
  all of it together, so that there is one series of TLBI for the range.
- Making entries invalid and TLBI are apart, because Gunyah's option NOSYNC lets a caller unmap many ranges and flush
  once. mappings.py remembers the addresses that were not flushed, and flushes before it maps something else there.
- `sync` is the TLB maintenance of a hypervisor: by IPA, which removes stage-2 entries and table descriptors, and then
  VMALLE1IS, because entries over both stages are not removed by IPA (machine/hw/arm64/tlb.py).

Replacing goes through break-before-make (Arm ARM D8.16.1): `_split` fills the new table first, with the block's
attributes and nothing pointing to it; then invalid, sync, table. For that moment a guest access to the block is a
translation fault; Gunyah retries those, and here no CPU runs in between. `_unhook` does the same the other way: a
table below which nothing is mapped gives way to a block. It is freed only after the sync, since a walker may have cached
the way to it and would read the freed page as a table.

Invariants: no leaf has the size of level 0; blocks are aligned at both ends; a table page belongs to one entry;
`pages.write` records any change that skips break-before-make. Owners and rights are not known here: extents have them
(memdb.py).

Left out: contiguous bits, other granules than 4 KiB, merging of what happens to be adjacent (only `fill` makes blocks),
and locks. Input addresses have 44 bits, from level 0 on.

Source: the sequence of TLBI is that of arch/arm64/kvm/hyp/nvhe/tlb.c, in the VM's own context. Tests:
tests/test_gunyah_mappings.py (test_no_allocation_that_fails_loses_anything, test_a_split_block_is_broken_before_it_is_made,
test_a_table_that_makes_room_for_a_block_is_forgotten_by_the_walker), tests/test_gunyah_el2.py
(test_ranges_of_any_size_in_any_order_with_memory_running_out).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.descriptor import ADDRESS, TABLE, VALID, leaf, table
from guest_memfd.machine.hw.arm64.granule import K4
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.regime import Stage2
from guest_memfd.machine.hw.arm64.registers import Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Ipa, Pa

IA_BITS = 44
"""Intermediate physical addresses of every VM: from level 0 on with one first table, 16 TiB."""
_START = 0
_PS = 5         # 48 bits
# (31 + 1) << (5 * 3 + 1) pages: what one range operation can name.
_LARGEST_RANGE = 32 << 16 << 12


class Stock:
    """Table pages taken in advance; what is left over goes back at the end of the ``with`` block.

    Raises HypRefused(NOMEM), with everything given back, when there are not *count* pages.
    """

    def __init__(self, source: PageSource, count: int) -> None:
        self._source = source
        self._pages: list[Pa] = []
        try:
            for _ in range(count):
                # One page may be missing after many have been taken: they go back, and the call is refused with
                # nothing changed.
                self._pages.append(source.alloc_table())
        except OutOfMemory:
            self.__exit__()
            raise HypRefused(GunyahError.NOMEM, f"{count} tables are needed") from None

    def __enter__(self) -> Stock:
        return self

    def __exit__(self, *_: object) -> None:
        while self._pages:
            self._source.free_table(self._pages.pop())

    def take(self) -> Pa:
        """One page; there is one, because the caller counted."""
        return self._pages.pop()


class GunyahLeaf(NamedTuple):
    """An entry that maps [ipa, ipa+size) or, when invalid, maps nothing there."""

    ipa: Ipa
    size: int
    level: int
    address: Pa
    value: int

    @property
    def valid(self) -> bool:
        """Whether it maps anything."""
        return bool(self.value & VALID)

    @property
    def oa(self) -> Pa:
        """Physical address that *ipa* goes to."""
        return Pa(self.value & ADDRESS & -self.size)


# log2 of what an entry maps, by level.
_SHIFT = [K4.level_shift(level) for level in range(4)]


def _is_table(value: int, level: int) -> bool:
    return level < 3 and value & 3 == TABLE


class GunyahStage2Table:
    """The table of the VM with this VMID; all addresses and sizes are bytes, multiples of 4 KiB."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: list[Tlb], vmid: int) -> None:
        self._ram, self._source, self._tlbs, self.vmid = ram, source, tlbs, vmid
        self.splits = 0                                 # blocks that a table has taken the place of
        self.filled = 0                                 # entries of that size that mapped nothing, and are a table now
        self.pages = PageTable(ram, source, 2, granule=K4, ia_bits=IA_BITS, start_level=_START)
        self.registers = Stage2(Vtcr(t0sz=64 - IA_BITS, sl0=2, tg0=K4, ps=_PS), vmid << 48 | self.pages.root)

    # Entries of one table that meet [start, end): (its address, value, first byte, end).
    def _entries(self, at: Pa, level: int, start: Ipa, end: Ipa) -> Iterator[tuple[Pa, int, Ipa, Ipa]]:
        read, shift = self._ram.read64, _SHIFT[level]
        while start < end:
            address = at + 8 * (start >> shift & 511)
            high = min(end, (start & -1 << shift) + (1 << shift))
            yield address, read(address), start, high
            start = high

    def leaf(self, ipa: Ipa) -> GunyahLeaf:
        """The entry that decides one address."""
        read, at, level = self._ram.read64, self.pages.root, _START
        while True:
            shift = _SHIFT[level]
            address = at + 8 * (ipa >> shift & 511)
            value = read(address)
            if not _is_table(value, level):
                return GunyahLeaf(ipa & -1 << shift, 1 << shift, level, address, value)
            at, level = Pa(value & ADDRESS), level + 1

    def leaves(self, start: Ipa, end: Ipa) -> Iterator[GunyahLeaf]:
        """The entries that decide [start, end), in order; the first and the last may reach beyond it."""
        first = self.leaf(start)
        if end <= first.ipa + first.size:
            yield first
        else:
            yield from self._leaves(self.pages.root, _START, start, end)

    def _leaves(self, at: Pa, level: int, start: Ipa, end: Ipa) -> Iterator[GunyahLeaf]:
        size = 1 << _SHIFT[level]
        for address, value, low, high in self._entries(at, level, start, end):
            if _is_table(value, level):
                yield from self._leaves(Pa(value & ADDRESS), level + 1, low, high)
            else:
                yield GunyahLeaf(low & -size, size, level, address, value)

    # -- cutting -------------------------------------------------------------------------------------------------

    def tables_for_cut(self, start: Ipa, end: Ipa) -> int:
        """How many tables `cut` takes."""
        split = set()
        for at in (start, end):
            found = self.leaf(at) if at < 1 << IA_BITS else None
            if found is not None and found.valid and at % found.size:
                # One table for each level at which the address is inside of a block. Both ends may be in one block,
                # which is split once: hence the set.
                split |= {(level, at >> _SHIFT[level]) for level in range(found.level, 3) if at % (1 << _SHIFT[level])}
        return len(split)

    def cut(self, start: Ipa, end: Ipa, stock: Stock) -> None:
        """Split blocks until no entry reaches across *start* or *end*; what is mapped stays mapped."""
        for at in (start, end):
            while at < 1 << IA_BITS:
                found = self.leaf(at)
                if not found.valid or at % found.size == 0:
                    break
                self._split(found, stock)

    def _split(self, block: GunyahLeaf, stock: Stock) -> None:
        below, page = block.level + 1, stock.take()
        self.splits += 1
        attributes = block.value & ~(ADDRESS | 3)
        for index in range(512):
            # Before the table is linked, so no walker can see it half filled, and `pages.write` need not watch.
            self._ram.write64(page + 8 * index, leaf(block.oa + index * (1 << _SHIFT[below]), attributes, below))
        # Break. Block and table of one range must never be in a TLB together.
        self.pages.write(block.address, block.level, 0, block.ipa)
        # All of the block, not only the part that will change: its old entry stands for all of it.
        self.sync(block.ipa, block.ipa + block.size)
        self.pages.write(block.address, block.level, table(page), block.ipa)

    # -- removing ------------------------------------------------------------------------------------------------

    def clear(self, start: Ipa, end: Ipa) -> None:
        """Make [start, end) invalid, without TLBI. No entry reaches across the ends (`cut`)."""
        self._clear(self.pages.root, _START, start, end)

    def _clear(self, at: Pa, level: int, start: Ipa, end: Ipa) -> None:
        for address, value, low, high in self._entries(at, level, start, end):
            if _is_table(value, level):
                self._clear(Pa(value & ADDRESS), level + 1, low, high)
            elif value:
                self.pages.write(address, level, 0, low)

    def rewrite(self, found: GunyahLeaf, value: int) -> None:
        """Change software bits, access flag or permissions of an entry in place."""
        self.pages.write(found.address, found.level, value, found.ipa)

    # -- mapping -------------------------------------------------------------------------------------------------

    # Whether one entry at this level can map all of [low, high) to pa.
    @staticmethod
    def _fits(level: int, low: Ipa, high: Ipa, pa: Pa) -> bool:
        size = 1 << _SHIFT[level]
        # A block must be aligned at both ends, guest address and physical address.
        return level > 0 and high - low == size and pa % size == 0

    def tables_for_fill(self, start: Ipa, end: Ipa, pa: Pa) -> int:
        """How many tables `fill` takes at most."""
        return self._need(self.pages.root, _START, start, end, pa)

    # *at* None: a table that is not there yet.
    def _need(self, at: Pa | None, level: int, start: Ipa, end: Ipa, pa: Pa) -> int:
        size, need, low = (1 << _SHIFT[level]), 0, start
        while low < end:
            high = min(end, (low & -size) + size)
            if not self._fits(level, low, high, pa + (low - start)):
                value = 0 if at is None else self._ram.read64(at + 8 * (low // size & 511))
                there = _is_table(value, level)
                # A table that is there already is used; one that this same call will make is counted once, by the
                # entry that it hangs on.
                need += not there
                need += self._need(Pa(value & ADDRESS) if there else None, level + 1, low, high, pa + (low - start))
            low = high
        return need

    def fill(self, start: Ipa, end: Ipa, pa: Pa, attributes: int, stock: Stock) -> None:
        """Map [start, end) to [pa, ...). What was mapped there is removed first, TLBs included; nothing partly covered
        by the range may be mapped (`cut`).
        """
        if any(found.valid for found in self.leaves(start, end)):
            self.clear(start, end)
            # One series of TLBI for all that is replaced. To break, flush and make entry by entry would cost a series
            # for each page.
            self.sync(start, end)
        self._fill(self.pages.root, _START, start, end, pa, attributes, stock)

    def _fill(self, at: Pa, level: int, start: Ipa, end: Ipa, pa: Pa, attributes: int, stock: Stock) -> None:
        for address, value, low, high in self._entries(at, level, start, end):
            to = pa + (low - start)
            there = _is_table(value, level)
            if self._fits(level, low, high, to):
                # Only tables without a valid entry are met here: `fill` has cleared the range.
                if there:
                    self._unhook(address, value, level, low, high)
                self.pages.write(address, level, leaf(to, attributes, level), low)
                continue
            below = Pa(value & ADDRESS) if there else stock.take()
            if not there:
                self.pages.write(address, level, table(below), low)
                self.filled += level > 0
            self._fill(below, level + 1, low, high, to, attributes, stock)

    # A table without a valid entry below it makes room for a block. A walk may have cached the way to it.
    def _unhook(self, address: Pa, value: int, level: int, low: Ipa, high: Ipa) -> None:
        self.pages.write(address, level, 0, low)
        self.sync(low, high)
        self._free(Pa(value & ADDRESS), level + 1)

    def _free(self, at: Pa, level: int) -> None:
        if level < 3:
            for index in range(512):
                value = self._ram.read64(at + 8 * index)
                if _is_table(value, level):
                    self._free(Pa(value & ADDRESS), level + 1)
        self._source.free_table(at)

    def destroy(self) -> None:
        """Give all tables back; nothing of this VMID may be left in a TLB afterwards."""
        self._free(self.pages.root, _START)
        self.sync_all()

    # -- TLB maintenance -----------------------------------------------------------------------------------------

    def sync(self, start: Ipa, end: Ipa) -> None:
        """DSB ISH; TLBI IPAS2E1IS, or RIPAS2E1IS; DSB ISH; TLBI VMALLE1IS; DSB ISH; ISB, for [start, end)."""
        # More than one range operation can name. To drop everything of the VMID costs less than a long series.
        if end - start > _LARGEST_RANGE:
            self.sync_all()
            return
        if end - start == PAGE:
            tlbi.ipas2e1is(self._tlbs, start, self.vmid)
        else:
            tlbi.ripas2e1is(self._tlbs, start, end - start, self.vmid)
        # Entries over both stages have no IPA in them, so the operation by IPA does not find them.
        tlbi.vmalle1is(self._tlbs, self.vmid)

    def sync_all(self) -> None:
        """TLBI VMALLS12E1IS: nothing of this VMID remains, of either stage."""
        tlbi.vmalls12e1is(self._tlbs, self.vmid)
