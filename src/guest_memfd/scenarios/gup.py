"""get_user_pages(): how a device or the kernel gets hold of a page that user space has mapped (mm/gup.c).

GUP-fast holds no lock, so it looks twice; GUP-slow lets the fault handler map the page first.
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT

from guest_memfd.designs.design import Design
from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.units import Index

MM = Host("mm")
ATTEMPTS = 3
"""Faults that GUP-slow takes for one page before it gives up; the kernel goes on until a signal is pending."""


def gup_fast(design: Design, index: Index, foll_pin: bool) -> Steps[Folio | None]:
    """gup_fast(): read the entry, take a reference blindly, look again; None: fall back to the slow path."""
    if not design.gup:
        return None
    folio = yield from MM.gup_read_pte(index)
    if folio is None:
        return None
    if not (yield from MM.gup_try_get(folio)):
        return None
    kept = yield from MM.gup_recheck(index, folio, foll_pin)
    return folio if kept else None


def pin_user_page(design: Design, index: Index, foll_pin: bool = True) -> Steps[Folio | int]:
    """pin_user_pages() of page *index*, or get_user_pages() without *foll_pin*: the folio, -EFAULT or -EAGAIN.

    The fast path first; then faultin_page() and another look, as __get_user_pages() has it. A VMA of secretmem is
    refused by check_vma_flags().
    """
    folio = yield from gup_fast(design, index, foll_pin)
    for _attempt in range(ATTEMPTS):
        if folio is not None:
            return folio
        if not design.gup:
            return -EFAULT
        if (yield from design.user_fault(index)) == "SIGBUS":
            return -EFAULT
        folio = yield from gup_fast(design, index, foll_pin)
    return -EAGAIN if folio is None else folio
