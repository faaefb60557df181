"""Hazard: the VMM maps, touches, converts, punches and closes whenever it likes."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import Host, Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.scenarios.party import Party

USER = Host("user")
RANGES = ((0, 1), (1, 1), (0, 2))


def user_touch(design: Design, index: int) -> Steps[str]:
    """Write page *index* through the mapping; one fault at most."""
    seen = yield from USER.user_access(index, True)
    if seen == "fault":
        seen = yield from design.user_fault(index)
        if seen == "ok":
            seen = yield from USER.user_access(index, True)
    return seen


def vmm(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Two things one after the other: change pages and touch them then, or touch them first and change them mapped."""
    what = yield from USER.choose("VMM", "map", "allocate", "punch", "to_private", "to_shared", "unbind", "close")
    if what == "map":
        index = yield from USER.choose("page", 0, 1)
        yield from mapping(design, index, "munmap", "punch", "to_private")
    elif what == "close":
        if (yield from USER.fd_close()):
            yield from design.close()
    else:
        start, nr = yield from USER.choose("range", *RANGES)
        yield from change(design, what, start, nr)
        if (yield from USER.choose("then", "stop", "map")) == "map":
            yield from mapping(design, start, "munmap")


def mapping(design: Design, index: int, *then: str) -> Steps[None]:
    """mmap, touch page *index*, perhaps convert or punch it under the mapping, munmap."""
    if (yield from design.mmap()):
        return
    seen = yield from user_touch(design, index)
    if seen == "ok":
        what = yield from USER.choose("then", *then)
        if what != "munmap":
            yield from change(design, what, index, 1)
    yield from design.munmap()


def change(design: Design, what: str, start: int, nr: int) -> Steps[None]:
    """One ioctl or fallocate; the result is the VMM's to know."""
    if what == "allocate":
        yield from design.allocate(start, nr)
    elif what == "punch":
        yield from design.punch_hole(start, nr)
    elif what == "to_private":
        yield from design.make_private(start, nr)
    elif what == "to_shared":
        yield from design.make_shared(start, nr)
    else:
        yield from design.unbind(start, nr)


VMM = Party("vmm", "a VMM thread that maps, touches, unmaps, allocates, punches, converts, unbinds, closes", vmm)
