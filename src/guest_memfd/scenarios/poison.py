"""Hazard: hardware takes a page away in the middle of anything."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party
from guest_memfd.words.primitives import Host, MfResult, Steps
from guest_memfd.words.units import FIRST_PAGE, Index, span

MM = Host("mm")


def memory_failure(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """memory_failure() on a page of the file: error_remove_folio is called with the folio locked, and its word is final.

    A page that has left the file meanwhile is no one's to take away (mm/memory-failure.c me_pagecache_clean()).
    """
    index = yield from MM.choose("page", *span(FIRST_PAGE, design.scene.pages))
    folio = yield from MM.hwpoison(index)
    if folio is None:
        return
    # All of the folio that the page is part of is taken away.
    yield from MM.begin_op("error", Index(index & -folio.nr), folio.nr)
    locked = yield from MM.lock_folio(folio)
    result: MfResult = "delayed" if locked.pgoff is None else (yield from design.error_folio(folio, locked))
    yield from MM.memory_failure_done(folio, result)
    yield from MM.unlock_folio(folio)
    yield from MM.folio_put(folio)


MEMORY_FAILURE = Party("memory-failure", "the memory-failure handler", memory_failure, task=False, fd=False)
