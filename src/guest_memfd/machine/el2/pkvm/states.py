"""Who owns a page: the page states and the hypervisor's vmemmap. A record that was never written is the host's.

An entry is eight bytes, packed as struct hyp_page is (include/nvhe/memory.h): refcount 15:0, order 23:16, host state
27:24, hyp state 31:28 complemented, number of guests that the host shares the page with 63:32. So all zeros reads as
"host OWNED, hypervisor NOPAGE", and the table is kept sparse: a dict of the words that are not zero. Upstream has one
word per 4 KiB page; here a word may also stand for a whole 2 MiB or 1 GiB range in which all pages agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.words.units import Pfn, span

ORDERS = (0, 9, 18)
"""Orders (log2 of 4 KiB pages) of what one leaf can map: page, 2 MiB, 1 GiB."""

_COUNT_MAX = (1 << 32) - 1


class PkvmState(IntEnum):
    """enum pkvm_page_state; POISON exists only for guests, and only as an annotation of their page-table entry."""

    OWNED = 0
    SHARED_OWNED = 1
    SHARED_BORROWED = 2
    NOPAGE = 3
    POISON = 4


class HypPage(NamedTuple):
    """One entry of the vmemmap, unpacked."""

    refcount: int = 0
    order: int = 0
    host: PkvmState = PkvmState.OWNED
    hyp: PkvmState = PkvmState.NOPAGE
    guests: int = 0

    @property
    def value(self) -> int:
        """struct hyp_page as the eight bytes that are in memory; *hyp* is stored inverted, so zeros mean "not EL2's"."""
        return self.refcount | self.order << 16 | self.host << 24 | (self.hyp ^ 3) << 28 | self.guests << 32

    @classmethod
    def decode(cls, value: int) -> HypPage:
        """The reverse of `value`: take the eight bytes of a struct hyp_page apart."""
        states = PkvmState(value >> 24 & 3), PkvmState((value >> 28 & 3) ^ 3)
        return cls(value & 0xffff, value >> 16 & 0xff, *states, value >> 32)

    @property
    def may_be_shared_again(self) -> bool:
        """Whether one more guest can borrow it without its count running over."""
        return self.guests < _COUNT_MAX

    @override
    def __repr__(self) -> str:
        more = f" guests={self.guests}" if self.guests else ""
        more += f" refcount={self.refcount}" if self.refcount else ""
        return f"<host {self.host.name} hyp {self.hyp.name}{more}>"


class Vmemmap:
    """hyp_vmemmap of all memory; frame numbers (pfn) count 4 KiB pages from physical address 0."""

    def __init__(self) -> None:
        # One dict of packed words per order, keyed by first pfn. A pfn is in at most one of them.
        self._words: dict[int, dict[Pfn, int]] = {order: {} for order in ORDERS}

    def __len__(self) -> int:
        return sum(map(len, self._words.values()))

    def page(self, pfn: Pfn) -> HypPage:
        """The record of one page."""
        return HypPage.decode(self._word(pfn))

    def _word(self, pfn: Pfn) -> int:
        for order, words in self._words.items():
            word = words.get(pfn & -1 << order)
            if word is not None:
                return word
        return 0

    def recorded(self) -> Iterator[tuple[Pfn, int]]:
        """(first pfn, order) of every record that differs from that of an untouched page, the host's own."""
        yield from ((pfn, order) for order, words in self._words.items() for pfn, word in words.items() if word)

    def pages(self, pfn: Pfn, order: int) -> Iterator[HypPage]:
        """The different records of the naturally aligned range of 1 << *order* pages; one if all pages agree."""
        # One word for the whole range is the usual case; 1 GiB has 262144 pages, too many to look at each.
        if self._covered(pfn, order):
            yield self.page(pfn)
            return
        for word in {self._word(each) for each in span(pfn, 1 << order)}:
            yield HypPage.decode(word)

    # Whether one word, or no word at all, stands for the whole range.
    def _covered(self, pfn: Pfn, order: int) -> bool:
        if any(pfn & -1 << o in self._words[o] for o in ORDERS if o >= order):
            return True
        return not any(self._below(pfn, order))

    def _below(self, pfn: Pfn, order: int) -> Iterator[tuple[int, Pfn]]:
        end = pfn + (1 << order)
        for lower in ORDERS:
            words = self._words[lower]
            if lower >= order or not words:
                continue
            # The shorter way: through the words that there are, or through the pages of the range.
            if len(words) < end - pfn >> lower:
                yield from ((lower, at) for at in words if pfn <= at < end)
            else:
                yield from ((lower, at) for at in span(pfn, 1 << order - lower, 1 << lower) if at in words)

    def set(self, pfn: Pfn, order: int, page: HypPage) -> None:
        """Write the record of all pages of a naturally aligned range of 1 << *order* pages, order one of ORDERS."""
        # A word for 2 MiB has to come apart before one of its pages can have another state.
        self._open(pfn, order)
        for lower, at in list(self._below(pfn, order)):
            del self._words[lower][at]
        value = page.value
        # Zeros are not stored: that is the record of a page that no one has touched, and the table stays as small as
        # what has been given away.
        if value:
            self._words[order][pfn] = value
        else:
            self._words[order].pop(pfn, None)

    # A word that stands for more than this range comes apart.
    def _open(self, pfn: Pfn, order: int) -> None:
        for i in range(len(ORDERS) - 1, 0, -1):
            upper, lower = ORDERS[i], ORDERS[i - 1]
            head = pfn & -1 << upper
            if upper > order and (word := self._words[upper].pop(head, None)) is not None:
                for at in span(head, 1 << upper - lower, 1 << lower):
                    self._words[lower][at] = word
