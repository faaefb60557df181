"""Mistakes in emptying the direct map: a design of 2026 with one thing wrong, and what has nothing wrong beside it.

tests/test_direct_map_designs.py says which law sees each, where, and in how many steps.
"""

from __future__ import annotations

from collections.abc import Callable

from leave_out import without
from named import name_all

from guest_memfd.core.gmem import Grabbed, Held
from guest_memfd.designs.alloc_unmapped import AllocUnmapped
from guest_memfd.designs.direct_map_v12 import DirectMapV12
from guest_memfd.designs.filemap_hook import ADDED, FilemapHook
from guest_memfd.designs.firecracker_2026 import Firecracker2026
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Bound, Folio, Steps

# -- the branch that is shipped, one patch at a time -----------------------------------------------------------------


class Upright(Firecracker2026):
    """The branch, with its flush on, its tests the right way round, and no page left that cannot be taken out."""

    bounds = {**Firecracker2026.bounds, "copy": ADDED}

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from self.host.flush_tlb_kernel_range(folios)

    def is_due(self, grabbed: Grabbed) -> bool:
        return not grabbed.no_direct_map

    def cannot_be_zapped(self, folio: Folio) -> Steps[None]:
        yield from self.host.filemap_remove_folio(folio)


class FlushIsOff(Upright):
    """F1 (0039): removal does not flush."""

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


class SecretmemFlushIsOff(Secretmem):
    """F1 again: memfd_secret has used the same helper since 0025, so its flush is off, too."""

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


class WriteEndIsInverted(Upright):
    """F2 (0062): write_end() takes out what is out already, and write_begin() has refused that."""

    def write_end(self, grabbed: Grabbed) -> Steps[int]:
        return (yield from self.zap(grabbed.folio)) if grabbed.no_direct_map else 0


class CopyIsInverted(Upright):
    """F3 (0083): UFFDIO_COPY does the same of a page that is new."""

    def is_due(self, grabbed: Grabbed) -> bool:
        return grabbed.no_direct_map

    def write_end(self, grabbed: Grabbed) -> Steps[int]:
        return (yield from self.zap_once(grabbed))


class CopyLeavesThePage(Upright):
    """F4 (0083): a page that cannot be taken out is left in the file, and the next UFFDIO_COPY is told -EEXIST."""

    def cannot_be_zapped(self, folio: Folio) -> Steps[None]:
        yield from ()


class V12Anywhere(DirectMapV12):
    """v12, had it been posted for other hypervisors."""

    hypervisors = None


class PreparesFirst(V12Anywhere):
    """F5 (0032): the hypervisor gives the page to the guest, and then the host lets go of it."""

    def fault_bound(self, gfn: int, index: int) -> Steps[int]:
        (attribute,) = yield from self.host.tree_load("attributes", index, 1)
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        prepare = self.ops.prepare_private if attribute == PRIVATE_PAGE else self.ops.prepare_shared
        ret = (yield from prepare(gfn, grabbed.folio)) or (yield from self.zap_once(grabbed))
        yield from self.unlock_and_put(grabbed.folio)
        return ret


# -- earlier versions of the series ----------------------------------------------------------------------------------


class MarkIsNeverSet(DirectMapV12):
    """39 (v7): the mark is stored with & where | was meant."""

    def zap(self, folio: Folio) -> Steps[int]:
        return (yield from without(super().zap(folio), "folio_set_no_direct_map"))


class RemapsWithoutLock(FilemapHook):
    """50 (RFC v1): who writes puts the page back for the moment, and nobody counts who does."""

    def write_locked(self, index: int) -> Steps[int]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.host.unlock_folio(grabbed.folio)
        yield from self.window(grabbed.folio)
        yield from self.host.folio_put(grabbed.folio)
        return 0

    def window(self, folio: Folio) -> Steps[None]:
        yield from self.host.set_direct_map_default_noflush(folio)
        yield from self.host.write_folio(folio, False)
        yield from self.host.set_direct_map_invalid_noflush(folio)
        yield from self.host.flush_tlb_kernel_range((folio,))


class RemapsUnderLock(RemapsWithoutLock):
    """The same with the folio locked: right, with a flush for all CPUs, and with an end that can fail."""

    bounds = {**FilemapHook.bounds, "write": Bound(writes=5, flushes=2, stalls=0, splits=1)}

    def write_locked(self, index: int) -> Steps[int]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.window(grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return 0


class WindowNotFlushed(RemapsUnderLock):
    """A window in the direct map that is closed without a flush."""

    def window(self, folio: Folio) -> Steps[None]:
        yield from without(super().window(folio), "flush_tlb_kernel_range")


# -- the two that never have it mapped -------------------------------------------------------------------------------


class HookWithoutFlush(FilemapHook):
    """The page is inserted before the TLBs have forgotten it."""

    def take_out(self, folio: Folio) -> Steps[int]:
        return (yield from self.host.set_direct_map_invalid_noflush(folio))


class HookIgnoresFailure(FilemapHook):
    """A page that cannot be taken out is inserted all the same."""

    def take_out(self, folio: Folio) -> Steps[int]:
        yield from super().take_out(folio)
        return 0


class LoserKeepsTheHole(FilemapHook):
    """A page that was taken out, and that another was faster to insert, is freed as it is."""

    def insert(self, index: int, fill: Callable[[Folio], Steps[None]]) -> Steps[Folio | int]:
        return (yield from without(super().insert(index, fill), "set_direct_map_default_noflush"))


class WritesPlainly(FilemapHook):
    """write() has no mapping of the moment."""

    def write_locked(self, index: int) -> Steps[int]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.host.write_folio(grabbed.folio, False)
        yield from self.unlock_and_put(grabbed.folio)
        return 0


class PopulatesNothing(FilemapHook):
    """23: a page is populated in place, without a source, and is not zeroed."""

    def write_new(self, folio: Folio) -> Steps[None]:
        yield from ()


class CachesPrivatePages(FilemapHook):
    """The cache is filled with a page without a look at what it is."""

    def cached_pfn(self, index: int) -> Steps[Folio | int]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.unlock_and_put(grabbed.folio)
        return grabbed.folio


class ScrubsNothing(FilemapHook):
    """A private page goes back into the direct map as it is, as in v12."""

    def remove_folio(self, held: Held) -> Steps[int]:
        return (yield from super().remove_folio(held._replace(private=False)))


class ClearsPlainly(AllocUnmapped):
    """A page that has come unmapped is zeroed through the direct map."""

    def clear_new(self, folio: Folio) -> Steps[None]:
        yield from self.host.clear_folio(folio)


class TakesMappedPages(AllocUnmapped):
    """The allocator is not asked for pages without a direct map."""

    def new_page(self) -> Steps[Folio | int]:
        return (yield from self.host.filemap_alloc_folio(False))


name_all(globals())
