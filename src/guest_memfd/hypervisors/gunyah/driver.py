"""What Gunyah's driver decides for a file that the library serves: pages are lent on demand, and taken back.

Theory of operation. Memory that is bound FORCE_LEND is the guest's alone from its first access on. KVM's user space says by
an ioctl when a page changes hands; here nobody says so, and the driver decides: it converts a page to private when its guest
faults, and to shared again when the VMM maps the file, when the binding ends, and when the VM ends.

Each of these is two operations of the library, and the library's lock is free between them. A page that is converted for
a guest and shared again by an mmap() before the guest has it would be given to the guest as a shared one, and the guest,
which was promised memory of its own, would write its secrets to it. So the driver has a lock, "bindings", as series v17 has
(there it is one of each VM; here one of each file, which may be bound to several). It is held shared from the conversion to
the guest's mapping, and exclusively while memory is taken back. It is outside of the invalidate lock, always (v17 takes the
two in both orders, S14). Under it, what vma_covers() says stays true, since mmap() waits for it. A caller holds the file
first: the binding that has led him here may end meanwhile.

A page that the VMM maps is not lent (-EPERM), as v17 has it; one that someone else still refers to is not lent either
(-EBUSY), which v17 does not see (R5). A dying VM is not asked, and what Gunyah will never give back is given up page by
page: the VM has to end, and the file too.

The same procedures are explored (the scene on-demand) and run by /dev/gunyah of the machine (machine/dev/gunyah/lent.py).
tests/test_on_demand.py has each of these rules broken, and what is seen then.

Source: gunyah_gmem_demand_page(), gunyah_gmem_mmap(), gunyah_gmem_remove_binding() (drivers/virt/gunyah/guest_memfd.c,
series v17, patch 24), as they would be on top of this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EAGAIN, EBUSY, EFAULT, EINVAL, ENOENT, EPERM
from typing import TYPE_CHECKING

from guest_memfd.core.gmem import filled
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import FIRST_PAGE, Gfn, Index

if TYPE_CHECKING:
    from guest_memfd.core import Library

_ATTEMPTS = 3
"""How often the pages of a dead VM are asked for: what can fail there is want of memory."""


def demand_page(library: Library, gfn: Gfn, index: Index, *, lend: bool = True, writable: bool = True) -> Steps[int]:
    """Give the guest page *index* at *gfn*, lent or shared as its binding says; 0 or -errno.

    -EPERM what the VMM maps, -EBUSY what someone refers to, -EINVAL lent for reading only, -EFAULT where the file or the
    binding has gone, -ENOMEM.
    """
    if lend and not writable:
        return -EINVAL                              # the hypervisor has no read-only private pages
    host = library.ops.host
    if not (yield from host.get_file()):
        return -EFAULT
    yield from host.down_read("bindings")
    ret = (yield from lend_range(library, index, 1)) if lend else 0
    if not ret:
        ret = yield from library.guest_fault(gfn, index)
    if lend:
        yield from host.op_returned("lend", index, 1, ret)
    yield from host.up_read("bindings")
    yield from library.close()
    return -EBUSY if ret == -EAGAIN else ret        # -EAGAIN would have the vCPU try without end


def lend_range(library: Library, start: Index, nr: int) -> Steps[int]:
    """Convert the folios of [start, start+nr) to private, under the bindings lock; 0, -EPERM, or as `make_private`."""
    host = library.ops.host
    first, length = around(library, start, nr)
    attributes = yield from host.tree_load("attributes", first, length)
    if attributes.count(PRIVATE_PAGE) == length:
        return 0
    # As the posted driver: lent memory is not mapped by the VMM, and must not be mappable either.
    if (yield from host.vma_covers(first, length)):
        return -EPERM
    return (yield from library.make_private(first, length)).ret


def around(library: Library, start: Index, nr: int) -> tuple[Index, int]:
    """The range of the whole folios around [start, start+nr), in pages: first and length."""
    size = 1 << library.order
    first = start & -size
    return first, (-(-(start + nr) // size) * size) - first


def mmap(library: Library, start: Index, nr: int) -> Steps[int]:
    """Map [start, start+nr) into the VMM; what was lent comes back first, with what the guest left in it.

    -EBUSY while a guest holds on to a page, -ENOMEM.
    """
    host = library.ops.host
    yield from host.down_write("bindings")
    ret = yield from _take_back(library, start, nr)
    if not ret:
        ret = yield from library.mmap()
    yield from host.up_write("bindings")
    return ret


# Pages beyond the end of the file are nobody's.
def _take_back(library: Library, start: Index, nr: int) -> Steps[int]:
    first, length = around(library, start, nr)
    length = min(length, library.size - first)
    return (yield from library.make_shared(first, length)).ret if length > 0 else 0


def unbind(library: Library, start: Index, nr: int) -> Steps[int]:
    """End the binding of [start, start+nr): its pages are the VMM's to see; as `Library.unbind` but for the page index."""
    host = library.ops.host
    if not (yield from host.get_file()):            # as the ioctl's fget(): the binding's may be the last
        return -ENOENT
    yield from host.down_write("bindings")
    ret = (yield from library.unbind(start, nr)).ret
    if not ret:
        yield from library.make_shared(start, nr)   # if that fails, mmap() does it
    yield from host.up_write("bindings")
    yield from library.close()
    return ret


def abandon(library: Library, ranges: Sequence[tuple[Index, int]]) -> Steps[int]:
    """The VM is dying: end its bindings, each (first page, length); -EAGAIN if the hypervisor fails again and again.

    A file may be bound to several VMs. Gunyah's half of it is released with the last binding.
    """
    host = library.ops.host
    if not (yield from host.get_file()):
        yield from library.ops.release()
        return 0
    yield from host.down_write("bindings")
    ret = 0
    for start, nr in ranges:
        ret = (yield from _abandon(library, start, nr)) or ret
    left = yield from host.tree_load("bindings", FIRST_PAGE, library.size)
    if not filled(left):
        yield from library.ops.release()
    yield from host.up_write("bindings")
    yield from library.close()
    return ret


def _abandon(library: Library, start: Index, nr: int) -> Steps[int]:
    ret, last = -EAGAIN, False
    for _attempt in range(_ATTEMPTS):
        ret, last = yield from library.teardown_bindings(start, nr)
        if not ret:
            yield from library.make_shared(start, nr)
            break
    if last:
        yield from library.close()
    return ret


def take_for_parcel(library: Library, start: Index, nr: int, *, lend: bool) -> Steps[int | tuple[Folio, ...]]:
    """The folios of [start, start+nr), whole ones, for a memory parcel: allocated, private if they are to be lent.

    -EPERM, -EBUSY, -ENOMEM as `demand_page`.
    """
    host = library.ops.host
    yield from host.down_read("bindings")
    ret = yield from library.allocate(start, nr)
    if not ret and lend:
        ret = yield from lend_range(library, start, nr)
    folios: list[Folio] = []
    index = start
    while not ret and index < start + nr:
        hit = yield from host.filemap_get_folio(index)
        if hit is None:
            ret = -EAGAIN
            break
        yield from host.folio_put(hit.folio)
        folios.append(hit.folio)
        index += hit.folio.nr
    yield from host.up_read("bindings")
    return tuple(folios) if not ret else -EBUSY if ret == -EAGAIN else ret
