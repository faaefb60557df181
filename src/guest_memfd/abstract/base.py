"""What the parts of the abstract host share: the state that they change, how a primitive waits or dies, folios and leaves.

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

from collections.abc import Sequence
from errno import EBUSY
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from guest_memfd.abstract import state as st
from guest_memfd.words import facts
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.pagestate import EVICTED, FREE, GUEST, MANY, REFERENCE, SECRET
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Gfn, Index, Pfn, span

if TYPE_CHECKING:
    from guest_memfd.core.hypervisor import Hypervisor
    from guest_memfd.words.scene import Kernel, Scene

Table = Literal["s1_leaf", "s2_leaf", "guest_leaf"]


class Panicked(Exception):  # noqa: N818
    """The kernel stopped in the middle of the primitive."""


class AbstractBase:
    """The state a primitive works on, whose file and VM it is about, who asked for it, and what it leaves for the laws.

    Of the primitives split_folio, merge_folio and page_hwpoison are here.
    """

    hypervisor: Hypervisor
    kernel: Kernel
    scene: Scene
    sea_fixup: bool
    tasks: frozenset[int]
    sizes: st.Sizes
    indexes: Sequence[Index]            # of all pages of a file
    state: st.State
    file: st.FileRecord
    vm: st.VmRecord

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.who = 0
        self.caller = "library"

    def wait(self) -> NoReturn:
        """The primitive cannot go on now; the caller waits."""
        raise Blocked

    def panic(self) -> NoReturn:
        """The kernel stops after an abort that has been noted."""
        raise Panicked

    def die(self, why: str) -> NoReturn:
        """The kernel stops for a reason that is no abort: BUG_ON, a wild pointer."""
        self.notes.append(facts.Broken(why))
        raise Panicked

    def gone(self, what: str) -> NoReturn:
        """The primitive was called on an object whose memory is gone: no one can say what happens next."""
        self.notes.append(facts.UseAfterFree(what))
        raise Panicked

    # -- numbers: of pages and gfns, counted on from file to file and from VM to VM --------------------------------

    def page(self, index: Index) -> st.PageRecord:
        """Page *index* of the file; outside of it the kernel stops."""
        # A design that asks for a page beyond the file has a bug that real memory would hide; here the kernel stops,
        # and the trace ends at the line that asked.
        if not 0 <= index < self.sizes.pages:
            self.die(f"page {index} is used, of a file of {self.sizes.pages} pages")
        return self.state.page(self.file.number * self.sizes.pages + index)

    def index(self, number: int) -> Index:
        """The page index, in its own file, of page record *number*."""
        return Index(number % self.sizes.pages)

    def ours(self, frame: st.Frame) -> Index | None:
        """The page index at which the current file holds *frame*."""
        number = frame.slot - 1 - self.file.number * self.sizes.pages
        return Index(number) if frame.slot and 0 <= number < self.sizes.pages else None

    def gfn(self, gfn: Gfn) -> st.GfnRecord:
        """Record of *gfn* of the VM; outside of what it has the kernel stops."""
        if not 0 <= gfn < self.sizes.gfns:
            self.die(f"gfn {gfn} is used, of a VM of {self.sizes.gfns} guest frames")
        return self.state.gfn(self.vm.number * self.sizes.gfns + gfn)

    # -- the file ----------------------------------------------------------------------------------------------------

    def bound(self) -> bool:
        """Whether any page of the file is bound."""
        return any(self.page(index).binding for index in self.indexes)

    def drop_inode(self) -> bool:
        """One reference on the inode less; True: the last one, and the caller evicts it."""
        if not self.file.inodes:
            self.die("iput of an inode without references")
        self.file.inodes -= 1
        if self.file.inodes:
            return False
        self.file.inode, self.file.evictor = EVICTED, self.who + 1
        return True

    # -- what the laws are told --------------------------------------------------------------------------------------

    def guests(self, frame: st.Frame) -> bool:
        """Whether *frame* is private to a guest: by the hypervisor, by what it holds, or by the library's word."""
        if frame.owner == GUEST or frame.content == SECRET:
            return True
        return bool(frame.gmap) and bool(frame.slot) and self.state.private(frame)

    def count(self, what: str) -> None:
        """The operation that the current party is in asks for one more of *what*: writes, flushes, calls, stalls."""
        ghost = self.state.ghost(self.who)
        if ghost.op:
            # Up to the largest number that a byte holds: no bound that a design states comes near it.
            setattr(ghost, what, min(getattr(ghost, what) + 1, MANY))

    def against(self, reason: int, frame: st.Frame | None = None) -> None:
        """Something stands against the operation that the current party is in: at *frame*'s folio, if it is one's doing."""
        ghost = self.state.ghost(self.who)
        if not ghost.op:
            return
        ghost.reasons |= reason
        for part in () if frame is None else self.state.parts(self.state.head(frame)):
            index = self.ours(part)
            if index is not None:
                ghost.places |= 1 << index

    # -- folios and their frames -------------------------------------------------------------------------------------

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
