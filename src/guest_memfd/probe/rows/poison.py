"""Rows about broken memory: MADV_HWPOISON takes a page out of use for good, so only an expendable machine is asked."""

from __future__ import annotations

import ctypes
import os

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import ADVICE, attempt, call, load, store
from guest_memfd.probe.ask.guest import ProbeGuest
from guest_memfd.probe.ask.here import SIZE, Here, bind, punch, resident
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.probe.rows.slots import GMEM, GPA


def poisoned(here: Here) -> tuple[int, int]:
    """A shared file whose first page is broken, all pages having been written, and the address of a mapping made since."""
    fd = here.gmem()
    # In a child, and before our own mapping: memory_failure() kills whoever has the page mapped.
    breaks(here, fd)
    return fd, here.map(fd)


def breaks(here: Here, fd: int) -> None:
    """Write all pages, and break the first, in a child: whoever has the page mapped then is killed."""
    def act() -> None:
        address = here.map(fd)
        store(address, b"x" * SIZE)
        call("madvise", address, PAGE, ADVICE["HWPOISON"])

    here.fork(act)


def advised(here: Here, name: str) -> str:
    """What the advice itself comes to."""
    address = here.map(here.gmem())
    store(address, b"x" * SIZE)
    return attempt(lambda: call("madvise", address, PAGE, ADVICE[name]) or None)


def loads(here: Here, page: int) -> str:
    """A load of a page by the CPU."""
    _, address = poisoned(here)
    return load(address + page * PAGE).decode()


def gathered(here: Here) -> str:
    """process_vm_writev(2) from a broken page."""
    _, address = poisoned(here)
    return attempt(lambda: call("process_vm_writev", os.getpid(), (ctypes.c_uint64 * 2)(address, 8), 1,
                                (ctypes.c_uint64 * 2)(here.memory(), 8), 1, 0))


def copies(here: Here) -> str:
    """write(2) from it: the kernel's copy."""
    _, address = poisoned(here)
    return attempt(lambda: call("write", os.pipe()[1], address, 8))


def populates(here: Here) -> str:
    """MADV_POPULATE_READ over a broken page."""
    _, address = poisoned(here)
    return attempt(lambda: call("madvise", address, SIZE, ADVICE["POPULATE_READ"]) or None)


def counted(here: Here) -> str:
    """How many pages the file has."""
    fd, _ = poisoned(here)
    return f"{resident(fd)} pages"


def replaced(here: Here) -> str:
    """Punched, and loaded again."""
    fd, address = poisoned(here)
    punch(fd, 0, PAGE)
    return f"{resident(fd)} pages, {'zero' if load(address) == bytes(1) else 'data'}, {resident(fd)} pages"


def met_by_guest(here: Here, again: bool) -> str:
    """A guest's load of it; *again*: after the page was punched."""
    visitor = ProbeGuest(here)
    fd = here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    before = visitor.store(GPA, b"x")
    breaks(here, fd)
    if again:
        punch(fd, 0, PAGE)
    return f"{before}, {visitor.load(GPA)}"


_KILLED = "SIGBUS BUS_MCEERR_AR at offset 0x0"

# Taken on 6.18.15, 7.2.12 and 7.3.4, which do the same.
ROWS = among(("gmem", "flag 1", "flag 2", "memory failure", "root"), [
    Row("poison.advice", "MADV_HWPOISON of a page of a shared file kills who has it mapped, the caller among them", advised,
        ("HWPOISON",), _KILLED),
    Row("poison.soft-offline", "MADV_SOFT_OFFLINE is refused: a page of a guest_memfd does not move", advised,
        ("SOFT_OFFLINE",), "EBUSY"),
    Row("poison.load", "a load of a broken page is a signal, also through a mapping made since", loads, (0,), _KILLED),
    Row("poison.neighbour", "the page beside it is as it was", loads, (1,), "x"),
    Row("poison.copy", "the kernel's copy from a broken page fails", copies, (), "EFAULT"),
    Row("poison.process-vm", "process_vm_writev(2) from a broken page fails", gathered, (), "EFAULT"),
    Row("poison.populate", "MADV_POPULATE_READ over a broken page says what it is", populates, (), "EHWPOISON"),
    Row("poison.resident", "a broken page stays in the file", counted, (), "4 pages", ("cachestat",)),
    Row("poison.punch", "a punch takes a broken page out of the file, and the next is new", replaced, (),
        "3 pages, zero, 4 pages", ("cachestat",)),
    Row("poison.guest", "a guest's load of a broken page ends KVM_RUN with EHWPOISON and a memory fault", met_by_guest,
        (False,), "ok, EHWPOISON, memory fault flags 0 gpa 0x10000000 size 0x1000", ("slots", "guest")),
    Row("poison.guest-punched", "once a broken page is punched the guest has a new one", met_by_guest, (True,), "ok, zero",
        ("slots", "guest")),
])
