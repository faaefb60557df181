"""Page cache and references of the abstract host: look-up, insertion, removal, and what the last put does."""

from __future__ import annotations

from errno import EEXIST, ENOMEM

from guest_memfd.abstract import state as st
from guest_memfd.abstract.access import AbstractAccess
from guest_memfd.abstract.operations import AbstractOperations
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ALLOCATED,
    ANY,
    CONTENTION,
    DATA,
    EVICTED,
    FAILURE,
    JUNK,
    REFERENCE,
    UNMAPPED,
    ZERO,
)
from guest_memfd.words.primitives import Folio, Lookup
from guest_memfd.words.units import Index, span


class AbstractPageCache(AbstractAccess, AbstractOperations):
    """The page-cache primitives, filemap_get_folio to folio_set_no_direct_map, and the references on a frame."""

    def filemap_get_folio(self, index: Index) -> Lookup | None:
        """A hit comes with a transient reference."""
        page = self.page(index)
        if not page.cached:
            return None
        frame = self.state.frame(page.cached - 1)
        head = self.state.head(frame)
        head.lookup += 1
        return Lookup(self.folio(head), Index(index - (frame.number - head.number)))

    def filemap_find_folio(self, index: Index, nr: int) -> Index:
        """The first slot that is taken."""
        end = min(index + nr, self.sizes.pages)
        return next((i for i in span(index, end - index) if self.page(i).cached), index + nr)

    def filemap_add_folio(self, index: Index, order: int) -> Lookup | int:
        """Allocates the lowest free frames that will do, for the index rounded down to the folio's size."""
        frames = self._add(index, order)
        if isinstance(frames, int):
            return frames
        head = frames[0]
        self.make_folio(head, order)
        # The page cache has one reference for each page. The LRU batch of this CPU holds one, too, which is why a
        # conversion may have to drain before it counts; a large folio empties the batch at once (mm/swap.c).
        head.cache, head.lru, head.lookup = 1 << order, int(not order), 1
        head.lock = self.who + 1
        return Lookup(Folio(head.number, order), Index(index >> order << order))

    def filemap_add_pages(self, index: Index, order: int) -> Lookup | int:
        """The same frames, each a folio of its own."""
        frames = self._add(index, order)
        if isinstance(frames, int):
            return frames
        for frame in frames:
            frame.cache = frame.lru = 1
        wanted = frames[index & (1 << order) - 1]
        wanted.lookup, wanted.lock = 1, self.who + 1
        return Lookup(Folio(wanted.number), index)

    def filemap_alloc_folio(self, unmapped: bool) -> Folio | int:
        """The lowest free frame. Where it comes *unmapped*, the allocator has made the hole long before, and flushed."""
        frame = self.free_block(0)
        if frame is None:
            self.against(FAILURE)
            return -ENOMEM
        frame.allocated, frame.content = ALLOCATED, JUNK
        frame.lookup, frame.lock = 1, self.who + 1
        self.make_folio(frame, 0)
        if unmapped:
            self.leave_leaf("s1_leaf", frame.number)
            frame.s1, frame.no_direct_map = 0, UNMAPPED
        return Folio(frame.number)

    def filemap_insert_folio(self, index: Index, folio: Folio) -> int:
        """What was put there before, on purpose, is what a reader of the page must find."""
        frame, page = self.locked(folio, "filemap_insert_folio"), self.page(index)
        if page.cached:
            self.against(CONTENTION)
            return -EEXIST
        frame.cache = frame.lru = 1
        frame.slot, page.cached = page.number + 1, frame.number + 1
        page.expect = DATA if frame.content == DATA else ZERO
        return 0

    # 2^order frames side by side, allocated and entered into the page cache; -ENOMEM, -EEXIST.
    def _add(self, index: Index, order: int) -> list[st.Frame] | int:
        pages = [self.page(i) for i in span(Index(index >> order << order), 1 << order)]
        head = self.free_block(order) if order <= self.sizes.order else None
        if head is None:
            self.against(FAILURE)
            return -ENOMEM
        # After the allocation, as in the kernel: another task may have inserted a folio meanwhile.
        if any(page.cached for page in pages):
            self.against(CONTENTION)
            return -EEXIST
        frames = self.frames_of(Folio(head.number, order))
        for page, frame in zip(pages, frames, strict=True):
            frame.allocated, frame.content = ALLOCATED, JUNK
            frame.slot, page.cached = page.number + 1, frame.number + 1
        return frames

    def filemap_remove_folio(self, folio: Folio) -> None:
        """Leaves the page cache; any other reference keeps the frame."""
        head = self.locked(folio, "filemap_remove_folio")
        if not head.slot:
            self.die(f"{folio} is not in the page cache")
        kept = head.kept
        for frame in self.state.parts(head):
            self._remove(frame, kept=bool(kept))
        head.cache = 0

    def _remove(self, frame: st.Frame, *, kept: bool) -> None:
        page = self.state.page(frame.slot - 1)
        index = self.index(page.number)
        page.cached = frame.slot = 0
        ghost = self.state.ghost(self.who)
        # Only a punch, or the end of the file, is asked to lose what is there; a page that is given up is lost already, and
        # userfaultfd's copy may take back what it has put there itself.
        op = self.under_way() or "someone"
        if op not in ("punch", "copy") and self.file.inode != EVICTED and not kept and page.expect not in (ZERO, ANY):
            self.notes.append(facts.Destroyed(frame.number, f"{op} takes the page out of the file"))
        page.expect = ZERO
        if ghost.op:
            ghost.removed |= 1 << index
        self.done_to("removes the folio", index)

    def folio_put(self, folio: Folio, kind: str = "lookup") -> None:
        """The last reference frees."""
        head = self.head_of(folio)
        count = getattr(head, kind)
        if not count:
            self.die(f"reference count of {folio} drops below zero ({kind})")
        # References are kept by kind, so that a law can name who holds a page. The kernel has one counter.
        setattr(head, kind, count - 1)
        self.free_if_unused(head)

    def folio_get(self, folio: Folio, kind: str = "provided") -> None:
        """Take a reference of *kind* that outlives the operation; the caller already has one on the folio."""
        head = self.head_of(folio)
        setattr(head, kind, getattr(head, kind) + 1)

    def leak_folio(self, folio: Folio) -> None:
        """Out of use permanently: a reference that no one drops, and a count that says so."""
        self.head_of(folio).kept += 1
        self.state.leaked += folio.nr

    def folio_ref_count(self, folio: Folio) -> int:
        """The sum of all references; more than the page cache, its LRU batch and the caller have is a reason to refuse."""
        head = self.head_of(folio)
        # The count alone is the answer. This only notes the reason, for the law that asks whether a refusal had one.
        # A punch has no use for it: a page that is pinned leaves the file all the same.
        if head.refs() > head.cache + head.lru + 1 and self.under_way() != "punch":
            self.against(REFERENCE, head)
        return head.refs()

    def folio_maybe_dma_pinned(self, folio: Folio) -> bool:
        """Whether a FOLL_PIN reference is held; a FOLL_GET reference is not seen here, as in the kernel."""
        return bool(self.head_of(folio).pin)

    def folio_mapped(self, folio: Folio) -> bool:
        """Whether a user page table maps it: where the kernel's count has a reference for each entry, ours has none."""
        mapped = any(frame.user for frame in self.frames_of(folio))
        if mapped:
            self.against(REFERENCE, self.head_of(folio))
        return mapped

    def mapping_set_no_direct_map(self) -> None:
        """Set AS_NO_DIRECT_MAP on the file: readers of page-cache folios that ask for it keep out."""
        self.file.refuses_readers = 1

    def mapping_no_direct_map(self) -> bool:
        """What a reader of page-cache folios asks, on a kernel that knows the question."""
        return bool(self.kernel.asks_mapping and self.file.refuses_readers)

    def lru_add_drain_all(self) -> None:
        """The batches let go of their references."""
        # Work on every CPU, and a wait for each: the costs of a procedure count it.
        self.count("stalls")
        for frame in self.state.frames():
            if frame.lru:
                frame.lru = 0
                self.free_if_unused(frame)

    def folio_mark_uptodate(self, folio: Folio) -> None:
        """Under the folio lock."""
        self.locked(folio, "folio_mark_uptodate").uptodate = 1

    def folio_set_no_direct_map(self, folio: Folio, marked: bool) -> None:
        """Under the folio lock."""
        self.locked(folio, "folio_set_no_direct_map").no_direct_map = int(marked)
