"""struct folio: who refers to a block of frames, and its flags. One count decides; the kinds explain it.

The kernel has one reference count. Beside it every reference is entered under its kind, as the kernel's own
ref_tracker does for debugging, so that the laws - and people - can tell a pin from a page-cache reference.
"""

from __future__ import annotations

from guest_memfd.words.units import FIRST_PAGE, PAGE, Index, Pa

KINDS = ("cache", "lru", "lookup", "provided", "pin", "get", "spec", "kept")
"""Kinds of references (abstract/state.py FRAME_FIELDS); ``kept`` is never dropped."""


class LinuxFolio:
    """The head page of an allocated folio at physical address `pa`, 4 KiB << `order` bytes."""

    __slots__ = ("broken", "cache", "get", "handled", "index", "inode", "kept", "lock", "lookup", "lru", "no_direct_map",
                 "order", "pa", "pin", "provided", "refcount", "retired", "spec", "unmapped", "uptodate")

    def __init__(self, pa: Pa, order: int) -> None:
        self.pa, self.order = pa, order
        self.refcount = 0
        self.cache = self.lru = self.lookup = self.provided = self.pin = self.get = self.spec = self.kept = 0
        self.uptodate = self.no_direct_map = False
        self.broken: set[Pa] = set()                    # pages with PG_hwpoison
        self.handled: set[Pa] = set()                   # those that memory_failure() has done with
        self.unmapped = False                           # it came from the allocator without a direct map
        self.retired = False                            # broken memory that no one refers to any more: never free again
        self.lock: int | None = None                    # the task that holds the folio lock
        self.inode: object | None = None                # folio->mapping
        self.index = FIRST_PAGE

    @property
    def size(self) -> int:
        """The folio's size in bytes."""
        return PAGE << self.order

    @property
    def nr(self) -> int:
        """The folio's size in pages, a power of 2."""
        return 1 << self.order

    @property
    def hwpoison(self) -> bool:
        """Whether the memory of one of its pages is broken."""
        return bool(self.broken)

    def index_of(self, pa: Pa) -> Index:
        """The page index of its page at *pa*."""
        return self.index + (pa - self.pa) // PAGE

    def take(self, kind: str, nr: int = 1) -> None:
        """*nr* more references of *kind*."""
        setattr(self, kind, getattr(self, kind) + nr)
        self.refcount += nr

    def drop(self, kind: str, nr: int = 1) -> bool:
        """*nr* references of *kind* less; True when they were the last of all. Raises ValueError below zero."""
        count = getattr(self, kind)
        if count < nr:
            raise ValueError(kind)
        setattr(self, kind, count - nr)
        self.refcount -= nr
        return not self.refcount

    def kinds(self) -> int:
        """The sum of what is entered by kind; it must equal refcount, or lockstep stops (lockstep/abstraction.py)."""
        return self.cache + self.lru + self.lookup + self.provided + self.pin + self.get + self.spec + self.kept
