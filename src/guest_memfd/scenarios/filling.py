"""Hazard: a file is filled from user space beside its faults, and the kernel keeps a page by its number, without GUP.

Each party is there where the design has what it does (designs/filled.py).
"""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.designs.filled import Copied, PfnCached, Populated, Written
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import map_pages, user_touch
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import FIRST_PAGE, Index, span

USER, MM = Host("user"), Host("mm")


def _page(design: Design) -> Steps[Index]:
    return (yield from USER.choose("page", *span(FIRST_PAGE, design.scene.pages)))


def writer(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """write(2) of a page, and perhaps of the same page again."""
    index = yield from _page(design)
    for again in ("stop", "write"):
        if isinstance(design, Written):
            ret = yield from design.write(index)
            yield from USER.op_returned("write", index, 1, ret)
        if again == "stop" and (yield from USER.choose("then", "stop", "write")) == "stop":
            return


def launcher(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Put what the guest begins with into a private page."""
    index = yield from _page(design)
    if isinstance(design, Populated):
        ret = yield from design.populate(index)
        yield from USER.op_returned("populate", index, 1, ret)


def uffd(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Map the file, have a handler bring a page in, touch it, unmap."""
    if (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        return
    index = yield from _page(design)
    if isinstance(design, Copied):
        ret = yield from design.copy(index)
        yield from USER.op_returned("copy", index, 1, ret)
    yield from user_touch(design, index)
    yield from design.munmap()


def pfn_cache_v2(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Refresh the cache by asking the file, map the page for the kernel alone, use it under the lock, drop it."""
    last = FIRST_PAGE + design.scene.pages - 1
    if not isinstance(design, PfnCached) or not (yield from MM.gpc_begin(last)):
        return
    folio = yield from design.cached_pfn(last)
    if not isinstance(folio, int) and (yield from MM.gpc_commit(folio)):
        if (yield from MM.gpc_read_lock()):
            yield from MM.gpc_access_vmap(True)
            yield from MM.gpc_read_unlock()
        yield from MM.gpc_drop()


WRITER = Party("writer", "a thread of the VMM that fills the file by write(2)", writer,
               exists=lambda design, hypervisor: isinstance(design, Written))
LAUNCHER = Party("launcher", "a VMM that puts a guest's first contents in place (populate)", launcher,
                 exists=lambda design, hypervisor: isinstance(design, Populated))
UFFD = Party("uffd", "a userfaultfd handler that brings pages in (UFFDIO_COPY)", uffd,
             exists=lambda design, hypervisor: isinstance(design, Copied))
PFN_CACHE_V2 = Party("pfn-cache-v2", "a user of a kernel mapping of a guest page that it has from the file, without GUP",
                     pfn_cache_v2, role="pfn-cache", fd=False,
                     exists=lambda design, hypervisor: hypervisor.pfn_cache and isinstance(design, PfnCached))
