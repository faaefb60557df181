"""From names to something that can be explored: the machine, the programs, and the state they start in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from guest_memfd.check.explorer import Explorer, Program, Tables, describe, perform, resume, send
from guest_memfd.check.outcome import Outcome
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.errors import BadInput, DesignRaised
from guest_memfd.hosts.abstract import AbstractHost
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.host import Primitive
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.laws import LAWS, Law
from guest_memfd.scenarios import PARTIES, TEARDOWN, Party


class World:
    """One design under one hypervisor: all its scenarios share the tables kept here."""

    def __init__(
        self, design: type[Design], hypervisor: Hypervisor, parties: Sequence[Party], *, failures: int = 1,
        laws: Sequence[Law] = tuple(LAWS.values()), merges_leaves: bool = False,
    ) -> None:
        self.design, self.hypervisor = design, hypervisor
        try:
            self.library = design(hypervisor.ops(), st.PAGES)
        except Exception as error:
            raise DesignRaised(f"design {design.name!r} cannot be made: {describe(error)}") from error
        self.parties = [p for p in parties if p.exists(self.library, hypervisor)]
        if len(self.parties) >= st.PARTIES:
            raise BadInput(f"{len(self.parties)} parties are registered, and the abstract host has room for "
                           f"{st.PARTIES - 1}; uninstall a plugin")
        self.programs = {p.name: self._program(i, p) for i, p in enumerate(self.parties)}
        self.teardown = self._program(st.PARTIES - 1, TEARDOWN)
        tasks = frozenset(i for i, p in enumerate(self.parties) if p.task)
        self.machine = AbstractHost(hypervisor, sea_fixup=design.sea_fixup, tasks=tasks, merges_leaves=merges_leaves)
        self.laws = laws
        self.broken_before: list[tuple[str, str]] = []
        self.initial = self._initial(failures)
        self.tables = Tables(self.machine, laws)

    def _program(self, number: int, party: Party) -> Program:
        return Program(number, party.name, lambda: party.procedure(self.library, self.hypervisor))

    def _initial(self, failures: int) -> bytes:
        number = st.PARTIES - 2
        create = Program(number, "create", lambda: self.library.create(st.PAGES, self.design.born_shared))
        shared, ret = run_alone(self.machine, create, self.machine.initial(), self._judge)
        bind = Program(number, "bind", lambda: self.library.bind(0, 0, st.PAGES))
        shared, bound = run_alone(self.machine, bind, shared, self._judge)
        if ret or bound:
            raise DesignRaised(f"design {self.design.name!r} cannot create and bind a file: {ret}, {bound}")
        state = st.State(shared)
        state.failures = failures
        return state.save()

    # What breaks while the scene is set is a finding of no steps.
    def _judge(self, _primitive: Primitive, outcome: Outcome) -> None:
        for law in self.laws:
            evidence = [law.in_state(outcome.shared), *map(law.on_note, outcome.notes)]
            self.broken_before += [(law.name, words) for words in evidence if words is not None]

    def must_have(self, names: Sequence[str]) -> None:
        """Raise BadInput unless *names* can be a scenario here: at least one, none twice, all of them there."""
        if not names:
            raise BadInput("a scenario needs at least one party")
        for name in names:
            if name not in self.programs:
                raise BadInput(f"party {PARTIES[name].name!r} cannot exist with design {self.design.name!r} "
                               f"under {self.hypervisor.name!r}")
        if len(set(names)) < len(names):
            raise BadInput(f"a party can be in a scenario only once, not as in {', '.join(names)}")

    def explorer(self, names: Sequence[str], tables: Tables | None = None) -> Explorer:
        """The scenario of the parties *names*; fresh *tables* make its result independent of what ran before."""
        programs = [self.programs[n] for n in names]
        return Explorer(tables or self.tables, programs, self.initial, self.teardown, self.broken_before)


def world(
    design: str | type[Design], hypervisor: str | Hypervisor, *, failures: int = 1, laws: Sequence[str] | None = None
) -> World:
    """The world of *design* under *hypervisor* with every party there is; laws by name, None for all.

    Raises UnknownName, PluginError, and BadInput where the design was not posted for the hypervisor.
    """
    if isinstance(design, str):
        design = DESIGNS[design]
    if isinstance(hypervisor, str):
        hypervisor = HYPERVISORS[hypervisor]
    if design.hypervisors is not None and hypervisor.name not in design.hypervisors:
        raise BadInput(
            f"design {design.name!r} was posted for {', '.join(design.hypervisors)} only, not for {hypervisor.name!r}"
        )
    judged = [law for law in LAWS.values() if laws is None or law.name in laws]
    return World(design, hypervisor, [PARTIES[name] for name in PARTIES], failures=failures, laws=judged)


def run_alone(
    machine: AbstractHost, program: Program, shared: bytes,
    seen: Callable[[Primitive, Outcome], None] = lambda _primitive, _outcome: None,
) -> tuple[bytes, Any]:
    """Drive one procedure to its end with nobody else around and no failures: the state, and what it returned.

    *seen* is told of every primitive and its outcome.
    """
    generator, primitive = resume(program, ())
    while primitive is not None:
        outcomes = perform(machine, shared, program.number, primitive)
        if not outcomes:
            raise DesignRaised(f"{program.name} waits for ever in {primitive}")
        seen(primitive, outcomes[0])
        shared = outcomes[0].shared
        if machine.halted(shared):
            raise DesignRaised(f"the kernel panics in {program.name}: {outcomes[0].notes}")
        try:
            primitive = send(program, generator, outcomes[0].result)
        except StopIteration as stop:
            return shared, stop.value
    return shared, None
