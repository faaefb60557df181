"""Page cache and references of the abstract host: look-up, insertion, removal, and what the last put does."""

from __future__ import annotations

from errno import EBUSY, EEXIST, ENOMEM

from guest_memfd.abstract import state as st
from guest_memfd.abstract.mappings import AbstractMappings
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ALLOCATED, ANY, CONTENTION, EVICTED, FAILURE, FREE, JUNK, REFERENCE, ZERO
from guest_memfd.words.primitives import Folio, Lookup
from guest_memfd.words.units import Index, span


class AbstractPageCache(AbstractMappings):
    """The page-cache primitives, filemap_get_folio to folio_set_no_direct_map, and the references on a frame."""

    def filemap_get_folio(self, index: Index) -> Lookup | None:
        """A hit comes with a transient reference."""
        page = self.page(index)
        if not page.cached:
            return None
        frame = self.state.frame(page.cached - 1)
        frame.lookup += 1
        return Lookup(Folio(frame.number), index)

    def filemap_find_folio(self, index: Index, nr: int) -> Index:
        """The first slot that is taken."""
        end = min(index + nr, self.sizes.pages)
        return next((i for i in span(index, end - index) if self.page(i).cached), index + nr)

    def filemap_add_folio(self, index: Index, order: int) -> Lookup | int:
        """Allocates the lowest free frame; this host has no free block above order 0."""
        page = self.page(index)
        # Any free frame would do. Always the lowest keeps the number of states small.
        frame = next((f for f in self.state.frames() if f.allocated == FREE), None)
        if frame is None or order:
            self.against(FAILURE)
            return -ENOMEM
        # After the allocation, as in the kernel: another task may have inserted a folio meanwhile.
        if page.cached:
            self.against(CONTENTION)
            return -EEXIST
        frame.allocated, frame.content = ALLOCATED, JUNK
        # The LRU batch of this CPU holds a reference, too, which is why a conversion may have to drain before it
        # counts.
        frame.slot, frame.cache, frame.lru, frame.lookup = page.number + 1, 1, 1, 1
        frame.lock = self.who + 1
        page.cached = frame.number + 1
        return Lookup(Folio(frame.number), index)

    def filemap_remove_folio(self, folio: Folio) -> None:
        """Leaves the page cache; any other reference keeps the frame."""
        frame = self._locked(folio, "filemap_remove_folio")
        if not frame.slot:
            self.die(f"{folio} is not in the page cache")
        page = self.state.page(frame.slot - 1)
        index = self.index(page.number)
        page.cached = frame.slot = frame.cache = 0
        ghost = self.state.ghost(self.who)
        # Only a punch, or the end of the file, is asked to lose what is there; a page that is given up is lost already.
        op = self.under_way() or "someone"
        if op != "punch" and self.file.inode != EVICTED and not frame.kept and page.expect not in (ZERO, ANY):
            self.notes.append(facts.Destroyed(frame.number, f"{op} takes the page out of the file"))
        page.expect = ZERO
        if ghost.op:
            ghost.removed |= 1 << index
        self.done_to("removes the folio", index)

    def split_folio(self, folio: Folio) -> int:
        """Every folio is a single page here."""
        self._locked(folio, "split_folio")
        return -EBUSY

    def folio_put(self, folio: Folio, kind: str = "lookup") -> None:
        """The last reference frees."""
        frame = self.state.frame(folio.pfn)
        count = getattr(frame, kind)
        if not count:
            self.die(f"reference count of {folio} drops below zero ({kind})")
        # References are kept by kind, so that a law can name who holds a page. The kernel has one counter.
        setattr(frame, kind, count - 1)
        self.free_if_unused(frame)

    def folio_get(self, folio: Folio, kind: str = "provided") -> None:
        """Take a reference of *kind* that outlives the operation; the caller already has one on the folio."""
        frame = self.state.frame(folio.pfn)
        setattr(frame, kind, getattr(frame, kind) + 1)

    def leak_folio(self, folio: Folio) -> None:
        """Out of use permanently: a reference that no one drops, and a count that says so."""
        frame = self.state.frame(folio.pfn)
        frame.kept += 1
        self.state.leaked += 1

    def folio_ref_count(self, folio: Folio) -> int:
        """The sum of all references; more than the page cache, its LRU batch and the caller have is a reason to refuse."""
        frame = self.state.frame(folio.pfn)
        # The count alone is the answer. This only notes the reason, for the law that asks whether a refusal had one.
        # A punch has no use for it: a page that is pinned leaves the file all the same.
        if frame.refs() > frame.cache + frame.lru + 1 and self.under_way() != "punch":
            self.against(REFERENCE, frame)
        return frame.refs()

    def folio_maybe_dma_pinned(self, folio: Folio) -> bool:
        """Whether a FOLL_PIN reference is held; a FOLL_GET reference is not seen here, as in the kernel."""
        return bool(self.state.frame(folio.pfn).pin)

    def folio_mapped(self, folio: Folio) -> bool:
        """Whether a user page table maps it."""
        return bool(self.state.frame(folio.pfn).user)

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
        self._locked(folio, "folio_mark_uptodate").uptodate = 1

    def folio_set_no_direct_map(self, folio: Folio, marked: bool) -> None:
        """Under the folio lock."""
        self._locked(folio, "folio_set_no_direct_map").no_direct_map = int(marked)

    def _locked(self, folio: Folio, what: str) -> st.Frame:
        frame = self.state.frame(folio.pfn)
        # A procedure that forgets the lock would race here. That is a bug in it, never an outcome.
        if frame.lock != self.who + 1:
            self.die(f"{what} of {folio} without its lock")
        return frame
