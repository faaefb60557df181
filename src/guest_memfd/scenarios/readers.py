"""Hazard: the kernel reads memory it was never given: a word load that runs over a page's end, a scan of all RAM."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import Host, Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.scenarios.party import Party

MM = Host("mm")
FRAMES = (0, 1, 2)
"""The frames guest memory can be in; a reader of all RAM comes across them all."""


def zeropad(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """One load_unaligned_zeropad() from the end of the page before; dentry names do this all day."""
    pfn = yield from MM.choose("next to", *FRAMES)
    yield from MM.load_unaligned_zeropad(pfn)


def kcore(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """A reader of /proc/kcore, page after page."""
    for pfn in FRAMES:
        yield from MM.copy_from_kernel_nofault(pfn)


ZEROPAD = Party("zeropad", "a zero-padding load from the page before", zeropad, task=False)
KCORE = Party("kcore", "a scan of physical memory through /proc/kcore", kcore, task=False)
