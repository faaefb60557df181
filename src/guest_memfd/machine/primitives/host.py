"""The emulated host as procedures see it: a primitive comes in, the machine moves, a result goes out.

Primitives are called from here only. Frozen tasks and the end of the kernel are dealt with here, as on the abstract host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from guest_memfd.errors import DesignRaised
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.directmap import DirectMap
from guest_memfd.machine.primitives.lifetime import Lifetimes
from guest_memfd.machine.primitives.locks import Locks
from guest_memfd.machine.primitives.power import PowerPrimitives
from guest_memfd.plugins.guard import Guard, where
from guest_memfd.words.outcome import STAY, Blocked
from guest_memfd.words.primitives import Bound, Caller, Primitive, Steps
from guest_memfd.words.scene import Scene

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board, Judge
    from guest_memfd.machine.hypcalls.vm import Vm


MOST, MOST_PER_FOLIO = 100_000, 100
"""Primitives that a procedure of a third party's may ask for: these, and so many more for each folio in the file."""


class EmulatedHost(Lifetimes, Locks, DirectMap, PowerPrimitives):
    """One guest_memfd file of *size* pages on *machine*, bound to *vm*.

    tasks: numbers of the parties that freezing stops. judge: told of every primitive and the facts it left;
    default: the machine's. scene: whose memslots vCPUs go by; default: whatever is bound. bounds, errnos: what the design
    says that operations cost at most, and may return.
    """

    theirs = ""
    """Whose procedures it runs, in words, if any of their code is a third party's."""

    def __init__(
        self, machine: Board, vm: Vm, size: int, *, tasks: frozenset[int] = frozenset(), judge: Judge | None = None,
        scene: Scene | None = None, bounds: Mapping[str, Bound] | None = None,
        errnos: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.machine, self.vm, self.tasks, self.judge = machine, vm, tasks, judge
        self.scene, self.bounds, self.errnos = scene, bounds or {}, errnos or {}
        self.inode = Inode(size, machine.module.name)
        self.who, self.caller, self.notes = 0, "library", []

    def perform(self, primitive: Primitive, who: int) -> Any:
        """Carry *primitive* out for task *who*; raises Blocked when it has to wait, KernelPanic when Linux stops.

        What the laws should know is in `notes` afterwards.
        """
        self.notes = []
        # A frozen task runs nothing, not even what it had begun.
        if who in self.tasks and self.machine.power.frozen:
            raise Blocked
        self.who, self.caller = who, primitive.caller
        try:
            self.must_be_there(primitive)
            return getattr(self, primitive.name)(*primitive.args)
        except KernelPanic as panic:
            self.machine.panicked(panic)
            raise
        finally:
            judge = self.judge or self.machine.judge
            if judge is not None:
                judge(primitive, self.notes)

    def perform_by_name(self, name: str, *args: Any, caller: Caller = "user") -> Any:
        """Carry out one primitive that belongs to no procedure, such as a system call's own."""
        return self.perform(Primitive(name, args, caller), 0)

    def run(self, procedure: Steps[Any], who: int = 0) -> Any:
        """Drive *procedure* to its end with no one else around: what it returns.

        Raises Blocked when it would wait without end, KernelPanic when Linux stops, DesignRaised for what a third party does
        wrong.
        """
        result: Any = None
        asked = 0
        while True:
            with Guard(self.theirs or "a procedure of the library", timed=bool(self.theirs)):
                try:
                    primitive = procedure.send(result)
                except StopIteration as stop:
                    return stop.value
            asked += 1
            if self.theirs and asked > MOST + MOST_PER_FOLIO * len(self.inode.pages):
                raise DesignRaised(f"{self.theirs} does not come back: after {asked:,} primitives it is still at "
                                   f"{where(procedure)}")
            result = self.perform(primitive, who)
            if result is STAY:                          # queued for a lock: no one is there who would let go of it
                raise Blocked
