"""Address spaces: what a VM sees where. Every check comes before the first change.

map, unmap, lookup, configure_range and modify_pages as docs/api/gunyah_api.md and hyp/mem/addrspace of the hypervisor have
them; which flags Linux passes is in drivers/virt/gunyah/guest_memfd.c (series v17, patch 20). Where a failing map may leave
a part of itself mapped in the hypervisor, ours leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag

from guest_memfd.compat import override
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.config import ConfiguredRanges, RangeOp
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.mappings import VISIBLE, Mappings
from guest_memfd.machine.el2.gunyah.memdb import MemDb
from guest_memfd.machine.el2.gunyah.memextent import Attributes, Extent, ExtentAccess, ExtentMapping
from guest_memfd.machine.el2.gunyah.stage2 import IA_BITS, GunyahLeaf, Stock
from guest_memfd.machine.hw.arm64.descriptor import VALID
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Ipa, Pa

_LIMIT = 1 << 48
_PAGE_BITS = PAGE - 1


class AddrMapFlag(IntFlag):
    """Flags of map and unmap."""

    PARTIAL = 1
    PRIVATE = 2
    VMMIO = 4
    WHOLE = 8
    NOSYNC = 1 << 31


# As plain numbers: inverting an IntFlag loses the bits that have no name.
_MAP_FLAGS = int(AddrMapFlag.PARTIAL | AddrMapFlag.PRIVATE | AddrMapFlag.VMMIO | AddrMapFlag.NOSYNC)
_UNMAP_FLAGS = _MAP_FLAGS | int(AddrMapFlag.WHOLE)


def check_range(start: int, size: int, limit: int, outside: GunyahError = GunyahError.ARG_SIZE) -> int:
    """The end of the range; raises Refused: ARG_ALIGN, ARG_SIZE for 0 and overflow, *outside* beyond *limit*."""
    if (start | size) & _PAGE_BITS:
        raise HypRefused(GunyahError.ARG_ALIGN, f"{start:#x}+{size:#x} is not page aligned")
    if not size or start + size > 1 << 64:
        raise HypRefused(GunyahError.ARG_SIZE, f"{size:#x} bytes at {start:#x}")
    if start + size > limit:
        raise HypRefused(outside, f"{start:#x}+{size:#x} reaches beyond {limit:#x}")
    return start + size


class AddressSpace(Mappings):
    """The stage 2 of one VM. *alive*: whether its vCPUs may still run, for then locked pages stay."""

    def __init__(self, ram: Ram, memdb: MemDb, source: PageSource, tlbs: list[Tlb], vmid: int, name: str,
                 alive: Callable[[], bool], relock: private.Relock = "access",
                 layout: private.Layout = "2024-12") -> None:
        super().__init__(ram, source, tlbs, vmid, name)
        self.memdb, self.relock, self.layout = memdb, relock, layout
        self._alive = alive
        self.ranges = ConfiguredRanges()
        self._recorded: list[Extent] = []                   # extents with a recorded mapping here

    # -- questions -----------------------------------------------------------------------------------------------

    def locked(self, ipa: Ipa) -> bool:
        """Whether *ipa* is a private page that the guest holds on to."""
        value = self.table.leaf(ipa & -PAGE).value
        return bool(value & VALID and value & private.LOCKED)

    # -- map -----------------------------------------------------------------------------------------------------

    def map(self, extent: Extent, vbase: Ipa, attributes: Attributes, flags: int, offset: int, size: int) -> None:
        """Map memory of *extent*: [offset, offset+size) of it at *vbase* (PARTIAL), or all of it.

        Raises HypRefused; nothing is mapped then. Errors in the order of the checks: ARG_INVAL flags; ARG_ALIGN; ARG_SIZE;
        ARG_INVAL attributes; ADDR_INVAL vbase; and those of each kind of map.
        """
        if flags & ~_MAP_FLAGS:
            raise HypRefused(GunyahError.ARG_INVAL, f"map flags {flags:#x}")
        kind = self._kind(flags)
        # A whole extent is mapped by record: pages that are donated to it later appear in this place by themselves.
        if not flags & AddrMapFlag.PARTIAL:
            self._map_whole(ExtentMapping(self, vbase, attributes), extent, kind, offset, size)
            return
        end = check_range(offset, size, extent.size)
        self._check_place(extent, vbase, attributes, size)
        start, end = extent.base + offset, extent.base + end
        if kind == "private":
            self._map_private(extent, vbase, attributes, start, end)
        elif kind == "vmmio":
            self._map_vmmio(extent, vbase, attributes, start, end)
        else:
            self._check_owner(extent, start, end)
            # Plain maps never replace what is mapped; private and VMMIO maps do.
            if any(leaf.valid for leaf in self.table.leaves(vbase, vbase + size)):
                raise HypRefused(GunyahError.EXISTING_MAPPING, f"{self!r} maps something in {vbase:#x}+{size:#x}")
            self.place(vbase, start, end, private.encode(attributes))

    @staticmethod
    def _kind(flags: int) -> str:
        both = AddrMapFlag.PRIVATE | AddrMapFlag.VMMIO
        if flags & both == both:
            raise HypRefused(GunyahError.ARG_INVAL, "PRIVATE and VMMIO together")
        return "private" if flags & AddrMapFlag.PRIVATE else "vmmio" if flags & AddrMapFlag.VMMIO else "plain"

    def _check_place(self, extent: Extent, vbase: Ipa, attributes: Attributes, size: int) -> None:
        if not attributes.within(extent.attributes):
            raise HypRefused(GunyahError.ARG_INVAL, f"{attributes} is more than {extent!r} allows")
        if vbase & _PAGE_BITS:
            raise HypRefused(GunyahError.ARG_ALIGN, f"vbase {vbase:#x}")
        if vbase >= _LIMIT or vbase + size > 1 << IA_BITS:
            raise HypRefused(GunyahError.ADDR_INVAL, f"vbase {vbase:#x}")

    def _check_owner(self, extent: Extent, start: Pa, end: Pa,
                     error: GunyahError = GunyahError.MEMDB_NOT_OWNER) -> None:
        if not self.memdb.owns(extent, start, end):
            raise HypRefused(error, f"{extent!r} does not own [{start:#x}, {end:#x})")

    def _check_configured(self, kind: str, vbase: Ipa, size: int) -> None:
        if self.ranges.kind(vbase, vbase + size) != kind:
            raise HypRefused(GunyahError.DENIED, f"{vbase:#x}+{size:#x} is not configured {kind}")

    # A page that is private already may only be mapped where it is, and is locked again; the place must not hold another
    # page that the guest has locked.
    def _map_private(self, extent: Extent, vbase: Ipa, attributes: Attributes, start: Pa, end: Pa) -> None:
        if not attributes.kernel & ExtentAccess.W:
            raise HypRefused(GunyahError.ARG_INVAL, "a private page has to be writable for the kernel of the VM")
        # A private page must come from the extent of this VM's own, or the host could map a page that another VM
        # owns.
        if extent.alone is not self:
            raise HypRefused(GunyahError.DENIED, f"{extent!r} holds no private pages of {self!r}")
        self._check_configured("private", vbase, end - start)
        self._check_owner(extent, start, end, GunyahError.DENIED)
        bits = private.encode(attributes) | private.PRIVATE | private.LOCKED | private.WRITABLE
        if any(places not in ((), (vbase - start,)) for _, _, places in self._places.runs(start, end)):
            raise HypRefused(GunyahError.EXISTING_MAPPING, f"[{start:#x}, {end:#x}) is mapped elsewhere in {self!r}")
        # Replacing happens without a word to the guest, so what it has locked must not be among it.
        self._check_free(vbase, start, end)
        self.place(vbase, start, end, bits)

    def _map_vmmio(self, extent: Extent, vbase: Ipa, attributes: Attributes, start: Pa, end: Pa) -> None:
        if (attributes.user | attributes.kernel) & ExtentAccess.X:
            raise HypRefused(GunyahError.ARG_INVAL, "device memory is not executable")
        self._check_configured("vmmio", vbase, end - start)
        self._check_owner(extent, start, end)
        self._check_free(vbase, start, end)
        self.place(vbase, start, end, private.encode(attributes))

    # What the guest holds on to is not replaced, silently or otherwise.
    def _check_free(self, vbase: Ipa, start: Pa, end: Pa) -> None:
        if self._alive() and any(value & private.LOCKED for _, _, value in self.others(vbase, start, end)):
            raise HypRefused(GunyahError.BUSY, f"{self!r} holds on to what it has in {vbase:#x}+{end - start:#x}")

    # -- the whole of an extent ----------------------------------------------------------------------------------

    def _map_whole(self, mapping: ExtentMapping, extent: Extent, kind: str, offset: int, size: int) -> None:
        if kind != "plain" or offset or size:
            raise HypRefused(GunyahError.ARG_INVAL, "only a PARTIAL map has an offset, a size, PRIVATE or VMMIO")
        self._check_place(extent, mapping.vbase, mapping.attributes, 0)
        owned = list(self.memdb.ranges(extent))
        with Stock(self.source, self.tables_for_mapping(mapping, extent.base, owned)) as stock:
            extent.record(mapping)
            self._recorded.append(extent)
            self.apply(mapping, extent.base, owned, stock)

    def unmap_whole(self, extent: Extent, vbase: Ipa) -> None:
        """Forget a recorded mapping and unmap what it maps; raises HypRefused(ADDR_INVAL) when it is not recorded."""
        mapping = extent.forget(self, vbase)
        self._recorded.remove(extent)
        distance = vbase - extent.base
        owned = list(self.memdb.ranges(extent))
        try:
            places = [(Ipa(low + distance), Ipa(high + distance)) for low, high in owned]
            need = sum(self.table.tables_for_cut(start, end) for start, end in places)
            with Stock(self.source, need) as stock:
                for low, high in owned:
                    self.withdraw(low, high, distance, stock)
        # Want of memory: the record is put back, as nothing was unmapped yet.
        except HypRefused:
            extent.mappings.append(mapping)
            self._recorded.append(extent)
            raise
        self.sync_all()

    @override
    def abandon(self) -> None:
        """Its VM has ended, and what it had stays whose it was: the tables go, and with them every place in it."""
        for extent in self._recorded:
            extent.forget_all(self)
        self._recorded.clear()
        super().abandon()

    # -- unmap ---------------------------------------------------------------------------------------------------

    def unmap(self, extent: Extent, vbase: Ipa, flags: int, offset: int, size: int) -> None:
        """Unmap: an entry goes only if it maps the page of *extent* that the call names.

        Raises HypRefused and changes nothing: ARG_INVAL flags; ARG_ALIGN; ARG_SIZE; ADDR_INVAL vbase, or nothing of that
        kind is mapped there; DENIED outside a range of that kind; MEMDB_NOT_OWNER; BUSY for a private page that is locked
        in a living VM, or no private page; NOMEM.
        """
        if flags & ~_UNMAP_FLAGS:
            raise HypRefused(GunyahError.ARG_INVAL, f"unmap flags {flags:#x}")
        kind = self._kind(flags)
        if not flags & AddrMapFlag.PARTIAL:
            if kind != "plain" or offset or size:
                raise HypRefused(GunyahError.ARG_INVAL, "only a PARTIAL unmap has an offset, a size, PRIVATE or VMMIO")
            self.unmap_whole(extent, vbase)
            return
        if flags & AddrMapFlag.WHOLE:
            raise HypRefused(GunyahError.ARG_INVAL, "PARTIAL and WHOLE together")
        end = check_range(offset, size, extent.size)
        self._check_place(extent, vbase, extent.attributes, size)
        self._unmap_partial(extent, vbase, kind, extent.base + offset, extent.base + end, not flags & AddrMapFlag.NOSYNC)

    def _unmap_partial(self, extent: Extent, vbase: Ipa, kind: str, start: Pa, end: Pa, sync: bool) -> None:
        stop = vbase + (end - start)
        if kind != "plain":
            self._check_configured(kind, vbase, end - start)
        self._check_owner(extent, start, end)
        found = [leaf for leaf in self.table.leaves(vbase, stop) if leaf.valid and leaf.oa - leaf.ipa == start - vbase]
        covered = sum(min(leaf.ipa + leaf.size, stop) - max(leaf.ipa, vbase) for leaf in found)
        if kind == "private":
            # Private pages go all or not at all, since each may have its own lock.
            if covered != end - start:
                raise HypRefused(GunyahError.ADDR_INVAL, f"{vbase:#x}+{end - start:#x} does not map all of it")
            self._check_given_up(found)
        # An earlier unmap with NOSYNC may have left TLB entries for these addresses, so the call synchronises before it
        # says that nothing is mapped.
        elif not found:
            if sync:
                self.sync(vbase, stop)
            raise HypRefused(GunyahError.ADDR_INVAL, f"nothing of {extent!r} is mapped at {vbase:#x}")
        with Stock(self.source, self.table.tables_for_cut(vbase, stop)) as stock:
            self.table.cut(vbase, stop, stock)
        gone = self.remove([leaf for leaf in self.table.leaves(vbase, stop)
                             if leaf.valid and leaf.oa - leaf.ipa == start - vbase])
        if sync:
            self.sync(vbase, stop)
        else:
            self.leave_stale(vbase, stop)
        # After the sync: with a stale entry the guest could write after the zeroing.
        self.sanitise(gone)

    def _check_given_up(self, found: list[GunyahLeaf]) -> None:
        if not all(leaf.value & private.PRIVATE for leaf in found):
            raise HypRefused(GunyahError.BUSY, "not a private page")
        if self._alive() and any(leaf.value & private.LOCKED for leaf in found):
            raise HypRefused(GunyahError.BUSY, "the guest holds on to the page")

    # -- the rest ------------------------------------------------------------------------------------------------

    def configure(self, op: int, base: Ipa, size: int) -> None:
        """addrspace_configure_range; raises Refused: ARG_INVAL, ARG_ALIGN, ARG_SIZE and those of `ConfiguredRanges`."""
        if op not in tuple(RangeOp):
            raise HypRefused(GunyahError.ARG_INVAL, f"configure_range operation {op}")
        end = Ipa(check_range(base, size, 1 << IA_BITS))
        self.ranges.apply(RangeOp(op), base, end)

    def lookup(self, extent: Extent, vbase: Ipa, size: int) -> tuple[int, int, Attributes]:
        """What the address space maps at *vbase*: offset into *extent*, contiguous bytes up to *size*, attributes.

        Raises HypRefused: ARG_ALIGN, ARG_SIZE, ADDR_INVAL nothing mapped, MEMDB_NOT_OWNER the page is in another extent.
        """
        end = Ipa(check_range(vbase, size, 1 << IA_BITS, outside=GunyahError.ADDR_INVAL))
        first = self.table.leaf(vbase)
        if not first.valid:
            raise HypRefused(GunyahError.ADDR_INVAL, f"nothing is mapped at {vbase:#x}")
        start = first.oa + (vbase - first.ipa)
        self._check_owner(extent, start, start + PAGE)
        stop = vbase
        for leaf in self.table.leaves(vbase, end):
            if not leaf.valid or leaf.oa - leaf.ipa != start - vbase or (leaf.value ^ first.value) & VISIBLE:
                break
            stop = min(end, leaf.ipa + leaf.size)
        owned = next(self.memdb.ranges(extent, start, start + (stop - vbase)))
        return start - extent.base, owned[1] - owned[0], private.decode(first.value)

    def modify(self, vbase: Ipa, size: int, flags: int) -> None:
        """modify_pages, by the guest: unlock private pages. Raises HypRefused, and nothing changes.

        ARG_INVAL flags; ARG_ALIGN; ARG_SIZE (0 is for a flush alone); ADDR_INVAL not mapped; DENIED not private; NOMEM
        for the tables that a part of a block needs.
        """
        wanted = private.modification(flags, self.layout)
        if not wanted.unlock:
            if vbase or size:
                raise HypRefused(GunyahError.ARG_INVAL, "a flush has no range")
            self.sync_all()
            return
        end = Ipa(check_range(vbase, size, 1 << IA_BITS))
        found = list(self.table.leaves(vbase, end))
        if not all(leaf.valid for leaf in found):
            raise HypRefused(GunyahError.ADDR_INVAL, f"not all of {vbase:#x}+{size:#x} is mapped")
        if not all(leaf.value & private.PRIVATE for leaf in found):
            raise HypRefused(GunyahError.DENIED, f"not all of {vbase:#x}+{size:#x} is private")
        with Stock(self.source, self.table.tables_for_cut(vbase, end)) as stock:
            self.table.cut(vbase, end, stock)
        for leaf in self.table.leaves(vbase, end):
            self.table.rewrite(leaf, private.unlock(leaf.value, wanted.keep, self.relock))
        # The guest asks for its own TLB entries to go, of earlier calls as well.
        if wanted.flush:
            self.sync_all()
        elif wanted.sync and self.relock != "never":
            self.table.sync(vbase, end)

    def touch(self, ipa: Ipa, access: str) -> bool:
        """A guest access was refused; True if only because the page is unlocked: it is locked again now.

        With it all that the same entry maps, as the access flag is one for all of a block.
        """
        leaf = self.table.leaf(ipa & -PAGE)
        # The hypervisor sees a touch only because `unlock` has cleared the access flag, or the right to write.
        relocks = self.relock == "access" or (self.relock == "write" and access == "w" and leaf.value & private.WRITABLE)
        if not relocks or not leaf.valid or not leaf.value & private.PRIVATE or leaf.value & private.LOCKED:
            return False
        self.table.rewrite(leaf, private.lock(leaf.value))
        # A right that is added needs a flush here because the old entry refuses the write; a set access flag needs
        # none, as an entry without it is never cached.
        if self.relock == "write":
            self.table.sync(leaf.ipa, leaf.ipa + leaf.size)
        return True
