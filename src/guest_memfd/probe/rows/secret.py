"""What only memfd_secret(2) has: its flags, its one ftruncate(2), its account in RLIMIT_MEMLOCK."""

from __future__ import annotations

import fcntl
import os
import resource

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import KEEP_SIZE, MAP_SHARED, PUNCH, RW, attempt, call, load
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import SECRET, SIZE, Here
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.probe.rows.create import control, sent_over_a_socket

LARGEST = (1 << 63) - 1


def opens(here: Here, flags: int) -> str:
    """memfd_secret(2), and the descriptor's flags."""
    fd = call("memfd_secret", flags)
    return "close on exec" if fcntl.fcntl(fd, fcntl.F_GETFD) else "inherited"


def no_descriptor_left(here: Here) -> None:
    """memfd_secret(2) with every descriptor that RLIMIT_NOFILE allows in use."""
    fd, _ = os.pipe()
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, fd + 1))
    call("memfd_secret", 0)


def truncates(here: Here, *sizes: int) -> str:
    """ftruncate(2) of a new file to one size after the other; the size it has then."""
    fd = here.secret(0)
    for size in sizes:
        call("ftruncate", fd, size)
    return f"{os.fstat(fd).st_size:#x}"


def maps_empty(here: Here, touch: bool) -> str:
    """Map a file of size 0."""
    address = here.map(here.secret(0))
    if touch:
        load(address)
    return "mapped"


def fallocates(here: Here, mode: int) -> None:
    """fallocate(2) of one page of a memfd_secret, with *mode*."""
    call("fallocate", here.secret(), mode, 0, PAGE)


def under_limit(here: Here, limit: int, *pages: int) -> str:
    """Map so many pages each, without privileges, under a limit of *limit* pages."""
    # CAP_IPC_LOCK goes past the limit, so privileges go first.
    here.descend()
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit * PAGE, limit * PAGE))
    except ValueError as error:
        raise Unfit(f"RLIMIT_MEMLOCK is below {limit} pages: {error}") from error
    fd = here.secret(16 * PAGE)
    for nr in pages:
        call("mmap", 0, nr * PAGE, RW, MAP_SHARED, fd, 0)
    return "mapped"


def touched_under(here: Here, limit: int) -> str:
    """Map 8 pages without privileges, under a limit of *limit* pages, and have the kernel read one after the other."""
    under_limit(here, limit)
    address = call("mmap", 0, 8 * PAGE, RW, MAP_SHARED, here.secret(8 * PAGE), 0)
    return f"{readable_pages(address, 8)} pages"


def readable_pages(address: int, pages: int) -> int:
    """How many of *pages* from *address* on the kernel can read, one after the other: a fault that fails is EFAULT there."""
    _, end = os.pipe()

    def faults(at: int) -> bool:
        return attempt(lambda: call("write", end, address + at * PAGE, 1)) == "EFAULT"

    return next((at for at in range(pages) if faults(at)), pages)


def privileged(here: Here) -> str:
    """Map with CAP_IPC_LOCK and a limit of 0."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    call("mmap", 0, SIZE, RW, MAP_SHARED, here.secret(), 0)
    return "mapped"


_BITS = (1, 2, 4, 8, 0x10, 0x800, 0x4000, 1 << 31)

SECRET_ROWS = among(("secretmem",), [
    Row("secret.flags-0", "memfd_secret(2) without flags is inherited by exec", opens, (0,), "inherited"),
    Row("secret.flags-cloexec", "memfd_secret(2) with O_CLOEXEC is not", opens, (os.O_CLOEXEC,), "close on exec"),
    *(Row(f"secret.flag-{bit:#x}", f"flag {bit:#x} is refused", opens, (bit,), "EINVAL") for bit in _BITS),
    Row("secret.emfile", "without a free descriptor no file is made", no_descriptor_left, (), "EMFILE"),
    Row("secret.get-seals", "a memfd_secret has no seals", control, (SECRET, fcntl.F_GET_SEALS, 0), "EINVAL"),
    Row("secret.add-seals", "a memfd_secret takes no seals", control, (SECRET, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW),
        "EINVAL"),
    Row("secret.scm-rights", "a memfd_secret that arrives over a socket maps the same memory", sent_over_a_socket, (SECRET,),
        "sent"),
    *(Row(f"secret.size-{name}", f"ftruncate(2): {words}", truncates, sizes, expect) for name, words, sizes, expect in (
        ("none", "a new memfd_secret has size 0", (), "0x0"),
        ("0-again", "from 0 to 0, as often as one likes", (0, 0, 0), "0x0"),
        ("set", "from 0 to a size", (SIZE,), hex(SIZE)),
        ("unaligned", "the size need not be a multiple of a page", (1,), "0x1"),
        ("largest", "the size may be the largest there is", (LARGEST,), hex(LARGEST)),
        ("after-0", "from 0 to 0 and then to a size", (0, SIZE), hex(SIZE)),
        ("twice", "a size is set once, the same size included", (SIZE, SIZE), "EINVAL"),
        ("grow", "it does not grow", (PAGE, SIZE), "EINVAL"),
        ("shrink", "it does not shrink", (SIZE, 0), "EINVAL"))),
    Row("secret.mmap-empty", "a memfd_secret of size 0 can be mapped", maps_empty, (False,), "mapped"),
    Row("secret.load-empty", "and a load of it is SIGBUS", maps_empty, (True,), "SIGBUS BUS_ADRERR at offset 0x0"),
    *(Row(f"secret.fallocate-{name}", f"fallocate(2) {name} of a memfd_secret is not supported", fallocates, (mode,),
          "EOPNOTSUPP")
      for name, mode in (("keep-size", KEEP_SIZE), ("punch", PUNCH), ("zero", 0x10))),
    *(Row(f"secret.memlock-{limit}-{'-'.join(map(str, pages))}", f"every mapping counts with its length: a limit of {limit} "
          f"pages, mappings of {' and '.join(map(str, pages))}", under_limit, (limit, *pages), expect)
      for limit, pages, expect in ((4, (4,), "mapped"), (4, (2, 2), "mapped"))),
    *(Row(f"secret.memlock-{limit}-{'-'.join(map(str, pages))}", f"a limit of {limit} pages, mappings of "
          f"{' and '.join(map(str, pages))}: too many, unless pages count when they are touched", under_limit,
          (limit, *pages), "EAGAIN", rules=(("secret counted per user", "mapped"),))
      for limit, pages in ((4, (5,)), (4, (2, 3)), (0, (1,)))),
    *(Row(f"secret.touch-{limit}", f"of 8 pages of a memfd_secret, those that can be touched under a limit of {limit}",
          touched_under, (limit,), "EAGAIN", rules=(("secret counted per user", f"{limit} pages"),))
      for limit in (0, 4)),
    Row("secret.memlock-privileged", "CAP_IPC_LOCK is above the limit", privileged, (), "mapped", ("ipc-lock",)),
])
