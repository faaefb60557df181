"""`prealloc`: a VMM thread that preallocates guest memory, fallocate(FALLOC_FL_KEEP_SIZE)."""

from __future__ import annotations

from guest_memfd import Design, Host, Hypervisor, Party, Steps

USER = Host("user")


def preallocate(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Have some pages, or all; what came of it is the VMM's to know."""
    start, nr = yield from USER.choose("range", (0, 1), (1, 1), (0, 2))
    yield from design.allocate(start, nr)


PREALLOC = Party("prealloc", "a VMM thread that preallocates guest memory", preallocate)
