"""Memory files served by the driver as posted. Here is what designs/gunyah_v17.py leaves out of its scenarios.

Several bindings, ranges, huge folios, parcels. Mistakes are kept and marked with the numbers of docs/bugs.md. Patches 20,
23, 24 and 25/35. Not modelled: bindings and accesses beyond the end of the file (S28), S8, one file in several VMs.
"""

from __future__ import annotations

from errno import EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.designs.gunyah_v17 import GunyahV17, entry_of
from guest_memfd.machine.dev.gunyah.binding import Binding
from guest_memfd.machine.dev.gunyah.memory import PMD_ORDER, GunyahMemoryFile, Parcelled
from guest_memfd.uapi.gunyah import GunyahMemFlag
from guest_memfd.words.primitives import Entries, Folio, Lookup, Steps
from guest_memfd.words.units import FIRST_GFN, Gfn, Index

if TYPE_CHECKING:
    from guest_memfd.core.gmem import Grabbed
    from guest_memfd.core.ops import GuestMemfdOps
    from guest_memfd.machine.board.board import Board

_ALL = 1 << 52
"""More gfns than any guest has."""


class PostedDriver(GunyahV17):
    """The driver with any bindings of its file."""

    def __init__(self, ops: GuestMemfdOps, size: int) -> None:
        super().__init__(ops, size)
        self.bindings: list[Binding] = []
        self.huge = False

    @override
    def lends(self, index: Index) -> bool:
        """As the binding of page *index* says."""
        return any(b.lend for b in self.bindings if b.covers(index, 1))

    # __gunyah_gmem_get_huge_folio(): a huge folio where the window is empty, else, or when that fails, a small one.
    @override
    def grab_folio(self, index: Index) -> Steps[Grabbed | int]:
        """Find or allocate the folio of page *index*; in a huge file try an aligned 2 MiB folio first."""
        if self.huge:
            hit = yield from self.driver.filemap_get_folio(index)
            if hit is not None:
                yield from self.driver.folio_put(hit.folio)
            else:
                new = yield from self.driver.filemap_add_folio(index, PMD_ORDER)
                if isinstance(new, Lookup):
                    yield from self.zero(new.folio)
                    # Given back at once: the look-up below finds the huge folio in the page cache, as it would find
                    # anyone's.
                    yield from self.unlock_and_put(new.folio)
        return (yield from super().grab_folio(index))

    # -- bindings ------------------------------------------------------------------------------------------------

    def bind_range(self, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
        """MAP_MEM of a range: one reference on the file."""
        yield from self.driver.get_file()
        ret = yield from self.driver.tree_store("bindings", start, Entries(gfn + 1, nr, 1))
        if ret:
            yield from self.close()
        return ret

    def unbind_range(self, binding: Binding, gfn: Gfn, nr: int) -> Steps[int]:
        """UNMAP: the whole binding, or an edge; for an edge the end is passed where a count belongs (S7)."""
        host = self.driver
        start, whole = binding.index(gfn), nr == binding.nr
        yield from host.begin_op("unbind", start, nr)
        yield from host.get_file()                          # fget() of the ioctl's argument
        # invalidate_lock first, then bindings_lock, as in the driver: two orders could deadlock.
        yield from host.down_write("invalidate")
        yield from host.down_write("bindings")
        # As posted, so the bug stays: the range ends too far, and takes pages that the guest still uses.
        ret = yield from self.reclaim_range(gfn, nr if whole else gfn + nr)
        if not ret:
            yield from host.tree_store_reserved("bindings", start, Entries(0, nr))
            # An edge leaves the rest of the binding, which needs its reference.
            if whole:
                yield from host.fput()                      # the binding's; the ioctl's own is forgotten (S12)
        yield from host.end_op(ret)
        yield from host.up_write("bindings")
        yield from host.up_write("invalidate")
        if ret:
            yield from self.close()
        return ret

    def mmap_range(self, start: Index, nr: int) -> Steps[int]:
        """mmap of part of the file: lent memory is taken back up to the end of its binding (S9)."""
        host = self.driver
        for binding in [b for b in self.bindings if b.lend and b.covers(start, nr)]:
            gfn = binding.gfn + (start - binding.start)
            end = max(start + nr, binding.start + binding.nr)
            if gfn < 0:                                     # wraps, and nothing is found there
                continue
            yield from host.begin_op("mmap", start, nr)
            yield from host.down_read("invalidate")
            ret = yield from self.reclaim_range(gfn, end - start)
            yield from host.end_op(0)
            yield from host.up_read("invalidate")
            if ret:
                return ret
        return (yield from host.mmap())

    def abandon_range(self, binding: Binding) -> Steps[int]:
        """The VM ends: reclaim (a failure only warns), drop the binding's file reference."""
        host = self.driver
        yield from host.down_write("bindings")
        ret = yield from self.reclaim_range(binding.gfn, binding.nr)
        if ret:
            # The VM ends whatever happens, so no caller could act on an error.
            yield from host.warn(f"gfn {binding.gfn:#x} and up are not reclaimed")
        yield from host.tree_store_reserved("bindings", binding.start, Entries(0, binding.nr))
        yield from host.up_write("bindings")
        yield from self.close()
        return ret

    def reclaim_rest(self) -> Steps[int]:
        """What is left in the VM's tree."""
        ret = yield from self.reclaim_range(FIRST_GFN, _ALL)
        if ret:
            yield from self.driver.warn("guest memory is lost")
        return ret

    # -- parcels (25/35) -------------------------------------------------------------------------------------------

    def take_for_parcel(self, start: Index, nr: int, lend: bool) -> Steps[int | tuple[Folio, ...]]:
        """gunyah_gmem_share_parcel(): folios, each with a reference; lent ones out of the direct map and marked."""
        taken: list[Folio] = []
        index, ret = start, 0
        while index < start + nr:
            grabbed = yield from self.grab_folio(index)
            if isinstance(grabbed, int):
                ret = grabbed
                break
            ret = (yield from self.lend_safe(grabbed)) if lend else 0
            if not ret:
                if lend:
                    yield from self.driver.folio_set_no_direct_map(grabbed.folio, True)
                # The parcel's own reference: the look-up's goes in the next lines, and the page must not be freed
                # while it is lent.
                yield from self.driver.folio_get(grabbed.folio, "provided")
                taken.append(grabbed.folio)
            yield from self.unlock_and_put(grabbed.folio)
            if ret:
                break
            index = grabbed.pgoff + grabbed.folio.nr
        if ret:
            # All that was taken so far, or the holes in the direct map would stay.
            yield from self.give_from_parcel(tuple(taken), lend)
            return ret
        return tuple(taken)

    def give_from_parcel(self, folios: tuple[Folio, ...], lend: bool) -> Steps[None]:
        """The Resource Manager has them no longer."""
        host = self.driver
        for folio in folios:
            yield from host.lock_folio(folio)
            if lend:
                # Before the last put: a page must not reach the allocator with a hole.
                yield from host.set_direct_map_default_noflush(folio)
                yield from host.folio_set_no_direct_map(folio, False)
            yield from host.unlock_folio(folio)
            yield from host.folio_put(folio, "provided")

    def parcel_to_paged(self, parcel: Parcelled, lend: bool) -> Steps[int]:
        """gunyah_vm_parcel_to_paged(): their references become those of the tree."""
        gfn = parcel.gfn
        for folio in parcel.folios:
            ret = yield from self.driver.tree_store("provided", gfn, Entries(entry_of(folio, lend), folio.nr))
            if ret:
                yield from self.forget_paged(parcel, gfn - parcel.gfn)
                return ret
            gfn += folio.nr
        return 0

    def forget_paged(self, parcel: Parcelled, nr: int) -> Steps[None]:
        """The rollback: one page short, and without an end where there was nothing to roll back (S31)."""
        yield from self.driver.tree_store_reserved("provided", parcel.gfn, Entries(0, nr - 1 if nr else _ALL))


class PostedFile(GunyahMemoryFile):
    """A file served by `PostedDriver`; all files of a VM share the VM's tree of provided pages."""

    library: PostedDriver

    def __init__(self, machine: Board, library: PostedDriver, size: int, flags: GunyahMemFlag) -> None:
        library.huge = bool(flags & GunyahMemFlag.ALLOW_HUGEPAGE)
        super().__init__(machine, library, size, flags)
        library.bindings = self.bindings

    @override
    def map_range(self, start: Index, nr: int) -> Steps[int]:
        """The driver's mmap() of pages [start, start+nr); 0 or -errno."""
        return self.library.mmap_range(start, nr)

    @override
    def bind(self, binding: Binding) -> int:
        """-EOPNOTSUPP for a second VM, which the driver would allow."""
        if any(b.vm is not binding.vm for b in self.bindings if b is not binding):
            return -EOPNOTSUPP
        if binding.start + binding.nr > self.pages:
            return -EINVAL
        if self.vm is not binding.vm:
            self.vm = self.host.vm = binding.vm
            self.host.inode.trees["provided"] = binding.vm.provided
        return int(self.run(self.library.bind_range(binding.gfn, binding.start, binding.nr)))

    @override
    def unbind(self, binding: Binding, gfn: Gfn, nr: int) -> int:
        """Give *nr* gfns of the binding up, by the driver's code as posted; 0 or -errno."""
        return int(self.run(self.library.unbind_range(binding, gfn, nr)))

    @override
    def abandon(self, binding: Binding) -> int:
        """Give the whole binding up as the VM ends, by the driver's code as posted; 0 or -errno."""
        return int(self.run(self.library.abandon_range(binding)))

    @override
    def demand(self, binding: Binding, gfn: Gfn) -> int:
        """The guest has faulted at *gfn*: provide its page, by the driver's code as posted; 0 or -errno."""
        return int(self.run(self.library.guest_fault(gfn, binding.index(gfn))))

    @override
    def make_parcel(self, binding: Binding, gfn: Gfn, nr: int) -> int | Parcelled:
        """As posted: -EPERM what the VMM maps or could; -ENOMEM for all that is not lent, whose ACL has no entry (S15)."""
        if not binding.lend:
            return -ENOMEM
        folios = self.run(self.library.take_for_parcel(binding.index(gfn), nr, binding.lend))
        if isinstance(folios, int):
            return folios
        first = self.host.inode.find(binding.index(gfn))
        assert first is not None
        # The last look-up takes the index in the binding for one in the file (S16).
        if self.host.inode.find(Index(gfn - binding.gfn)) is None:
            self.run(self.library.driver.bug("the parcel's start is read through an error pointer"))
        return Parcelled(folios, binding.gfn + (first.index - binding.start))

    @override
    def parcel_is_paged(self, binding: Binding, parcel: Parcelled) -> int:
        """The VM has started: the parcel's folios become provided pages, by the driver's code as posted; 0 or -errno."""
        return int(self.run(self.library.parcel_to_paged(parcel, binding.lend)))

    @override
    def parcel_is_not_paged(self, parcel: Parcelled) -> None:
        """The start has failed: forget the provided pages again, by the driver's code as posted."""
        self.run(self.library.forget_paged(parcel, parcel.nr))

    @override
    def parcel_is_back(self, parcel: Parcelled, lend: bool, ret: int) -> None:
        """As posted: refused, the references stay permanently."""
        if not ret:
            self.run(self.library.give_from_parcel(parcel.folios, lend))

