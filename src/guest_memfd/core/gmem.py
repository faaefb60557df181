"""What a procedure of the library is given: the file that it serves, and by it the steps that a design may replace.

The procedures are functions of the modules beside this one, each with the file as its first argument, as the kernel has
them. A call by that argument - ``gmem.zap(folio)`` - is a step: a design's may take its place. A call by name alone is none.
Ours are the functions of the same names, in the modules that stand above each group here; library.py puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.words.primitives import Folio, Host, Lookup, Steps, VmFault
from guest_memfd.words.units import Gfn, Index

PowerPolicy = Literal["count", "notifier", "none"]
"""How hibernation is kept from pages that are away from the host (power.py)."""


class Conversion(NamedTuple):
    """0, or -errno and the page index that refused (None when no page did)."""

    ret: int
    error_index: Index | None = None


class Grabbed(NamedTuple):
    """A locked, referenced, zeroed folio, its mark, and the page index of its head."""

    folio: Folio
    pgoff: Index
    no_direct_map: bool


class Held(NamedTuple):
    """A referenced, unlocked folio of a range under the exclusive lock, with what the trees say of it.

    pgoff and gfn are those of its head.
    """

    folio: Folio
    pgoff: Index
    gfn: Gfn | None
    private: bool


def bound_gfn(entry: int) -> Gfn:
    """The gfn that *entry* of the bindings, which is no hole, binds a page to."""
    return Gfn(entry - 1)


def filled(entries: Sequence[int]) -> int:
    """How many of *entries* are no holes."""
    return len(entries) - entries.count(0)


class Gmem(Protocol):
    """One guest_memfd of *size* pages, in folios of *order*; Steps of a method are what it asks the host for."""

    host: Host
    ops: GuestMemfdOps
    size: int
    order: int
    splits: bool
    no_direct_map: bool

    @property
    def power(self) -> PowerPolicy:
        """How hibernation is kept away from its pages."""

    def has(self, start: Index, nr: int) -> bool:
        """Whether [start, start+nr) is a range of the file."""

    def whole(self, *numbers: int) -> bool:
        """Whether all *numbers* (page indexes, lengths, gfns) are multiples of a folio's size."""

    # power.py

    def account(self, pages: int) -> Steps[int]:
        """So many pages leave the host (+) or come back (-)."""

    # direct_map.py

    def zap(self, folio: Folio) -> Steps[int]:
        """Out of the direct map, and of the TLBs."""

    def zap_noflush(self, folio: Folio) -> Steps[int]:
        """The same without the flush, for a batch."""

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """One flush for all folios of a batch."""

    def restore(self, folio: Folio) -> Steps[int]:
        """Back into the direct map."""

    # folio.py

    def grab_folio(self, index: Index) -> Steps[Grabbed | int]:
        """Find or allocate a folio, locked and zeroed."""

    def add_folio(self, index: Index, small: bool) -> Steps[Lookup | int]:
        """Allocate a folio for a page."""

    def order_at(self, index: Index) -> Steps[int]:
        """Of the folio that a page can be part of."""

    def zero(self, folio: Folio) -> Steps[None]:
        """Zero a folio for its first use in this life."""

    def unlock_and_put(self, folio: Folio) -> Steps[None]:
        """Let go of what was grabbed."""

    def present(self, start: Index, nr: int) -> Steps[tuple[Held, ...]]:
        """All folios of a range, referenced."""

    def put_all(self, folios: tuple[Held, ...]) -> Steps[None]:
        """Drop the references that `present` has taken."""

    def invalidate_guest(self, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, Index]]:
        """Ask the hypervisor for the folios, before anything is changed."""

    def remove_folio(self, held: Held) -> Steps[int]:
        """One folio leaves the file."""

    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """Scrub a folio, and put it back into the direct map."""

    def take_back(self, held: Held) -> Steps[int]:
        """The hypervisor gives a folio back."""

    def leak(self, held: Held) -> Steps[None]:
        """The hypervisor never will: the folio is given up and counted."""

    # fault.py

    def fault_bound(self, gfn: Gfn, index: Index) -> Steps[int]:
        """A guest's fault, under the lock, of a page that is bound there."""

    def give_private(self, gfn: Gfn, grabbed: Grabbed) -> Steps[int]:
        """A private page leaves the host and is given to the guest."""

    def fault_shared(self, index: Index) -> Steps[VmFault]:
        """A VMM's fault, under the lock."""

    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        """A shared page is in the direct map before the VMM has it."""

    # large.py

    def single_pages(
        self, start: Index, nr: int, folios: tuple[Held, ...], cut: tuple[Held, ...],
    ) -> Steps[tuple[int, Index, tuple[Held, ...]]]:
        """Some folios of a range are split, and all of it is looked up anew."""

    def split(self, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
        """Make single pages of folios."""

    def split_locked(self, held: Held, marked: bool) -> Steps[int]:
        """Make single pages of a folio that is locked."""

    def merge(self, start: Index, nr: int) -> Steps[None]:
        """Make large folios of pages that have become alike."""

    # convert.py

    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """Shared to private, under the lock."""

    def check_and_commit_private(self, start: Index, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
        """All that can fail, and then the store."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        """Who else refers to a folio?"""

    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """Private to shared, under the lock."""

    def give_to_host(self, folios: tuple[Held, ...]) -> Steps[Conversion]:
        """The guest lets go of the folios, with their contents."""

    # invalidate.py

    def remove_range(self, start: Index, nr: int, reason: Reason) -> Steps[Conversion]:
        """What a punch and the end of the file have in common."""

    def take_from_users(self, folio: Folio) -> Steps[int]:
        """Guest and VMM lose a folio whose memory is broken."""

    # file.py

    def alloc_inode(self) -> Steps[int]:
        """The inode of a new file."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        """Which of its pages are private at first, and which are shared."""

    def split_to_bind(self, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
        """Make single pages of the folios that a binding would cut."""

    def teardown_bindings(self, start: Index, nr: int) -> Steps[tuple[int, bool]]:
        """Bindings of a dying VM end; and whether they were the file's last."""

    def unbind_locked(self, start: Index, nr: int, reason: Reason) -> Steps[tuple[Conversion, bool]]:
        """A binding, or what a dying VM has bound, goes; and whether it was the last."""

    def take_all_back(self, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, Index]]:
        """The hypervisor gives back what was bound."""

    def take_parts_back(self, held: Held) -> Steps[int]:
        """The same of a large folio that does not come back as a whole."""

    def close(self) -> Steps[None]:
        """A reference on the file goes, and perhaps the file."""

    def evict(self) -> Steps[None]:
        """The inode goes, and with it every page."""
