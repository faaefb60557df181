"""What the mixins of the abstract host share: the state that they change, and how a primitive waits or dies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from guest_memfd.abstract import state as st
from guest_memfd.words import facts
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.pagestate import EVICTED, GUEST, MANY, SECRET
from guest_memfd.words.primitives import OPS
from guest_memfd.words.units import Gfn, Index

if TYPE_CHECKING:
    from guest_memfd.core.hypervisor import Hypervisor
    from guest_memfd.words.scene import Kernel, Scene


class Panicked(Exception):  # noqa: N818
    """The kernel stopped in the middle of the primitive."""


class AbstractBase:
    """The state a primitive works on, whose file and VM it is about, who asked for it, and what it leaves for the laws."""

    hypervisor: Hypervisor
    kernel: Kernel
    scene: Scene
    sea_fixup: bool
    tasks: frozenset[int]
    sizes: st.Sizes
    indexes: Sequence[Index]            # of all pages of a file
    state: st.State
    file: st.FileRecord
    vm: st.VmRecord

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.who = 0
        self.caller = "library"

    def wait(self) -> NoReturn:
        """The primitive cannot go on now; the caller waits."""
        raise Blocked

    def panic(self) -> NoReturn:
        """The kernel stops after an abort that has been noted."""
        raise Panicked

    def die(self, why: str) -> NoReturn:
        """The kernel stops for a reason that is no abort: BUG_ON, a wild pointer."""
        self.notes.append(facts.Broken(why))
        raise Panicked

    def gone(self, what: str) -> NoReturn:
        """The primitive was called on an object whose memory is gone: no one can say what happens next."""
        self.notes.append(facts.UseAfterFree(what))
        raise Panicked

    # -- numbers: of pages and gfns, counted on from file to file and from VM to VM --------------------------------

    def page(self, index: Index) -> st.PageRecord:
        """Page *index* of the file; outside of it the kernel stops."""
        # A design that asks for a page beyond the file has a bug that real memory would hide; here the kernel stops,
        # and the trace ends at the line that asked.
        if not 0 <= index < self.sizes.pages:
            self.die(f"page {index} is used, of a file of {self.sizes.pages} pages")
        return self.state.page(self.file.number * self.sizes.pages + index)

    def index(self, number: int) -> Index:
        """The page index, in its own file, of page record *number*."""
        return Index(number % self.sizes.pages)

    def ours(self, frame: st.Frame) -> Index | None:
        """The page index at which the current file holds *frame*."""
        number = frame.slot - 1 - self.file.number * self.sizes.pages
        return Index(number) if frame.slot and 0 <= number < self.sizes.pages else None

    def gfn(self, gfn: Gfn) -> st.GfnRecord:
        """Record of *gfn* of the VM; outside of what it has the kernel stops."""
        if not 0 <= gfn < self.sizes.gfns:
            self.die(f"gfn {gfn} is used, of a VM of {self.sizes.gfns} guest frames")
        return self.state.gfn(self.vm.number * self.sizes.gfns + gfn)

    # -- what the laws are told --------------------------------------------------------------------------------------

    def guests(self, frame: st.Frame) -> bool:
        """Whether *frame* is private to a guest: by the hypervisor, by what it holds, or by the library's word."""
        if frame.owner == GUEST or frame.content == SECRET:
            return True
        return bool(frame.gmap) and bool(frame.slot) and self.state.private(frame)

    def under_way(self) -> str | None:
        """The operation that the current party is in."""
        op = self.state.ghost(self.who).op
        return OPS[op - 1] if op else None

    def out_of_scope(self, what: str, index: Index) -> None:
        """Note it when the current party's operation is not about page *index*; an eviction is about all pages."""
        ghost = self.state.ghost(self.who)
        # Eviction is about the whole file, whatever operation dropped the last reference.
        if ghost.op and self.file.inode != EVICTED and not ghost.scope >> index & 1:
            self.notes.append(facts.OutOfScope(OPS[ghost.op - 1], what, index))

    def done_to(self, what: str, index: Index, *, always: bool = False) -> None:
        """The current party's operation does something to page *index* that users of it must hear of beforehand.

        *always*: that is so even if the operation has begun no invalidation at all: there is a VM to be told.
        """
        self.out_of_scope(what, index)
        ghost = self.state.ghost(self.who)
        if ghost.op and (always or ghost.begun) and not ghost.announced >> index & 1:
            self.notes.append(facts.Unannounced(OPS[ghost.op - 1], what, index))

    def count(self, what: str) -> None:
        """The operation that the current party is in asks for one more of *what*: writes, flushes, calls, stalls."""
        ghost = self.state.ghost(self.who)
        if ghost.op:
            # Up to the largest number that a byte holds: no bound that a design states comes near it.
            setattr(ghost, what, min(getattr(ghost, what) + 1, MANY))

    def against(self, reason: int, frame: st.Frame | None = None) -> None:
        """Something stands against the operation that the current party is in: at *frame*'s folio, if it is one's doing."""
        ghost = self.state.ghost(self.who)
        if not ghost.op:
            return
        ghost.reasons |= reason
        for part in () if frame is None else self.state.parts(self.state.head(frame)):
            index = self.ours(part)
            if index is not None:
                ghost.places |= 1 << index

    # -- how an operation has ended, until its caller is told ----------------------------------------------------------

    def how_ended(self, ghost: st.PartyGhost) -> facts.HowEnded | None:
        """What the operation has said at its end, None if it has said nothing."""
        if not ghost.ended:
            return None
        about = self.members(ghost.scope)
        return facts.HowEnded(
            OPS[ghost.ended_op - 1], 1 - ghost.ended, range(about[0], about[-1] + 1) if about else range(0),
            ghost.ended_at - 1 if ghost.ended_at else None, ghost.gfn - 1 if ghost.gfn else None)

    def refused(self, op: str, errno: int) -> None:
        """What is an operation for the laws, and one primitive here, has been refused."""
        ghost = self.state.ghost(self.who)
        ghost.ended, ghost.ended_op = 1 + errno, OPS.index(op) + 1

    def faulted_in(self, index: Index) -> None:
        """The party goes on at page *index* of its mapping: if it has faulted, it was told that it can."""
        ghost = self.state.ghost(self.who)
        if ghost.ended_op == OPS.index("user_fault") + 1 and not ghost.op:
            self.notes.append(facts.Returned("user_fault", index, 1, 0, None, self.sizes.pages, self.how_ended(ghost)))
            self.clear(ghost)

    @staticmethod
    def clear(ghost: st.PartyGhost) -> None:
        """The party is in no operation, and has been in none."""
        ghost.op = ghost.gfn = ghost.scope = ghost.toggled = ghost.removed = ghost.reasons = ghost.places = 0
        ghost.writes = ghost.flushes = ghost.calls = ghost.stalls = ghost.splits = 0
        ghost.ended = ghost.ended_op = ghost.ended_at = 0

    def members(self, mask: int) -> tuple[Index, ...]:
        """The page indexes of bit mask *mask*."""
        return tuple(i for i in self.indexes if mask >> i & 1)
