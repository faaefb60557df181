"""The page cache as the kernel's guest_memfd uses it, where the library of core/ zeroes in the same step."""

from __future__ import annotations

from errno import EAGAIN, EEXIST

from guest_memfd.core.folio import LOOKUPS
from guest_memfd.words.primitives import Folio, Host, Locked, Steps
from guest_memfd.words.units import Index


def filemap_grab_folio(host: Host, index: Index) -> Steps[tuple[Folio, Locked] | int]:
    """Find or allocate the folio of page *index*, locked and referenced, not zeroed; -ENOMEM, -EAGAIN (mm/filemap.c)."""
    for _attempt in range(LOOKUPS):
        hit = yield from host.filemap_get_folio(index)
        if hit is None:
            new = yield from host.filemap_add_folio(index, 0)
            if not isinstance(new, int):
                return new.folio, Locked(index, uptodate=False, no_direct_map=False, hwpoison=False)
            if new != -EEXIST:
                return new
        else:
            locked = yield from host.lock_folio(hit.folio)
            if locked.pgoff is not None:
                return hit.folio, locked
            yield from host.unlock_folio(hit.folio)
            yield from host.folio_put(hit.folio)
    return -EAGAIN
