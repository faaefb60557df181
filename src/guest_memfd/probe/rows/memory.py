"""Advice, locks, NUMA policy and accounting of a mapping: madvise(2), mlock(2), mbind(2), smaps."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import ADVICE, FAILED, MAP_SHARED, RW, attempt, call, load, store
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import SECRET, SIZE, Here, resident
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.uapi.kvm import SHARED

_MARK = b"\x5a" * SIZE


def advises(here: Here, which: int | str, advice: str) -> str:
    """madvise(2) of a populated mapping: what it returns, and what another mapping then shows."""
    fd = here.file(which)
    address, witness = here.map(fd), here.map(fd)
    mark = _mark(which)
    store(address, mark)
    result = attempt(lambda: call("madvise", address, SIZE, ADVICE[advice]) or None)
    if result != "ok":
        return result
    shown = load(witness, len(mark))
    return "ok, kept" if shown == mark else "ok, zero" if shown == bytes(len(mark)) else "ok, other bytes"


# Every page of memfd_secret may split a leaf of the direct map for good: one will do.
def _mark(which: int | str) -> bytes:
    return _MARK[:PAGE] if which == SECRET else _MARK


def populates(here: Here, flags: int, advice: str, nr: int) -> str:
    """MADV_POPULATE_READ or _WRITE of *nr* bytes of an empty file, and how many pages it has then."""
    fd = here.gmem(flags)
    address = call("mmap", 0, nr, RW, MAP_SHARED, fd, 0)
    result = attempt(lambda: call("madvise", address, nr, ADVICE[advice]) or None)
    return f"{result}, {resident(fd)} pages"


def guarded(here: Here) -> None:
    """Load from a page after MADV_GUARD_INSTALL; unfit where the kernel has no guard regions for files."""
    address = here.map(here.gmem())
    try:
        call("madvise", address, SIZE, ADVICE["GUARD_INSTALL"])
    except FAILED as error:
        raise Unfit(f"MADV_GUARD_INSTALL: {error}") from error
    load(address)


def locks(here: Here, which: int | str, name: str, *more: int) -> None:
    """mlock(2), mlock2(2) or munlock(2)."""
    call(name, here.map(here.file(which)), SIZE, *more)


# -- NUMA --------------------------------------------------------------------------------------------------------------

MODES = ("default", "preferred", "bind", "interleave", "local", "preferred-many", "weighted-interleave")
"""MPOL_*, in order (include/uapi/linux/mempolicy.h)."""
_WITH_NODES = {"preferred", "bind", "interleave", "preferred-many", "weighted-interleave"}
_F_ADDR, _STRICT, _MOVE, _MOVE_ALL = 2, 1, 2, 4


def _bind(address: int, mode: str, nodes: int = 1, flags: int = 0) -> None:
    mask = ctypes.c_ulong(nodes) if mode in _WITH_NODES else None
    call("mbind", address, SIZE, MODES.index(mode), mask, 64 if mask else 0, flags)


def _policy(address: int) -> str:
    mode = ctypes.c_int(-1)
    call("get_mempolicy", mode, None, 0, address, _F_ADDR)
    return MODES[mode.value & 0xFF] if 0 <= mode.value & 0xFF < len(MODES) else str(mode.value)


def policy_of(here: Here, mode: str) -> str:
    """mbind(2), and what get_mempolicy(2) shows of the same mapping."""
    address = here.map(here.gmem())
    _bind(address, mode)
    return _policy(address)


def policy_elsewhere(here: Here) -> str:
    """mbind(2), and what get_mempolicy(2) shows of another mapping of the same file."""
    fd = here.gmem()
    address, other = here.map(fd), here.map(fd)
    _bind(address, "bind")
    return _policy(other)


def binds_with(here: Here, mode: str, nodes: int, flags: int) -> None:
    """mbind(2) of a mapping populated with memory of node 0."""
    address = here.map(here.gmem())
    _store_on_node_0(address, _MARK)
    _bind(address, mode, nodes, flags)


# A file that has no policy of its own takes that of the task (set_mempolicy(2)), which is as it was afterwards.
def _store_on_node_0(address: int, data: bytes) -> None:
    call("set_mempolicy", MODES.index("bind"), ctypes.c_ulong(1), 64)
    store(address, data)
    call("set_mempolicy", MODES.index("default"), None, 0)


def moves(here: Here, query: bool) -> str:
    """move_pages(2) of a page populated with memory of node 0: the status of the page."""
    address = here.map(here.gmem())
    _store_on_node_0(address, b"x")
    return f"node {_moved(address, None if query else 0)}"


def _moved(address: int, node: int | None) -> int:
    status = ctypes.c_int(-99)
    call("move_pages", 0, 1, ctypes.c_void_p(address), None if node is None else ctypes.c_int(node), status, _MOVE)
    return status.value


def interleaved(here: Here) -> list[int]:
    """The nodes of eight pages of a file, one after the other, after mbind(2) with MPOL_INTERLEAVE over nodes 0 and 1."""
    size = 2 * SIZE
    address = here.map(here.gmem(size=size), size)
    call("mbind", address, size, MODES.index("interleave"), ctypes.c_ulong(3), 64, 0)
    nodes = []
    for at in range(address, address + size, PAGE):
        store(at, b"x")
        nodes.append(_moved(at, None))
    return nodes


# -- accounting --------------------------------------------------------------------------------------------------------


def smaps(here: Here, which: int | str, field: str, flags: int = 0) -> str:
    """A line of /proc/self/smaps about a populated mapping (not touched where *flags* are given)."""
    address = here.map(here.file(which), flags=MAP_SHARED | flags)
    if not flags:
        store(address, _mark(which))
    text = Path("/proc/self/smaps").read_text()
    part = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M)
    mine = next((area for area in part if area.startswith(f"{address:x}-")), "")
    found = re.search(rf"^{field}:\s*(.*?)\s*$", mine, re.M)
    # "sd" says that the kernel has CONFIG_MEM_SOFT_DIRTY, and nothing about the file.
    return found[1].removesuffix(" sd") if found else "no such line"


def rss_kind(here: Here) -> str:
    """Under which name /proc/self/status counts 64 populated pages."""
    def counts() -> dict[str, int]:
        text = Path("/proc/self/status").read_text()
        return {name: int(kb) for name, kb in re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.M)}

    size = 64 * PAGE
    address = here.map(here.gmem(size=size), size)
    # Twice: what the call itself brings in of Python's files, which may lie on a tmpfs, is there afterwards.
    counts()
    store(address, b"x")
    before = counts()
    # Byte by byte: as many bytes of our own would be anonymous memory, which the allocator may keep.
    for at in range(0, size, PAGE):
        store(address + at, b"x")
    after = counts()
    return "+".join(name for name in after if after[name] - before[name] >= size >> 11) or "none"


_KEPT = ["NORMAL", "RANDOM", "SEQUENTIAL", "WILLNEED", "DONTNEED", "DONTNEED_LOCKED", "DONTFORK", "DOFORK", "MERGEABLE",
         "UNMERGEABLE", "HUGEPAGE", "NOHUGEPAGE", "DONTDUMP", "DODUMP", "KEEPONFORK", "COLD", "PAGEOUT", "POPULATE_READ",
         "POPULATE_WRITE", "GUARD_INSTALL", "GUARD_REMOVE"]
_REFUSED = ["FREE", "WIPEONFORK", "COLLAPSE"]
_POISON = ["HWPOISON", "SOFT_OFFLINE"]
_SECRET_REFUSED = ["DONTNEED", "FREE", "REMOVE", "WIPEONFORK", "COLD", "PAGEOUT", "POPULATE_READ", "POPULATE_WRITE",
                   "COLLAPSE", "GUARD_INSTALL"]
# Where mappings are not VM_LOCKED any more, what locked memory refuses is allowed, and keeps the data (CVE-2026-93243).
_SECRET_UNLOCKED: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("DONTNEED", "COLD", "PAGEOUT"), (("secret counted per user", "ok, kept"),)),
    "REMOVE": (("secret counted per user", "EOPNOTSUPP"),),
    "GUARD_INSTALL": (("no guard regions", "EINVAL"), ("secret counted per user", "ok, kept")),
}
# Built in or not: without the option the advice is unknown.
_OPTIONAL = {"MERGEABLE", "UNMERGEABLE", "HUGEPAGE", "NOHUGEPAGE", "GUARD_INSTALL", "GUARD_REMOVE"}

ROWS = [
    *among(("gmem", "flag 1", "flag 2"), [
        *(Row(f"madvise.{name}", f"MADV_{name} is accepted and takes no data away", advises, (SHARED, name),
              "ok, kept | EINVAL" if name in _OPTIONAL else "ok, kept") for name in _KEPT),
        Row("madvise.REMOVE", "MADV_REMOVE punches: the data are gone", advises, (SHARED, "REMOVE"), "ok, zero"),
        *(Row(f"madvise.{name}", f"MADV_{name} is refused", advises, (SHARED, name), "EINVAL") for name in _REFUSED),
        *(Row(f"madvise.{name}", f"MADV_{name}: a kernel without memory failure handling does not know it", advises,
              (SHARED, name), "EINVAL", ("no memory failure",)) for name in _POISON),
        *(Row(f"populate.{name}", f"MADV_{name} allocates every page", populates, (SHARED, name, SIZE), "ok, 4 pages",
              ("cachestat",))
          for name in ("POPULATE_READ", "POPULATE_WRITE")),
        *(Row(f"populate.{name}.past-eof", f"MADV_{name} past the end is a fault, and what came before stays", populates,
              (SHARED, name, 2 * SIZE), "EFAULT, 4 pages", ("cachestat",)) for name in ("POPULATE_READ", "POPULATE_WRITE")),
        Row("madvise.guarded", "a load of a guard region is SIGSEGV", guarded, (), "SIGSEGV SEGV_ACCERR at offset 0x0 | "
            "SIGSEGV SEGV_MAPERR at offset 0x0"),
        Row("mlock", "mlock(2) of a shared file works", locks, (SHARED, "mlock")),
        Row("mlock2", "mlock2(2) MLOCK_ONFAULT works", locks, (SHARED, "mlock2", 1)),
        Row("munlock", "munlock(2) of a shared file works", locks, (SHARED, "munlock")),
        Row("smaps.flags", "flags of the mapping", smaps, (SHARED, "VmFlags"), "rd wr sh mr mw ms"),
        Row("smaps.huge", "the mapping is not eligible for huge pages", smaps, (SHARED, "THPeligible"), "0"),
        Row("smaps.rss", "all pages of the mapping are resident", smaps, (SHARED, "Rss"), f"{SIZE >> 10} kB"),
        Row("status.rss", "resident pages count as those of files", rss_kind, (), "RssFile"),
    ]),
    *among(("gmem", "flag 1"), [
        *(Row(f"populate.{name}.private", f"MADV_{name} of private pages is a fault", populates, (1, name, SIZE),
              "EFAULT, 0 pages", ("cachestat",)) for name in ("POPULATE_READ", "POPULATE_WRITE")),
        # __mlock_posix_error_return(): the fault is EFAULT inside, and POSIX
        # wants ENOMEM for addresses that cannot be had.
        Row("mlock.private", "mlock(2) of private pages fails", locks, (1, "mlock"), "ENOMEM"),
    ]),
    *among(("gmem", "flag 1", "flag 2", "numa"), [
        *(Row(f"mbind.{mode}", f"mbind(2) of {mode} is accepted, and the mapping shows it", policy_of, (mode,), mode)
          for mode in MODES),
        Row("mbind.second-mapping", "policy belongs to the mapping before 6.19, to the file since", policy_elsewhere, (),
            "default", rules=(("inodes of its own", "bind"),)),
        Row("mbind.unknown-node", "a node that there is not is refused", binds_with, ("bind", 1 << 63, 0), "EINVAL",
            ("fewer than 64 nodes",)),
        Row("mbind.move", "MPOL_MF_MOVE of populated pages is accepted", binds_with, ("bind", 1, _MOVE)),
        Row("mbind.move-all", "MPOL_MF_MOVE_ALL and MPOL_MF_STRICT are accepted where all is", binds_with,
            ("bind", 1, _MOVE_ALL | _STRICT), "ok", ("root",)),
        Row("move.query", "move_pages(2) tells the node", moves, (True,), "node 0"),
        Row("move.move", "move_pages(2) to the node where the page is", moves, (False,), "node 0"),
    ]),
]

SECRET_ROWS = among(("secretmem",), [
    *(Row(f"secret.madvise-{name}", f"MADV_{name} of a memfd_secret is refused", advises, (SECRET, name), "EINVAL",
          rules=_SECRET_UNLOCKED.get(name, ())) for name in _SECRET_REFUSED),
    Row("secret.madvise-DONTNEED_LOCKED", "MADV_DONTNEED_LOCKED of a memfd_secret is accepted, and takes no data away",
        advises, (SECRET, "DONTNEED_LOCKED"), "ok, kept"),
    Row("secret.mlock", "mlock(2) of a memfd_secret fails: get_user_pages(), by which it populates, refuses it", locks,
        (SECRET, "mlock"), "ENOMEM"),
    Row("secret.munlock", "munlock(2) of a memfd_secret is accepted", locks, (SECRET, "munlock")),
    Row("secret.smaps-flags", "a mapping of memfd_secret is locked and not dumped", smaps, (SECRET, "VmFlags"),
        "rd wr sh mr mw me ms lo dd | rd wr sh mr mw ms lo dd",
        rules=(("secret counted per user", "rd wr sh mr mw ms dd"),)),
    *(Row(f"secret.{name}", f"{how} of a memfd_secret does not populate", smaps, (SECRET, "Rss", flag), "0 kB")
      for name, how, flag in (("populate", "MAP_POPULATE", 0x8000), ("locked", "MAP_LOCKED", 0x2000))),
])
