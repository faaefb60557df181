"""Life of a guest_memfd: the file, its inode, bindings to an address space, and the module that serves it.

A binding holds the file, the file and each VMA hold the inode, the inode holds the module. Pins hold folios only: a
folio that outlives the inode has been taken back and detached, so its last put needs no one's code. A caller that comes by a
binding and not by the descriptor - a vCPU, an unbind, a dying VM - holds the file while he works: the binding may end.
"""

from __future__ import annotations

from itertools import chain

from guest_memfd.core.base import filled
from guest_memfd.core.convert import Conversion
from guest_memfd.core.folio import Held
from guest_memfd.core.invalidate import Removes
from guest_memfd.core.ops import Reason
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import EBADF, EEXIST, EINVAL, EIO, ENODEV, ENOENT, EOPNOTSUPP, Entries, Steps


def runs(pages: tuple[int, ...]) -> list[tuple[int, int]]:
    """The runs of consecutive page indexes in *pages*: (first, length) each, in order."""
    found: list[tuple[int, int]] = []
    for page in sorted(set(pages)):
        if found and sum(found[-1]) == page:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((page, 1))
    return found


class Files(Removes):
    """create, bind, unbind, mmap, munmap, vm_teardown."""

    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        """A file of *size* pages, private but for the page indexes in *shared*; -EINVAL, -ENODEV, -ENOMEM, -EOPNOTSUPP.

        -EINVAL also for a file or a run of shared pages that would end inside a folio. -EOPNOTSUPP on a kernel whose direct
        map cannot be changed: there the setters do nothing and say 0, so no one would notice later (CVE-2024-50182).
        """
        host = self.host
        if size <= 0 or any(not 0 <= i < size for i in shared):
            return -EINVAL
        if not self.whole(size, *chain.from_iterable(runs(shared))):
            return -EINVAL
        # Asked once, here. Later the setters would say 0 and do nothing, and the file would look protected.
        if self.no_direct_map and not (yield from host.can_set_direct_map()):
            return -EOPNOTSUPP
        yield from host.begin_op("create", 0, size)
        # The module before the inode: an inode whose module has gone would call code that is no longer there.
        ret = (yield from self._alloc_inode()) if (yield from host.try_module_get()) else -ENODEV
        if ret:
            yield from host.end_op(ret)
            return ret
        ret = yield from self.init_attributes(size, shared)
        yield from host.end_op(ret)
        if ret:
            yield from self.close()
            return ret
        # Last: from here on other threads can use the descriptor, and everything they may ask for has to be in place.
        yield from host.fd_install()
        return 0

    def _alloc_inode(self) -> Steps[int]:
        ret = yield from self.host.alloc_inode()
        if ret:
            yield from self.host.module_put()
        elif self.no_direct_map:
            yield from self.host.mapping_set_no_direct_map()
        return ret

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        """Cover every page: a hole in the tree would have to be read as something."""
        host = self.host
        ret = yield from host.xa_store("attributes", 0, Entries(PRIVATE_PAGE, size))
        for start, nr in runs(shared):
            if not ret:
                ret = yield from host.xa_store("attributes", start, Entries(SHARED_PAGE, nr))
        return ret

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        """Let *gfn* on be pages [start, start+nr); -EEXIST if bound already, -ENOMEM.

        -EBADF when the file has gone, -ENODEV when the VM has been stopped: no one would take that binding away again.
        -EINVAL outside of the file, for a range that cuts a folio, and for a gfn that is no multiple of a folio's size.
        """
        host = self.host
        if not self.has(start, nr) or not self.whole(gfn, start, nr):
            return -EINVAL
        yield from host.begin_op("bind", start, nr)
        # A reference, not only a pointer: the descriptor may be closed by another thread while this call waits for
        # the lock.
        if not (yield from host.get_file()):
            yield from host.end_op(-EBADF)
            return -EBADF
        yield from host.down_write("invalidate")
        bound = yield from host.xa_load("bindings", 0, self.size)
        if filled(bound[start:start + nr]):
            ret = -EEXIST
        # A stopped VM has had its teardown, or will not ask again for bindings that come later. No one would ever
        # take this one away.
        elif (yield from host.vm_state()) != "running":
            ret = -ENODEV
        else:
            ret = yield from host.xa_store("bindings", start, Entries(gfn + 1, nr, 1))
        yield from host.end_op(ret)
        yield from host.up_write("invalidate")
        if ret or filled(bound):                       # one reference for all bindings, taken by the first
            yield from self.close()
        return ret

    def unbind(self, start: int, nr: int) -> Steps[Conversion]:
        """Take the binding of [start, start+nr) away; -EBUSY with the page index if the guest holds on to a page.

        Pages stay in the file, the host's again, with their contents where the hypervisor preserves them. -EINVAL
        outside of the file, and for a range that cuts a folio; -ENOENT where nothing is bound; -EIO with the page index
        if the hypervisor will never give a page back.
        """
        if not self.has(start, nr) or not self.whole(start, nr):
            return Conversion(-EINVAL)
        yield from self.host.begin_op("unbind", start, nr)
        if not (yield from self.host.get_file()):      # a task that waits for the lock must hold what it is in
            yield from self.host.end_op(-ENOENT)
            return Conversion(-ENOENT)
        yield from self.host.down_write("invalidate")
        result, last = yield from self._unbind(start, nr, "unbind")
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        # After the lock is dropped: this ends the file if the binding was its last user. The second `close` is for
        # the reference that this call has held itself.
        if last:
            yield from self.close()
        yield from self.close()
        return result

    def vm_teardown(self) -> Steps[int]:
        """The VM is dying and its vCPUs are out: everything bound comes back, then the VM may go.

        -EAGAIN when the hypervisor fails twice to give a page back: the bindings, and the file, stay for another try. What
        it will never give back leaves the file and is counted.
        """
        if not (yield from self.host.get_file()):
            yield from self.ops.release()
            return 0
        yield from self.host.begin_op("teardown", 0, self.size)
        yield from self.host.down_write("invalidate")
        result, last = yield from self._unbind(0, self.size, "teardown")
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        if result.ret:
            yield from self.host.warn(f"page {result.error_index} stays with the hypervisor")
        else:
            yield from self.ops.release()
        if last:
            yield from self.close()
        yield from self.close()
        return result.ret

    def _unbind(self, start: int, nr: int, reason: Reason) -> Steps[tuple[Conversion, bool]]:
        host = self.host
        bound = yield from host.xa_load("bindings", 0, self.size)
        if not filled(bound[start:start + nr]):
            return Conversion(0 if reason == "teardown" else -ENOENT), False
        yield from host.mmu_invalidate_begin(start, nr)
        folios = yield from self.present(start, nr)
        if reason == "teardown":
            # A dying VM is not asked: refusing is for guests that go on. What cannot come back is given up, or the VM
            # could never end.
            ret, index = yield from self._take_all_back(folios, leaks=True)
        else:
            # Asked for all pages first, as in a punch: a refusal must leave the binding whole.
            ret, index = yield from self.invalidate_guest(folios, reason)
            if not ret:
                ret, index = yield from self._take_all_back(folios, leaks=False)
        yield from self.put_all(folios)
        if not ret:
            # Erasing needs no memory, so it can come after everything that fails.
            yield from host.xa_store_reserved("bindings", start, Entries(0, nr))
        yield from host.mmu_invalidate_end()
        if ret:
            return Conversion(ret, index), False
        return Conversion(0), filled(bound) == filled(bound[start:start + nr])

    # Of a dying VM nothing is asked beforehand: each page comes back, or with *leaks* is given up for good.
    def _take_all_back(self, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, int]]:
        for held in folios:
            ret = 0
            if leaks:
                ret, _ = yield from self.invalidate_guest((held,), "teardown")
            # memory_failure() looks at the folio under its lock; owner and mark must not change under it.
            yield from self.host.lock_folio(held.folio)
            if not ret:
                ret = yield from self.take_back(held)
            if ret == -EIO and leaks:
                yield from self.leak(held)
                ret = 0
            yield from self.host.unlock_folio(held.folio)
            if ret:
                return ret, held.pgoff
        return 0, 0

    def mmap(self) -> Steps[int]:
        """Map the file into the VMM; 0 or -ENOMEM. Private pages may be mapped: touching them is SIGBUS."""
        return (yield from self.host.mmap())

    def munmap(self) -> Steps[None]:
        """Unmap; the last reference on the inode may go with it."""
        if (yield from self.host.munmap()):
            yield from self.evict()
