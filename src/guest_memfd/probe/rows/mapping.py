"""mmap(2), mprotect(2) and the touch of a mapping: what is refused, which signal comes where, what is seen."""

from __future__ import annotations

import os

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask import calls
from guest_memfd.probe.ask.calls import (
    KEEP_SIZE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    RW,
    call,
    load,
    store,
)
from guest_memfd.probe.ask.here import SECRET, SIZE, Here, punch, resident
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.uapi.kvm import SHARED

FAR = 1 << 40


def maps(here: Here, which: int | str, prot: int, flags: int, offset: int = 0, nr: int = SIZE) -> None:
    """mmap(2) of *nr* bytes from byte *offset* on, with the protection and flags under test."""
    call("mmap", 0, nr, prot, flags, here.file(which), offset)


def protects(here: Here, which: int | str, prot: int) -> None:
    """mprotect(2) of a mapping with PROT_READ."""
    call("mprotect", here.map(here.file(which), prot=PROT_READ), SIZE, prot)


def fills(here: Here, which: int | str, flags: int) -> str:
    """Pages that there are after mmap(2) of twice the file's size."""
    fd = here.file(which)
    here.map(fd, 2 * SIZE, flags=MAP_SHARED | flags)
    return f"{resident(fd)} pages"


def touches(here: Here, which: int | str, prot: int, offset: int, write: bool, allocated: bool = False) -> str:
    """Load or store at *offset* of a mapping of twice the file's size."""
    fd = here.file(which)
    if allocated:
        call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    address = here.map(fd, 2 * SIZE, prot=prot)
    if write:
        store(address + offset, b"x")
        return "stored"
    return "zero" if load(address + offset, 8) == bytes(8) else "not zero"


def touches_unmapped(here: Here) -> None:
    """Load where the mapping was."""
    address = here.map(here.gmem())
    call("munmap", address, SIZE)
    load(address)


def after_load(here: Here) -> str:
    """Pages after one load."""
    fd = here.gmem()
    load(here.map(fd))
    return f"{resident(fd)} pages"


def reused(here: Here) -> str:
    """What a page shows that was written, punched and touched again, over and over."""
    fd = here.gmem()
    address = here.map(fd)
    for _ in range(50):
        if load(address, SIZE) != bytes(SIZE):
            return "not zero"
        store(address, b"\xa5" * SIZE)
        punch(fd, 0, SIZE)
    return "zero"


def seen_by(here: Here, which: int | str, other: str) -> str:
    """Store through one mapping, load through another."""
    fd = here.file(which)
    first, text = here.map(fd), b"same"
    if other == "fork":
        here.fork(lambda: store(first, text))
        return load(first, 4).decode()
    store(first, text)
    if other == "closed":
        second = here.map(fd)
        os.close(fd)
    elif other == "vm-closed":
        os.close(here.vm)
        second = here.map(fd)
    else:
        second = here.map(os.dup(fd) if other == "dup" else fd)
    return load(second, 4).decode()


def kept_by_mapping(here: Here) -> str:
    """Loads and stores after descriptor and VM have been closed."""
    fd = here.gmem()
    address = here.map(fd)
    store(address, b"kept")
    os.close(fd)
    os.close(here.vm)
    store(address + PAGE, b"more")
    return (load(address, 4) + load(address + PAGE, 4)).decode()


_PROTS = {"none": PROT_NONE, "r": PROT_READ, "w": PROT_WRITE, "rw": RW}
_WITHOUT = [
    Row(f"mmap.flags-{flags}.{how}-{name}", f"without the flag MMAP there is no mmap(2): {how}, {name}", maps,
        (flags, prot, value), "ENODEV", ("flag 2",) if flags else (), rules=(("no flag 1", "ENODEV"),))
    for flags in (0, 2) for how, value in (("shared", MAP_SHARED), ("private", MAP_PRIVATE)) for name, prot in _PROTS.items()
]
# What do_mmap() looks at itself comes before the file is asked: PROT_EXEC on a mount that is noexec, flags that
# MAP_SHARED_VALIDATE does not know, MAP_GROWSDOWN of what is shared, an end that overflows. How long the file is, is not
# among that: a touch finds out.
_MAPS: list[tuple[str, str, int, int, int, int, str]] = [
    *((f"{how}-{name}", f"{how} mapping, {name}", prot, value, 0, SIZE, "ok")
      for how, value in (("shared", MAP_SHARED), ("shared-validate", MAP_SHARED_VALIDATE)) for name, prot in _PROTS.items()),
    ("private-rw", "private mapping, writable", RW, MAP_PRIVATE, 0, SIZE, "EINVAL"),
    ("private-r", "private mapping, read-only", PROT_READ, MAP_PRIVATE, 0, SIZE, "EINVAL"),
    ("exec", "executable mapping", PROT_READ | PROT_EXEC, MAP_SHARED, 0, SIZE, "EPERM"),
    ("exec-private", "executable private mapping", PROT_EXEC, MAP_PRIVATE, 0, SIZE, "EPERM"),
    ("longer", "mapping of more than the file has", RW, MAP_SHARED, 0, 1 << 30, "ok"),
    ("at-eof", "mapping that starts at the end", RW, MAP_SHARED, SIZE, SIZE, "ok"),
    ("far", "mapping that starts far past the end", RW, MAP_SHARED, FAR, SIZE, "ok"),
    ("offset-unaligned", "offset that is no multiple of a page", RW, MAP_SHARED, 1, SIZE, "EINVAL"),
    ("offset-overflow", "offset whose end overflows", RW, MAP_SHARED, (1 << 64) - PAGE, 2 * PAGE, "EOVERFLOW"),
    ("len-0", "length 0", RW, MAP_SHARED, 0, 0, "EINVAL"),
    ("hugetlb", "MAP_HUGETLB", RW, MAP_SHARED | calls.MAP_HUGETLB, 0, SIZE, "EINVAL"),
    ("sync", "MAP_SYNC", RW, MAP_SHARED_VALIDATE | calls.MAP_SYNC, 0, SIZE, "EOPNOTSUPP"),
    ("growsdown", "MAP_GROWSDOWN", RW, MAP_SHARED | calls.MAP_GROWSDOWN, 0, SIZE, "EINVAL"),
]
_BUS, _SEGV = "SIGBUS BUS_ADRERR", "SIGSEGV SEGV_ACCERR"

_SHAREABLE = [
    *(Row(f"mmap.{name}", f"{words}: {'can be made' if expect == 'ok' else 'is refused'}", maps,
          (SHARED, prot, flags, offset, nr), expect) for name, words, prot, flags, offset, nr, expect in _MAPS),
    *(Row(f"mmap.{name}", f"{how} allocates everything up to the end of the file", fills, (SHARED, flag), "4 pages",
          ("cachestat",))
      for name, how, flag in (("populate", "MAP_POPULATE", calls.MAP_POPULATE), ("locked", "MAP_LOCKED", calls.MAP_LOCKED))),
    *(Row(f"mprotect.{name}", f"mprotect(2) to {name} {'works' if expect == 'ok' else 'is refused'}", protects,
          (SHARED, prot), expect)
      for name, prot, expect in (("rw", RW, "ok"), ("none", PROT_NONE, "ok"), ("exec", PROT_READ | PROT_EXEC, "EACCES"))),
    Row("fault.load", "the first load of a page shows zero", touches, (SHARED, RW, 0, False), "zero"),
    Row("fault.store", "a page can be stored to", touches, (SHARED, RW, PAGE, True), "stored"),
    Row("fault.load-past-eof", "a load past the end is SIGBUS at the address", touches, (SHARED, RW, SIZE, False),
        f"{_BUS} at offset {SIZE:#x}"),
    Row("fault.store-past-eof", "a store past the end is SIGBUS at the address", touches,
        (SHARED, RW, SIZE + PAGE + 8, True), f"{_BUS} at offset {SIZE + PAGE + 8:#x}"),
    Row("fault.store-read-only", "a store to a read-only mapping is SIGSEGV", touches, (SHARED, PROT_READ, 8, True),
        f"{_SEGV} at offset 0x8"),
    Row("fault.load-none", "a load of a mapping without access is SIGSEGV", touches, (SHARED, PROT_NONE, 8, False),
        f"{_SEGV} at offset 0x8"),
    Row("fault.unmapped", "a load where the mapping was is SIGSEGV", touches_unmapped, (),
        "SIGSEGV SEGV_MAPERR at offset 0x0"),
    Row("fault.load-allocates", "a load allocates a page, and one only", after_load, (), "1 pages", ("cachestat",)),
    Row("fault.reused", "a page that comes back after a punch shows zero", reused, (), "zero"),
    *(Row(f"coherent.{other}", f"a store is seen {words}", seen_by, (SHARED, other), "same") for other, words in (
        ("second", "through a second mapping"),
        ("dup", "through a mapping of a duplicate"),
        ("fork", "by the parent of a forked child"),
        ("closed", "after the descriptor has been closed"),
        ("vm-closed", "after the VM's descriptor has been closed"))),
    Row("coherent.mapping-only", "a mapping works on when descriptor and VM have been closed", kept_by_mapping, (),
        "keptmore"),
]
_PRIVATE = [
    Row("private.mmap", "a file with MMAP and without INIT_SHARED can be mapped", maps, (1, RW, MAP_SHARED)),
    Row("private.load", "and every load is SIGBUS", touches, (1, RW, PAGE, False), f"{_BUS} at offset {PAGE:#x}"),
    Row("private.store", "and every store is SIGBUS", touches, (1, RW, 16, True), f"{_BUS} at offset 0x10"),
    Row("private.load-allocated", "allocating the pages does not make them shared: a load", touches, (1, RW, 0, False, True),
        f"{_BUS} at offset 0x0"),
    Row("private.store-allocated", "allocating the pages does not make them shared: a store", touches,
        (1, RW, 0, True, True), f"{_BUS} at offset 0x0"),
]
ROWS = [*among(("gmem",), [*_WITHOUT, Row("mmap.flags-0.exec", "PROT_EXEC is refused before the missing flag MMAP is", maps,
                                           (0, PROT_EXEC, MAP_SHARED), "EPERM")]),
        *among(("gmem", "flag 1", "flag 2"), _SHAREABLE), *among(("gmem", "flag 1"), _PRIVATE)]

SECRET_ROWS = among(("secretmem",), [
    *(Row(f"secret.mmap-{name}", f"memfd_secret: {words}: {'can be made' if expect == 'ok' else 'is refused'}", maps,
          (SECRET, prot, flags, offset, nr), expect)
      for name, words, prot, flags, offset, nr, expect in _MAPS
      if name.startswith(("shared", "private", "exec")) and name != "exec-private"),
    Row("secret.load", "the first load of a page of memfd_secret shows zero", touches, (SECRET, RW, 0, False), "zero"),
    Row("secret.load-past-eof", "a load past the end of a memfd_secret is SIGBUS at the address", touches,
        (SECRET, RW, SIZE, False), f"{_BUS} at offset {SIZE:#x}"),
    Row("secret.coherent-second", "a second mapping of a memfd_secret shows the same bytes", seen_by, (SECRET, "second"),
        "same"),
    Row("secret.coherent-fork", "a forked child shares a memfd_secret", seen_by, (SECRET, "fork"), "same"),
])
