"""`guestmem-v5`: the library reduced to what the pages of a file need (v4, v5: 20 and 22 Nov 2024), with KVM its only user.

Differs from `kvm-7.4`, KVM's own protocol, in what the library takes over: the page cache, its callbacks, punch. There is no
mmap() yet, no conversion in place, and no more of the direct map. A memory error that was dealt with is told as one that was
not, and the other way round (S49). What the hypervisor has of a page comes back when the page is freed, by its frame alone.

v4 differs in one thing, at the end of a file: it takes the callbacks away before the pages go, so that nobody is told of
them. Under SNP they are freed while the RMP says that they are the guest's (the author, 22 Nov 2024; docs/bugs.md). v5
truncates first; here the pages go with the inode, which is next, as nothing else has it.

Left out: that ->invalidate_begin may fail half-way through the files of an inode (R34), as there is one file; that pages can
be made private, or shared, by KVM's attributes. How a vCPU faults, and how memslots come and go, is 7.4's, without the
mistakes of the time (docs/bugs.md has those of KVM by themselves).
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import ENODEV
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Held
from guest_memfd.designs.design import NoConversion
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.words.primitives import Folio, Locked, MfResult, Steps
from guest_memfd.words.units import FIRST_GFN


class GuestmemV5(NoConversion, Kvm74):
    """mm/guestmem.c of v5, and virt/kvm/guest_memfd.c on top of it."""

    name = "guestmem-v5"
    title = "the posted guest_memfd library as the address_space of a file"
    source = "Elliot Berman, \"mm: Introduce guestmem library\" v4 (20241120-guestmem-library-v4-*) and v5, 22 Nov 2024"
    gup = False
    keeps: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in Kvm74.keeps.items() if name not in ("make_private", "make_shared", "mmap")},
        "munmap": "there are no mappings",
    }

    @override
    def mmap(self) -> Steps[int]:
        """-ENODEV: the file has no ->mmap."""
        yield from ()
        return -ENODEV

    @override
    def free_folio(self, held: Held) -> Steps[None]:
        """guestmem_free_folio(): ->release_folio(), which is kvm_arch_gmem_invalidate() of its frame, whoever has it."""
        if held.private:
            yield from self.ops.reclaim(FIRST_GFN, held.folio)

    @override
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        """guestmem_error_folio(): ``return ret ? MF_DELAYED : MF_FAILED``, and KVM's ->invalidate_begin returns 0 (S49)."""
        yield from super().error_folio(folio, locked)
        return "failed"
