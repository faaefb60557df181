"""The operations table a hypervisor supplies to the library, and what each entry promises.

The set is chosen so that the objections to the posted tables do not apply (docs/library.md names them):

* conversion and teardown are different calls: `make_shared` preserves contents, `reclaim` need not;
* only `invalidate` may refuse, it is asked for every page before anything is changed, and never during teardown;
* there is no invalidate_end: the library pairs gmem_invalidate_begin and _end itself, no matter who refuses in between;
* nothing is called after `release`, before the file is bound again; the library holds the module until the inode has gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.units import Gfn

Reason = Literal["to_private", "to_shared", "punch", "unbind", "error", "teardown"]
"""Why a page is taken from the guest. Under ``teardown`` the VM is dying and `invalidate` may not refuse."""


class GuestMemfdOps(ABC):
    """What the library asks of a hypervisor's driver. All calls may sleep.

    A folio is referenced, and either locked or in a range for which the invalidate lock is held exclusively; *gfn* is
    that of its first page, a multiple of its size, and all of it has one attribute.
    Every procedure returns 0 or -errno. An entry that fails leaves the page as it was, or in a state from which the
    same entry can be called again. -EIO from `invalidate` or `reclaim` is final: the page will never come back.
    """

    module: str
    """Name of the module this code lives in; the library holds it while a file exists."""

    scrubs: bool = False
    """Whether `reclaim` leaves zeros, so that the library need not write them."""

    def __init__(self) -> None:
        self.host = Host(self.module)

    @abstractmethod
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Make *folio* the guest's alone and map it at *gfn*; repeatable if the page is the guest's already."""

    @abstractmethod
    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Map *folio* at *gfn* for guest and host together."""

    def split(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """The parts of *folio* go different ways from now on: nothing of the hypervisor's is larger than a page of it.

        What the guest has it keeps, with its contents. Called before anything is changed, so it may fail. Not needed by a
        hypervisor that splits what it has when a part of it is asked for, or that can do without.
        """
        yield from ()
        return 0

    def by_page(self, already: int, name: str, gfn: Gfn | None, folio: Folio, *args: object) -> Steps[int]:
        """Hypercall *name* about *folio*; about each page of it if the answer is *already*, for it may be so of a part only.

        *gfn*, None for a call that takes none, and *args* are those of the call. 0, the first other -errno, or *already*
        if it is so of every page.
        """
        ret = yield from self._call(name, gfn, folio, args)
        if ret != already or not folio.order:
            return ret
        for at, pfn in enumerate(folio.pfns):
            one = yield from self._call(name, None if gfn is None else gfn + at, Folio(pfn), args)
            if one not in (0, already):
                return one
            ret = ret and one
        return ret

    def _call(self, name: str, gfn: Gfn | None, folio: Folio, args: tuple[object, ...]) -> Steps[int]:
        about = (folio,) if gfn is None else (gfn, folio)
        return (yield from self.host.hyp_call(name, *about, *args))

    @abstractmethod
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """See to it that the guest cannot reach *folio*; -EBUSY if the guest holds on to it (not under teardown).

        A shared folio (*private* False) is wholly the host's afterwards; a private one is still the guest's.
        """

    @abstractmethod
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Give an invalidated private *folio* back to the host with its contents."""

    @abstractmethod
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """The library calls *folio* private from now on; cannot fail. For guests that kept it mapped while shared."""

    @abstractmethod
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Give an invalidated *folio* back to the host for good; contents need not survive."""

    def release(self) -> Steps[None]:
        """What the file was to its VM is over: free what is kept of it, then call this. Nothing else is called after."""
        yield from self.host.ops_released()
