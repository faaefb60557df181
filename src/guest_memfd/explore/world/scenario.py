"""From names to something that can be explored: the machine, the programs, and the state they start in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EOPNOTSUPP
from typing import Any

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.names import lacks as lacks_design
from guest_memfd.errors import BadInput, DesignRaised, GuestMemfdError, InternalError, PluginError, UnknownName, shown
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.place import local_key
from guest_memfd.explore.engine.program import Program, perform, resume, send
from guest_memfd.explore.engine.rehearsal import Rehearsal
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.world import choice
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.names import lacks as lacks_hypervisor
from guest_memfd.laws import LAWS, Law, judging
from guest_memfd.plugins.guard import Guard, asked_twice, foreign, foreign_modules, where
from guest_memfd.plugins.registry import Registry
from guest_memfd.scenarios import PARTIES, SCENES, TEARDOWN, Party
from guest_memfd.scenarios.party import lacks as lacks_party
from guest_memfd.scenarios.party import system_call
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import Host, Primitive, Steps
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import FIRST_PAGE

MOST_ALONE = 2000
"""Steps of a procedure that runs alone."""

MOST_ROLES = 250
"""A party's number is kept in a byte, beside 0 for no one; two numbers are the teardown's and the scene's."""


class World:
    """One design under one hypervisor in one scene: all its scenarios share the tables kept here.

    Raises BadInput where there are more parties than numbers, PluginError where the design defines what nothing will ever
    call, DesignRaised where it cannot be made.
    """

    def __init__(
        self, design: type[Design], hypervisor: Hypervisor, parties: Sequence[Party], *, scene: Scene | None = None,
        failures: int | None = None, laws: Sequence[Law] | None = None, engine: str | None = None, reduce: bool = False,
    ) -> None:
        self.design, self.hypervisor, self.scene = design, hypervisor, scene or SCENES["two-pages"]
        self.engine = engine
        _look_at(design, hypervisor)
        self.foreign = foreign(design, hypervisor.ops, *_code(hypervisor))
        self.named = f" of design {design.name!r} on {hypervisor.name!r}"
        self.library = _library(design, hypervisor, self.scene)
        for party in parties:
            if foreign(party.procedure) and (wrong := lacks_party(party)) is not None:
                raise PluginError(f"party {shown(party.name)}: {wrong}")
        self.parties = [p for p in parties if self._exists(p)]
        # Parties of one role are one task that does different things: they share a number, and with it the locks that
        # they hold.
        roles = list(dict.fromkeys(p.role or p.name for p in self.parties))
        if len(roles) > MOST_ROLES:
            raise BadInput(f"{len(roles)} parties are registered, and there are numbers for {MOST_ROLES}; "
                           "uninstall a plugin")
        self.programs = {p.name: self._program(roles.index(p.role or p.name), p) for p in self.parties}
        self.teardown = self._program_of(len(roles), TEARDOWN.name, self._tear_down)
        self.setting = len(roles) + 1
        tasks = frozenset(self.programs[p.name].number for p in self.parties if p.task)
        self.machine = AbstractHost(hypervisor, self.scene, len(roles) + 2, sea_fixup=design.sea_fixup, tasks=tasks,
                                    bounds=design.bounds, errnos=design.errnos, resumes=design.resumes)
        # Only third-party hypercalls are run twice; the shipped ones are tested, and most of the time would go into
        # them.
        self.machine.foreign = self.named if foreign(*_code(hypervisor)) else ""
        self.laws = judging(design, LAWS.values() if laws is None else laws)
        self.broken_before: list[tuple[str, str]] = []
        self.refused = 0
        self.initial = self._initial(self.scene.failures if failures is None else failures)
        self.rehearsal = Rehearsal(self.machine, self.programs, self.initial)
        self.tables = Tables(self.machine, self.laws, reduce=reduce)

    def blame(self, what: str) -> GuestMemfdError:
        """The error to raise for *what* is not the same when it is repeated: a third party's, if any of it is, or ours."""
        if any(program.anew is not None for program in self.programs.values()):
            return DesignRaised(f"something{self.named} is not deterministic: {what}")
        return InternalError(what)

    def foreign_modules(self) -> set[str]:
        """The modules of third parties that design, hypervisor, parties and laws come from."""
        laws = (judge for law in self.laws for judge in (law.in_state, law.on_note, law.at_end))
        return foreign_modules(self.design, self.hypervisor.ops, *_code(self.hypervisor), *laws, *(
            code for party in self.parties for code in (party.procedure, party.exists)))

    def _exists(self, party: Party) -> bool:
        who, theirs = f"`exists` of party {party.name!r}{self.named}", self.foreign or foreign(party.exists)
        there, again = asked_twice(who, party.exists, self.library, self.hypervisor, theirs=theirs)
        if type(there) is not bool:
            raise DesignRaised(f"{who} answered {shown(there)}, not True or False")
        if there != again:
            raise DesignRaised(f"{who} is not deterministic: it answered {there} and then {again}")
        if there and party.file >= self.scene.files:
            raise DesignRaised(f"{who} answered True in scene {self.scene.name!r}, which has no file {party.file}, "
                               "the one that it works on")
        return there

    def _program(self, number: int, party: Party) -> Program:
        def start(library: Design) -> Steps[Any]:
            steps = party.procedure(library, self.hypervisor)
            return _of_file(party.file, system_call(library, steps) if party.fd else steps)

        return self._program_of(number, party.name, start, foreign=foreign(party.procedure))

    def _program_of(
        self, number: int, name: str, start: Callable[[Design], Steps[Any]], *, foreign: bool = False
    ) -> Program:
        anew = (lambda: start(_made(self.design, self.hypervisor, self.scene))) if foreign or self.foreign else None
        return Program(number, name, lambda: start(self.library), anew, self.named)

    def _tear_down(self, library: Design) -> Steps[None]:
        for file in range(self.scene.files):
            yield from _of_file(file, TEARDOWN.procedure(library, self.hypervisor))

    def _initial(self, failures: int) -> bytes:
        # Setting the scene uses the design's own create and bind, so a design that gets these wrong is judged by what
        # it leaves.
        shared = self.machine.initial()
        for file in range(self.scene.files if self.scene.made else 0):
            shared = self._set(shared, file)
        state = st.State(shared)
        state.failures, state.given, state.refusals = failures, failures, self.scene.refusals
        return state.save()

    # A design may refuse a kernel that it cannot work on, and nothing else: then there is no file.
    def _set(self, shared: bytes, file: int) -> bytes:
        program = self._program_of(self.setting, "scene", lambda library: _of_file(file, set_scene(library)))
        shared, results = run_alone(self.machine, program, shared, self._judge)
        # A design that refuses a kernel it cannot work on is right. Any other failure means that there is nothing to
        # explore.
        if results == [-EOPNOTSUPP] and not self.scene.kernel.changes_direct_map:
            self.refused = results[0]
        elif any(results):
            raise DesignRaised(f"design {self.design.name!r} cannot create, bind and populate a file: {results}")
        return shared

    # What breaks while the scene is set is a finding of no steps.
    def _judge(self, _primitive: Primitive, outcome: Outcome) -> None:
        for law in self.laws:
            evidence = [law.in_state(outcome.shared), *map(law.on_note, outcome.notes)]
            self.broken_before += [(law.name, words) for words in evidence if words is not None]

    def must_have(self, names: Sequence[str]) -> None:
        """Raise BadInput unless *names* can be a scenario here: at least one, none twice, all there, all different tasks."""
        if not names:
            raise BadInput("a scenario needs at least one party")
        for name in names:
            if name not in self.programs:
                raise BadInput(f"party {PARTIES[name].name!r} cannot exist with design {self.design.name!r} "
                               f"under {self.hypervisor.name!r} in scene {self.scene.name!r}")
        if len(set(names)) < len(names):
            raise BadInput(f"a party can be in a scenario only once, not as in {', '.join(names)}")
        if not self.apart(names):
            raise BadInput(f"{', '.join(names)}: two of these are the same task doing different things")

    def apart(self, names: Sequence[str]) -> bool:
        """Whether no two of the parties *names* are one and the same task."""
        return len({self.programs[name].number for name in names}) == len(names)

    def explorer(self, names: Sequence[str], tables: Tables | None = None, threads: int = 1) -> Explorer:
        """The scenario of the parties *names*; fresh *tables* make its result independent of what ran before.

        threads: how many may explore it; what they find does not depend on it.
        """
        programs = [self.programs[n] for n in names]
        return choice.explorer(
            self.engine, tables or self.tables, programs, self.initial, self.teardown, self.broken_before, threads)


def set_scene(library: Design) -> Steps[list[int]]:
    """Create the file of the library's scene, bind it slot by slot, populate it: what each returned, up to a failure."""
    user, scene = Host("user"), library.scene
    ret = yield from library.create(scene.pages, scene.shared)
    yield from user.op_returned("create", FIRST_PAGE, scene.pages, ret)
    results = [ret]
    for slot in scene.slots if not ret else ():
        ret = yield from library.bind(slot.gfn, slot.start, slot.nr)
        yield from user.op_returned("bind", slot.start, slot.nr, ret, gfn=slot.gfn)
        results.append(ret)
    if scene.populated and not any(results):
        ret = yield from library.allocate(FIRST_PAGE, scene.pages)
        yield from user.op_returned("allocate", FIRST_PAGE, scene.pages, ret)
        results.append(ret)
    return results


# What is built in need not be looked at, world after world.
def _look_at(design: type[Design], hypervisor: Hypervisor) -> None:
    asked: list[tuple[Registry[Any], Any, Callable[[object], str | None]]] = [
        (DESIGNS, design, lacks_design), (HYPERVISORS, hypervisor, lacks_hypervisor)]
    for registry, thing, lacks in asked:
        if not any(thing is each for each in registry.builtin) and (wrong := lacks(thing)) is not None:
            raise PluginError(f"{registry.kind} {shown(getattr(thing, 'name', thing))}: {wrong}")


def _library(design: type[Design], hypervisor: Hypervisor, scene: Scene) -> Design:
    with Guard(f"making design {design.name!r} on {hypervisor.name!r}", timed=foreign(design, hypervisor.ops)):
        return _made(design, hypervisor, scene)


def _made(design: type[Design], hypervisor: Hypervisor, scene: Scene) -> Design:
    ops = hypervisor.ops()
    if not isinstance(ops, GuestMemfdOps):
        raise PluginError(f"hypervisor {hypervisor.name!r}: its ops make {shown(ops)}, which is no GuestMemfdOps")
    library = design(ops, scene.pages)
    if design.large and hypervisor.large and scene.order:
        library.order, library.splits = scene.order, True
    order = getattr(library, "order", 0)
    if order > scene.order:
        least = f"order {scene.order} at most" if scene.order else "single pages only"
        raise BadInput(f"design {design.name!r} has folios of order {order}; scene {scene.name!r} has {least}")
    library.scene = scene
    library.lender = hypervisor.driver if scene.lends and design.converts else None
    return library


# What of a hypervisor the machine runs.
def _code(hypervisor: Hypervisor) -> list[Callable[..., Any]]:
    return [*hypervisor.hypercalls.values(), hypervisor.guest_consents, hypervisor.guest_touches, hypervisor.force_reclaim,
            hypervisor.exports]


# What a party of another file asks for is about that file; the library keeps nothing of a file in itself.
def _of_file(file: int, steps: Steps[Any]) -> Steps[Any]:
    if not file:
        return steps
    return _readdressed(file, steps)


def _readdressed(file: int, steps: Steps[Any]) -> Steps[Any]:
    try:
        primitive = next(steps)
        while True:
            # A design is written for one file. Which file is meant is written on each primitive, outside of the
            # design.
            primitive = steps.send((yield primitive._replace(file=file)))
    except StopIteration as stop:
        return stop.value


def world(
    design: str | type[Design], hypervisor: str | Hypervisor, *, scene: str | Scene = "two-pages",
    failures: int | None = None, laws: Sequence[str] | None = None, engine: str | None = None, reduce: bool = False,
) -> World:
    """The world of *design* under *hypervisor* in *scene* with every party there is; laws by name, None for all.

    engine: one of `choice.ENGINES`; None: the fastest for each scenario. reduce: leave out what makes no difference
    (docs/explorer.md). Raises UnknownName, PluginError, BadInput where the
    design was not posted for the hypervisor, and HostUnavailable where the engine is not here.
    """
    choice.must_be_here(engine)
    if isinstance(design, str):
        design = DESIGNS[design]
    if isinstance(hypervisor, str):
        hypervisor = HYPERVISORS[hypervisor]
    if isinstance(scene, str):
        scene = scene_of(scene)
    _look_at(design, hypervisor)                        # before any of their fields is used
    if design.hypervisors is not None and hypervisor.name not in design.hypervisors:
        raise BadInput(
            f"design {design.name!r} was posted for {', '.join(design.hypervisors)} only, not for {hypervisor.name!r}"
        )
    judged = [law for law in LAWS.values() if laws is None or law.name in laws]
    return World(design, hypervisor, [PARTIES[name] for name in PARTIES], scene=scene, failures=failures, laws=judged,
                 engine=engine, reduce=reduce)


def scene_of(name: str) -> Scene:
    """The shipped scene called *name*; raises UnknownName."""
    if name not in SCENES:
        raise UnknownName("scene", name, SCENES)
    return SCENES[name]


def run_alone(
    machine: AbstractHost, program: Program, shared: bytes,
    seen: Callable[[Primitive, Outcome], None] = lambda _primitive, _outcome: None,
) -> tuple[bytes, Any]:
    """Drive one procedure to its end with no one else around and no failures: the state, and what it returned.

    *seen* is told of every primitive and its outcome. Raises DesignRaised if it waits, or goes round, without end.
    """
    generator, primitive = resume(program, ())
    passed: set[Any] = set()
    path: list[Any] = []
    asked: list[Primitive | None] = []
    returned = None
    while primitive is not None:
        # Alone and without choices, so the same place in the same state means that it will go round without end.
        place = (local_key(generator), shared)
        if place in passed:
            raise DesignRaised(f"{program} goes round for ever, at {primitive} ({where(generator)})")
        if len(passed) > MOST_ALONE:
            raise DesignRaised(f"{program} goes on and on: {MOST_ALONE} steps have led to no end, at {primitive} "
                               f"({where(generator)})")
        passed.add(place)
        outcomes = perform(machine, shared, program.number, primitive)
        if not outcomes:
            raise DesignRaised(f"{program} waits for ever in {primitive} ({where(generator)})")
        seen(primitive, outcomes[0])
        shared = outcomes[0].shared
        if machine.halted(shared):
            raise DesignRaised(f"the kernel panics in {program}: {outcomes[0].notes}")
        asked.append(primitive)
        path.append(outcomes[0].result)
        try:
            primitive = send(program, generator, outcomes[0].result)
        except StopIteration as stop:
            primitive, returned = None, stop.value
    if program.anew is not None:
        resume(program, path, asked, anew=True)
    return shared, returned
