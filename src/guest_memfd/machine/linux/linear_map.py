"""Holes in the linear map of arm64 Linux. Here is what set_direct_map_*() do to it, and when the TLBs learn of it,
release by release (arch/arm64/mm/pageattr.c, split_kernel_leaf_mapping() in mmu.c).

7.3 splits leaves on CPUs with BBML3 and marks holes present-invalid; 6.12 maps by pages whenever the setters work.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.machine.linux.linear_layout import PAGE_END as PAGE_END
from guest_memfd.machine.linux.linear_layout import PAGE_OFFSET as PAGE_OFFSET
from guest_memfd.machine.linux.linear_layout import LinearLayout
from guest_memfd.words.units import PAGE, Pa, Va, span

_MIGHT_SLEEP = "BUG: sleeping function called from invalid context at kernel/locking/mutex.c"


class LinearMap(LinearLayout):
    """The linear map and its setters; constructed as LinearLayout says. Addresses are physical, `nr` counts 4 KiB pages."""

    atomic = False
    """Whether the caller may not sleep; code that models interrupts and spinlocks sets it."""

    # -- the setters --------------------------------------------------------------------------------------------

    def set_direct_map_invalid_noflush(self, pa: Pa, nr: int = 1) -> int:
        """Make a hole of *nr* pages; TLBs keep what they have. 0 and nothing done unless can_set_direct_map().

        -ENOMEM (table page), -EBUSY (too early to split), -EINVAL (*pa* no page, or a leaf that cannot be split).
        """
        # Success, and the page is still there: so arm64 has it. Who needs the
        # hole has to ask can_set_direct_map() beforehand.
        if not self.can_set_direct_map():
            return 0
        if self.release == "6.12":
            return self._update_range_prot(pa, nr, 0, dm.VALID)
        return self._update_range_prot(pa, nr, dm.PRESENT_INVALID, self._present_valid)

    def set_direct_map_default_noflush(self, pa: Pa, nr: int = 1) -> int:
        """Undo it: valid and writable again; execute bits stay. Guard and errors as above."""
        if not self.can_set_direct_map():
            return 0
        if self.release == "6.12":
            return self._update_range_prot(pa, nr, dm.VALID | dm.WRITE, dm.RDONLY)
        return self._update_range_prot(pa, nr, self._present_valid | dm.WRITE, dm.PRESENT_INVALID | dm.RDONLY)

    def set_direct_map_valid_noflush(self, pa: Pa, nr: int, valid: bool) -> int:
        """As set_memory_valid(): in spite of its name it flushes when it makes a hole. Not there in 6.12: BadInput."""
        if self.release == "6.12":
            raise BadInput("set_direct_map_valid_noflush: arm64 has none in 6.12")
        return self.set_memory_valid(pa, nr, valid) if self.can_set_direct_map() else 0

    def set_memory_valid(self, pa: Pa, nr: int, valid: bool) -> int:
        """Change validity alone. 6.12 flushes both ways, 7.3 only when pages become invalid; no guard."""
        if self.release == "6.12":
            ret = self._update_range_prot(pa, nr, dm.VALID * valid, dm.VALID * (not valid))
        elif valid:
            return self._update_range_prot(pa, nr, self._present_valid, dm.PRESENT_INVALID)
        else:
            ret = self._update_range_prot(pa, nr, dm.PRESENT_INVALID, self._present_valid)
        self.flush_tlb_kernel_range(self.va(pa), self.va(pa) + nr * PAGE)
        return ret

    def kernel_map_pages(self, pa: Pa, nr: int, enable: bool) -> None:
        """__kernel_map_pages(): debug_pagealloc takes free pages out; may be called in atomic context."""
        if self.can_set_direct_map():
            self.set_memory_valid(pa, nr, enable)

    # PTE_PRESENT_VALID_KERNEL: with KPTI, bit 11 of a valid entry is nG.
    @property
    def _present_valid(self) -> int:
        return dm.VALID | (dm.NG if self.kpti else 0)

    def _update_range_prot(self, pa: Pa, nr: int, set_mask: int, clear_mask: int) -> int:
        if pa % PAGE or nr <= 0:
            return self._warn_on_once("update_range_prot", -EINVAL)
        start = self.va(pa)
        end = start + nr * PAGE
        if not any(low <= pa and pa + nr * PAGE <= high for low, high in self.ranges):
            raise ValueError(f"pages [{pa:#x}, {pa + nr * PAGE:#x}) are not in the linear map")
        first = start & -dm.PUD_SIZE
        for va in span(first, -(-(end - first) // dm.PUD_SIZE), dm.PUD_SIZE):
            self.fault_in(va)
        ret = self._split_kernel_leaf_mapping(start, end)
        if ret:
            return self._warn_on_once("update_range_prot", ret)
        return self._set_pageattr_masks(start, end, set_mask, clear_mask)

    # The walk over [start, end): a leaf is changed as a whole or not at all.
    def _set_pageattr_masks(self, start: Va, end: Va, set_mask: int, clear_mask: int) -> int:
        for va, entry in self.tables.leaves(start, end):
            size = dm.level_size(entry.level)
            if (self.release == "6.12" and entry.level < 3) or va % size or va + size > end:
                return self._warn_on_once("pageattr_entry", -EINVAL)
            self.tables.store(entry, entry.value & ~clear_mask | set_mask)
        return 0

    def _warn_on_once(self, where: str, ret: int) -> int:
        line = f"WARNING: arch/arm64/mm/pageattr.c: {where}()"
        if not any(said.startswith(line) for said in self.warnings):
            self.warnings.append(f"{line} = {ret}")
        return ret

    # -- splitting ----------------------------------------------------------------------------------------------

    def split_to_pages(self, pa: Pa, nr: int) -> int:
        """Have each of *nr* pages be an entry of its own, valid or not as it was: range_split_to_ptes(); 0 or -ENOMEM."""
        if not self._requires_bbml3:
            return 0
        start = self.va(pa)
        self.fault_in(start)
        try:
            self.tables.split_to_ptes(start, start + nr * PAGE)
        except OutOfMemory:
            return -ENOMEM
        return 0

    def _split_kernel_leaf_mapping(self, start: Va, end: Va) -> int:
        if not self._requires_bbml3:
            return 0
        if not self.capabilities_finalized and (not self.page_alloc_available or self.online_cpus > 1):
            # Boot: no page allocator yet, or secondary CPUs of which no one knows what they tolerate.
            self.warnings.append("WARNING: arch/arm64/mm/mmu.c: split_kernel_leaf_mapping() = -16")
            return -EBUSY
        if self.atomic:
            self.warnings.append(_MIGHT_SLEEP)
        if end - start == PAGE:
            # Both ends are in one contiguous run; splitting at the end that is inside of it isolates the page.
            return self.tables.split_at(start if start & -start < end & -end else end)
        return self.tables.split_at(start) or self.tables.split_at(end)
