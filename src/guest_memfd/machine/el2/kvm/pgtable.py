"""A stage-2 table as KVM keeps it. Rule of this file: a valid entry is broken and flushed before another takes its place
(tests/test_kvm_el2.py holds it).

After arch/arm64/kvm/hyp/pgtable.c: an entry that changes is LOCKED first, then its TLB entries go, then the new entry is
written; a table that no longer holds anything is freed after its parent entry has gone the same way. A block that has
to make room for a page is dropped as a whole, and the rest of it is faulted in again when it is needed; `split` alone keeps
it. All the table pages that an operation needs are allocated before it changes anything.

Descriptors are stored by arm64's PageTable.write, which watches over break-before-make.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Ipa, Pa, span

LOCKED = 1 << 60
"""Software's note in an invalid entry: break-before-make is under way (KVM_INVALID_PTE_TYPE_LOCKED, 7.3)."""
STATE_SHIFT = 55
"""pKVM keeps the page state of guests in the software bits 56:55."""

LAST_LEVEL = 3
_STRIDE = 9


def leaf_attributes(prot: str, *, device: bool = False, state: int = 0) -> int:
    """Attribute bits for *prot*, letters of "rwx"; *state* goes into bits 56:55 (kvm_pgtable.h, stage2_set_prot_attr())."""
    bits = d.AF | d.SH_INNER | (d.DEVICE_NGNRE if device else d.NORMAL_WB) << d.MEMATTR_SHIFT | state << STATE_SHIFT
    bits |= d.S2_READ * ("r" in prot) | d.S2_WRITE * ("w" in prot)
    return bits if "x" in prot else bits | d.S2_XN


def page_of(entry: Entry, number: int) -> int:
    """The leaf of page *number* of the block that *entry* maps: the same in all but the address."""
    return d.leaf(entry.oa + number * PAGE, entry.value & ~(d.ADDRESS | d.TABLE), LAST_LEVEL)


def tables_to_split(order: int) -> int:
    """Table pages that it takes to make pages of a leaf of 1 << *order*: 1 for 2 MiB; for 1 GiB 512, and one above them."""
    return (1 << order >> _STRIDE) + (order > _STRIDE)


def level_of(order: int) -> int:
    """The level whose leaves map 1 << *order* pages of 4 KiB: 0, 9 or 18."""
    return LAST_LEVEL - order // _STRIDE


class KvmStage2Table:
    """One stage-2 tree with a 4 KiB granule, for input addresses of *ia_bits*; orders are 0, 9 or 18.

    *locked* is what an entry says in the middle of break-before-make.
    """

    def __init__(self, ram: Ram, table: PageTable, source: PageSource, tlbs: Maintenance, locked: int = LOCKED) -> None:
        self.ram, self.table, self.source, self.tlbs, self.locked = ram, table, source, tlbs, locked
        table.live_check = tlbs.holds
        self.splits = 0                                 # blocks that a table has taken the place of
        # How many entries of a table other than the first are in use (KVM: the table page's refcount).
        self._used: dict[Pa, int] = {}

    @property
    def root(self) -> Pa:
        """Physical address of the first table."""
        return self.table.root

    @property
    def tables(self) -> int:
        """Table pages in use, without the first."""
        return len(self._used)

    def _index(self, ia: Ipa, level: int) -> int:
        return ia >> 12 + (LAST_LEVEL - level) * _STRIDE & (1 << _STRIDE) - 1

    # The entries from the first level down to *level*, or to the first that is no table.
    def _path(self, ia: Ipa, level: int = LAST_LEVEL) -> list[Entry]:
        return [entry for entry in self.table.path(ia) if entry.level <= level]

    def leaf(self, ia: Ipa) -> Entry:
        """What decides *ia*; beyond the input size that is an empty entry which is nowhere."""
        if ia >> self.table.ia_bits:
            return Entry(self.table.start_level, Pa(0), 0)
        return self.table.lookup(ia)

    def empty(self, ia: Ipa, order: int) -> bool:
        """Whether nothing in the aligned range maps and nothing in it is annotated."""
        return self._empty(self._path(ia, level_of(order))[-1])

    def _empty(self, entry: Entry) -> bool:
        if d.kind(entry.value, entry.level) != "table":
            return not entry.value
        base = d.table_address(entry.value)
        return not self._used[base] or all(
            self._empty(Entry(entry.level + 1, at, self.ram.read64(at))) for at in span(base, PAGE // 8, 8))

    # -- changes -----------------------------------------------------------------------------------------------

    def map(self, ia: Ipa, order: int, oa: Pa, attributes: int) -> None:
        """Map the aligned range with one leaf, whatever was there; raises OutOfMemory with nothing changed."""
        self._install(ia, order, d.leaf(oa, attributes, level_of(order)))

    def annotate(self, ia: Ipa, order: int, note: int) -> None:
        """Unmap the aligned range and leave *note* in its one entry; raises OutOfMemory with nothing changed."""
        self._install(ia, order, note)

    def _install(self, ia: Ipa, order: int, value: int) -> None:
        level = level_of(order)
        entry = self._path(ia, level)[-1]
        # To put a smaller entry into an annotated range would need the annotation for the rest of it, which a table
        # of empty entries does not have.
        if entry.level < level and entry.value and not entry.valid:
            raise ValueError(f"{ia:#x} is annotated as part of a larger range, which would be forgotten")
        # All table pages are allocated here, before the entry changes: after OutOfMemory nothing has.
        new = value if entry.level == level else self._chain(ia, entry.level, level, value)
        self.splits += entry.level != level and entry.valid
        if entry.value != new:
            self._replace(ia, entry, new)

    def split(self, ia: Ipa, pages: Callable[[Entry, int], int]) -> None:
        """Make entries of single pages of the one that decides *ia*; raises OutOfMemory with nothing changed.

        *pages*: what the entry of a page says, by the entry that it was part of and the page's number in it. As
        kvm_pgtable_stage2_split(), which splits what maps; here an annotated range as well.
        """
        entry = self.leaf(ia)
        if not entry.order:
            return
        per_table = 1 << _STRIDE
        tables = self._take(tables_to_split(entry.order))
        for number in range(1 << entry.order - _STRIDE):
            values = (pages(entry, number * per_table + at) for at in range(per_table))
            self.ram.write(tables[number], pack(f"<{per_table}Q", *values))
        if entry.order > _STRIDE:
            self.ram.write(tables[-1], pack(f"<{per_table}Q", *map(d.table, tables[:-1])))
        self._used |= dict.fromkeys(tables, per_table)
        self.splits += 1
        self._replace(ia, entry, d.table(tables[-1]))

    # All of them, or OutOfMemory and none.
    def _take(self, number: int) -> list[Pa]:
        made: list[Pa] = []
        try:
            while len(made) < number:
                made.append(self.source.alloc_table())
        except Exception:
            for pa in made:
                self.source.free_table(pa)
            raise
        return made

    # New tables from *above* down to *level* with *value* at the bottom; the descriptor of the uppermost.
    def _chain(self, ia: Ipa, above: int, level: int, value: int) -> int:
        for at, pa in zip(range(level, above, -1), self._take(level - above), strict=True):
            # The rest of a new table is empty. A block that made room is dropped as a whole, and is faulted in again
            # piece by piece: KVM can always ask for the mapping again.
            self.table.write(pa + 8 * self._index(ia, at), at, value)
            self._used[pa] = 1
            value = d.table(pa)
        return value

    # stage2_try_break_pte(), then stage2_make_pte().
    def _replace(self, ia: Ipa, entry: Entry, value: int) -> None:
        if entry.valid:
            # Not zero: an empty entry means that anyone may map it, and another CPU's fault could do so between break
            # and make.
            self._write(ia, entry, self.locked)
            # Between break and make. After the make a TLB could hold the old entry and the new one.
            self._flush(ia, entry)
        self._write(ia, entry, value)
        # Only after the flush: a walker that has cached the way to this table would read the freed page as
        # descriptors.
        if entry.valid and d.kind(entry.value, entry.level) == "table":
            self._free(entry)
        self._count(entry, bool(value) - bool(entry.value))

    def _write(self, ia: Ipa, entry: Entry, value: int) -> None:
        self.table.write(entry.address, entry.level, value, ia)

    def _flush(self, ia: Ipa, entry: Entry) -> None:
        size = PAGE << entry.order
        if d.kind(entry.value, entry.level) == "table":
            self.tlbs.flush_range(ia & -size, size)
        else:
            self.tlbs.flush_ipa(ia & -size, entry.level)

    def _count(self, entry: Entry, change: int) -> None:
        page = entry.address & -PAGE
        if page in self._used:
            self._used[page] += change

    def _free(self, entry: Entry) -> None:
        base = d.table_address(entry.value)
        for at in span(base, PAGE // 8, 8) if self._used[base] else ():
            below = Entry(entry.level + 1, at, self.ram.read64(at))
            if d.kind(below.value, below.level) == "table":
                self._free(below)
        del self._used[base]
        self.source.free_table(base)

    def unmap(self, ia: Ipa) -> Entry:
        """Clear what decides *ia*, mapping or note, and free tables that hold nothing any more; returns what was there."""
        path = self._path(ia)
        entry = path.pop()
        if entry.value:
            self._clear(ia, entry)
            # Upwards, as long as a table has become empty; the first-level table is not counted and always stays.
            while len(path) and not self._used.get(d.table_address(path[-1].value), 1):
                self._clear(ia, path.pop())
        return entry

    def _clear(self, ia: Ipa, entry: Entry) -> None:
        self._write(ia, entry, 0)
        if entry.valid:
            self._flush(ia, entry)
            # A table has leaves of all sizes below it, so there is no one level to give as a hint: a wrong hint
            # removes nothing.
            if d.kind(entry.value, entry.level) == "table":
                self._free(entry)
        self._count(entry, -1)

    def destroy(self) -> None:
        """Free every table but the first, which is emptied; the caller sees to the TLBs."""
        size = PAGE << (LAST_LEVEL - self.table.start_level) * _STRIDE
        for number, ia in enumerate(span(Ipa(0), (1 << self.table.ia_bits) // size, size)):
            # Most of the first tables' entries are empty, and there are a thousand.
            if not self.table.memory.read64(self.table.root + 8 * number):
                continue
            (entry,) = self._path(ia, self.table.start_level)
            if d.kind(entry.value, entry.level) == "table":
                self._free(entry)
            self._write(ia, entry, 0)
