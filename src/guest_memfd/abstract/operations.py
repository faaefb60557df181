"""Operations, as the laws see them: what one is about, what it does to which page, and how it has ended."""

from __future__ import annotations

from guest_memfd.abstract import state as st
from guest_memfd.abstract.base import AbstractBase
from guest_memfd.words import facts
from guest_memfd.words.pagestate import EVICTED
from guest_memfd.words.primitives import OPS
from guest_memfd.words.units import Index


class AbstractOperations(AbstractBase):
    """What primitives that are steps of an operation note of it."""

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

    def about_block(self, index: Index) -> bool:
        """Whether the current party's operation is about a page of the largest folio that page *index* can be part of."""
        order = self.sizes.order
        return bool(self.state.ghost(self.who).scope >> (index >> order << order) & (1 << (1 << order)) - 1)

    def done_to(self, what: str, index: Index, *, always: bool = False) -> None:
        """The current party's operation does something to page *index* that users of it must hear of beforehand.

        *always*: that is so even if the operation has begun no invalidation at all: there is a VM to be told.
        """
        self.out_of_scope(what, index)
        ghost = self.state.ghost(self.who)
        if ghost.op and (always or ghost.begun) and not ghost.announced >> index & 1:
            self.notes.append(facts.Unannounced(OPS[ghost.op - 1], what, index))

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
