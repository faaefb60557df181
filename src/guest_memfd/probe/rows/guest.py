"""What a guest sees of a slot with a guest_memfd, and what the host does (a guest at CPL 3, x86-64)."""

from __future__ import annotations

import os

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import ADVICE, KEEP_SIZE, call, load, store
from guest_memfd.probe.ask.guest import ProbeGuest
from guest_memfd.probe.ask.here import SIZE, Here, bind, punch, resident
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.probe.rows.slots import GMEM, GPA
from guest_memfd.uapi.kvm import SHARED


def _text(address: int) -> str:
    """The eight bytes at *address* as text."""
    data = load(address, 8).rstrip(b"\0")
    return data.decode("ascii", "replace") if data else "zero"


def stores(here: Here) -> str:
    """The guest stores, the host loads, and the other way round."""
    guest, fd = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    address = here.map(fd)
    guest.store(GPA + PAGE, b"guest")
    store(address + 2 * PAGE, b"host")
    return f"{_text(address + PAGE)} {guest.load(GPA + 2 * PAGE)}"


def first_touch(here: Here, flags: int) -> str:
    """What the first load shows, and how many pages there are then."""
    guest, fd = ProbeGuest(here), here.gmem(flags)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    return f"{guest.load(GPA + PAGE)}, {resident(fd)} pages"


def punched(here: Here) -> str:
    """Load, host's load, store and host's load of a page that is punched while the guest has it."""
    guest, fd = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    address = here.map(fd)
    guest.store(GPA, b"before")
    punch(fd, 0, SIZE)
    seen = guest.load(GPA), _text(address)
    guest.store(GPA, b"after")
    return " ".join((*seen, _text(address)))


def beside_user_memory(here: Here, flags: int) -> str:
    """What the guest loads when userspace_addr is other memory; what its store leaves there; pages of the file."""
    guest, fd, memory = ProbeGuest(here), here.gmem(flags), here.memory()
    store(memory, b"anon")
    bind(here.vm, 1, GMEM, GPA, SIZE, memory, fd)
    seen = guest.load(GPA)
    guest.store(GPA, b"guest")
    return f"{seen}, then {_text(memory)}, {resident(fd)} pages"


def without_user_memory(here: Here, flags: int) -> str:
    """What the guest loads when userspace_addr is 0."""
    guest = ProbeGuest(here)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, here.gmem(flags))
    return guest.load(GPA)


def private_file(here: Here) -> str:
    """A file with MMAP and without INIT_SHARED: the guest's store and load."""
    guest, fd = ProbeGuest(here), here.gmem(1)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    guest.store(GPA, b"private")
    return guest.load(GPA)


def private_file_of_host(here: Here) -> None:
    """The same, and then the host loads."""
    guest, fd = ProbeGuest(here), here.gmem(1)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    guest.store(GPA, b"private")
    load(here.map(fd))


def all_closed(here: Here, touched: bool, mapped: bool) -> str:
    """Close the last descriptor of a bound file; what the guest's next load comes to, twice."""
    guest, fd = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    if mapped:
        store(here.map(fd), b"mapped")
    if touched:
        guest.load(GPA)
    os.close(fd)
    first, second = guest.load(GPA), guest.load(GPA)
    return first if first == second else f"{first}, then {second}"


def replaced(here: Here) -> str:
    """Close a bound file, delete its slot, bind a new one there: what the guest loads."""
    guest, old = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, old)
    guest.store(GPA, b"old")
    os.close(old)
    bind(here.vm, 1, 0, 0, 0)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, here.gmem())
    return guest.load(GPA)


def slot_deleted(here: Here) -> str:
    """Delete the slot under a page that the guest has; bind the file elsewhere: both loads."""
    guest, fd = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    guest.store(GPA, b"kept")
    bind(here.vm, 1, 0, 0, 0)
    gone = guest.load(GPA)
    # Another slot number, and another address: the bytes are the file's and go wherever it is bound.
    bind(here.vm, 2, GMEM, 2 * GPA, SIZE, 0, fd)
    return f"{gone}, then {guest.load(2 * GPA)}"


def past_slot(here: Here) -> str:
    """Load past the end of the slot."""
    guest = ProbeGuest(here)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, here.gmem())
    return guest.load(GPA + SIZE)


def host_lets_go(here: Here, how: str) -> str:
    """The host does something to its own mapping; what the guest then loads."""
    guest, fd = ProbeGuest(here), here.gmem()
    address = here.map(fd)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0 if how == "munmap" else address, fd)
    guest.store(GPA, b"kept")
    if how == "munmap":
        call("munmap", address, SIZE)
    elif how == "mprotect":
        call("mprotect", address, SIZE, 0)
    else:
        call("madvise", address, SIZE, ADVICE[how])
    return guest.load(GPA)


def plain_slot(here: Here, what: str) -> str:
    """A plain slot whose userspace_addr is a mapping of a guest_memfd, or nothing."""
    guest = ProbeGuest(here)
    if what == "unmapped":
        address = here.hole()
    elif what == "past-eof":
        address = here.map(here.gmem(), offset=SIZE)
    elif what == "secret":
        address = here.map(here.secret())
    else:
        address = here.map(here.gmem(1 if what == "private" else SHARED))
    if what in ("shared", "secret"):
        store(address, b"host")
    bind(here.vm, 1, 0, GPA, SIZE, address)
    return guest.load(GPA)


def emulated_secret(here: Here) -> str:
    """A plain slot whose userspace_addr is a memfd_secret: a load at CPL 0."""
    guest, address = ProbeGuest(here), here.map(here.secret())
    store(address, b"host")
    bind(here.vm, 1, 0, GPA, SIZE, address)
    return guest.at_cpl_0(GPA)


def plain_slot_punched(here: Here) -> str:
    """The same with a shared file that is punched after the guest's store."""
    guest, fd = ProbeGuest(here), here.gmem()
    bind(here.vm, 1, 0, GPA, SIZE, here.map(fd))
    guest.store(GPA, b"before")
    punch(fd, 0, SIZE)
    return guest.load(GPA)


def allocated_before(here: Here) -> str:
    """Allocate, then let the guest load: what it sees."""
    guest, fd = ProbeGuest(here), here.gmem()
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
    return guest.load(GPA + PAGE)


# Flags 0: the access was a shared one. Size and address are a page's: that is all that KVM knows of the fault.
_GONE = f"EFAULT, memory fault flags 0 gpa {GPA:#x} size {PAGE:#x}"
_IN_PLACE = (("in-place", None),)

ROWS = among(("slots", "guest"), [
    *among(("flag 1", "flag 2", "cachestat"), [
        Row("guest.stores", "a store of either side is seen by the other", stores, (), "guest host"),
        Row("guest.first-touch", "the guest's first touch allocates one page, which shows zero", first_touch, (SHARED,),
            "zero, 1 pages"),
        Row("guest.allocated", "a page allocated before shows zero", allocated_before, (), "zero"),
        Row("guest.punched", "a punch under the guest: both sides see zero, and then the guest's next store", punched, (),
            "zero zero after"),
        Row("guest.flags-3.user-memory", "with the flag MMAP the guest has the file, whatever userspace_addr is",
            beside_user_memory, (SHARED,), "zero, then anon, 1 pages"),
        Row("guest.flags-3.no-user-memory", "with the flag MMAP userspace_addr may be 0", without_user_memory, (SHARED,),
            "zero"),
        Row("guest.closed.touched", "the last reference closed: a memory fault on a page that the guest had", all_closed,
            (True, False), _GONE),
        Row("guest.closed.untouched", "the last reference closed: a memory fault on a page that it never had", all_closed,
            (False, False), _GONE),
        Row("guest.closed.mapped", "a mapping is a reference: the guest goes on", all_closed, (True, True), "mapped"),
        Row("guest.replaced", "a new file in place of a closed one shows zero", replaced, (), "zero"),
        Row("guest.slot-deleted", "a slot deleted under the guest is an MMIO exit; the file keeps its bytes", slot_deleted,
            (), "mmio, then kept"),
        Row("guest.past-slot", "past the end of the slot is an MMIO exit", past_slot, (), "mmio"),
        *(Row(f"guest.{how}", f"{how} of the host's mapping does not disturb the guest", host_lets_go, (how,), "kept")
          for how in ("munmap", "mprotect", "DONTNEED")),
        Row("guest.REMOVE", "MADV_REMOVE of the host's mapping takes the guest's page", host_lets_go, ("REMOVE",), "zero"),
        Row("guest.plain-shared", "a mapping of a shared file serves as userspace_addr of a plain slot", plain_slot,
            ("shared",), "host"),
        Row("guest.plain-punched", "and a punch goes through to the guest", plain_slot_punched, (), "zero"),
        Row("guest.plain-past-eof", "a mapping past the end does not", plain_slot, ("past-eof",), "EFAULT, exit 0"),
    ]),
    # No exit says where: KVM_EXIT_MEMORY_FAULT is filled in for slots with a
    # guest_memfd, and not where get_user_pages() fails.
    Row("guest.plain-unmapped", "nor does an address where nothing is", plain_slot, ("unmapped",), "EFAULT, exit 0"),
    Row("guest.plain-private", "nor does a mapping of private pages", plain_slot, ("private",), "EFAULT, exit 0",
        ("flag 1",)),
    Row("guest.flags-1", "a file with MMAP and without INIT_SHARED serves the guest", private_file, (), "private",
        ("flag 1",)),
    Row("guest.flags-1.host", "and the host's load of it is SIGBUS", private_file_of_host, (),
        "SIGBUS BUS_ADRERR at offset 0x0", ("flag 1",)),
    *(Row(f"guest.flags-{flags}.user-memory", f"without the flag MMAP (flags {flags}) a default VM uses userspace_addr, and "
          "the file stays empty", beside_user_memory, (flags,), "anon, then guest, 0 pages",
          ("cachestat", *(("flag 2",) if flags else ())), _IN_PLACE) for flags in (0, 2)),
    Row("guest.flags-0.no-user-memory", "and without userspace_addr the guest faults, with no exit that says so",
        without_user_memory, (0,), "EFAULT, exit 0", (), _IN_PLACE),
])

SECRET_ROWS = among(("slots", "guest", "secretmem"), [
    Row("secret.guest", "KVM takes pages by get_user_pages(), so a guest cannot have a memfd_secret", plain_slot,
        ("secret",), "EFAULT, exit 0"),
    Row("secret.guest-emulated", "an emulator only copies: a guest's kernel that is emulated can read a memfd_secret",
        emulated_secret, (), "host", ("cpl 0 emulated",)),
])
