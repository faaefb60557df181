"""Translation tables as software builds them: the linear map, user page tables, stage 2 of every hypervisor.

Theory of operation. A tree of tables lies in the machine's RAM, where the walker reads it at any moment. To change it is
easy; to change it so that no CPU ever sees a wrong translation is the work. Two things can go wrong: memory runs out in the
middle, and a CPU holds a copy of an entry that has been replaced. The first is prevented here; the second is recorded.

Memory. Every operation that needs tables first allocates all of them, in a block that frees them again if anything raises
(`TablePages.new`). New tables are filled while nothing points to them; stores into linked tables are collected in a list.
Only when nothing can fail any more is the list written, one descriptor that links a finished table at a time. So after
OutOfMemory or BadInput not one descriptor has changed. Tables are freed all together: one that maps nothing any more
stays, as in Linux's linear map. (Gunyah frees them, and has its own code: el2/gunyah/stage2.py.)

Replacing. The architecture forbids some changes of a valid descriptor while it is in use: another output address, another
size (block to table and back), the contiguous bit, the memory type. A TLB could hold both the old and the new one and
mix them. The rule is break-before-make: write an invalid descriptor, remove the old one from all TLBs, write the new one.
All stores go through `write`, which compares old and new (bbm.py):

- valid to valid that needs break-before-make is a violation at once;
- valid to invalid is remembered where `live_check` is given; when the entry becomes valid again, it is asked whether a
  TLB still holds the old translation: then the break was made, but not the flush in between.

Violations are kept and not raised: the machine goes on, as hardware would. `split` shows the right order: all new tables
are filled first, then the contiguous run around the block loses its marks, as a whole, then the block is replaced. With
FEAT_BBM level 3 (*bbml3*) sizes may change live, as arm64 Linux does for its linear map; then no flush is passed.

Invariants: a contiguous run is changed as a whole or not at all; an entry that maps is never replaced by a table except
in `split`, so `map` over a part of a block is BadInput; an annotated (invalid, not zero) entry is kept until it is
replaced, since EL2 stores owners there.

Left out: locks (one call into a machine at a time), reference counts of tables, merging.

Source: Arm ARM D8.16.1; arch/arm64/mm/mmu.c (split_contpte() and around). Tests: tests/test_arm64_tables.py
(test_every_allocation_of_map_can_fail, test_a_live_split_needs_bbml3_or_a_flush,
test_break_without_maintenance_before_make); the tests of every hypervisor assert that `violations` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import pack
from typing import Any

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import bbm
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.filling import Filling
from guest_memfd.machine.hw.arm64.granule import K4, Granule
from guest_memfd.machine.hw.arm64.pages import PageSource, TableMemory, TablePages
from guest_memfd.words.units import Pa

# What a descriptor says besides type, address and contiguity.
_ATTRIBUTES = ~(d.TABLE | d.ADDRESS | d.CONTIGUOUS) & (1 << 64) - 1


class PageTable:
    """One tree of translation tables for input addresses of *ia_bits* bits.

    *stage* is 1 or 2. At stage 1 the bits of an address above *ia_bits* are ignored, so that either half can be passed.
    *start_level* None: what *ia_bits* asks for. *concatenated*: first-level tables (stage 2), a power of two up to 16.
    *live_check*, if given, says whether a TLB still holds a translation of [ia, ia+size): it is asked when an entry becomes
    valid that needs break-before-make against what was there before. *bbml3*: FEAT_BBM level 3. Raises OutOfMemory, and
    BadInput for a geometry that does not exist.
    """

    def __init__(self, memory: TableMemory, source: PageSource, stage: int, granule: Granule = K4, ia_bits: int = 48,
                 start_level: int | None = None, concatenated: int = 1,
                 live_check: Callable[[Any, int], bool] | None = None, *, bbml3: bool = False) -> None:
        self.memory, self.source, self.stage, self.granule, self.ia_bits = memory, source, stage, granule, ia_bits
        self.start_level = granule.start_level(ia_bits) if start_level is None else start_level
        self.concatenated, self.live_check, self.bbml3 = concatenated, live_check, bbml3
        first = max(0, ia_bits - granule.level_shift(self.start_level) - granule.stride)
        if concatenated != 1 << first or concatenated > 16 or (stage == 1 and concatenated > 1):
            raise BadInput(f"{ia_bits} bits from level {self.start_level} on: {1 << first} first-level tables of {granule}")
        self.violations: list[bbm.Violation] = []
        # The last valid descriptor of entries that were broken, by address; kept only for live_check.
        self._broken: dict[Pa, int] = {}
        self._pages = TablePages(memory, source, granule.shift - 12)
        self.root = self._pages.alloc(self._pages.order + first)

    @property
    def tables(self) -> set[Pa]:
        """Physical addresses of all tables but the first."""
        return self._pages.tables

    def free(self) -> None:
        """Give every table page back; the tree must not be used any more."""
        self._pages.free_all()
        self._pages.free(self.root, self._pages.order + self.concatenated.bit_length() - 1)

    # -- reading ------------------------------------------------------------------------------------------------------

    def lookup(self, ia: int) -> Entry:
        """What decides *ia*: a leaf, an invalid entry, or an annotated one; raises BadInput beyond the input size."""
        return self.path(ia)[-1]

    def path(self, ia: int) -> list[Entry]:
        """Every entry on the way to `lookup`'s, which is the last."""
        ia = self._input(ia)
        table, found = self.root, []
        for level in range(self.start_level, 4):
            address = self._slot(table, level, ia)
            found.append(Entry(level, address, self.memory.read64(address)))
            if d.kind(found[-1].value, level, self.granule) != "table":
                break
            table = d.table_address(found[-1].value, self.granule)
        return found

    def leaves(self, ia: int, size: int) -> Iterator[tuple[int, int, Entry]]:
        """(ia, size, entry) of everything that decides [ia, ia+size), in order; the first and last may reach beyond."""
        ia = self._input(ia)
        end = ia + size
        while ia < end:
            entry = self.lookup(ia)
            covers = 1 << self.granule.level_shift(entry.level)
            yield ia & -covers, covers, entry
            ia = (ia & -covers) + covers

    def _input(self, ia: int) -> int:
        if self.stage == 1:
            return ia & (1 << self.ia_bits) - 1
        if ia >> self.ia_bits:
            raise BadInput(f"{ia:#x} is beyond the {self.ia_bits} bits of this table")
        return ia

    def _slot(self, table: Pa, level: int, ia: int) -> Pa:
        number = ia >> self.granule.level_shift(level)
        return table + 8 * (number if level == self.start_level else number & self.granule.table_entries - 1)

    # -- the one place that stores ------------------------------------------------------------------------------------

    def write(self, address: Pa, level: int, value: int, ia: int | None = None) -> None:
        """Store a descriptor; what needed break-before-make and did not get it goes to `violations`.

        *ia* (an address the entry is for) lets `live_check` be asked.
        """
        old = self.memory.read64(address)
        # Valid to valid: hardware may hold both at once. Whether that is allowed depends on what changes.
        if old & value & d.VALID:
            self._note(address, level, old, value, "")
        elif self.live_check is not None and ia is not None:
            if old & d.VALID:
                # The value before the break, for the make: what matters is whether a TLB still has that one.
                self._broken[address] = old
            # Only a make needs the question: an entry that stays invalid breaks no rule, whatever a TLB still holds.
            elif value & d.VALID and address in self._broken:
                size = 1 << self.granule.level_shift(level)
                if self.live_check(ia & -size, size):
                    self._note(address, level, self._broken[address], value, " that a TLB still holds")
                del self._broken[address]
        self.memory.write64(address, value)

    def _note(self, address: Pa, level: int, old: int, new: int, more: str) -> None:
        why = bbm.needs(old, new, level, self.stage, self.granule, self.bbml3)
        if why is not None:
            self.violations.append(bbm.Violation(address, level, self.stage, self.granule, old, new, why + more))

    # -- changing -----------------------------------------------------------------------------------------------------

    def map(self, ia: int, size: int, oa: int, attributes: int, largest: int = 0, *, contiguous: bool = False) -> None:
        """Map [ia, ia+size) to *oa* with the largest blocks that fit, from level *largest* down; tables met on the way stay.

        *attributes*: all bits of a leaf but type, address and contiguous. *contiguous*: mark whole runs. Raises OutOfMemory,
        and BadInput when not aligned to pages, or a part of it is a part of a block or of a contiguous run; nothing has
        changed then.
        """
        size = self._aligned(ia | size | oa, size)
        if oa + size - 1 >> (52 if self.granule.shift == 16 else 48):
            raise BadInput(f"{oa:#x} does not fit into a descriptor")
        self._fill(Filling(self.granule, self._input(ia), size, oa, attributes, largest, contiguous))

    def annotate(self, ia: int, size: int, value: int, largest: int = 3) -> None:
        """Leave the invalid descriptor *value* in all entries of [ia, ia+size), from level *largest* on; raises as `map`."""
        if value & d.VALID:
            raise BadInput(f"{value:#x} is valid and would map something")
        self._fill(Filling(self.granule, self._input(ia), self._aligned(ia | size, size), None, value, largest, False))

    def unmap(self, ia: int, size: int) -> None:
        """Make every entry of [ia, ia+size) zero; raises BadInput when a block or run reaches beyond it (split it first)."""
        ia = self._input(ia)
        end = ia + self._aligned(ia | size, size)
        # Before anything is changed. To unmark a run would be a change of its own, with its own break and flush.
        self._whole(ia, end)
        found = list(self.leaves(ia, size))
        # Only the first and the last can reach beyond the range. To drop the rest of such a block silently would
        # unmap what no one has named.
        for at, covers, entry in (found[0], found[-1]):
            if entry.value and (at < ia or at + covers > end):
                raise BadInput(f"{at:#x} is mapped by a block of {covers:#x} bytes that reaches beyond the range")
        for at, _, entry in found:
            if entry.value:
                self.write(entry.address, entry.level, 0, at)

    def split(self, ia: int, level: int = 3, *, contiguous: bool = False,
              flush: Callable[[int, int], None] | None = None) -> None:
        """Let *ia* be decided at *level*: its block becomes a table of smaller leaves with the same attributes.

        The contiguous run it is part of loses its marks. *contiguous*: mark the runs of the new leaves. *flush*, if given,
        is called with (ia, size) between break and make; without it the change is made live, which only FEAT_BBM level 3
        permits. Raises BadInput when nothing is mapped at *ia*; OutOfMemory with nothing changed.
        """
        ia = self._input(ia)
        entry = self.lookup(ia)
        if not entry.value & d.VALID:
            raise BadInput(f"nothing is mapped at {ia:#x}")
        if entry.level > level or (entry.level == level and contiguous):
            return
        with self._pages.new() as new:
            # All at once, before the first store: from 1 GiB down to pages two tables are needed, and the second may
            # not be there.
            tables = [new() for _ in range(entry.level, level)]
            below: int | None = None
            # From the bottom up: a table is complete before anything points to it.
            for at in range(level - 1, entry.level - 1, -1):
                self._fill_split(tables[at - entry.level], at, self._leaf_at(entry, ia, at), ia, below, contiguous)
                below = d.table(tables[at - entry.level])
            # First the run, then the block. A block that is a table while its neighbours claim to be one run with it
            # would be a contradiction that a TLB may resolve either way.
            if entry.value & d.CONTIGUOUS:
                self._unmark(ia, entry, flush)
            if below is not None:
                self._replace(ia, entry, below, flush)

    # The leaf that *entry* amounts to at *level*, around *ia*.
    def _leaf_at(self, entry: Entry, ia: int, level: int) -> int:
        inside = ia & (1 << self.granule.level_shift(entry.level)) - (1 << self.granule.level_shift(level))
        oa = d.output_address(entry.value, entry.level, self.granule) + inside
        return d.leaf(oa, entry.value & _ATTRIBUTES, level)

    # A new table in place of the block *value* at *level*; *below* is what stands for *ia*, unless another leaf does.
    def _fill_split(self, table: Pa, level: int, value: int, ia: int, below: int | None, contiguous: bool) -> None:
        oa, step = d.output_address(value, level, self.granule), 1 << self.granule.level_shift(level + 1)
        bits = value & _ATTRIBUTES
        run = self.granule.contiguous(level + 1)
        values = [d.leaf(oa + n * step, bits, level + 1) for n in range(self.granule.table_entries)]
        mine = ia // step & self.granule.table_entries - 1
        if contiguous and run > 1:
            skip = range(mine - mine % run, mine - mine % run + run) if below is not None else ()
            values = [v if n in skip else v | d.CONTIGUOUS for n, v in enumerate(values)]
        if below is not None:
            values[mine] = below
        self._write_unlinked(table, values)

    def _replace(self, ia: int, entry: Entry, value: int, flush: Callable[[int, int], None] | None) -> None:
        size = 1 << self.granule.level_shift(entry.level)
        if flush is not None:
            # Break, flush, make. For this moment nothing is mapped here: a kernel cannot do that to the text that it
            # runs, so it splits its linear map live, where level 3 of FEAT_BBM is there.
            self.write(entry.address, entry.level, 0, ia)
            flush(ia & -size, size)
        self.write(entry.address, entry.level, value, ia)

    # Take the contiguous bit from the whole run: all of it is broken before any of it is made again.
    def _unmark(self, ia: int, entry: Entry, flush: Callable[[int, int], None] | None) -> None:
        run, shift = self.granule.contiguous(entry.level), self.granule.level_shift(entry.level)
        first = entry.address & -(8 * run)
        found = [(first + 8 * n, self.memory.read64(first + 8 * n)) for n in range(run)]
        base, size = ia & -(run << shift), run << shift
        # All of the run before any of it: a run whose entries disagree may not be seen by a walker.
        if flush is not None:
            for n, (address, _) in enumerate(found):
                self.write(address, entry.level, 0, base + (n << shift))
            flush(base, size)
        for n, (address, value) in enumerate(found):
            self.write(address, entry.level, value & ~d.CONTIGUOUS, base + (n << shift))

    # -- filling ------------------------------------------------------------------------------------------------------

    def _aligned(self, bits: int, size: int) -> int:
        if bits & self.granule.size - 1 or size <= 0:
            raise BadInput(f"not a positive number of {self.granule} pages, or not aligned to them")
        return size

    # A contiguous run is changed as a whole or not at all.
    def _whole(self, ia: int, end: int) -> None:
        for at in (ia, end - 1):
            entry = self.lookup(at)
            if entry.value & d.VALID and entry.value & d.CONTIGUOUS:
                run = self.granule.contiguous(entry.level) << self.granule.level_shift(entry.level)
                if at & -run < ia or (at & -run) + run > end:
                    raise BadInput(f"{at:#x} is in a contiguous run that reaches beyond the range: split it first")

    def _fill(self, what: Filling) -> None:
        self._input(what.end - 1)
        self._whole(what.ia, what.end)
        links: list[tuple[Pa, int, int, int]] = []
        with self._pages.new() as new:
            self._cover(self.root, self.start_level, what.ia, what.end, what, new, links)
            for address, level, value, ia in links:
                self.write(address, level, value, ia)

    # What belongs into a table that is linked already; stores are collected and made when nothing can fail any more.
    def _cover(self, table: Pa, level: int, ia: int, end: int, what: Filling, new: Callable[[], Pa],
               links: list[tuple[Pa, int, int, int]]) -> None:
        for at, until in what.slots(ia, end, level):
            address = self._slot(table, level, at)
            value = self.memory.read64(address)
            found = d.kind(value, level, self.granule)
            if found == "table":
                self._cover(d.table_address(value, self.granule), level + 1, at, until, what, new, links)
            elif what.fits(at, until, level):
                # Collected, not stored: a table that cannot be had for the end of the range must leave its beginning
                # as it was.
                links.append((address, level, self._marked(what, at, level, table), at))
            elif value:
                # An implicit split would need break-before-make, and only the caller knows how to flush.
                raise BadInput(f"{at:#x} is in {d.describe(value, level, self.stage, self.granule)}: split it first")
            else:
                links.append((address, level, d.table(self._build(level + 1, at, until, what, new)), at))

    # A new table, with everything below it.
    def _build(self, level: int, ia: int, end: int, what: Filling, new: Callable[[], Pa]) -> Pa:
        table = new()
        values = [0] * self.granule.table_entries
        shift, mask = self.granule.level_shift(level), self.granule.table_entries - 1
        for at, until in what.slots(ia, end, level):
            if what.fits(at, until, level):
                values[at >> shift & mask] = self._marked(what, at, level, None)
            else:
                values[at >> shift & mask] = d.table(self._build(level + 1, at, until, what, new))
        self._write_unlinked(table, values)
        return table

    # The leaf, marked contiguous if its whole run is; in a linked table none of the run may lead to another table.
    def _marked(self, what: Filling, ia: int, level: int, table: Pa | None) -> int:
        value, base = what.value(ia, level), what.run(ia, level)
        if base is None:
            return value
        # A run with a table in it is no run. In a new table nothing is linked yet, so there it cannot happen.
        if table is not None and level < 3:
            first = self._slot(table, level, base)
            if any(d.kind(self.memory.read64(first + 8 * n), level, self.granule) == "table"
                   for n in range(self.granule.contiguous(level))):
                return value
        return value | d.CONTIGUOUS

    # No one can see this table yet, so that no rule about changing descriptors applies.
    def _write_unlinked(self, table: Pa, values: list[int]) -> None:
        self.memory.write(table, pack(f"<{len(values)}Q", *values))
