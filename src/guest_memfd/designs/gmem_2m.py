"""`gmem-2m`: 2M folios in guest_memfd without hugetlb (RFC, 12 Dec 2024), mistakes included.

Differs from our library: a large folio is taken where there is one, else a single page, for the life of the page. Nothing
is converted in place, as what is shared is other memory, and nothing is mapped by the VMM. What has been prepared (cleared,
and given to the guest by the firmware) is noted page by page in a bitmap of the file. A folio is prepared with its order,
once; under SNP, where a part of it is assigned already, one entry of the RMP is written, that of the page in question, and
all of the folio is noted. A punch of a part splits the folio, and if that fails it zeroes the part, which its guest may
have. The direct map is left alone, and nothing is scrubbed.

Left out: the module parameter; that a 2M folio is taken also where memslots cut it, and is mapped by pages then: here it
consists of pages. The bitmap is kept by gfn, and cleared where a page comes back. Pages that a scene has shared are given
to the guest as ours are.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EEXIST, EINVAL, ENOMEM, EPERM
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Conversion, Grabbed, Held, bound_gfn
from guest_memfd.core.large import is_cut
from guest_memfd.core.ops import Reason
from guest_memfd.designs.design import NoConversion
from guest_memfd.designs.none import NoDesign
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Bound, Entries, Folio, Steps
from guest_memfd.words.units import Gfn, Index, Pfn


class Gmem2m(NoConversion, NoDesign):
    """virt/kvm/guest_memfd.c and arch/x86/kvm/svm/sev.c of the series."""

    name = "gmem-2m"
    title = "2M folios as far as there are some, and a bitmap of what has been prepared"
    source = "20241212063635.712877-1-michael.roth@amd.com; the thread to March 2025"
    hypervisors = ("kvm", "snp")
    large = True
    offers: ClassVar[tuple[str, ...]] = ("populate",)
    keeps: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("create", "close"), "an inode and a file, as every guest_memfd has them"),
        **dict.fromkeys(("bind", "unbind"), "a folio that a memslot cuts is mapped by pages there; ours splits it"),
        "vm_teardown": "KVM zaps all, and the firmware gives up what it has, or keeps it",
        "guest_fault": "KVM retries by sequence where ours holds the lock; what it maps is the same",
        **dict.fromkeys(("user_fault", "munmap"), "there is no mmap(), so nobody comes"),
        "allocate": "a large folio is there when its first page is",
        "punch_hole": "range, lock and result are alike; what is under the lock is not",
        "evict": "truncation of all of it, which cuts no folio",
        "error_folio": "all of the folio is zapped, and the file keeps it",
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "the series has nothing of it: power is 'none'"),
    }
    bounds: ClassVar[Mapping[str, Bound]] = {**NoDesign.bounds, "populate": Bound(calls=4, splits=3)}

    @property
    def has_rmp(self) -> bool:
        """Whether firmware keeps an owner of each page: under SNP, where pages come back empty, and not under plain KVM."""
        return self.ops.scrubs

    @override
    def mmap(self) -> Steps[int]:
        """-EPERM: this file has no mmap()."""
        yield from ()
        return -EPERM

    @override
    def zero(self, folio: Folio) -> Steps[None]:
        """Not when it is allocated: page by page, when it is prepared."""
        yield from ()

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """As all memory of user space: who gets it next clears it."""
        yield from ()

    # -- the bitmap ----------------------------------------------------------------------------------------------

    def unprepared(self, gfn: Gfn, folio: Folio) -> Steps[tuple[int, ...]]:
        """Which pages of *folio*, which is at *gfn*, have not been prepared, counted from its first."""
        noted = yield from self.host.tree_load("provided", gfn, folio.nr)
        return tuple(at for at in range(folio.nr) if not noted[at])

    def note_prepared(self, gfn: Gfn, nr: int, prepared: bool = True) -> Steps[None]:
        """Bits of the bitmap change, which takes no memory."""
        yield from self.host.tree_store_reserved("provided", gfn, Entries(int(prepared), nr))

    @override
    def take_back(self, held: Held) -> Steps[int]:
        """Once it is the host's it has to be prepared again."""
        ret = yield from super().take_back(held)
        if not ret and held.gfn is not None:
            yield from self.note_prepared(held.gfn, held.folio.nr, prepared=False)
        return ret

    # -- faults --------------------------------------------------------------------------------------------------

    @override
    def fault_bound(self, gfn: Gfn, index: Index) -> Steps[int]:
        """kvm_gmem_get_pfn(): prepare what is not, of all of the folio, and map it."""
        (attribute,) = yield from self.host.tree_load("attributes", index, 1)
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        at = index - grabbed.pgoff
        missing = yield from self.unprepared(gfn - at, grabbed.folio)
        if missing:
            ret = yield from self.prepare(gfn - at, grabbed, at, missing, private=attribute == PRIVATE_PAGE)
        elif attribute == PRIVATE_PAGE and self.has_rmp:
            ret = yield from self.ops.host.hyp_call("npt_map", gfn - at, grabbed.folio)
        else:
            ret = yield from (self.ops.prepare_private if attribute == PRIVATE_PAGE else self.ops.prepare_shared)(
                gfn - at, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    def prepare(self, gfn: Gfn, grabbed: Grabbed, at: int, missing: tuple[int, ...], *, private: bool) -> Steps[int]:
        """kvm_gmem_prepare_folio(): clear the pages that are *missing*, give the guest the folio, and note all of it.

        *at*: the page of the folio that the guest asks for. 0 or -errno.
        """
        for page in missing:
            yield from self.host.clear_folio(Folio(Pfn(grabbed.folio.pfn + page)))
        yield from self.host.folio_mark_uptodate(grabbed.folio)
        ret = yield from (self.assign(gfn, grabbed.folio, at) if private else self.ops.prepare_shared(gfn, grabbed.folio))
        if not ret:
            yield from self.note_prepared(gfn, grabbed.folio.nr)
        return ret

    def assign(self, gfn: Gfn, folio: Folio, at: int) -> Steps[int]:
        """sev_gmem_prepare(): all of the folio, or, where a part is assigned already, the page that is asked for."""
        if not self.has_rmp or not folio.order:
            return (yield from self.ops.prepare_private(gfn, folio))
        ret = yield from self.ops.host.hyp_call("rmp_assign", gfn, folio)
        if ret == -EPERM:
            ret = yield from self.ops.prepare_private(gfn + at, Folio(Pfn(folio.pfn + at)))
        return ret

    def populate(self, index: Index) -> Steps[int]:
        """kvm_gmem_populate() of one page: 0; -EINVAL if it is shared or bound to nothing, -EEXIST if it is prepared."""
        host = self.host
        yield from host.begin_op("populate", index, 1)
        yield from host.down_write("invalidate")
        (attribute,) = yield from host.tree_load("attributes", index, 1)
        (bound,) = yield from host.tree_load("bindings", index, 1)
        ret = (yield from self.populate_bound(bound_gfn(bound), index)) if bound and attribute == PRIVATE_PAGE else -EINVAL
        yield from host.end_op(ret)
        yield from host.up_write("invalidate")
        return ret

    def populate_bound(self, gfn: Gfn, index: Index) -> Steps[int]:
        """Copy the page into its folio, give it to the guest by itself, and note it."""
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        at = index - grabbed.pgoff
        page = Folio(Pfn(grabbed.folio.pfn + at))
        ret = -EEXIST
        if at in (yield from self.unprepared(gfn - at, grabbed.folio)):
            yield from self.host.write_folio(page, False)
            # sev_gmem_post_populate(), which the VMM repeats until the page is there, or there is no guest. Elsewhere the
            # page is mapped when the guest asks for it.
            ret = -ENOMEM if self.has_rmp else 0
            while ret == -ENOMEM:
                ret = yield from self.ops.prepare_private(gfn, page)
        if not ret:
            yield from self.note_prepared(gfn, 1)
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    # -- punch ---------------------------------------------------------------------------------------------------

    @override
    def remove_range(self, start: Index, nr: int, reason: Reason) -> Steps[Conversion]:
        """truncate_inode_pages_range(): a folio that the range cuts is split, or else the part is zeroed."""
        folios = yield from self.present(start, nr)
        for held in folios:
            if is_cut(held, start, nr) and (yield from self.split((held,)))[0]:
                for at in range(max(start - held.pgoff, 0), min(start + nr - held.pgoff, held.folio.nr)):
                    yield from self.host.clear_folio(Folio(Pfn(held.folio.pfn + at)))
        yield from self.put_all(folios)
        result = Conversion(0)
        for first, pages in (yield from self.whole_folios(start, nr)):
            if not result.ret:
                result = yield from super().remove_range(first, pages, reason)
        return result

    def whole_folios(self, start: Index, nr: int) -> Steps[tuple[tuple[Index, int], ...]]:
        """The parts of [start, start+nr) without the folios that it cuts: each a first page, and how many."""
        folios = yield from self.present(start, nr)
        yield from self.put_all(folios)
        cut = [held for held in folios if is_cut(held, start, nr)]
        first = max((held.pgoff + held.folio.nr for held in cut if held.pgoff < start), default=start)
        end = min((held.pgoff for held in cut if held.pgoff >= start), default=start + nr)
        return ((Index(first), end - first),) if first < end else ()
