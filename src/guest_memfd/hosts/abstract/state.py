"""The layout of the abstract host's state: which byte means what, and the small enumerations in them.

A state is one bytes object, so that it hashes and copies at C speed. Records are views on it with one property per
byte. Every field is read by a law or decides what a primitive does; tests/test_state_fields.py sees each change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

PAGES: Final = 2
"""Pages of the guest_memfd file, and guest frames of the VM."""

FRAMES: Final = 3
"""Page frames guest_memfd can be given: one more than it needs, so that a pinned page can be replaced."""

PARTIES: Final = 14
"""Party numbers run from 0 to PARTIES-1 (scenarios/)."""

# Owner of a frame, as the hypervisor records it.
HOST, GUEST, SHARED, BORROWED = range(4)
OWNERS = ("host", "guest", "shared", "borrowed")
"""shared: host's, lent to be used by both; borrowed: the guest's, which the guest lets the host use."""

# Where a frame is with the allocator; kept: out of use for ever (quarantined, or poisoned hardware).
FREE, ALLOCATED, KEPT = range(3)

# What a frame holds.
ZERO, JUNK, DATA, SECRET = range(4)
CONTENTS = ("zero", "junk", "data", "secret")
"""junk: left by an unknown previous owner; data: host and guest may both know it; secret: written by the guest while
the page was private."""

ANY = 255
"""Expected content of a page nobody can rely on (relinquished, or never written)."""

SHARED_PAGE, PRIVATE_PAGE = 1, 2
"""Entries of the library's attribute tree; 0 would be a hole, and is a bug."""

RUNNING, DYING, GONE = range(3)
VM_STATES = ("running", "dying", "gone")

FRAME_FIELDS = {
    "allocated": "FREE, ALLOCATED, KEPT",
    "owner": "the hypervisor's record: HOST, GUEST, SHARED, BORROWED",
    "s1": "host stage 1: 1 mapped in the direct map, 0 zapped",
    "stale": "some CPU's TLB still holds the kernel mapping that stage 1 no longer has",
    "s2": "host stage 2: 1 the hypervisor lets the host touch it",
    "gmap": "guest stage 2: gfn+1 that maps this frame, 0 none",
    "gstale": "gfn+1 of a guest stage-2 TLB entry that outlived its mapping, 0 none",
    "locked_in": "the guest holds on to the page (Gunyah: private and locked; pKVM: not shared with the host)",
    "user": "the VMM's page table maps it",
    "content": "ZERO, JUNK, DATA, SECRET",
    "slot": "page index + 1 at which the page cache holds it, 0 when it has left",
    "cache": "references: the page cache's",
    "lru": "references: a per-CPU lru_add batch's",
    "lookup": "references: transient, of whoever looked it up and means to lock it",
    "provided": "references: one per page a v17 driver has provided to the guest",
    "pin": "references: FOLL_PIN of a device or io_uring",
    "get": "references: GUP without FOLL_PIN (vmsplice, /proc/pid/mem)",
    "spec": "references: speculative, from GUP-fast; never used to touch the page",
    "lock": "folio lock: party number + 1 of the holder",
    "uptodate": "PG_uptodate: the library has zeroed it in this life",
    "private": "the library's mark: inaccessible to the host",
    "poison": "PG_hwpoison",
}
PAGE_FIELDS = {
    "cached": "page cache slot: frame + 1",
    "attr": "attribute tree: SHARED_PAGE, PRIVATE_PAGE",
    "binding": "binding tree: gfn + 1 bound to this page",
    "provided": "v17's vm->mm tree, by gfn: 2 * frame + lend + 1",
    "gpoison": "by gfn: the guest's stage-2 entry says POISONED (pKVM force reclaim)",
    "expect": "ghost: what whoever may read this page must find (or ANY)",
}
PARTY_FIELDS = {
    "op": "ghost: operation under way (index into OPS) + 1",
    "scope": "ghost: bit mask of the pages it is about",
    "toggled": "ghost: pages whose attribute it has changed an odd number of times",
    "removed": "ghost: pages it has taken out of the page cache",
}
GLOBALS = {
    "invalidate_w": "invalidate_lock: writer's party number + 1",
    "invalidate_r": "invalidate_lock: number of readers",
    "invalidate_q": "invalidate_lock: queued writer's party number + 1",
    "bindings_w": "v17's bindings_lock: writer",
    "bindings_r": "v17's bindings_lock: number of readers",
    "bindings_q": "v17's bindings_lock: queued writer",
    "fd": "the VMM's file descriptor is open",
    "files": "references on the file",
    "inodes": "references on the inode: the file, and each VMA",
    "vma": "user mappings of the file (VMAs)",
    "vm": "RUNNING, DYING, GONE",
    "module": "references on the hypervisor's module",
    "unloaded": "the module's code is gone",
    "progress": "mmu_invalidate_in_progress",
    "gpc": "gfn_to_pfn_cache: frame + 1 it maps",
    "gpc_fresh": "no invalidation since the cache sampled mmu_invalidate_seq",
    "gpc_readers": "its lock is held for reading",
    "away": "pages counted as gone from the host (power)",
    "preparing": "hibernation has been announced and not vetoed",
    "frozen": "tasks are frozen",
    "reserved": "nodes preallocated for the attribute tree",
    "failures": "failures that may still happen",
    "panic": "the kernel has stopped",
}
OPS = ("fault", "user_fault", "mmap", "allocate", "punch", "to_private", "to_shared", "unbind", "teardown")

_FRAME_SIZE, _PAGE_SIZE, _PARTY_SIZE = len(FRAME_FIELDS), len(PAGE_FIELDS), len(PARTY_FIELDS)
_PAGES_AT = FRAMES * _FRAME_SIZE
_PARTIES_AT = _PAGES_AT + PAGES * _PAGE_SIZE
_GLOBALS_AT = _PARTIES_AT + PARTIES * _PARTY_SIZE
SIZE: Final = _GLOBALS_AT + len(GLOBALS)
PANIC_AT: Final = _GLOBALS_AT + list(GLOBALS).index("panic")
"""Where the byte `panic` is."""


def _byte(offset: int) -> property:
    def read(self: _Record) -> int:
        return self.raw[self.at + offset]

    def write(self: _Record, value: int) -> None:
        self.raw[self.at + offset] = value

    return property(read, write)


class _Record:
    __slots__ = ("at", "number", "raw")

    def __init__(self, raw: bytearray, at: int, number: int) -> None:
        self.raw, self.at, self.number = raw, at, number

    if TYPE_CHECKING:                                   # every field is an int
        def __getattr__(self, name: str) -> int: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class Frame(_Record):
    """One page frame; `number` is its pfn. Fields: FRAME_FIELDS."""

    def refs(self) -> int:
        """folio_ref_count()."""
        return int(self.cache + self.lru + self.lookup + self.provided + self.pin + self.get + self.spec)


class Page(_Record):
    """One page of the file; `number` is its page index. Fields: PAGE_FIELDS."""


class PartyGhost(_Record):
    """What the laws remember of the operation a party is in. Fields: PARTY_FIELDS."""


for _cls, _fields in ((Frame, FRAME_FIELDS), (Page, PAGE_FIELDS), (PartyGhost, PARTY_FIELDS)):
    for _offset, _name in enumerate(_fields):
        setattr(_cls, _name, _byte(_offset))


class State:
    """A mutable view on one state; `save` gives the immutable one. Attributes: GLOBALS, as integers."""

    __slots__ = ("raw",)

    def __init__(self, saved: bytes | bytearray | None = None) -> None:
        # A bytearray that is handed in wants to know what is read (check/footprint.py): its own copy does.
        self.raw = saved.copy() if isinstance(saved, bytearray) else bytearray(saved or SIZE)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> int: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def save(self) -> bytes:
        """The state as an immutable, hashable value (a watched state stays one)."""
        return bytes(self.raw) if type(self.raw) is bytearray else self.raw     # type: ignore[return-value]

    def frame(self, pfn: int) -> Frame:
        """Frame *pfn*; IndexError where there is none."""
        if not 0 <= pfn < FRAMES:
            raise IndexError(f"there is no pfn {pfn} on this host of {FRAMES} frames")
        return Frame(self.raw, pfn * _FRAME_SIZE, pfn)

    def page(self, index: int) -> Page:
        """Page *index* of the file; IndexError where there is none."""
        if not 0 <= index < PAGES:
            raise IndexError(f"there is no page {index} in this file of {PAGES} pages")
        return Page(self.raw, _PAGES_AT + index * _PAGE_SIZE, index)

    def ghost(self, party: int) -> PartyGhost:
        """The ghost of *party*."""
        return PartyGhost(self.raw, _PARTIES_AT + party * _PARTY_SIZE, party)

    def frames(self) -> Iterator[Frame]:
        """All frames."""
        return map(self.frame, range(FRAMES))

    def private(self, frame: Frame) -> bool:
        """The library's word on a frame in the file: its attribute, or the mark where a design keeps no attributes."""
        attr = self.page(frame.slot - 1).attr if frame.slot else 0
        return attr == PRIVATE_PAGE if attr else bool(frame.private)

    def pages(self) -> Iterator[Page]:
        """All pages of the file."""
        return map(self.page, range(PAGES))


def _global(offset: int) -> property:
    def read(self: State) -> int:
        return self.raw[offset]

    def write(self: State, value: int) -> None:
        self.raw[offset] = value

    return property(read, write)


for _offset, _name in enumerate(GLOBALS):
    setattr(State, _name, _global(_GLOBALS_AT + _offset))


def changes(before: bytes, after: bytes) -> list[tuple[str, int, int]]:
    """(field, old, new) of every byte that differs, in the order of the layout."""
    return [
        (field_name(at), old, new)
        for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new
    ]


def field_name(at: int) -> str:
    """``pfn0.owner``, ``page1.attr``, ``frozen``: what byte *at* of a state is."""
    if at < _PAGES_AT:
        return f"pfn{at // _FRAME_SIZE}.{list(FRAME_FIELDS)[at % _FRAME_SIZE]}"
    if at < _PARTIES_AT:
        at -= _PAGES_AT
        return f"page{at // _PAGE_SIZE}.{list(PAGE_FIELDS)[at % _PAGE_SIZE]}"
    if at < _GLOBALS_AT:
        at -= _PARTIES_AT
        return f"party{at // _PARTY_SIZE}.{list(PARTY_FIELDS)[at % _PARTY_SIZE]}"
    return list(GLOBALS)[at - _GLOBALS_AT]
