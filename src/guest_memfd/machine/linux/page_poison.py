"""What the page allocator writes to pages on its own. Here is the order of poisoning, initialising and unmapping around
free and alloc (mm/page_alloc.c free_pages_prepare() and post_alloc_hook(), mm/page_poison.c).

Every access is a plain one through the linear map: the owner that took the page out must have put it back before freeing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from guest_memfd.words.units import PAGE, Pa, span

PAGE_POISON = 0xAA


class PoisonAccess(Protocol):
    """Plain accesses of the kernel to a page of the linear map; an abort that is fatal does not return."""

    def memset_page(self, pa: Pa, byte: int) -> None:
        """Write *byte* to the whole page."""

    def memchr_inv_page(self, pa: Pa, byte: int) -> bytes | None:
        """The page's contents if anything in it is not *byte*, else None."""


class PageChecks:
    """page_poison=, init_on_free=, init_on_alloc= and debug_pagealloc= of the kernel command line.

    Poisoning takes precedence over both init options, as mem_debugging_and_hardening_init() (mm/mm_init.c) has it.
    `log` is what the kernel prints.
    """

    def __init__(
        self, access: PoisonAccess, linear_map: PoisonLinearMap, *, poison: bool = False, init_on_free: bool = False,
        init_on_alloc: bool = False,
    ) -> None:
        self.access, self.linear_map = access, linear_map
        self.log: list[str] = []
        if poison and (init_on_free or init_on_alloc):
            self.log.append("mem auto-init: CONFIG_PAGE_POISONING is on, will take precedence over init_on_alloc and "
                            "init_on_free")
        self.poison = poison
        self.init_on_free = init_on_free and not poison
        self.init_on_alloc = init_on_alloc and not poison

    def on_free(self, pa: Pa, order: int = 0) -> None:
        """free_pages_prepare(): poison, clear, and take out of the linear map, in this order."""
        if self.poison:
            for page in _pages(pa, order):
                self.access.memset_page(page, PAGE_POISON)
        if self.init_on_free:
            for page in _pages(pa, order):
                self.access.memset_page(page, 0)
        # Last: the writes above go through the linear map, and after this line there is nothing to write through.
        if self.linear_map.debug_pagealloc:
            self.linear_map.kernel_map_pages(pa, 1 << order, False)

    def on_alloc(self, pa: Pa, order: int = 0, *, zero: bool = False) -> None:
        """post_alloc_hook(): back into the linear map, check the poison, clear if asked (*zero*: __GFP_ZERO).

        Pages that init_on_free has cleared are not cleared again.
        """
        # First, for the same reason.
        if self.linear_map.debug_pagealloc:
            self.linear_map.kernel_map_pages(pa, 1 << order, True)
        # Before clearing, which would wipe out the traces of a write to a free page.
        if self.poison:
            for page in _pages(pa, order):
                self._check(page)
        if (zero or self.init_on_alloc) and not self.init_on_free:
            for page in _pages(pa, order):
                self.access.memset_page(page, 0)

    # check_poison_mem()
    def _check(self, page: Pa) -> None:
        found = self.access.memchr_inv_page(page, PAGE_POISON)
        if found is None:
            return
        wrong = [at for at in range(PAGE) if found[at] != PAGE_POISON]
        error = found[wrong[0]] ^ PAGE_POISON
        single = len(wrong) == 1 and not error & (error - 1)
        self.log.append(f"pagealloc: {'single bit error' if single else 'memory corruption'} "
                        f"at {page + wrong[0]:#x}-{page + wrong[-1]:#x}")


class PoisonLinearMap(Protocol):
    """The linear map as debug_pagealloc needs it."""

    debug_pagealloc: bool

    def kernel_map_pages(self, pa: Pa, nr: int, enable: bool) -> None:
        """__kernel_map_pages(): make *nr* pages from *pa* on present in the linear map, or not present."""


def _pages(pa: Pa, order: int) -> Sequence[Pa]:
    return span(pa, 1 << order, PAGE)
