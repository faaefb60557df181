"""What the mixins of the abstract host share: the state under the knife, and how a primitive waits or dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from guest_memfd.hosts.abstract import notes
from guest_memfd.hosts.abstract import state as st

if TYPE_CHECKING:
    from guest_memfd.hypervisors.hypervisor import Hypervisor


class Blocked(Exception):  # noqa: N818 - a signal, not an error
    """The primitive has to wait."""


class Panicked(Exception):  # noqa: N818
    """The kernel stopped in the middle of the primitive."""


class Base:
    """The state a primitive works on, who asked for it, and what it leaves for the laws."""

    hypervisor: Hypervisor
    sea_fixup: bool
    tasks: frozenset[int]

    def __init__(self) -> None:
        self.state = st.State()
        self.notes: list[Any] = []
        self.who = 0
        self.caller = "library"

    def wait(self) -> NoReturn:
        """The primitive cannot go on now; whoever asked waits."""
        raise Blocked

    def panic(self) -> NoReturn:
        """The kernel stops after an abort that has been noted."""
        raise Panicked

    def die(self, why: str) -> NoReturn:
        """The kernel stops for a reason that is no abort: BUG_ON, a wild pointer."""
        self.notes.append(notes.Broken(why))
        raise Panicked

    def guests(self, frame: st.Frame) -> bool:
        """Whether *frame* is private to the guest: by the hypervisor, by what it holds, or by the library's word."""
        if frame.owner == st.GUEST or frame.content == st.SECRET:
            return True
        return bool(frame.gmap) and bool(frame.slot) and self.state.private(frame)

    def out_of_scope(self, what: str, index: int) -> None:
        """Note it when the current party's operation is not about page *index*."""
        ghost = self.state.ghost(self.who)
        if ghost.op and not ghost.scope >> index & 1:
            self.notes.append(notes.OutOfScope(st.OPS[ghost.op - 1], what, index))
