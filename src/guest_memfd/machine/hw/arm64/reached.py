"""What a tree of tables leads to, read as a walker reads it. Empty entries cost next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.words.units import PAGE, Pa


class ReachedMemory(Protocol):
    """What holds the tables."""

    def read(self, pa: Pa, nr: int, /) -> bytes:
        """The *nr* bytes from *pa* on."""


class Reached(NamedTuple):
    """A valid entry: [ia, ia+size) goes to *pa*, which is where it arrives or, if *table*, the next table."""

    ia: int
    pa: Pa
    size: int
    table: bool


def reached(memory: ReachedMemory, tree: PageTable) -> Iterator[Reached]:
    """Every valid entry of *tree*, a table before what is in it, in order; for a granule of 4 KiB."""
    return _below(memory, tree, tree.root, tree.start_level, 0, PAGE * tree.concatenated)


def _below(memory: ReachedMemory, tree: PageTable, table: Pa, level: int, ia: int, nr: int) -> Iterator[Reached]:
    shift = tree.granule.level_shift(level)
    for number, value in enumerate(memoryview(memory.read(table, nr)).cast("Q")):
        kind = d.kind(value, level, tree.granule) if value & d.VALID else "invalid"
        if kind == "invalid":
            continue
        at = ia + (number << shift)
        if kind == "table":
            below = d.table_address(value, tree.granule)
            yield Reached(at, below, 1 << shift, True)
            yield from _below(memory, tree, below, level + 1, at, PAGE)
        else:
            yield Reached(at, Pa(d.output_address(value, level, tree.granule)), 1 << shift, False)
