"""Hazard: the VMM maps, touches, converts, punches, binds and closes whenever it likes."""

from __future__ import annotations

from errno import EAGAIN, EBADF, EFAULT, ENOTTY

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party, Procedure
from guest_memfd.words.primitives import Host, Steps, VmFault
from guest_memfd.words.units import FIRST_PAGE, Index, span

USER = Host("user")


def user_touch(design: Design, index: Index) -> Steps[str]:
    """Write page *index* through the mapping; one fault at most."""
    seen = yield from USER.user_access(index, True)
    if seen == "fault":
        seen = yield from fault_in(design, index)
        if seen == "ok":
            seen = yield from USER.user_access(index, True)
    return seen


def fault_in(design: Design, index: Index) -> Steps[VmFault]:
    """A fault of the VMM at page *index*; what is not ``ok`` is what the VMM is told, by SIGBUS or by faulting again."""
    answer = yield from design.user_fault(index)
    if answer != "ok":
        yield from USER.op_returned("user_fault", index, 1, -EFAULT if answer == "SIGBUS" else -EAGAIN)
    return answer


def vmm(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Two things one after the other: change pages and touch them then, or touch them first and change them mapped."""
    what = yield from USER.choose("VMM", "map", "allocate", "punch", "to_private", "to_shared", "unbind", "close")
    if what == "map":
        index = yield from USER.choose("page", *span(FIRST_PAGE, design.scene.pages))
        yield from mapping(design, index, "munmap", "punch", "to_private")
    elif what == "close":
        yield from close(design)
    else:
        start, nr = yield from USER.choose("range", *design.scene.ranges)
        yield from change(design, what, start, nr)
        if (yield from USER.choose("then", "stop", "map")) == "map":
            yield from mapping(design, start, "munmap")


def mapping(design: Design, index: Index, *then: str) -> Steps[None]:
    """mmap, touch page *index*, perhaps convert or punch it under the mapping and touch it again, munmap."""
    if (yield from map_pages(design, index, 1)):
        return
    seen = yield from user_touch(design, index)
    if seen == "ok":
        what = yield from USER.choose("then", *then)
        if what != "munmap":
            yield from change(design, what, index, 1)
            yield from user_touch(design, index)
    yield from design.munmap()


def map_pages(design: Design, start: Index, nr: int) -> Steps[int]:
    """mmap(2) of the file for the sake of [start, start+nr), which a driver that has lent them takes back first."""
    if design.lender is None:
        return (yield from design.mmap())
    if not (yield from USER.fdget()):               # the system call holds the file, whoever closes the descriptor meanwhile
        return -EBADF
    ret = yield from design.lender.mmap(design, start, nr)
    yield from design.close()
    return ret


def close(design: Design) -> Steps[None]:
    """close(2) of the VMM's descriptor; a second time it is not there, and nothing happens."""
    if (yield from USER.fd_close()):
        yield from design.close()


def change(design: Design, what: str, start: Index, nr: int) -> Steps[int]:
    """One ioctl or fallocate: what it returned; -EBADF without a descriptor, which only an unbind does not need."""
    if what != "unbind" and not (yield from USER.fd_open()):
        return -EBADF
    return (yield from _change(design, what, start, nr))


def _change(design: Design, what: str, start: Index, nr: int) -> Steps[int]:
    if design.lender is not None:
        if what == "unbind":
            return (yield from design.lender.unbind(design, start, nr))
        if what in ("to_private", "to_shared"):
            return -ENOTTY                              # such a driver has no conversion for user space
    index, gfn = None, None
    if what == "allocate":
        ret = yield from design.allocate(start, nr)
    elif what == "bind":
        gfn = design.scene.gfn(start)
        ret = yield from design.bind(gfn, start, nr)
    elif what == "punch":
        ret, index = yield from design.punch_hole(start, nr)
    elif what == "to_private":
        ret, index = yield from design.make_private(start, nr)
    elif what == "to_shared":
        ret, index = yield from design.make_shared(start, nr)
    else:
        ret, index = yield from design.unbind(start, nr)
    yield from USER.op_returned(what, start, nr, ret, index, gfn)
    return ret


def mover(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Move a memslot: KVM_SET_USER_MEMORY_REGION deletes it, and sets it anew at a gfn that has none."""
    yield from change(design, "unbind", FIRST_PAGE, 1)
    if (yield from USER.fd_open()):
        ret = yield from design.bind(design.scene.beyond, FIRST_PAGE, 1)
        yield from USER.op_returned("bind", FIRST_PAGE, 1, ret, gfn=design.scene.beyond)


STEPS = 3
"""Operations that a VMM of a longer life does, one after the other."""


def life(*allowed: str) -> Procedure:
    """A VMM that does any three of *allowed*, in any order, the same one again included."""

    def procedure(design: Design, hypervisor: Hypervisor) -> Steps[None]:
        mapped = False
        for _step in range(STEPS):
            what = yield from USER.choose("VMM", "stop", *allowed)
            if what == "stop":
                break
            if what == "close":
                yield from close(design)
            elif what == "map":
                mapped = mapped or not (yield from map_pages(design, FIRST_PAGE, design.scene.pages))
            elif what == "touch":
                # Only what it has mapped itself: a fault holds its VMA, and another thread's munmap() would not wait here.
                if mapped:
                    index = yield from USER.choose("page", *span(FIRST_PAGE, design.scene.pages))
                    yield from user_touch(design, index)
            else:
                start, nr = yield from USER.choose("range", *design.scene.ranges)
                yield from change(design, what, start, nr)
        if mapped:
            yield from design.munmap()

    return procedure


def second_thread(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """One system call of another thread."""
    what = yield from USER.choose("thread", "allocate", "punch", "to_private", "to_shared", "unbind", "bind")
    last = FIRST_PAGE + design.scene.pages - 1
    # Of a binding a part can be taken away while another thread takes the rest.
    start = (yield from USER.choose("first page", FIRST_PAGE, last)) if what == "unbind" and last else FIRST_PAGE
    yield from _change(design, what, start, design.scene.pages - start)


def repeater(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Convert, and again as long as the answer is to try again; private for as long as that takes."""
    while (yield from _change(design, "to_private", FIRST_PAGE, design.scene.pages)) == -EAGAIN:
        pass


def odd_requests(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """A request that is not about pages of the file, or is about none."""
    size = design.scene.pages
    what = yield from USER.choose("odd", "allocate", "punch", "to_private", "to_shared", "unbind", "bind")
    ranges = [(FIRST_PAGE + size, 1), (FIRST_PAGE, size + 1), (FIRST_PAGE + size - 1, 2)]
    if what not in ("allocate", "punch"):              # vfs_fallocate() lets none of these through
        ranges += [(FIRST_PAGE - 1, 1), (FIRST_PAGE, 0), (FIRST_PAGE, -1)]
    start, nr = yield from USER.choose("range", *ranges)
    yield from change(design, what, start, nr)


VMM = Party("vmm", "a VMM thread that maps, touches, unmaps, allocates, punches, converts, unbinds, closes", vmm, role="vmm",
            fd=False)
VMM_LIFE = Party("vmm-life", "a VMM that binds, unbinds, punches and closes, any three one after the other",
                 life("bind", "unbind", "punch", "close"), role="vmm", fd=False)
VMM_PAGES = Party("vmm-pages", "a VMM that allocates, punches and converts, any three one after the other",
                  life("allocate", "punch", "to_private", "to_shared"), role="vmm", fd=False)
VMM_MAPPED = Party("vmm-mapped", "a VMM that maps, touches, punches and converts, any three one after the other",
                   life("map", "touch", "punch", "to_private"), role="vmm", fd=False)
VMM_ANY = Party("vmm-any", "a VMM that does any three of all that a VMM can do, one after the other",
                life("map", "touch", "allocate", "punch", "to_private", "to_shared", "bind", "unbind", "close"), role="vmm",
                fd=False)
VMM_MOVE = Party("vmm-move", "a VMM that moves a memslot to another gfn", mover, role="vmm", fd=False)
VMM_ODD = Party("vmm-odd", "a VMM that asks for what is no page of the file", odd_requests, role="vmm", fd=False)
VMM2 = Party("vmm2", "a second thread of the VMM, in one system call", second_thread)
REPEATER = Party("repeater", "a thread of the VMM that repeats a conversion while the answer is -EAGAIN", repeater,
                 role="vmm2")
