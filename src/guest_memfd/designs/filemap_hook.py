"""`filemap-hook`: a page of such a file is never in the direct map, from its insertion to its removal (8 May 2026).

What reviewers asked for in place of v12 and its authors agreed to: filemap_add_folio() of a mapping with AS_NO_DIRECT_MAP
takes the page out and flushes before it can be found, filemap_remove_folio() puts it back after it has left. So there is
no mark, a page is zeroed before it is inserted, and conversion in place changes no entry. Who writes to a page that is
there - write(2), populate - has a mapping of the moment for that, of one CPU (Brendan Jackman's mermap).

There is a text, and there are no patches: what it does not say is our library's, scrubbing a private page before it goes
back among it. Hibernation is kept away as secretmem does it, which has the same flag of the mapping. GUP is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EEXIST, EINVAL
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.direct_map import ATTEMPTS
from guest_memfd.core.gmem import Grabbed, Held
from guest_memfd.designs.design import OPERATIONS, Design
from guest_memfd.designs.filled import on_shared, pfn_of_shared
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Bound, Folio, Lookup, Steps
from guest_memfd.words.units import Index

ADDED = Bound(writes=1 + ATTEMPTS, flushes=1, stalls=0, splits=1)
"""A page enters the file, or is put back into the direct map because another was faster."""


class FilemapHook(Design):
    """Never in the direct map while it is in a file."""

    name = "filemap-hook"
    title = "out of the direct map before a page can be found in the file, and back after it has left"
    source = "Sean Christopherson, 21 Apr 2026; Takahiro Itazuri, 8 May 2026 (v12 thread)"
    power = "count"
    gup = False
    promises = ("no-direct-map",)
    offers = ("write", "populate", "copy", "cached_pfn")
    keeps: ClassVar[Mapping[str, str]] = dict.fromkeys(
        OPERATIONS, "the text is about insertion and removal: its steps take the place of ours there")
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Design.bounds, "fault": ADDED._replace(calls=2, splits=3), "user_fault": ADDED, "allocate": ADDED, "write": ADDED,
        "copy": ADDED, "populate": ADDED._replace(stalls=1),
        "to_private": Bound(calls=4, stalls=2, splits=2), "punch": Bound(writes=ATTEMPTS, calls=4, splits=3),
    }

    # -- in, and out ---------------------------------------------------------------------------------------------

    @override
    def add_folio(self, index: Index, small: bool) -> Steps[Lookup | int]:
        """A page of zeros, out of the direct map before it is inserted; -ENOMEM, -EEXIST, and there is nothing to undo."""
        folio = yield from self.insert(index, self.clear_new)
        return folio if isinstance(folio, int) else Lookup(folio, index)

    def insert(self, index: Index, fill: Callable[[Folio], Steps[None]]) -> Steps[Folio | int]:
        """Allocate, *fill*, take out, insert: the locked folio, or -errno."""
        host = self.host
        folio = yield from self.new_page()
        if isinstance(folio, int):
            return folio
        yield from fill(folio)
        # Before it can be found: to whoever finds it, a page that is not
        # uptodate has still to be zeroed, and it is out by then.
        yield from host.folio_mark_uptodate(folio)
        ret = yield from self.take_out(folio)
        if not ret:
            ret = yield from host.filemap_insert_folio(index, folio)
            # Another was faster, or there is no node for it: it was never in the file, and goes back as it came.
            if ret:
                yield from self.put_back(folio)
        if ret:
            yield from self.unlock_and_put(folio)
        return ret or folio

    def new_page(self) -> Steps[Folio | int]:
        """A page that is in the direct map, and is written to through it."""
        return (yield from self.host.filemap_alloc_folio(False))

    def clear_new(self, folio: Folio) -> Steps[None]:
        """Zeros, while no one else can find the page."""
        yield from self.host.clear_folio(folio)

    def write_new(self, folio: Folio) -> Steps[None]:
        """What user space gives, while no one else can find the page."""
        yield from self.host.write_folio(folio, False)

    def take_out(self, folio: Folio) -> Steps[int]:
        """Out of the direct map and of all TLBs; -ENOMEM, and the page is as it was."""
        ret = yield from self.host.set_direct_map_invalid_noflush(folio)
        if not ret:
            yield from self.host.flush_tlb_kernel_range((folio,))
        return ret

    def put_back(self, folio: Folio) -> Steps[None]:
        """Into the direct map; one for which that fails is never used again, rather than freed with a hole."""
        for _attempt in range(ATTEMPTS):
            if not (yield from self.host.set_direct_map_default_noflush(folio)):
                return
        yield from self.host.warn(f"{folio} cannot be put back into the direct map and is kept")
        yield from self.host.leak_folio(folio)

    @override
    def remove_folio(self, held: Held) -> Steps[int]:
        """Taken back, scrubbed, out of the file, and then into the direct map; -errno of the hypervisor's."""
        host, folio = self.host, held.folio
        locked = yield from host.lock_folio(folio)
        ret = yield from self.take_back(held)
        if ret:
            yield from host.unlock_folio(folio)
            return ret
        if held.private and not self.ops.scrubs and not locked.hwpoison:
            yield from host.clear_folio_local(folio)
        yield from host.filemap_remove_folio(folio)
        if not locked.hwpoison:                             # broken memory is not mapped again
            yield from self.put_back(folio)
        yield from self.unlock_and_put(folio)
        return 0

    # -- what is left of our steps: a page that is there is out --------------------------------------------------

    @override
    def zero(self, folio: Folio) -> Steps[None]:
        """It was zeroed, or filled, before it was inserted."""
        yield from ()

    @override
    def zap_noflush(self, folio: Folio) -> Steps[int]:
        """0: the page is out since it is in the file."""
        yield from ()
        return 0

    @override
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """No entry has changed."""
        yield from ()

    @override
    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        """The VMM uses its own mapping."""
        yield from ()
        return 0

    # -- how else it is filled -----------------------------------------------------------------------------------

    def write(self, index: Index) -> Steps[int]:
        """write(2) of a shared page, as often as user space likes: 0, or -errno."""
        return (yield from on_shared(self, "write", index, self.write_locked))

    def write_locked(self, index: Index) -> Steps[int]:
        """Through a mapping of the moment."""
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.host.write_folio(grabbed.folio, True)
        yield from self.unlock_and_put(grabbed.folio)
        return 0

    def populate(self, index: Index) -> Steps[int]:
        """What the guest begins with, in a private page: 0; -EINVAL if it is shared, -EEXIST if it is there."""
        host = self.host
        yield from host.begin_op("populate", index, 1)
        yield from host.down_write("invalidate")
        (attribute,) = yield from host.tree_load("attributes", index, 1)
        ret = (yield from self.fill_new(index)) if attribute == PRIVATE_PAGE else -EINVAL
        yield from host.end_op(ret)
        yield from host.up_write("invalidate")
        return ret

    def fill_new(self, index: Index) -> Steps[int]:
        """A new page with what user space gives; -EEXIST for one that is there."""
        hit = yield from self.host.filemap_get_folio(index)
        if hit is not None:
            yield from self.host.folio_put(hit.folio)
            return -EEXIST
        folio = yield from self.insert(index, self.write_new)
        if isinstance(folio, int):
            return folio
        yield from self.unlock_and_put(folio)
        return 0

    def copy(self, index: Index) -> Steps[int]:
        """UFFDIO_COPY: the page is filled, and out of the direct map, before it is inserted and mapped."""
        return (yield from on_shared(self, "copy", index, self.copy_locked))

    def copy_locked(self, index: Index) -> Steps[int]:
        """0, -EEXIST, -ENOMEM. Where the VMA has gone meanwhile, the page is there for who maps it next."""
        folio = yield from self.insert(index, self.write_new)
        if isinstance(folio, int):
            return folio
        yield from self.host.vmf_insert_folio(index, folio)
        yield from self.unlock_and_put(folio)
        return 0

    def cached_pfn(self, index: Index) -> Steps[Folio | int]:
        """By the file and not by a user address; -EFAULT for a private page."""
        return (yield from pfn_of_shared(self, index))
