"""Hazard: hibernation copies every page there is, mapping those that are not."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import FIRST_FRAME, FIRST_PAGE, span

MM = Host("mm")


def hibernate(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """hibernate(): availability and notifiers, freeze, copy the image, go on as after a resume; or suspend to RAM."""
    if (yield from MM.choose("to", "disk", "RAM")) == "RAM":
        yield from MM.freeze_processes()
        yield from MM.thaw_processes()
        return
    # The veto comes before tasks are frozen, as in hibernate(): in between they run, and may make a file.
    ret = yield from design.hibernate_prepare()
    if ret:
        yield from MM.op_returned("hibernate", FIRST_PAGE, design.scene.pages, ret)
        return
    yield from MM.freeze_processes()
    for pfn in span(FIRST_FRAME, design.scene.frames):
        yield from MM.image_copy(pfn)
    yield from MM.thaw_processes()
    yield from design.hibernate_post()


POWER = Party("power", "the power manager: hibernation, image copy, resume; suspend to RAM", hibernate, task=False, fd=False)
