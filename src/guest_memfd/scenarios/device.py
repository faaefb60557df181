"""Hazard: a reference that outlives the mapping it was taken through (vfio, io_uring, vmsplice, O_DIRECT)."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.gup import gup_fast
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import change, fault_in, map_pages, user_touch
from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.units import FIRST_PAGE, span

MM = Host("mm")


def device(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Map, fault the page in, pin it, unmap - and only then use it and let go."""
    if (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        return
    index = yield from MM.choose("page", *span(FIRST_PAGE, design.scene.pages))
    seen = yield from fault_in(design, index)
    folio: Folio | None = None
    foll_pin = True
    if seen == "ok":
        # Both: folio_maybe_dma_pinned() sees pins only, and vmsplice(2) or a copy of the kernel's takes none.
        foll_pin = yield from MM.choose("FOLL_PIN", True, False)
        folio = yield from gup_fast(design, index, foll_pin)
    yield from design.munmap()
    if folio is not None:
        yield from MM.pin_access(folio, True, foll_pin)
        yield from MM.unpin(folio, foll_pin)


def pinner(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Pin a page of one's own mapping, convert or punch it while it is pinned, use the pin, let go."""
    if (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        return
    index = yield from MM.choose("page", *span(FIRST_PAGE, design.scene.pages))
    if (yield from user_touch(design, index)) == "ok":
        foll_pin = yield from MM.choose("FOLL_PIN", True, False)
        folio = yield from gup_fast(design, index, foll_pin)
        if folio is not None:
            what = yield from MM.choose("then", "to_private", "punch")
            yield from change(design, what, index, 1)
            yield from MM.pin_access(folio, True, foll_pin)
            yield from MM.unpin(folio, foll_pin)
    yield from design.munmap()


PINNER = Party("pinner", "a VMM that converts or punches a page which its own device has pinned", pinner, role="vmm",
               fd=False)
DEVICE = Party("device", "a device (pin, DMA) or a kernel user (get, copy) that keeps a page across munmap", device,
               task=False, fd=False)
