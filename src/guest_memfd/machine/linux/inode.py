"""A guest_memfd inode: page cache, trees, locks, references. Here are the data of one file, and no behaviour.

The primitives (../primitives/) act on it; which reference keeps it alive is said in core/file.py, and who may use it while
it dies in ../primitives/lifetime.py.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.words.pagestate import DESTROYED, EVICTED, NO_INODE
from guest_memfd.words.primitives import Splits
from guest_memfd.words.units import Gfn, Index

if TYPE_CHECKING:
    from guest_memfd.machine.linux.mm import FileMapping

OF_VM = ("provided", "memslots", "gmem_files")
"""Trees of the VM, which is found through the inode here."""

TREES = ("attributes", "bindings", *OF_VM)


@dataclass(eq=False)
class Inode:
    """One guest_memfd file of `size` pages, made by code of module `module`."""

    size: int
    module: str
    pages: dict[Index, LinuxFolio] = field(default_factory=dict)        # page index of the head -> folio
    orders: dict[int, int] = field(default_factory=dict)        # order -> folios of it in `pages`
    trees: dict[str, MapleTree] = field(default_factory=lambda: {name: MapleTree() for name in TREES})
    released: bool = False                                      # the hypervisor's half will not be called again
    reserved: range = range(0)                                  # pages for which the attribute tree has preallocated nodes
    refuses_readers: bool = False                               # AS_NO_DIRECT_MAP
    invalidate: Rwsem = field(default_factory=Rwsem)
    bindings: Rwsem = field(default_factory=Rwsem)
    fd: bool = False                                            # user space has a descriptor
    files: int = 0                                              # references on the struct file
    references: int = 0                                         # references on the inode: the file, each VMA
    life: int = NO_INODE
    evictor: int | None = None                                  # the task that dropped the last reference and evicts it
    mapping: FileMapping | None = None                          # the user page table its VMAs share
    split: Splits = field(default_factory=Splits)               # by its primitives, where somebody accounts for it
    _in_order: list[Index] | None = None                        # keys of `pages`, sorted when first asked for

    def find(self, index: Index) -> LinuxFolio | None:
        """The folio that covers page *index*."""
        # A folio is found by its head, and the head of *index* depends on the order: one look for each order in use.
        for order in self.orders:
            page = self.pages.get(index & -1 << order)
            if page is not None and page.order == order:
                return page
        return None

    def next(self, index: Index) -> Index:
        """The page index of the first folio that begins at *index* or after it; beyond any range when there is none."""
        if self._in_order is None:
            self._in_order = sorted(self.pages)
        at = bisect_left(self._in_order, index)
        return self._in_order[at] if at < len(self._in_order) else Index(1 << 62)

    def insert(self, page: LinuxFolio, index: Index) -> None:
        """Put *page* into the page cache at the aligned *index*."""
        self.pages[index] = page
        self._in_order = None
        self.orders[page.order] = self.orders.get(page.order, 0) + 1
        page.inode, page.index = self, index

    def remove(self, page: LinuxFolio) -> None:
        """Take *page* out of the page cache; it belongs to no file then. Its references are left as they are."""
        del self.pages[page.index]
        self._in_order = None
        self.orders[page.order] -= 1
        if not self.orders[page.order]:
            del self.orders[page.order]
        page.inode = None

    def put(self, task: int) -> bool:
        """*task* drops a reference; True when it was the last, and the inode is *task*'s to evict."""
        # Count and verdict in one step: of two tasks that drop a reference, exactly one sees the last.
        self.references -= 1
        if self.references:
            return False
        self.life, self.evictor = EVICTED, task
        return True

    def destroy(self) -> None:
        """What was kept in it goes with its memory. (Trees of the VM are only found through it here.)"""
        self.life, self.evictor, self.refuses_readers = DESTROYED, None, False
        self.trees |= {name: MapleTree() for name in ("attributes", "bindings")}

    def bound(self) -> bool:
        """Whether any page is bound to a VM."""
        return self.trees["bindings"].load(0, self.size).count(0) < self.size

    def entry(self, tree: str, index: Index | Gfn) -> int:
        """One entry of a tree."""
        return self.trees[tree].load(index, 1)[0]
