"""fallocate(2) of a guest_memfd: which modes there are, which bounds they keep, and what they allocate and free."""

from __future__ import annotations

import signal

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import KEEP_SIZE, PUNCH, PUNCH_HOLE, attempt, call, load, store
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import SIZE, Here, punch, resident
from guest_memfd.probe.ask.row import Row, among

MODES = {"0": 0, "punch-without-keep": PUNCH_HOLE, "no-hide-stale": 4, "collapse": 8, "zero": 0x10, "zero-keep": 0x11,
         "insert": 0x20, "unshare": 0x40, "write-zeroes": 0x80, "unknown": 0x100, "all": 0x1FF}
"""Mode bits that a guest_memfd does not have (include/uapi/linux/falloc.h)."""

BOUNDS = {
    "offset-unaligned": (1, PAGE, "EINVAL"), "len-unaligned": (0, 1, "EINVAL"), "len-0": (0, 0, "EINVAL"),
    "offset-negative": (-PAGE, PAGE, "EINVAL"), "len-negative": (0, -PAGE, "EINVAL"),
    # vfs_fallocate() looks at the sum itself. What is merely past the end is
    # for the file to refuse, and that says EINVAL.
    "overflow": ((1 << 63) - PAGE, PAGE, "EFBIG"), "offset-huge": ((1 << 63) - PAGE, 2 * PAGE, "EFBIG"),
}


def change(here: Here, flags: int, mode: int, offset: int, nr: int) -> str:
    """fallocate(2) of a file of four pages, and how many pages it has afterwards."""
    fd = here.gmem(flags)
    result = attempt(lambda: call("fallocate", fd, mode, offset, nr) or None)
    return f"{result}, {resident(fd)} pages"


def punch_full(here: Here, flags: int, offset: int, nr: int) -> str:
    """Punch a file of four pages that are all allocated, and how many it has afterwards."""
    fd = here.gmem(flags)
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    result = attempt(lambda: punch(fd, offset, nr))
    return f"{result}, {resident(fd)} pages"


def shows_zero(here: Here, locked: bool) -> str:
    """What a mapping shows of a page that is punched while it is mapped."""
    fd = here.gmem()
    address = here.map(fd)
    store(address, b"\x5a" * SIZE)
    if locked:
        call("mlock", address, SIZE)
    punch(fd, PAGE, PAGE)
    return "zero" if load(address + PAGE, PAGE) == bytes(PAGE) and load(address) == b"\x5a" else "not zero"


def interrupted(here: Here) -> str:
    """fallocate(2) when a signal comes in between: the errno, and whether pages stay."""
    pages = 1 << 14
    fd = here.gmem(0, pages * PAGE)
    signal.signal(signal.SIGALRM, lambda *_: None)
    # A signal that is too early finds nothing allocated, one that is too late everything.
    for microseconds in (300, 600, 1200, 2500, 5000) * 4:
        signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
        result = attempt(lambda: call("fallocate", fd, KEEP_SIZE, 0, pages * PAGE) or None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        kept = resident(fd)
        punch(fd, 0, pages * PAGE)
        if result != "ok" and kept:
            return f"{result}, {'some' if kept < pages else 'all'} pages"
    raise Unfit("no signal came while it was at work")


ROWS = among(("gmem", "cachestat"), [
    *(Row(f"fallocate.mode-{name}", f"mode {mode:#x} is not supported", change, (0, mode, 0, PAGE), "EOPNOTSUPP, 0 pages")
      for name, mode in MODES.items()),
    *(Row(f"fallocate.{what}.{name}", f"{words} {nr:#x} bytes at {offset:#x} is refused, and allocates nothing", change,
          (0, mode, offset, nr), f"{expect}, 0 pages")
      for what, words, mode in (("keep", "allocating", KEEP_SIZE), ("punch", "punching", PUNCH))
      for name, (offset, nr, expect) in BOUNDS.items()),
    *(Row(f"fallocate.allocate.flags-{flags}", f"KEEP_SIZE allocates at once, with flags {flags}", change,
          (flags, KEEP_SIZE, 0, SIZE), "ok, 4 pages",
          tuple(f"flag {bit}" for bit in (1, 2) if flags & bit)) for flags in range(4)),
    Row("fallocate.allocate.part", "KEEP_SIZE allocates what it is asked for", change, (0, KEEP_SIZE, PAGE, 2 * PAGE),
        "ok, 2 pages"),
    Row("fallocate.allocate.past-eof", "KEEP_SIZE with a byte past the end is refused, and allocates nothing", change,
        (0, KEEP_SIZE, 3 * PAGE, 2 * PAGE), "EINVAL, 0 pages"),
    Row("fallocate.allocate.beyond", "KEEP_SIZE wholly past the end is refused", change, (0, KEEP_SIZE, SIZE, PAGE),
        "EINVAL, 0 pages"),
    *(Row(f"fallocate.free.flags-{flags}", f"punching frees at once, with flags {flags}", punch_full, (flags, PAGE, PAGE),
          "ok, 3 pages", tuple(f"flag {bit}" for bit in (1, 2) if flags & bit)) for flags in range(4)),
    Row("fallocate.free.all", "punching everything leaves no page", punch_full, (0, 0, SIZE), "ok, 0 pages"),
    # Only allocating asks for the size (kvm_gmem_allocate()). A punch takes what there is between two indices.
    Row("fallocate.free.past-eof", "punching past the end is accepted, and frees what lies inside", punch_full,
        (0, 2 * PAGE, 1 << 30), "ok, 2 pages"),
    Row("fallocate.free.beyond", "punching wholly past the end is accepted, and frees nothing", punch_full,
        (0, 1 << 30, PAGE), "ok, 4 pages"),
    Row("fallocate.free.hole", "punching a hole is accepted", change, (0, PUNCH, 0, SIZE), "ok, 0 pages"),
    Row("fallocate.mapped", "a mapping shows zero where it has been punched, and nowhere else", shows_zero, (False,), "zero",
        ("flag 1", "flag 2")),
    Row("fallocate.locked", "punching goes through mlock(2)", shows_zero, (True,), "zero", ("flag 1", "flag 2")),
    Row("fallocate.interrupted", "a signal makes fallocate(2) fail with EINTR, and what was allocated by then stays",
        interrupted, (), "EINTR, some pages", ("memory 512M",)),
])
