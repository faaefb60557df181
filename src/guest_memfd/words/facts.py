"""The facts a step leaves for the laws: who touched what, what became of an abort, what an operation returned.

A note says what happened, never whether that was right: judging is the job of laws/.
"""

from __future__ import annotations

from typing import NamedTuple

from guest_memfd.distinct import distinct
from guest_memfd.words.primitives import Bound, Cost
from guest_memfd.words.units import Gfn, Index, Pfn


@distinct
class Access(NamedTuple):
    """Someone reached the contents of a frame."""

    who: str                    # guest, VMM, kernel, device, image, allocator, library
    what: str                   # the primitive, in words
    via: str                    # direct map, stale TLB entry, user mapping, DMA, guest mapping, ...
    pfn: Pfn
    write: bool
    content: str                # before the access
    guests: bool                # the frame was private to the guest
    held: bool                  # the guest could still reach it, or owned it
    pgoff: Index | None         # page index at which the file holds it
    expect: str | None          # what a reader there must find; None: no one can say
    free: bool                  # the frame was free
    broken: bool                # its memory is broken, and memory_failure() has done with it


@distinct
class Abort(NamedTuple):
    """An access of the kernel did not get through."""

    what: str
    stage: int
    pfn: Pfn
    kind: str                   # translation fault, synchronous external abort, ...
    survived: bool
    why: str


@distinct
class DirectMapChange(NamedTuple):
    """A direct-map entry was written by the code of *caller*."""

    caller: str
    pfn: Pfn
    invalid: bool
    broken: bool = False                # its memory is broken, and memory_failure() has done with it


@distinct
class MadePrivate(NamedTuple):
    """A frame has just become private to the guest: by the library's word, or by the hypervisor's."""

    how: str
    pfn: Pfn
    pins: int                   # references through which someone may still touch it
    cached_mapping: bool        # a gfn_to_pfn_cache still maps it


@distinct
class StrayGuest(NamedTuple):
    """The guest reached a frame that is not its own any more."""

    pfn: Pfn
    via: str


@distinct
class Refused(NamedTuple):
    """The hypervisor refused a request as a rule, not as a failure."""

    call: str
    errno: int


@distinct
class OutOfScope(NamedTuple):
    """An operation did something to a page outside its range."""

    op: str
    what: str
    pgoff: Index


@distinct
class Unannounced(NamedTuple):
    """An operation did something to a page that no gmem_invalidate_begin() of its own has announced."""

    op: str
    what: str
    pgoff: Index


@distinct
class Rebound(NamedTuple):
    """A bind has overwritten the binding that a page had."""

    pgoff: Index


@distinct
class Ended(NamedTuple):
    """An operation has come to its end, and still holds its lock."""

    op: str
    ret: int
    error_index: Index | None
    scope: tuple[Index, ...]
    toggled: tuple[Index, ...]          # pages whose attribute is not what it was before
    removed: tuple[Index, ...]          # pages it took out of the page cache
    left: tuple[Index, ...]             # pages of the range that are in the page cache now
    attrs: tuple[int, ...]              # attributes of the range now
    bound: tuple[int, ...]              # for each page of the range the gfn + 1 it is bound to now, or 0
    batched: tuple[Index, ...]          # pages of the range that sit in an lru_add batch
    mapped: tuple[Index, ...]           # pages that who has faulted maps now: the guest where they are bound, or the VMM
    reasons: tuple[str, ...]            # what stood against it on the way
    places: tuple[Index, ...]           # pages at which something did
    gfn: Gfn | None                     # where the guest has faulted, if that is what it was about
    cost: Cost
    documented: tuple[int, ...]         # errno values that hypervisor and design add to those of the library
    bound_of_cost: Bound | None         # what the design says it costs at most, None if it says nothing
    asked: tuple[int, ...] = ()         # of a new file: the attributes that it was to have, where someone has said
    around: int = 0                     # pages of all the large folios that its range can have a part of
    leaves: int = 0                     # how many leaves, larger than a page, can lie over those in one table
    resumes: bool = False               # whether a refusal leaves done what lies before the page that it names


class HowEnded(NamedTuple):
    """What an operation has said at its end, until its caller is told."""

    op: str
    ret: int
    about: range = range(0)             # page indexes
    at: Index | None = None             # the page index that it has named
    gfn: Gfn | None = None              # of a bind: the first


@distinct
class Returned(NamedTuple):
    """A system call, or an exit of a vCPU, has returned to its caller."""

    op: str
    start: Index
    nr: int
    ret: int
    error_index: Index | None
    size: int                           # of the file, in pages
    how: HowEnded | None                # what the operation had said at its end, None if it never said
    begun: bool = False                 # an invalidation that was begun has not been ended
    gfn: Gfn | None = None              # of a bind: the first gfn that was asked for
    shared: tuple[int, ...] = ()        # of pages that were to be lent: those that the host shares now
    documented: tuple[int, ...] = ()    # errno values that the design adds to those of the library


@distinct
class Given(NamedTuple):
    """A page was mapped for *whom* while its memory was known to be broken."""

    whom: str
    pfn: Pfn


@distinct
class Contained(NamedTuple):
    """memory_failure() has done with a page of the file."""

    pfn: Pfn
    result: str                         # what error_remove_folio() said: delayed or failed
    reached: tuple[str, ...]            # who still reaches the page: guest, VMM, kernel
    reasons: tuple[str, ...]            # what stood against taking it away


@distinct
class UseAfterFree(NamedTuple):
    """A primitive was called on an object whose memory is gone."""

    what: str


@distinct
class Freed(NamedTuple):
    """The last reference of a frame went."""

    pfn: Pfn
    owner: str
    content: str
    guest_reaches: bool


@distinct
class Destroyed(NamedTuple):
    """Contents that someone relied on were lost without being asked for."""

    pfn: Pfn
    how: str


@distinct
class Broken(NamedTuple):
    """The kernel stopped for a reason that is no abort: BUG_ON, a wild pointer, code that is gone."""

    what: str


@distinct
class Warned(NamedTuple):
    """The kernel said WARN_ON(): something went wrong that could not be undone there."""

    what: str


Note = (Access | Abort | DirectMapChange | MadePrivate | StrayGuest | Refused | OutOfScope | Unannounced | Rebound | Ended
        | Returned | Given | Contained | Freed | Destroyed | UseAfterFree | Broken | Warned)
