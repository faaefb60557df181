"""Life of a guest_memfd: the file, its inode, bindings to an address space, and the module that serves it.

A binding holds the file, the file and each VMA hold the inode, the inode holds the module. Pins hold folios only: a
folio that outlives the inode has been taken back and detached, so its last put needs no one's code. A caller that comes by a
binding and not by the descriptor - a vCPU, an unbind, a dying VM - holds the file while he works: the binding may end.
"""

from __future__ import annotations

from errno import EAGAIN, EBADF, EEXIST, EINVAL, EIO, ENODEV, ENOENT, EOPNOTSUPP
from itertools import chain

from guest_memfd.core import large
from guest_memfd.core.gmem import Conversion, Gmem, Held, filled
from guest_memfd.core.ops import Reason
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Steps
from guest_memfd.words.units import FIRST_PAGE, Gfn, Index


def runs(pages: tuple[int, ...]) -> list[tuple[Index, int]]:
    """The runs of consecutive page indexes in *pages*: (first, length) each, in order."""
    found: list[tuple[Index, int]] = []
    for page in sorted(set(pages)):
        if found and sum(found[-1]) == page:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((Index(page), 1))
    return found


def create(gmem: Gmem, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
    """A file of *size* pages, private but for the page indexes in *shared*; -EINVAL, -ENODEV, -ENOMEM, -EOPNOTSUPP.

    -EINVAL also for a file or a run of shared pages that would end inside a folio, where those cannot be split. -EOPNOTSUPP
    on a kernel whose direct map cannot be changed: there the setters do nothing and say 0, so no one would notice later
    (CVE-2024-50182).
    """
    host = gmem.host
    if size <= 0 or any(not 0 <= i < size for i in shared):
        return -EINVAL
    if not (gmem.splits or gmem.whole(size, *chain.from_iterable(runs(shared)))):
        return -EINVAL
    # Asked once, here. Later the setters would say 0 and do nothing, and the file would look protected.
    if gmem.no_direct_map and not (yield from host.can_set_direct_map()):
        return -EOPNOTSUPP
    yield from host.begin_op("create", FIRST_PAGE, size)
    # The module before the inode: an inode whose module has gone would call code that is no longer there.
    ret = (yield from gmem.alloc_inode()) if (yield from host.try_module_get()) else -ENODEV
    if ret:
        yield from host.end_op(ret)
        return ret
    ret = yield from gmem.init_attributes(size, shared)
    yield from host.end_op(ret)
    if ret:
        yield from gmem.close()
        return ret
    # Last: from here on other threads can use the descriptor, and everything they may ask for has to be in place.
    yield from host.fd_install()
    return 0


def alloc_inode(gmem: Gmem) -> Steps[int]:
    """An inode in the module's keeping, for which the caller has a reference; 0 or -ENOMEM, and the reference has gone."""
    ret = yield from gmem.host.alloc_inode()
    if ret:
        yield from gmem.host.module_put()
    elif gmem.no_direct_map:
        yield from gmem.host.mapping_set_no_direct_map()
    return ret


def init_attributes(gmem: Gmem, size: int, shared: tuple[int, ...]) -> Steps[int]:
    """Cover every page: a hole in the tree would have to be read as something."""
    host = gmem.host
    ret = yield from host.tree_store("attributes", FIRST_PAGE, Entries(PRIVATE_PAGE, size))
    for start, nr in runs(shared):
        if not ret:
            ret = yield from host.tree_store("attributes", start, Entries(SHARED_PAGE, nr))
    return ret


def bind(gmem: Gmem, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
    """Let *gfn* on be pages [start, start+nr); -EEXIST if bound already, -ENOMEM.

    -EBADF when the file has gone, -ENODEV when the VM has been stopped: no one would take that binding away again.
    -EINVAL outside of the file. A range that cuts a folio, or a gfn that is no multiple of its size, splits it, and -EAGAIN
    says that someone refers to it; where folios cannot be split that is -EINVAL, too.
    """
    host = gmem.host
    if not gmem.has(start, nr) or not (gmem.splits or gmem.whole(gfn, start, nr)):
        return -EINVAL
    yield from host.begin_op("bind", start, nr, gfn)
    # A reference, not only a pointer: the descriptor may be closed by another thread while this call waits for
    # the lock.
    if not (yield from host.get_file()):
        yield from host.end_op(-EBADF)
        return -EBADF
    yield from host.down_write("invalidate")
    bound = yield from host.tree_load("bindings", FIRST_PAGE, gmem.size)
    if filled(bound[start:start + nr]):
        ret = -EEXIST
    # A stopped VM has had its teardown, or will not ask again for bindings that come later. No one would ever
    # take this one away.
    elif (yield from host.vm_state()) != "running":
        ret = -ENODEV
    else:
        ret = (yield from gmem.split_to_bind(gfn, start, nr)) if gmem.splits else 0
        ret = ret or (yield from host.tree_store("bindings", start, Entries(gfn + 1, nr, 1)))
    yield from host.end_op(ret)
    yield from host.up_write("invalidate")
    if ret or filled(bound):                       # one reference for all bindings, taken by the first
        yield from gmem.close()
    return ret


def split_to_bind(gmem: Gmem, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
    """Make single pages of the folios that a binding would cut, or put at a gfn that is no multiple of their size.

    0, -ENOMEM, or -EAGAIN while someone refers to one of them.
    """
    folios = yield from gmem.present(start, nr)
    cut = tuple(held for held in folios if large.is_cut(held, start, nr) or (gfn + held.pgoff - start) % held.folio.nr)
    ret, _, folios = yield from gmem.single_pages(start, nr, folios, cut)
    yield from gmem.put_all(folios)
    return ret


def unbind(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """Take the binding of [start, start+nr) away; -EBUSY with the page index if the guest holds on to a page.

    Pages stay in the file, the host's again, with their contents where the hypervisor preserves them. -EINVAL
    outside of the file, and for a range that cuts a folio; -ENOENT where nothing is bound; -EIO with the page index
    if the hypervisor will never give a page back.
    """
    if not gmem.has(start, nr) or not (gmem.splits or gmem.whole(start, nr)):
        return Conversion(-EINVAL)
    yield from gmem.host.begin_op("unbind", start, nr)
    if not (yield from gmem.host.get_file()):      # a task that waits for the lock must hold what it is in
        yield from gmem.host.end_op(-ENOENT)
        return Conversion(-ENOENT)
    yield from gmem.host.down_write("invalidate")
    result, last = yield from gmem.unbind_locked(start, nr, "unbind")
    yield from gmem.host.end_op(result.ret, result.error_index)
    yield from gmem.host.up_write("invalidate")
    # After the lock is dropped: this ends the file if the binding was its last user. The second `close` is for
    # the reference that this call has held itself.
    if last:
        yield from gmem.close()
    yield from gmem.close()
    return result


def vm_teardown(gmem: Gmem) -> Steps[int]:
    """The VM is dying and its vCPUs are out: everything bound comes back, then the VM may go.

    -EAGAIN when the hypervisor fails twice to give a page back: the bindings, and the file, stay for another try. What
    it will never give back leaves the file and is counted.
    """
    if not (yield from gmem.host.get_file()):
        yield from gmem.ops.release()
        return 0
    ret, last = yield from gmem.teardown_bindings(FIRST_PAGE, gmem.size)
    if not ret:
        yield from gmem.ops.release()
    if last:
        yield from gmem.close()
    yield from gmem.close()
    return ret


def teardown_bindings(gmem: Gmem, start: Index, nr: int) -> Steps[tuple[int, bool]]:
    """What a dying VM has bound of [start, start+nr) comes back, of a file that the caller holds: as `vm_teardown`.

    Also whether these were the file's last bindings, whose reference is the caller's to drop.
    """
    yield from gmem.host.begin_op("teardown", start, nr)
    yield from gmem.host.down_write("invalidate")
    result, last = yield from gmem.unbind_locked(start, nr, "teardown")
    yield from gmem.host.end_op(result.ret, result.error_index)
    yield from gmem.host.up_write("invalidate")
    if result.ret:
        yield from gmem.host.warn(f"page {result.error_index} stays with the hypervisor")
    return result.ret, last


def unbind_locked(gmem: Gmem, start: Index, nr: int, reason: Reason) -> Steps[tuple[Conversion, bool]]:
    """Take the bindings of [start, start+nr) away, under the invalidate lock; and whether they were the file's last.

    A refusal leaves the bindings whole. 0 under ``teardown`` where nothing is bound, -ENOENT otherwise.
    """
    host = gmem.host
    bound = yield from host.tree_load("bindings", FIRST_PAGE, gmem.size)
    if not filled(bound[start:start + nr]):
        return Conversion(0 if reason == "teardown" else -ENOENT), False
    yield from host.gmem_invalidate_begin(start, nr)
    folios = yield from gmem.present(start, nr)
    ret, index, folios = yield from large.cut_off(gmem, start, nr, folios)
    if not ret and reason != "teardown":
        # Asked for all pages first, as in a punch: a refusal must leave the binding whole.
        ret, index = yield from gmem.invalidate_guest(folios, reason)
    if not ret:
        # A dying VM is not asked: refusing is for guests that go on. What cannot come back is given up, or the VM
        # could never end.
        ret, index = yield from gmem.take_all_back(folios, leaks=reason == "teardown")
    yield from gmem.put_all(folios)
    if not ret:
        # Erasing needs no memory, so it can come after everything that fails.
        yield from host.tree_store_reserved("bindings", start, Entries(0, nr))
    yield from host.gmem_invalidate_end()
    if ret:
        return Conversion(ret, index), False
    return Conversion(0), filled(bound) == filled(bound[start:start + nr])


def take_all_back(gmem: Gmem, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, Index]]:
    """Have the private ones of *folios* back from the hypervisor; (0, 0), or -errno and the page index that failed.

    *leaks*: of a dying VM. Nothing is asked beforehand: each page comes back, or is given up for good.
    """
    for held in folios:
        ret = 0
        if leaks:
            ret, _ = yield from gmem.invalidate_guest((held,), "teardown")
        # memory_failure() looks at the folio under its lock; owner and mark must not change under it.
        yield from gmem.host.lock_folio(held.folio)
        if not ret:
            ret = yield from gmem.take_back(held)
        stays = leaks and ret == -EIO
        if stays and not held.folio.order:
            yield from gmem.leak(held)
            ret = 0
        yield from gmem.host.unlock_folio(held.folio)
        if stays and held.folio.order:
            ret = yield from gmem.take_parts_back(held)
        if ret:
            return ret, held.pgoff
    return 0, FIRST_PAGE


def take_parts_back(gmem: Gmem, held: Held) -> Steps[int]:
    """Have the pages of a large folio back, of a dying VM, one by one: what stays for good may be one of them; 0 or -errno.

    -EAGAIN where it cannot be split now: a reference passes, and to give all of it up would lose what is not refused.
    """
    ret, _ = yield from gmem.split((held,))
    if ret:
        return -EAGAIN
    parts = yield from gmem.present(held.pgoff, held.folio.nr)
    ret, _ = yield from gmem.take_all_back(parts, leaks=True)
    yield from gmem.put_all(parts)
    return ret


def mmap(gmem: Gmem) -> Steps[int]:
    """Map the file into the VMM; 0 or -ENOMEM. Private pages may be mapped: touching them is SIGBUS."""
    return (yield from gmem.host.mmap())


def munmap(gmem: Gmem) -> Steps[None]:
    """Unmap; the last reference on the inode may go with it."""
    if (yield from gmem.host.munmap()):
        yield from gmem.evict()


# -- the last reference -------------------------------------------------------------------------------------


def close(gmem: Gmem) -> Steps[None]:
    """Drop a reference on the file: close(2), or a binding that ends."""
    if (yield from gmem.host.fput()) and (yield from gmem.host.iput()):
        yield from gmem.evict()


def evict(gmem: Gmem) -> Steps[None]:
    """Give every page back, and let the inode and the module go: no reference is left, and nothing is bound."""
    yield from gmem.host.down_write("invalidate")
    # No one can reach the inode any more, so the lock is for lockdep only.
    yield from gmem.remove_range(FIRST_PAGE, gmem.size, "punch")
    yield from gmem.host.up_write("invalidate")
    yield from gmem.host.destroy_inode()
    # The very last step: the code that runs here may be unloaded from now on.
    yield from gmem.host.module_put()
