"""What all parts of the library hold: the host's primitives and the hypervisor's operations."""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.words.primitives import Host


def filled(entries: Sequence[int]) -> int:
    """How many of *entries* are no holes."""
    return len(entries) - entries.count(0)


class Parts:
    """Base of the library's parts. *size* is the file's length in pages, *order* that of all its folios."""

    order = 0
    splits = False
    """Whether folios may be split, and smaller ones be used where one of `order` cannot be had."""

    no_direct_map = True
    """Whether private pages leave the direct map: then the kernel must be able to do that, and who reads page-cache folios
    through it is turned away (AS_NO_DIRECT_MAP)."""

    def __init__(self, ops: GuestMemfdOps, size: int) -> None:
        self.host = Host("library")
        self.ops = ops
        self.size = size

    def has(self, start: int, nr: int) -> bool:
        """Whether [start, start+nr) is a range of the file."""
        return start >= 0 and nr > 0 and start + nr <= self.size

    def whole(self, *numbers: int) -> bool:
        """Whether all *numbers* (page indexes, lengths, gfns) are multiples of a folio's size."""
        return not any(number % (1 << self.order) for number in numbers)
