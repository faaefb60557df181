"""Where the linear map of arm64 Linux is, and what it is made of at boot. Which leaves are used depends on the release
and on kernel parameters (force_pte_mapping(), can_set_direct_map(), map_mem() in arch/arm64/mm/mmu.c, pageattr.c).

One liberty is taken: a linear map of 4 KiB pages is built gigabyte by gigabyte when first needed beyond `eager` bytes,
with the descriptors that boot would have written. Counters report it as if all of it were there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.machine.linux.kernel_flush import KernelFlush
from guest_memfd.machine.linux.leaf_split import COUNTERS, SplitTable
from guest_memfd.words.units import Pa, Va

RELEASES = ("6.12", "7.3")
RODATA = ("full", "on", "off", "noalias")
PAGE_OFFSET = Va(0xFFFF_0000_0000_0000)
PAGE_END = Va(0xFFFF_8000_0000_0000)


class LinearLayout:
    """The linear map of *ram* as boot leaves it, and with it the root of the kernel's page table (TTBR1_EL1).

    release         "7.3" or "6.12"
    rodata          the kernel parameter: "full" and "on" are the same, "off", "noalias" (read-only without full)
    bbml3           all CPUs tolerate a live change of leaf size (7.3 only; 6.12 knows nothing of it)
    debug_pagealloc the kernel parameter
    kpti            kernel entries are not global (nG)
    tlb_range       FEAT_TLBIRANGE
    ranges          (start, end) of what is RAM for Linux, physical; all of *ram* by default
    boot            where the tables made at boot come from; *source* by default
    eager           this many bytes of a page-mapped linear map are built at once

    Raises BadInput for an unknown release or rodata, OutOfMemory when there is no room for the tables (a real kernel
    panics at boot). `warnings` collects what the kernel would print.
    """

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], *, release: str = "7.3", rodata: str = "full",
                 bbml3: bool = False, debug_pagealloc: bool = False, kpti: bool = False, tlb_range: bool = False,
                 ranges: Iterable[tuple[Pa, Pa]] | None = None, boot: PageSource | None = None,
                 eager: int = 4 << 30, vmid: Callable[[], int] = lambda: 0) -> None:
        if release not in RELEASES:
            raise BadInput(f"release {release!r}: the rules of {' and '.join(RELEASES)} are known")
        if rodata not in RODATA:
            raise BadInput(f"rodata={rodata}: the kernel takes {', '.join(RODATA)}")
        self.ram, self.source = ram, source
        self.memstart = ram.base & -dm.PUD_SIZE
        self.release, self.rodata, self.debug_pagealloc = release, rodata, debug_pagealloc
        self.bbml3 = bbml3 and release != "6.12"
        self.kpti = kpti
        self.page_alloc_available = self.capabilities_finalized = True
        self.online_cpus = len(tlbs)
        self.warnings: list[str] = []
        self.flush_tlb_kernel_range = KernelFlush(tlbs, release, tlb_range=tlb_range, vmid=vmid)
        """All CPUs forget [start, end), virtual: see kernel_flush.py."""
        self.ranges = sorted(ranges or [(ram.base, ram.end)])
        # Gigabytes of the linear map that no one has needed yet, and the table pages they will take.
        self._unbuilt: dict[Va, list[tuple[Pa, Pa]]] = {}
        self._owed = 0
        self._flags = dm.NO_BLOCK | dm.NO_CONT if self.force_pte_mapping() else 0
        # linear_map_requires_bbml2 of 7.3: there are blocks to be split, and only BBML3 allows it.
        self._requires_bbml3 = self.bbml3 and not self._flags and self.can_set_direct_map()
        self._boot = boot or source
        self.tables = SplitTable(ram, self._boot, any_size=self.bbml3)
        self._prot = dm.PAGE_KERNEL_TAGGED | (dm.NG if kpti else 0)
        self._map_mem(eager)
        self.tables.source = source

    # -- what the kernel decides at boot ------------------------------------------------------------------------

    def can_set_direct_map(self) -> bool:
        """Whether the setters do anything at all: rodata=full, or debug_pagealloc (arch/arm64/mm/pageattr.c)."""
        return self.rodata in ("full", "on") or self.debug_pagealloc

    def force_pte_mapping(self) -> bool:
        """Whether the linear map is made of 4 KiB pages only (arch/arm64/mm/mmu.c)."""
        if self.release == "6.12":
            return self.can_set_direct_map()
        return self.debug_pagealloc or (not self.bbml3 and self.rodata in ("full", "on"))

    def _map_mem(self, eager: int) -> None:
        for start, end in self.ranges:
            while start < end:
                va = self.va(start)
                nxt = min(end, start + (dm.PUD_SIZE - va % dm.PUD_SIZE))
                self.tables.count(va, va + (nxt - start), self._flags)
                if self._flags & dm.NO_BLOCK and start - self.ram.base >= eager:
                    self._unbuilt.setdefault(va & -dm.PUD_SIZE, []).append((start, nxt))
                else:
                    self.tables.map(va, va + (nxt - start), start, self._prot, self._flags)
                start = nxt
        self._owed = self._tables_owed()

    def _tables_owed(self) -> int:
        puds = {va & -dm.PGDIR_SIZE for va in self._unbuilt if not self.tables.lookup(va).level}
        ptes = 0
        for spans in self._unbuilt.values():
            ptes += len({pmd for start, end in spans for pmd in range(self.va(start) >> 21, (self.va(end) - 1 >> 21) + 1)})
        return len(puds) + len(self._unbuilt) + ptes

    def finalize_capabilities(self, *, bbml3: bool) -> None:
        """All CPUs are up. Unless each has BBML3, what was built on it is split to pages while no one looks.

        linear_map_split_to_ptes() of 7.3; OutOfMemory: the kernel panics ("Failed to split linear map").
        """
        self.capabilities_finalized = True
        if not self._requires_bbml3 or bbml3:
            return
        for start, end in self.ranges:
            self.tables.split_to_ptes(self.va(start), self.va(end))
            self.flush_tlb_kernel_range(self.va(start), self.va(end))
        self.bbml3 = self._requires_bbml3 = self.tables.any_size = False

    def built(self, va: Va) -> bool:
        """Whether the tables of the gigabyte around *va* are there."""
        return va & -dm.PUD_SIZE not in self._unbuilt

    def fault_in(self, va: Va) -> bool:
        """Build the gigabyte around *va* if it has not been needed yet: True, and the access is to be repeated.

        Code that walks the tables in hardware's place asks this before a translation fault of the linear map is taken.
        """
        spans = self._unbuilt.get(va & -dm.PUD_SIZE)
        if spans is None:
            return False
        before, self.tables.source = self.tables.pages, self._boot
        for start, end in spans:
            self.tables.map(self.va(start), self.va(end), start, self._prot, self._flags)
        self.tables.source = self.source
        del self._unbuilt[va & -dm.PUD_SIZE]
        self._owed -= self.tables.pages - before
        return True

    def map_text(self, va: Va, pa: Pa, size: int) -> None:
        """Map kernel text outside of the linear map: 4 KiB pages, read-only, executable at EL1; raises OutOfMemory."""
        prot = dm.PAGE_KERNEL_ROX | (dm.NG if self.kpti else 0)
        self.tables.map(va, va + size, pa, prot, dm.NO_BLOCK | dm.NO_CONT | dm.ROX)

    # -- queries ------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Pa:
        """Physical address of swapper_pg_dir."""
        return self.tables.root

    def va(self, pa: Pa) -> Va:
        """Where the linear map has physical address *pa*: phys_to_virt()."""
        return PAGE_OFFSET + (pa - self.memstart)

    def pa(self, va: Va) -> Pa:
        """virt_to_phys() of a linear-map address."""
        return self.memstart + (va - PAGE_OFFSET)

    def covers(self, va: Va) -> bool:
        """Whether *va* is an address of the linear map, mapped or not."""
        return PAGE_OFFSET <= va < PAGE_END

    def leaf(self, pa: Pa) -> Entry:
        """The entry that decides the linear-map address of *pa*."""
        va = self.va(pa)
        self.fault_in(va)
        return self.tables.lookup(va)

    def path(self, va: Va) -> list[Entry]:
        """Every entry from the root down to what decides *va*, as show_pte() prints them."""
        self.fault_in(va)
        return list(self.tables.path(va))

    def kernel_page_present(self, pa: Pa) -> bool:
        """Whether the linear map has the page. 6.12 takes every block for present (arch/arm64/mm/pageattr.c)."""
        entry = self.leaf(pa)
        if self.release == "6.12" and entry.level < 3 and entry.value & dm.VALID:
            return True
        return bool(entry.value & dm.VALID)

    @property
    def table_pages(self) -> int:
        """Pages that tables take, those not built yet included."""
        return self.tables.pages + self._owed

    def meminfo(self) -> dict[str, int]:
        """Bytes of the linear map by leaf size, named as in /proc/meminfo; holes count with the leaf they are in."""
        return {name: self.tables.mapped[size] for size, name in COUNTERS.items()}

    @property
    def splits(self) -> dict[str, int]:
        """How many leaves of a size were split since boot, named as meminfo() names them."""
        return {COUNTERS[size]: nr for size, nr in self.tables.splits.items()}

    @property
    def flushes(self) -> dict[str, int]:
        """TLBI operations by kind."""
        return self.flush_tlb_kernel_range.counts
