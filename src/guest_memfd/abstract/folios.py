"""Large folios and large leaves of the abstract host: what is one for several pages, and how it becomes several.

Theory of operation. A folio of order n is 2^n frames that lie side by side, aligned. Its lock, its references and its
flags are those of its first frame; what a page holds, who owns it, who maps it and whether its memory is broken is each
page's own. The page cache has an entry for each page. Leaves are another thing: an entry of a table that maps 2^n pages,
whatever folios these are. There are three tables - the direct map, host stage 2, guest stage 2 - and for each page the order
of its leaf in each. A leaf that is changed in part has to be split first, one size after the other. In the direct map that
takes a table, so it can fail; a hypervisor has a call of its own for it, or fails the call that needs it.

A TLB keeps a large leaf as one entry. That entry says of each page what the split leaves say, so it does no harm until one
of them changes; the flush of that page then drops it. So staleness is each page's own, too.
"""

from __future__ import annotations

from errno import EBUSY
from typing import Literal

from guest_memfd.abstract import state as st
from guest_memfd.abstract.base import AbstractBase
from guest_memfd.words.pagestate import FREE, REFERENCE
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Index, Pfn, span

Table = Literal["s1_leaf", "s2_leaf", "guest_leaf"]


class AbstractFolios(AbstractBase):
    """split_folio, merge_folio, page_hwpoison, and what the other mixins ask about folios and leaves."""

    def head_of(self, folio: Folio) -> st.Frame:
        """The frame that has lock, references and flags of what the caller calls *folio*."""
        return self.state.head(self.state.frame(folio.pfn))

    def folio(self, frame: st.Frame) -> Folio:
        """The folio that *frame* is part of."""
        head = self.state.head(frame)
        return Folio(head.number, self.state.folio(head.number).order if self.sizes.order else 0)

    def frames_of(self, folio: Folio) -> list[st.Frame]:
        """The frames that *folio* names, whatever has become of it."""
        return [self.state.frame(pfn) for pfn in folio.pfns]

    def free_block(self, order: int) -> st.Frame | None:
        """The lowest 2^order free frames that are aligned: the first of them."""
        # Any free block would do. Always the lowest keeps the number of states small.
        for first in range(0, self.sizes.frames, 1 << order):
            frames = [self.state.frame(pfn) for pfn in span(Pfn(first), 1 << order)]
            if all(frame.allocated == FREE for frame in frames):
                return frames[0]
        return None

    # -- leaves ------------------------------------------------------------------------------------------------------

    def leaf(self, table: Table, pfn: Pfn) -> int:
        """The order of the leaf that maps *pfn* in *table*."""
        return int(getattr(self.state.folio(pfn), table)) if self.sizes.order else 0

    def set_leaf(self, table: Table, pfn: Pfn, order: int) -> None:
        """One leaf maps the 2^order pages from *pfn* on."""
        if self.sizes.order:
            for part in span(pfn, 1 << order):
                setattr(self.state.folio(part), table, order)

    def cut_leaf(self, table: Table, folio: Folio) -> None:
        """Split the leaves that map more than *folio*, one size after the other, until none does."""
        while (order := self.leaf(table, folio.pfn)) > folio.order:
            self._split_leaf(table, folio.pfn, order)

    def leave_leaf(self, table: Table, pfn: Pfn) -> None:
        """The leaf that maps *pfn* is leaves of single pages, and was before anybody has counted what is split."""
        order = self.leaf(table, pfn)
        for part in span(Pfn(pfn >> order << order), 1 << order):
            self.set_leaf(table, part, 0)

    def split_leaves(self, table: Table, folio: Folio) -> None:
        """Have a leaf of its own map each page of *folio*."""
        for pfn in folio.pfns:
            self.cut_leaf(table, Folio(pfn))

    def _split_leaf(self, table: Table, pfn: Pfn, order: int) -> None:
        first = Pfn(pfn >> order << order)
        for half in span(first, 2, 1 << order - 1):
            self.set_leaf(table, half, order - 1)
        self.count("splits")

    # -- folios ------------------------------------------------------------------------------------------------------

    def make_folio(self, head: st.Frame, order: int) -> None:
        """The 2^order frames from *head* on are one folio from now on."""
        if not self.sizes.order:
            return
        for tail, pfn in enumerate(span(head.number, 1 << order)):
            record = self.state.folio(pfn)
            record.order, record.tail = 0 if tail else order, tail

    def split_folio(self, folio: Folio) -> int:
        """Flags and the page cache's references are those of every page; the caller keeps the first, locked."""
        head = self.locked(folio, "split_folio")
        parts = self.state.parts(head)
        if not head.slot:
            self.die(f"split_folio of {folio}, which is not in the page cache")
        if len(parts) == 1:
            self.die(f"split_folio of {folio}, which is a single page")
        # No one but the page cache and the caller: a part that someone refers to cannot become a folio of its own.
        if head.refs() != len(parts) + 1:
            self.against(REFERENCE, head)
            return -EBUSY
        for part in parts:
            if part.user:
                self.die(f"split_folio of {folio}, which a page table of the VMM maps")
            part.cache, part.uptodate, part.no_direct_map = 1, head.uptodate, head.no_direct_map
            self.make_folio(part, 0)
        return 0

    def merge_folio(self, index: Index, order: int) -> bool:
        """The pages' references are frozen at what the page cache has, so nobody finds a folio half way."""
        frames = [self.state.frame(page.cached - 1) for i in span(index, 1 << order) if (page := self.page(i)).cached]
        if len(frames) < 1 << order or frames[0].number % (1 << order):
            return False
        first = frames[0]
        for at, frame in enumerate(frames):
            if (frame.number != first.number + at or self.folio(frame) != Folio(frame.number)
                    or frame.lock or frame.poison or frame.refs() != 1
                    or (frame.uptodate, frame.no_direct_map) != (first.uptodate, first.no_direct_map)):
                return False
        for frame in frames[1:]:
            frame.cache = frame.uptodate = frame.no_direct_map = 0
        first.cache = len(frames)
        self.make_folio(first, order)
        return True

    def page_hwpoison(self, folio: Folio) -> tuple[bool, ...]:
        """PG_hwpoison is each page's own."""
        return tuple(bool(frame.poison) for frame in self.frames_of(folio))

    def locked(self, folio: Folio, what: str) -> st.Frame:
        """The frame of *folio* that has its lock, which the current party holds; else the kernel stops."""
        head = self.head_of(folio)
        # A procedure that forgets the lock would race here. That is a bug in it, never an outcome.
        if head.lock != self.who + 1:
            self.die(f"{what} of {folio} without its lock")
        return head
