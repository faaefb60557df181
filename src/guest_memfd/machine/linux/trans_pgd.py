"""Temporary copies of the linear map's tables, for kexec and the resume kernel. Every entry that is not empty becomes
valid and writable, so holes are not there in the copy (copy_pte() in arch/arm64/mm/trans_pgd.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import ENOMEM
from typing import Protocol

from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.words.units import Pa, Va, span


class PgdSource(Protocol):
    """The linear map that is copied."""

    ram: Ram
    kpti: bool

    @property
    def root(self) -> Pa:
        """Physical address of swapper_pg_dir, the first table of the linear map."""

    def fault_in(self, va: Va) -> bool:
        """Build what has not been needed yet."""


def trans_pgd_create_copy(linear_map: PgdSource, pages: PageSource, start: Va, end: Va) -> Pa | int:
    """Physical address of a table tree that maps what [start, end), virtual, maps; or -ENOMEM, and nothing is kept.

    *pages* gives the tables. A copy of a hole is valid: a kernel that runs on the copy reaches everything.
    """
    first = start & -dm.PUD_SIZE
    for va in span(first, -(-(end - first) // dm.PUD_SIZE), dm.PUD_SIZE):
        linear_map.fault_in(va)
    taken: list[Pa] = []
    try:
        root = _new(pages, taken)
        _copy(linear_map, pages, taken, (linear_map.root, root), (start, end), 0)
    except OutOfMemory:
        for pa in taken:
            pages.free_table(pa)
        return -ENOMEM
    return root


def _new(pages: PageSource, taken: list[Pa]) -> Pa:
    taken.append(pages.alloc_table())
    return taken[-1]


def _copy(linear_map: PgdSource, pages: PageSource, taken: list[Pa], tables: tuple[Pa, Pa], range_: tuple[int, int],
          level: int) -> None:
    ram, (old, new) = linear_map.ram, tables
    for index, inside in _entries(range_, level):
        value = ram.read64(old + 8 * index)
        if not value:
            continue
        entry = Entry(level, old + 8 * index, value)
        if dm.is_table(entry):
            table = _new(pages, taken)
            _copy(linear_map, pages, taken, (Pa(value & dm.OUTPUT), table), inside, level + 1)
            ram.write64(new + 8 * index, table | dm.VALID | dm.TABLE | value & (dm.TABLE_PXN | dm.TABLE_UXN))
        else:
            value = value & ~(dm.RDONLY | dm.PRESENT_INVALID) | dm.VALID | dm.WRITE
            ram.write64(new + 8 * index, value | (dm.NG if linear_map.kpti else 0))


# Index and piece of the range, for every entry of *level* that the range touches.
def _entries(span: tuple[int, int], level: int) -> Iterator[tuple[int, tuple[int, int]]]:
    start, end = span
    size = dm.level_size(level)
    while start < end:
        nxt = min(end, (start & -size) + size)
        yield start >> (39 - 9 * level) & 511, (start, nxt)
        start = nxt
