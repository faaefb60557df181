"""`guestmem-v6`: v5 taken up again for userfaultfd (RFC v6, 15 Sep 2025), on top of direct-map removal v7 and write(2).

Differs from `guestmem-v5`: ->invalidate_begin cannot fail; a file can be mapped and written to; with
GUEST_MEMFD_FLAG_NO_DIRECT_MAP a page leaves the direct map when it is "prepared", that is zeroed or filled: by the first
fault or write(2), of guest or VMM. It comes back when it is freed. Whether it could be taken out is not looked at (S50), and
nobody flushes. There is no mark: what is up to date is out. A memory error is MF_FAILED, always (S50). GUP is refused.

A mapping holds the file, as every VMA does (in `kvm-7.4` here it holds the inode, which nothing there can tell).

Left out: userfaultfd, for which it was made. A fault that it stops is one that comes later. Ours are the lock around a write
and its -EFAULT for a private page, as in `direct-map-v12`.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN, EBADF, EEXIST, EFAULT, ENOSPC
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Held
from guest_memfd.designs.filled import on_shared
from guest_memfd.designs.guestmem_v5 import GuestmemV5
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.words.primitives import Bound, Folio, Locked, Steps
from guest_memfd.words.units import Index

PREPARED = Bound(writes=1, stalls=0, splits=1)


class GuestmemV6(GuestmemV5):
    """mm/guestmem.c of RFC v6."""

    name = "guestmem-v6"
    title = "the guest_memfd library taken up again, out of the direct map from the first fault or write"
    source = "20250915161815.40729-1-kalyazin@amazon.com"
    no_direct_map = True
    promises = ("no-direct-map",)
    offers: ClassVar[tuple[str, ...]] = ("populate", "write")
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = {**Kvm74.errnos, "write": (ENOSPC,)}
    keeps: ClassVar[Mapping[str, str]] = {name: why for name, why in GuestmemV5.keeps.items() if name != "munmap"}
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Kvm74.bounds, "user_fault": PREPARED, "write": PREPARED, "populate": PREPARED._replace(stalls=1),
    }

    # -- a mapping holds the file --------------------------------------------------------------------------------

    @override
    def mmap(self) -> Steps[int]:
        """guestmem_mmap(): 0, -ENOMEM, -EBADF for a file that has gone."""
        if not (yield from self.host.get_file()):
            return -EBADF
        ret = yield from self.host.mmap()
        if ret:
            yield from self.close()
        return ret

    @override
    def munmap(self) -> Steps[None]:
        """The VMA goes, and with it its reference on the file."""
        yield from self.host.munmap()
        yield from self.close()

    # -- out, and back -------------------------------------------------------------------------------------------

    @override
    def zero(self, folio: Folio) -> Steps[None]:
        """clear_highpage(), and what comes of it."""
        yield from self.host.clear_folio(folio)
        yield from self.mark_prepared(folio)

    def mark_prepared(self, folio: Folio) -> Steps[None]:
        """guestmem_mark_prepared(): the result is not looked at, and there is no flush (S50)."""
        yield from self.host.set_direct_map_invalid_noflush(folio)
        yield from self.host.folio_mark_uptodate(folio)

    @override
    def free_folio(self, held: Held) -> Steps[None]:
        """kvm_gmem_release_folio(): back into the direct map, in use before or not, broken or not; nothing is scrubbed."""
        yield from self.host.set_direct_map_default_noflush(held.folio)
        yield from super().free_folio(held)

    # -- how it is filled ----------------------------------------------------------------------------------------

    @override
    def populate_locked(self, index: Index, folio: Folio, locked: Locked) -> Steps[int]:
        """Copy to a page that is new, and take it out; no page is zeroed for that."""
        ret = -EEXIST if locked.uptodate else 0
        if not ret:
            yield from self.host.write_folio(folio, False)
            yield from self.mark_prepared(folio)
        yield from self.unlock_and_put(folio)
        return ret

    def write(self, index: Index) -> Steps[int]:
        """write(2): 0; -ENOSPC for a page that has been filled, -EFAULT for one that is private or cannot be had."""
        return (yield from on_shared(self, "write", index, self.write_locked))

    def write_locked(self, index: Index) -> Steps[int]:
        """guestmem_write_begin(), which refuses what is up to date, and guestmem_write_end()."""
        found = yield from self.get_folio(index)
        if isinstance(found, int):
            return found if found == -EAGAIN else -EFAULT
        folio, locked = found
        ret = -ENOSPC if locked.uptodate else 0
        if not ret:
            yield from self.host.write_folio(folio, False)
            yield from self.mark_prepared(folio)
        yield from self.unlock_and_put(folio)
        return ret
