"""Hazard: hardware takes a page away in the middle of anything."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import Host, Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.scenarios.party import Party

MM = Host("mm")


def memory_failure(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """memory_failure() on a page of the file: error_remove_folio is called with the folio locked."""
    index = yield from MM.choose("page", 0, 1)
    folio = yield from MM.hwpoison(index)
    if folio is not None:
        locked = yield from MM.lock_folio(folio)
        yield from design.error_folio(folio, locked)
        yield from MM.unlock_folio(folio)
        yield from MM.folio_put(folio)


MEMORY_FAILURE = Party("memory-failure", "the memory-failure handler", memory_failure, task=False)
