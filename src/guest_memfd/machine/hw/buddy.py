"""The page allocator: a binary buddy of power-of-two blocks up to 1 GiB. The lowest address is given first.

What is free is a set of blocks per order; blocks split on the way down and merge with their buddy on the way up, as in
mm/page_alloc.c. Contents are no one's business here: a block is handed out as its last owner left it.
"""

from __future__ import annotations

from heapq import heappop, heappush

from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Pa

MAX_ORDER = 18
"""Largest block: 4 KiB << 18 = 1 GiB (Linux's own allocator ends at order 10, and takes 1 GiB from CMA)."""


class OutOfMemory(Exception):  # noqa: N818 - named after what it is
    """No free block of this order, or an injected failure."""


class Buddy:
    """The allocator of [start, start+size), physical addresses; all of it free at first.

    *by_address*: the lowest address that will do is given, even where a smaller block is free.
    """

    def __init__(self, ram: Ram, start: Pa, size: int, *, by_address: bool = False) -> None:
        self.ram, self.start, self.size, self.by_address = ram, start, size, by_address
        self.free_pages = 0
        self._free: list[dict[Pa, None]] = [{} for _ in range(MAX_ORDER + 1)]
        # Addresses that may be free, lowest first; those that are not any more are skipped when met.
        self._heaps: list[list[Pa]] = [[] for _ in range(MAX_ORDER + 1)]
        self._fail_in: int | None = None
        self.allocations = 0
        self.tables = 0                                 # pages given for translation tables, ever
        self._release(start, size)

    # Largest aligned blocks first, so that a range which is no power of two comes apart as Linux's memblocks do.
    def _release(self, start: Pa, size: int) -> None:
        while size >= PAGE:
            order = min(MAX_ORDER, (size // PAGE).bit_length() - 1)
            while start % (PAGE << order):
                order -= 1
            self.free(start, order)
            start, size = start + (PAGE << order), size - (PAGE << order)

    def fail_at(self, n: int | None) -> None:
        """Let the *n*-th allocation from now on (0: the next) fail once; None: none."""
        self._fail_in = n

    @property
    def pending(self) -> bool:
        """Whether an allocation is still to fail."""
        return self._fail_in is not None

    def _injected(self) -> bool:
        self.allocations += 1
        if self._fail_in is None:
            return False
        self._fail_in -= 1
        if self._fail_in >= 0:
            return False
        self._fail_in = None
        return True

    def alloc(self, order: int = 0) -> Pa:
        """Physical address of a block of 4 KiB << *order* bytes, lowest first; raises OutOfMemory."""
        if self._injected():
            raise OutOfMemory(f"injected failure of an order-{order} allocation")
        fitting = [o for o in range(order, MAX_ORDER + 1) if self._free[o]]
        if self.by_address:
            fitting.sort(key=lambda o: min(self._free[o]))
        at = next(iter(fitting), None)
        if at is None:
            raise OutOfMemory(f"no free block of order {order}: {self.free_pages} pages are free")
        pa = self._lowest(at)
        while at > order:
            at -= 1
            self._put(pa + (PAGE << at), at)
        self.free_pages -= 1 << order
        return pa

    def _lowest(self, order: int) -> Pa:
        heap, free = self._heaps[order], self._free[order]
        while True:
            pa = heappop(heap)
            if pa in free:
                del free[pa]
                return pa

    def _put(self, pa: Pa, order: int) -> None:
        self._free[order][pa] = None
        heappush(self._heaps[order], pa)

    def free(self, pa: Pa, order: int = 0) -> None:
        """Give a block back; it merges with its buddy for as long as that is free."""
        if not self.start <= pa < self.start + self.size or pa % (PAGE << order):
            raise ValueError(f"{pa:#x} is no block of order {order} of this allocator")
        self.free_pages += 1 << order
        while order < MAX_ORDER:
            buddy = Pa(pa ^ (PAGE << order))
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            pa, order = min(pa, buddy), order + 1
        self._put(pa, order)

    def is_free(self, pa: Pa) -> bool:
        """Whether the page at *pa* is in a free block."""
        return any(pa & -(PAGE << order) in free for order, free in enumerate(self._free))

    def first_free(self, start: Pa, size: int) -> Pa | None:
        """The lowest free page in [start, start+size), which are whole pages; None when there is none."""
        found = []
        for order, free in enumerate(self._free):
            block = PAGE << order
            first, last = start & -block, start + size - 1 & -block
            if (last - first) // block < len(free):
                lowest = next((Pa(pa) for pa in range(first, last + block, block) if pa in free), None)
            else:
                lowest = min((pa for pa in free if first <= pa <= last), default=None)
            if lowest is not None:
                found.append(max(lowest, start))
        return min(found, default=None)

    def alloc_table(self) -> Pa:
        """One zeroed page for a translation table; raises OutOfMemory."""
        pa = self.alloc()
        self.ram.zero(pa, PAGE)
        self.tables += 1
        return pa

    def free_table(self, pa: Pa) -> None:
        """Give a table page back."""
        self.free(pa)
