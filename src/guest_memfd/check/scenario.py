"""From names to something that can be explored: the machine, the programs, and the state they start in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from guest_memfd.check.explorer import Explorer, Program, Tables, resume
from guest_memfd.designs.design import Design
from guest_memfd.errors import DesignRaised, InternalError
from guest_memfd.hosts.abstract import AbstractHost
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.host import Primitive
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.laws import LAWS, Law
from guest_memfd.scenarios import TEARDOWN, Party


class World:
    """One design under one hypervisor: all its scenarios share the tables kept here."""

    def __init__(
        self, design: type[Design], hypervisor: Hypervisor, parties: Sequence[Party], *, failures: int = 1,
        laws: Sequence[Law] = tuple(LAWS.values()),
    ) -> None:
        self.design, self.hypervisor = design, hypervisor
        self.library = design(hypervisor.ops(), st.PAGES)
        self.parties = [p for p in parties if p.exists(self.library, hypervisor)]
        if len(self.parties) >= st.PARTIES:
            raise InternalError(f"the abstract host has room for {st.PARTIES - 1} parties")
        self.programs = {p.name: self._program(i, p) for i, p in enumerate(self.parties)}
        self.teardown = self._program(st.PARTIES - 1, TEARDOWN)
        tasks = frozenset(i for i, p in enumerate(self.parties) if p.task)
        self.machine = AbstractHost(hypervisor, sea_fixup=design.sea_fixup, tasks=tasks)
        self.laws = laws
        self.initial = self._initial(failures)
        self.tables = Tables(self.machine, laws)

    def _program(self, number: int, party: Party) -> Program:
        return Program(number, party.name, lambda: party.procedure(self.library, self.hypervisor))

    def _initial(self, failures: int) -> bytes:
        number = st.PARTIES - 2
        create = Program(number, "create", lambda: self.library.create(st.PAGES, self.design.born_shared))
        shared, ret = run_alone(self.machine, create, self.machine.initial())
        bind = Program(number, "bind", lambda: self.library.bind(0, 0, st.PAGES))
        shared, bound = run_alone(self.machine, bind, shared)
        if ret or bound:
            raise DesignRaised(f"design {self.design.name!r} cannot create and bind a file: {ret}, {bound}")
        state = st.State(shared)
        state.failures = failures
        return state.save()

    def explorer(self, names: Sequence[str], tables: Tables | None = None) -> Explorer:
        """The scenario of the parties *names*; fresh *tables* make its result independent of what ran before."""
        return Explorer(tables or self.tables, [self.programs[n] for n in names], self.initial, self.teardown)


def run_alone(
    machine: AbstractHost, program: Program, shared: bytes, seen: Callable[[Primitive], None] = lambda _: None
) -> tuple[bytes, Any]:
    """Drive one procedure to its end with nobody else around and no failures: the state, and what it returned.

    *seen* is told of every primitive.
    """
    generator, primitive = resume(program, ())
    while primitive is not None:
        seen(primitive)
        outcomes = machine.outcomes(shared, program.number, primitive)
        if not outcomes:
            raise DesignRaised(f"{program.name} waits for ever in {primitive}")
        shared = outcomes[0].shared
        if machine.halted(shared):
            raise DesignRaised(f"the kernel panics in {program.name}: {outcomes[0].notes}")
        try:
            primitive = generator.send(outcomes[0].result)
        except StopIteration as stop:
            return shared, stop.value
    return shared, None
