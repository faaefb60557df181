"""Where table pages come from and go to. When an operation fails, no page that it took is lost.

4 KiB tables are single pages of the source; those of the 16K and 64K granules, and concatenated ones, are blocks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from guest_memfd.errors import BadInput
from guest_memfd.words.units import PAGE, Pa


class TableMemory(Protocol):
    """What holds the tables."""

    def read64(self, pa: Pa, /) -> int:
        """The doubleword at *pa*."""

    def write64(self, pa: Pa, value: int, /) -> None:
        """Store a doubleword at *pa*, 8-byte aligned, little endian."""

    def write(self, pa: Pa, data: bytes, /) -> None:
        """Store *data* from *pa* on; used to zero tables."""


class PageSource(Protocol):
    """Where table pages of 4 KiB come from."""

    def alloc_table(self) -> Pa:
        """A zeroed page; raises OutOfMemory."""

    def free_table(self, pa: Pa, /) -> None:
        """Take a page back."""


@runtime_checkable
class BlockSource(Protocol):
    """Where larger tables (16K and 64K granules, concatenated ones) come from: 4 KiB << *order* bytes, aligned to that."""

    def alloc(self, order: int = 0, /) -> Pa:
        """A block, contents untouched; raises OutOfMemory."""

    def free(self, pa: Pa, order: int = 0, /) -> None:
        """Take a block back."""


class TablePages:
    """The table pages of one tree; *order* is log2 of how many pages of 4 KiB make one table."""

    def __init__(self, memory: TableMemory, source: PageSource, order: int) -> None:
        self.memory, self.source, self.order = memory, source, order
        self.tables: set[Pa] = set()

    def alloc(self, order: int) -> Pa:
        """Zeroed memory for 1 << *order* pages; raises OutOfMemory, and BadInput when the source has single pages only."""
        if not order:
            return self.source.alloc_table()
        if not isinstance(self.source, BlockSource):
            raise BadInput(f"this source has no blocks of order {order} for tables")
        pa = self.source.alloc(order)
        self.memory.write(pa, bytes(PAGE << order))
        return pa

    def free(self, pa: Pa, order: int) -> None:
        """Give back what `alloc` returned."""
        if not order:
            self.source.free_table(pa)
        else:
            assert isinstance(self.source, BlockSource)
            self.source.free(pa, order)

    @contextmanager
    def new(self) -> Iterator[Callable[[], Pa]]:
        """A function that allocates tables, of which none stays when anything goes wrong inside."""
        made: list[Pa] = []

        def table() -> Pa:
            made.append(self.alloc(self.order))
            return made[-1]

        try:
            yield table
        # Whatever went wrong, ^C included: a table that is linked nowhere would be lost.
        except BaseException:
            for pa in made:
                self.free(pa, self.order)
            raise
        # Only now they belong to the tree: everything inside has succeeded.
        self.tables.update(made)

    def free_all(self) -> None:
        """Give every table back that was linked."""
        while self.tables:
            self.free(self.tables.pop(), self.order)
