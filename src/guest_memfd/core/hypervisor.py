"""What a hypervisor is to this project: its driver's half (core/ops.py) and its own half, the code that hypercalls run.

The own half is a table of plain functions over `Stage2`, the little that any machine's EL2 code can do to a page. So it
is written once and runs on every host that offers `Stage2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.errors import shown
from guest_memfd.words.primitives import MAX_ERRNO, Folio, Steps
from guest_memfd.words.units import Gfn, Index, Pfn

if TYPE_CHECKING:
    from guest_memfd.core.library import Library

Owner = Literal["host", "guest", "shared", "borrowed"]


def check_owner(owner: str) -> None:
    """Raise ValueError for what is no `Owner`."""
    if owner not in get_args(Owner):
        raise ValueError(f"{owner!r} is recorded as the owner of a page; an owner is {', '.join(get_args(Owner))}")


# What the host gets for an access to a lent page: with the first no exception table is asked, with the others it is.
SEA = "synchronous external abort"
DATA_ABORT = "translation fault with S1PTW"
RMP_FAULT = "page fault of the RMP check"
GPF = "granule protection fault"
SECURE_STORAGE = "secure storage access exception"


class Stage2(Protocol):
    """The hypervisor's records and page tables. Each call of a hypercall's code is one atomic step of the machine."""

    def owner(self, pfn: Pfn) -> str:
        """host; guest (donated); shared (the host's, both may use it); borrowed (the guest's, the host may use it).

        ``other guest``: a guest of another VM has it.
        """

    def set_owner(self, pfn: Pfn, owner: Owner) -> None:
        """Record *owner* as the owner of the page; neither the host's nor a guest's mapping changes."""

    def host_maps(self, pfn: Pfn, allowed: bool, order: int = 0) -> None:
        """Let the host's stage 2 map 2^*order* pages, or not; taking them away flushes the host's TLBs of both stages."""

    def host_leaf(self, pfn: Pfn) -> int:
        """The order of the entry that says what the host may do to the page."""

    def host_split(self, pfn: Pfn, order: int) -> None:
        """Make entries of single pages of what says so of 2^*order* pages."""

    def guest_map(self, gfn: Gfn, pfn: Pfn, order: int = 0) -> None:
        """Map 2^*order* pages into the guest, from *gfn* and *pfn* on: as one leaf where both are multiples of that."""

    def guest_leaf(self, gfn: Gfn) -> int:
        """The order of the leaf that maps *gfn*, 0 if nothing does."""

    def guest_split(self, gfn: Gfn, order: int) -> None:
        """Make leaves of single pages of what maps [gfn, gfn + 2^order), which stays mapped."""

    def guest_unmap(self, gfn: Gfn, pfn: Pfn, *, flush: bool = True) -> bool:
        """Unmap it; False if gfn did not map it. Without *flush* (NOSYNC) TLBs may keep the entry.

        A leaf that maps more goes as a whole: who wants to keep the rest splits it first.
        """

    def gfn_of(self, pfn: Pfn) -> Gfn | None:
        """The gfn that maps the page."""

    def scrub(self, pfn: Pfn) -> None:
        """Write zeros over the page from EL2, which needs no mapping of the host's."""

    def zeroed(self, pfn: Pfn) -> None:
        """The page is zeros, and whoever uses it from now on knows it: it has been accepted by its guest."""

    def lose(self, pfn: Pfn, how: str) -> None:
        """The contents are lost: to who asked for that, or to a guest that did not, if the request is about other pages."""

    def destroy(self, pfn: Pfn, gfn: Gfn, how: str) -> None:
        """Scrub a living guest's page without its consent and mark its entry POISONED."""

    def poisoned(self, gfn: Gfn) -> bool:
        """Whether the guest's entry says POISONED: its page was destroyed."""

    def locked_in(self, pfn: Pfn) -> bool:
        """Whether the guest holds on to the page."""

    def set_locked_in(self, pfn: Pfn, locked: bool) -> None:
        """Record that the guest holds on, or lets go."""

    def declassify(self, pfn: Pfn) -> None:
        """The guest agrees that the host reads the page."""

    def forget(self, pfn: Pfn) -> None:
        """The guest no longer relies on the contents."""

    def vm_alive(self) -> bool:
        """Whether the VM runs (not dying)."""

    def refuse(self, call: str, errno: int) -> int:
        """Return -errno: refused by rule."""


def all_owned(stage2: Stage2, folio: Folio, owner: Owner) -> bool:
    """Whether *owner* is what is recorded of every page of *folio*."""
    return all(stage2.owner(pfn) == owner for pfn in folio.pfns)


Hypercall = Callable[..., int]


class LendingDriver(Protocol):
    """A driver that lends pages on demand: no one but it says when a page changes hands. Procedures over the library.

    Ranges are in pages of the file; all return 0 or -errno.
    """

    def demand_page(self, library: Library, gfn: Gfn, index: Index, *, lend: bool = True,
                    writable: bool = True) -> Steps[int]:
        """Give the guest page *index* at *gfn*, lent or shared; an error is user space's to see."""

    def mmap(self, library: Library, start: Index, nr: int) -> Steps[int]:
        """Map [start, start+nr) into the VMM, once the guest has let go of it."""

    def unbind(self, library: Library, start: Index, nr: int) -> Steps[int]:
        """End the binding of [start, start+nr); its pages are the VMM's."""

    def abandon(self, library: Library, ranges: Sequence[tuple[Index, int]]) -> Steps[int]:
        """The VM is dying: end its bindings, each (first page, length)."""


def _nothing(_stage2: Stage2, _pfn: Pfn) -> None:
    return None


def _never(_stage2: Stage2, _pfn: Pfn) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Hypervisor:
    """A hypervisor as scenarios use it.

    abort: the kind it injects for a host access to a page that stage 2 withholds, None if there is no host stage 2.
    hypercalls: name -> code(stage2, *args) -> 0 or -errno. fallible: name -> -errno of an injected failure, which passes.
    final: name -> -errno of a refusal for good: the page in question will never come back.
    errnos: operation of the library -> errno values that it can have under this hypervisor on top of the documented ones.
    guards: which accesses of the host it withholds: all to such a page, or writes through an entry that maps one.
    encrypts: what the host reads of a guest's page is ciphertext.
    tracks_owner: whether it keeps ownership at all (plain KVM does not).
    exports: has a page that the host has touched given to it, encrypted, and the access is repeated; False if it cannot be.
        No exception table is asked before. What the host then writes there its guest will not have back.
    consents: in words, what `guest_consents` is to this guest; None if its guests cannot give a page up.
    lending: in words, what it calls giving a page to a guest alone, and taking it back; None if it has no words of its own.
    large: whether its operations take folios of more than one page.
    driver: decides when pages are lent and taken back; None where user space does, by conversions.
    """

    name: str
    title: str
    module: str
    ops: Callable[[], GuestMemfdOps]
    hypercalls: Mapping[str, Hypercall]
    fallible: Mapping[str, int]
    abort: str | None
    tracks_owner: bool
    consents: str | None = None
    guest_consents: Callable[[Stage2, Pfn], None] = _nothing
    guest_touches: Callable[[Stage2, Pfn], None] = _nothing
    force_reclaim: Callable[[Any, Pfn], bool] = _never
    exports: Callable[[Any, Pfn], bool] = _never
    pfn_cache: bool = False
    large: bool = False
    guards: Literal["accesses", "writes"] = "accesses"
    encrypts: bool = False
    final: Mapping[str, int] = field(default_factory=dict)
    errnos: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    driver: LendingDriver | None = None
    lending: str | None = None

    def wrong_result(self, name: str, ret: object) -> str | None:
        """What is wrong with *ret* as the result of hypercall *name*, in words; None when it is 0 or -errno."""
        if type(ret) is int and -MAX_ERRNO <= ret <= 0:
            return None
        return f"hypercall {name!r} of {self.name!r} returned {shown(ret)}, not 0 or -errno"
