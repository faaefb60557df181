"""The layout of the abstract host's state: which byte means what, and the small enumerations in them.

A state is one bytes object, so that it hashes and copies at C speed. It begins with how many records of each kind it has
(`Sizes`), so it can be read without being told which scene it belongs to; then come the globals, then the records.
Records are views with one property per byte. Every field is read by a law or decides what a primitive does;
tests/test_state_fields.py sees each change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from guest_memfd.compat import override
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.units import FIRST_FRAME, Gfn, Index, Pfn, Unit, span

if TYPE_CHECKING:
    from typing import Generic

    # A field that holds one more than a unit, and 0 for none.
    class _OneMore(Generic[Unit]):
        def __get__(self, record: object, owner: object, /) -> Unit: ...
        def __set__(self, record: object, value: int, /) -> None: ...

FRAME_FIELDS = {
    "allocated": "FREE, ALLOCATED, KEPT",
    "owner": "the hypervisor's record: HOST, GUEST, SHARED, BORROWED",
    "of": "VM whose guest that record is about, 0 for the host's own",
    "s1": "host stage 1: 1 mapped in the direct map, 0 zapped",
    "stale": "some CPU's TLB still holds the kernel mapping that stage 1 no longer has",
    "s2": "host stage 2: 1 the hypervisor lets the host touch it",
    "gmap": "guest stage 2: number of the gfn record + 1 that maps this frame, 0 none",
    "asked": "ghost: that mapping was made because the guest had faulted there",
    "withdrawn": "ghost: BORROWED by a consent that is older than the page's last conversion to private",
    "gstale": "gfn record + 1 of a guest stage-2 TLB entry that outlived its mapping, 0 none",
    "locked_in": "the guest holds on to the page (Gunyah: private and locked; pKVM: not shared with the host)",
    "user": "page + 1 at which the VMM's page table maps it",
    "content": "ZERO, JUNK, DATA, SECRET",
    "slot": "page + 1 at which the page cache holds it, 0 when it has left",
    "cache": "references: the page cache's",
    "lru": "references: a per-CPU lru_add batch's",
    "lookup": "references: transient, of a lookup that means to lock it",
    "provided": "references: one per page a v17 driver has provided to the guest",
    "pin": "references: FOLL_PIN of a device or io_uring",
    "get": "references: GUP without FOLL_PIN (vmsplice, /proc/pid/mem)",
    "spec": "references: speculative, from GUP-fast; never used to touch the page",
    "kept": "references: permanent, of a page that is taken out of use and counted",
    "lock": "folio lock: party number + 1 of the holder",
    "uptodate": "PG_uptodate: the library has zeroed it in this life",
    "no_direct_map": "MAPPED; MARKED by the library as not in the direct map; UNMAPPED: it came so from the allocator",
    "poison": "PG_hwpoison",
    "handled": "memory_failure() has done with the poisoned page",
    "stuck": "the hypervisor has refused for good to give it back",
}
FOLIO_FIELDS = {
    "order": "of the folio that begins at this frame",
    "tail": "how many frames before this one its folio begins: 0 for its first",
    "s1_leaf": "order of the direct-map leaf that the page's entry is, or is part of",
    "s2_leaf": "host stage 2: the same",
    "guest_leaf": "guest stage 2: the same, of a page that is mapped",
}
PAGE_FIELDS = {
    "cached": "page cache slot: frame + 1",
    "attr": "attribute tree: SHARED_PAGE, PRIVATE_PAGE",
    "binding": "binding tree: gfn + 1 bound to this page",
    "expect": "ghost: what any reader of this page must find (or ANY)",
}
GFN_FIELDS = {
    "provided": "v17's vm->mm tree: 2 * frame + lend + 1",
    "gpoison": "the guest's stage-2 entry says POISONED (pKVM force reclaim)",
    "memslot": "KVM's memslot: twice the page index + 1, and perhaps SLOT_INVALID; 0 none",
    "gmem_file": "slot->gmem.file is set",
}
FILE_FIELDS = {
    "invalidate_w": "invalidate_lock: writer's party number + 1",
    "invalidate_r": "invalidate_lock: number of readers",
    "invalidate_q": "invalidate_lock: queued writer's party number + 1",
    "bindings_w": "v17's bindings_lock: writer",
    "bindings_r": "v17's bindings_lock: number of readers",
    "bindings_q": "v17's bindings_lock: queued writer",
    "fd": "the VMM's file descriptor is open",
    "files": "references on the file",
    "inode": "NO_INODE, ALIVE, EVICTED (only the evictor may use it), DESTROYED",
    "inodes": "references on the inode: the file, and each VMA",
    "evictor": "party number + 1 of who dropped the last reference and evicts the inode",
    "vma": "user mappings of the file (VMAs)",
    "reserved": "bit mask of the pages for which the attribute tree has preallocated nodes",
    "released": "the hypervisor's half has been told that it will not be called again",
    "refuses_readers": "AS_NO_DIRECT_MAP: readers of page-cache folios are turned away",
}
VM_FIELDS = {
    "vm": "RUNNING, DYING, GONE",
    "progress": "mmu_invalidate_in_progress",
    "gpc": "gfn_to_pfn_cache: frame + 1 it maps",
    "gpc_fresh": "no invalidation since the cache sampled mmu_invalidate_seq",
    "gpc_readers": "its lock is held for reading",
    "slots_lock": "kvm->slots_lock: party number + 1 of the holder",
    "mmu_w": "kvm->mmu_lock: writer's party number + 1",
    "mmu_r": "kvm->mmu_lock: number of readers",
    "mmu_q": "kvm->mmu_lock: queued writer's party number + 1",
    "srcu": "kvm->srcu: number of readers",
    "seq": "mmu_invalidate_seq: how often it has moved on from a value that a reader has sampled",
    "sampled": "a reader has sampled mmu_invalidate_seq as it is now",
    "range": "mmu_invalidate_range_start to _end: bit mask of gfns",
}
PARTY_FIELDS = {
    "op": "ghost: operation under way (index into OPS) + 1",
    "gfn": "ghost: gfn + 1 at which the guest has faulted, if that is what it is about",
    "scope": "ghost: bit mask of the pages of the file it is about",
    "toggled": "ghost: pages whose attribute it has changed an odd number of times",
    "removed": "ghost: pages it has taken out of the page cache",
    "reasons": "ghost: bit mask of what has stood against it (REASONS)",
    "places": "ghost: bit mask of the pages at which something did",
    "writes": "ghost: direct-map entries it has written",
    "flushes": "ghost: kernel TLB flushes it has asked for",
    "calls": "ghost: hypercalls it has made",
    "stalls": "ghost: how often it has made others wait (locks taken exclusively, batches drained)",
    "splits": "ghost: leaves it has split, of the direct map and of either stage 2",
    "begun": "invalidations it has begun and not ended",
    "announced": "ghost: bit mask of the pages whose invalidation it has begun and not ended",
    "ended": "ghost: 1 + errno with which it has ended, before it returns; scope is kept until then",
    "ended_op": "ghost: which one that was (index into OPS) + 1",
    "ended_at": "ghost: 1 + the page index that it has named then",
}
GLOBALS = {
    "panic": "the kernel has stopped",
    "module": "references on the hypervisor's module",
    "unloaded": "the module's code is gone",
    "away": "pages counted as gone from the host (power)",
    "preparing": "hibernation has been announced and not vetoed",
    "frozen": "tasks are frozen",
    "failures": "failures that may still happen",
    "given": "failures that could happen when the parties began",
    "refusals": "refusals for good that may still happen",
    "leaked": "pages the library has counted as never coming back",
}


class Sizes(NamedTuple):
    """How many records of each kind a state has; pages are per file, gfns per VM. order: of the largest folio."""

    frames: int
    pages: int
    gfns: int
    files: int
    vms: int
    parties: int
    order: int = 0


RECORDS: dict[str, dict[str, str]] = {
    "pfn": FRAME_FIELDS, "folio": FOLIO_FIELDS, "page": PAGE_FIELDS, "gfn": GFN_FIELDS, "file": FILE_FIELDS, "vm": VM_FIELDS,
    "party": PARTY_FIELDS,
}
"""Kinds of records, in the order of the layout, and the fields of each."""

_HEADER = len(Sizes._fields)
PANIC_AT: Final = _HEADER + list(GLOBALS).index("panic")
"""Where the byte `panic` is, in every state."""


class StateLayout:
    """Where the records are in a state of given *sizes*."""

    __slots__ = ("at", "counts", "names", "pfns", "size", "sizes")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        # Where every folio is a single page, and so is every leaf, nothing has to be kept of them.
        self.counts = {"pfn": sizes.frames, "folio": sizes.frames if sizes.order else 0,
                       "page": sizes.pages * sizes.files, "gfn": sizes.gfns * sizes.vms,
                       "file": sizes.files, "vm": sizes.vms, "party": sizes.parties}
        self.pfns = span(FIRST_FRAME, sizes.frames)
        self.at: dict[str, int] = {}
        self.names = [*(f"number of {what}" for what in Sizes._fields), *GLOBALS]
        for kind, fields in RECORDS.items():
            self.at[kind] = len(self.names)
            self.names += [f"{kind}{number}.{name}" for number in range(self.counts[kind]) for name in fields]
        self.size = len(self.names)


@lru_cache
def _layout(sizes: tuple[int, ...]) -> StateLayout:
    return StateLayout(Sizes(*sizes))


_read = bytearray.__getitem__


def layout_of(state: bytes | bytearray) -> StateLayout:
    """The layout of *state*, which is in its first bytes: the same in every state of a host, so no one is said to look."""
    if isinstance(state, bytes):
        return _layout(tuple(state[:_HEADER]))
    # Past `Watched.__getitem__`: the header is the same in every state, and noting it would make each footprint
    # longer.
    return _layout((_read(state, 0), _read(state, 1), _read(state, 2), _read(state, 3), _read(state, 4), _read(state, 5),
                    _read(state, 6)))


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
        @override
        def __setattr__(self, name: str, value: Any) -> None: ...


class Frame(_Record):
    """One page frame; `number` is its pfn. Fields: FRAME_FIELDS."""

    if TYPE_CHECKING:
        number: Pfn

    def refs(self) -> int:
        """The number that folio_ref_count() returns: all kinds of references on this frame, added up."""
        return int(self.cache + self.lru + self.lookup + self.provided + self.pin + self.get + self.spec + self.kept)


class FolioRecord(_Record):
    """What is more than a page about frame `number`: its folio, and the leaves that map it. Fields: FOLIO_FIELDS."""


class PageRecord(_Record):
    """One page of a file; `number` is its page index, counted on from file to file. Fields: PAGE_FIELDS."""

    if TYPE_CHECKING:
        cached: _OneMore[Pfn]
        binding: _OneMore[Gfn]


class GfnRecord(_Record):
    """One guest frame; `number` is its gfn, counted on from VM to VM. Fields: GFN_FIELDS."""


class FileRecord(_Record):
    """A guest_memfd file and its inode. Fields: FILE_FIELDS."""


class VmRecord(_Record):
    """A VM. Fields: VM_FIELDS."""

    if TYPE_CHECKING:
        gpc: _OneMore[Pfn]


class PartyGhost(_Record):
    """What the laws remember of the operation a party is in. Fields: PARTY_FIELDS."""

    if TYPE_CHECKING:
        gfn: _OneMore[Gfn]
        ended_at: _OneMore[Index]


for _cls, _fields in ((Frame, FRAME_FIELDS), (FolioRecord, FOLIO_FIELDS), (PageRecord, PAGE_FIELDS),
                      (GfnRecord, GFN_FIELDS), (FileRecord, FILE_FIELDS), (VmRecord, VM_FIELDS), (PartyGhost, PARTY_FIELDS)):
    for _offset, _name in enumerate(_fields):
        # Properties and not a dictionary: a field is one byte of the state, read and written in place, and a
        # footprint sees each.
        setattr(_cls, _name, _byte(_offset))

_FRAME_SIZE, _FOLIO_SIZE, _PAGE_SIZE, _GFN_SIZE, _FILE_SIZE, _VM_SIZE, _PARTY_SIZE = map(len, RECORDS.values())


class State:
    """A mutable view on one state; `save` gives the immutable one. Attributes: GLOBALS, as integers."""

    __slots__ = ("layout", "raw")

    def __init__(self, saved: bytes | bytearray) -> None:
        # A bytearray that is handed in wants to know what is read (explore/engine/footprint.py): its own copy does.
        self.raw = saved.copy() if isinstance(saved, bytearray) else bytearray(saved)
        self.layout = layout_of(saved)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> int: ...
        @override
        def __setattr__(self, name: str, value: Any) -> None: ...

    @classmethod
    def empty(cls, sizes: Sizes) -> State:
        """A state of these *sizes*, in which every field is 0."""
        return cls(bytes(sizes) + bytes(_layout(sizes).size - _HEADER))

    def save(self) -> bytes:
        """The state as an immutable, hashable value (a watched state stays one)."""
        return bytes(self.raw) if type(self.raw) is bytearray else self.raw     # type: ignore[return-value]

    def _at(self, kind: str, number: int, size: int) -> int:
        if not 0 <= number < self.layout.counts[kind]:
            raise IndexError(f"there is no {kind} {number} on this host, which has {self.layout.counts[kind]}")
        return self.layout.at[kind] + number * size

    def frame(self, pfn: Pfn) -> Frame:
        """Frame *pfn*; IndexError where there is none."""
        return Frame(self.raw, self._at("pfn", pfn, _FRAME_SIZE), pfn)

    def folio(self, pfn: Pfn) -> FolioRecord:
        """What is more than a page about frame *pfn*; IndexError where all folios are single pages."""
        return FolioRecord(self.raw, self._at("folio", pfn, _FOLIO_SIZE), pfn)

    def head(self, frame: Frame) -> Frame:
        """The first frame of the folio that *frame* is part of: it has the lock, the references and the flags."""
        if not self.layout.sizes.order:
            return frame
        tail = self.folio(frame.number).tail
        return self.frame(Pfn(frame.number - tail)) if tail else frame

    def parts(self, frame: Frame) -> tuple[Frame, ...]:
        """All frames of the folio that begins at *frame*."""
        if not self.layout.sizes.order:
            return (frame,)
        return tuple(self.frame(pfn) for pfn in span(frame.number, 1 << self.folio(frame.number).order))

    def page(self, number: int) -> PageRecord:
        """Page *number* (its page index, if it is of the first file); IndexError where there is none."""
        return PageRecord(self.raw, self._at("page", number, _PAGE_SIZE), number)

    def gfn(self, number: int) -> GfnRecord:
        """Guest frame *number* (its gfn, if it is of the first VM); IndexError where there is none."""
        return GfnRecord(self.raw, self._at("gfn", number, _GFN_SIZE), number)

    def file(self, number: int = 0) -> FileRecord:
        """The record of file *number*, from 0 on; it reads and writes the bytes of this state."""
        return FileRecord(self.raw, self._at("file", number, _FILE_SIZE), number)

    def vm(self, number: int = 0) -> VmRecord:
        """The record of VM *number*, from 0 on; it reads and writes the bytes of this state."""
        return VmRecord(self.raw, self._at("vm", number, _VM_SIZE), number)

    def ghost(self, party: int) -> PartyGhost:
        """The ghost of *party*."""
        return PartyGhost(self.raw, self._at("party", party, _PARTY_SIZE), party)

    def frames(self) -> Iterator[Frame]:
        """The records of all frames, by frame number from 0 on."""
        return map(self.frame, self.layout.pfns)

    def folios(self) -> Iterator[FolioRecord]:
        """What is more than a page about each frame; none where all folios are single pages."""
        return map(self.folio, self.layout.pfns[:self.layout.counts["folio"]])

    def pages(self) -> Iterator[PageRecord]:
        """All pages of all files."""
        return map(self.page, range(self.layout.counts["page"]))

    def gfns(self) -> Iterator[GfnRecord]:
        """All guest frames of all VMs."""
        return map(self.gfn, range(self.layout.counts["gfn"]))

    def all_files(self) -> Iterator[FileRecord]:
        """The records of all files, by number from 0 on."""
        return map(self.file, range(self.layout.counts["file"]))

    def vms(self) -> Iterator[VmRecord]:
        """The records of all VMs, by number from 0 on."""
        return map(self.vm, range(self.layout.counts["vm"]))

    def ghosts(self) -> Iterator[PartyGhost]:
        """The ghosts of all parties."""
        return map(self.ghost, range(self.layout.counts["party"]))

    def file_of(self, page: int) -> FileRecord:
        """The file that page *number* belongs to."""
        return self.file(page // self.layout.sizes.pages)

    def private(self, frame: Frame) -> bool:
        """The library's word on a frame in a file: its attribute, or the mark where a design keeps no attributes."""
        attr = self.page(frame.slot - 1).attr if frame.slot else 0
        return attr == PRIVATE_PAGE if attr else bool(self.head(frame).no_direct_map)


def _global(offset: int) -> property:
    def read(self: State) -> int:
        return self.raw[offset]

    def write(self: State, value: int) -> None:
        self.raw[offset] = value

    return property(read, write)


for _offset, _name in enumerate(GLOBALS):
    setattr(State, _name, _global(_HEADER + _offset))


def changes(before: bytes, after: bytes) -> list[tuple[str, int, int]]:
    """(field, old, new) of every byte that differs, in the order of the layout."""
    names = layout_of(before).names
    return [(names[at], old, new) for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


def fields_of(state: bytes) -> dict[str, int]:
    """Name (``pfn0.owner``, ``frozen``) -> number of every byte after the sizes, in the order of the layout."""
    return dict(list(zip(layout_of(state).names, state, strict=True))[_HEADER:])
