"""`guestmem-rfc2`: the guest_memfd library posted again (RFC v2, 29 Aug 2024), REMOVE_DIRECT_MAP and CLEAR_INACCESSIBLE set.

Differs from `guestmem-rfc1`: who grabs a folio says whether he wants it accessible, and the library takes it there. For that
nobody may refer to it but those who know that it can change: each folio counts these ("safe"), and a change waits 10 ms
for the folio's count to be that number. Where the direct map cannot be changed that is an error, on the way out at least
(R26). Mistakes as posted: nothing is ever flushed, as "the hypervisor will also be flushing" (R25); the direct map is back
before the client is asked whether it may be (N6); who waits for the folio lock has a reference that is not safe yet (R16),
and so has a batch of new pages (R30); punch ignores a refusal (S40); fallocate() tests for NULL (S41); a broken page is put
back into the direct map, refused or not (S45).

The counters are not kept here. Who has a safe reference has the folio locked from where he counts himself to where he stops.
So for who looks, "safe" is what page cache, private data (folio_attach_private() takes a reference; there is none here) and
he himself have, and "accessible" is the mark. The base count is not one too high, as it seems (S47).

Clients: KVM, as converted in the series (no ->prepare_accessible: no mmap). For any other hypervisor, of which there was
none, the Gunyah client of `guestmem-rfc1` without its own mistakes; it takes a page back in ->prepare_accessible.

Left out: ->prepare_inaccessible (SNP's), -EINTR, memory for the counters, populate, that MF_IGNORED is not MF_FAILED, and
that a fault of the VMM does without the invalidate lock: a page that comes while a punch ends would count as left by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EBUSY, EFAULT, EOPNOTSUPP
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.convert import CACHE_AND_LOOKUP
from guest_memfd.core.gmem import Grabbed, Held, bound_gfn
from guest_memfd.designs.filemap import filemap_grab_folio
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.primitives import Bound, Folio, Locked, MfResult, Steps, VmFault
from guest_memfd.words.units import Gfn, Index


class GuestmemRfc2(GuestmemRfc1):
    """mm/guest_memfd.c of RFC v2."""

    name = "guestmem-rfc2"
    title = "the second posted guest_memfd library, which counts references that are safe"
    source = "20240829-guest-memfd-lib-v2-*-b9afc1ff3656@quicinc.com"
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = {"fault": (EBUSY,)}
    keeps: ClassVar[Mapping[str, str]] = {
        name: why for name, why in GuestmemRfc1.keeps.items() if name not in ("create", "error_folio")}
    bounds: ClassVar[Mapping[str, Bound]] = {
        **GuestmemRfc1.bounds, "fault": Bound(writes=1, calls=6, stalls=0, splits=3),
        "user_fault": Bound(writes=1, calls=4, stalls=0, splits=1),
        "punch": Bound(writes=1, calls=4, splits=3),
    }

    @override
    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        """Where the direct map cannot be changed there is no REMOVE_DIRECT_MAP: -EINVAL there, as for any such flag."""
        if not (yield from self.host.can_set_direct_map()):
            return -EOPNOTSUPP
        return (yield from super().create(size, shared))

    # -- grab ----------------------------------------------------------------------------------------------------

    def hold(self, index: Index, *, accessible: bool) -> Steps[tuple[Grabbed, bool] | int]:
        """guest_memfd_grab_folio(): the locked folio, accessible or not, and whether its memory is broken; or -errno."""
        found = yield from filemap_grab_folio(self.host, index)
        if isinstance(found, int):
            return found
        folio, locked = found
        if not locked.uptodate:
            ret = yield from self.first_use(folio, accessible=accessible)
        elif accessible:
            ret = (yield from self.make_accessible_at(index, folio)) if locked.no_direct_map else 0
        else:
            ret = 0 if locked.no_direct_map else (yield from self.make_inaccessible(index, folio))
        if ret:
            yield from self.unlock_and_put(folio)
            return ret
        return Grabbed(folio, index, not accessible), locked.hwpoison

    def first_use(self, folio: Folio, *, accessible: bool) -> Steps[int]:
        """Zero it, and take it out of the direct map if it is to be inaccessible; -ENOMEM, and it stays in the file."""
        yield from self.host.clear_folio(folio)
        ret = 0 if accessible else (yield from self.take_out(folio))
        if not ret:
            yield from self.host.folio_mark_uptodate(folio)
        return ret

    def take_out(self, folio: Folio) -> Steps[int]:
        """folio_set_direct_map_invalid_noflush(): -ENOMEM is an answer now; still no flush (R25)."""
        ret = yield from self.host.set_direct_map_invalid_noflush(folio)
        if not ret:
            yield from self.host.folio_set_no_direct_map(folio, True)
        return ret

    def is_quiet(self, folio: Folio) -> Steps[bool]:
        """wait_event_timeout(folio_ref_count() == safe), at the moment when the 10 ms are over."""
        return (yield from self.host.folio_ref_count(folio)) == CACHE_AND_LOOKUP

    @override
    def make_inaccessible(self, index: Index, folio: Folio) -> Steps[int]:
        """guest_memfd_make_inaccessible(): unmap from user space, wait, leave the direct map; -EBUSY, -ENOMEM."""
        yield from self.host.unmap_mapping_pages(index, folio.nr)
        return (yield from self.take_out(folio)) if (yield from self.is_quiet(folio)) else -EBUSY

    def make_accessible_at(self, index: Index, folio: Folio) -> Steps[int]:
        """guest_memfd_make_accessible(): wait, restore, and then ask the client (N6); -EBUSY, and what that says."""
        if not (yield from self.is_quiet(folio)):
            return -EBUSY
        yield from self.put_back(folio)
        # A client that refuses leaves a page that is its guest's in the direct map: nothing takes it out again.
        ret = yield from self.take_back_at(index, folio)
        if not ret:
            yield from self.host.folio_set_no_direct_map(folio, False)
        return ret

    def put_back(self, folio: Folio) -> Steps[None]:
        """folio_set_direct_map_default_noflush(), with a BUG_ON()."""
        if (yield from self.host.set_direct_map_default_noflush(folio)):
            yield from self.host.bug("BUG_ON(set_direct_map_default_noflush())")

    # -- the guest's side ----------------------------------------------------------------------------------------

    @override
    def guest_fault(self, gfn: Gfn, index: Index) -> Steps[int]:
        """The client's, which holds the file over it (kvm_gmem_get_file()); -EFAULT for one that has gone."""
        host = self.host
        yield from host.begin_op("fault", index, 1, gfn)
        if not (yield from host.get_file()):
            yield from host.end_op(-EFAULT)
            return -EFAULT
        ret = yield from super().guest_fault(gfn, index)
        yield from self.close()
        return ret

    @override
    def _get_pfn(self, gfn: Gfn, index: Index) -> Steps[tuple[int, bool]]:
        return (yield from self.give(gfn, index, lends=True)), True

    @override
    def _demand_page(self, gfn: Gfn, index: Index) -> Steps[tuple[int, bool]]:
        return (yield from self.give(gfn, index, lends=self.lends(index))), True

    def give(self, gfn: Gfn, index: Index, *, lends: bool) -> Steps[int]:
        """Hold the page as the guest is to have it, and give it to the guest."""
        held = yield from self.hold(index, accessible=not lends)
        if isinstance(held, int):
            return held
        grabbed, broken = held
        if broken:
            ret = -EHWPOISON
        else:
            ret = yield from (self.ops.prepare_private if lends else self.ops.prepare_shared)(gfn, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    # -- the host's side -----------------------------------------------------------------------------------------

    @override
    def user_fault(self, index: Index) -> Steps[VmFault]:
        """gmem_fault(): hold it accessible, and map it; SIGBUS whatever stands against that."""
        host = self.host
        yield from host.down_read("invalidate")
        yield from host.begin_op("user_fault", index, 1)
        held = yield from self.hold(index, accessible=True)
        answer: VmFault = "SIGBUS"
        if not isinstance(held, int) and not held[1]:               # of broken memory __do_fault() takes care
            answer = "ok" if (yield from host.vmf_insert_folio(index, held[0].folio)) else "retry"
        yield from host.end_op(-EFAULT if answer == "SIGBUS" else 0)
        if not isinstance(held, int):
            yield from self.unlock_and_put(held[0].folio)
        yield from host.up_read("invalidate")
        return answer

    @override
    def grab(self, index: Index, uptodate: bool) -> Steps[Grabbed | int]:
        """For fallocate(), which wants its pages inaccessible, and tests for NULL still (S41)."""
        held = yield from self.hold(index, accessible=False)
        return held if isinstance(held, int) else held[0]

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """gmem_release_folio(): restore the direct map; no one scrubs."""
        yield from self.put_back(held.folio)
        if marked:
            yield from self.host.folio_set_no_direct_map(held.folio, False)

    @override
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        """gmem_error_folio(): ask the client, and whatever it says, restore the direct map (S45); 0 is MF_IGNORED.

        It has the folio locked and waits for the invalidate lock, as KVM's has it (N3).
        """
        host = self.host
        if locked.pgoff is None:
            return "failed"
        yield from host.unmap_mapping_pages(locked.pgoff, folio.nr)                 # hwpoison_user_mappings()
        yield from host.down_read("invalidate")
        (bound,) = yield from host.tree_load("bindings", locked.pgoff, 1)
        yield from host.gmem_invalidate_begin(locked.pgoff, folio.nr)
        if bound:
            yield from self.ops.invalidate(bound_gfn(bound), folio, self.lends(locked.pgoff), "error")
        yield from host.gmem_invalidate_end()
        yield from host.up_read("invalidate")
        yield from self.put_back(folio)
        return "failed"
