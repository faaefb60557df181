"""A trace again: exactly its steps, by the real procedures on the abstract host, with no table in between.

Nothing that the trace says is believed. Every primitive, every result and the broken law at the end come out again, or
the first thing that does not is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from guest_memfd.abstract import state as st
from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import Design
from guest_memfd.errors import GuestMemfdError
from guest_memfd.explore.engine.finding import Finding, Step, word
from guest_memfd.explore.engine.footprint import Watched
from guest_memfd.explore.engine.place import chain_of
from guest_memfd.explore.engine.program import Program, dismiss, perform, resume
from guest_memfd.explore.trace import Trace, TraceStep, version
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.scenarios import TEARDOWN
from guest_memfd.words.outcome import STAY, Outcome
from guest_memfd.words.primitives import LOADS, SILENT, Primitive

SILENT_AT_MOST = 1000
"""Primitives that take no step of their own, in one step; what is explored has no more, because Python nests no deeper."""


class Beside(Protocol):
    """Another host that takes the same steps; it raises GuestMemfdError when it does anything else."""

    def step(self, who: int, primitive: Primitive, outcome: Outcome) -> Any:
        """Carry *primitive* out for party *who*, to end as *outcome* has it."""


class Divergence(NamedTuple):
    """Where the run parts from its record (the number of the step, from 1), and why."""

    step: int
    why: str

    @override
    def __str__(self) -> str:
        return f"step {self.step}: {self.why}"


@dataclass(frozen=True)
class Replay:
    """A trace that has been run again: the steps that could be taken, and where it diverged, if it did.

    inside: for each step the procedures that were under way when it was taken, the outermost first, by name; looked: the
    fields that it looked at. standing: party -> the procedures that it is in at the end. All are empty of what was not run.
    """

    trace: Trace
    initial: bytes
    steps: tuple[Step, ...]
    divergence: Divergence | None = None
    inside: tuple[tuple[str, ...], ...] = ()
    looked: tuple[frozenset[str], ...] = ()
    standing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the same law breaks in the same way, by the same steps."""
        return self.divergence is None

    @property
    def finding(self) -> Finding:
        """What has been run, as the explorer would show it."""
        return Finding(self.trace.law, self.trace.evidence, list(self.steps), self.initial)


def replay(
    trace: Trace, *, design: str | type[Design] | None = None, hypervisor: str | Hypervisor | None = None,
    beside: Callable[[World], Beside] | None = None, seen: Callable[[Step], None] | None = None,
) -> Replay:
    """Run *trace* again, with another *design* or *hypervisor* if one is given; says where it diverges, if it does.

    *beside* makes a second host, in the initial state, that has to take every step as well; *seen* is called with each step
    when it has been taken.

    Raises BadInput when the scene cannot be set (unknown design, hypervisor or party), and what a design that raises
    makes the explorer raise.
    """
    built = world(design or trace.design, hypervisor or trace.hypervisor, scene=trace.scene, failures=trace.failures)
    built.must_have(trace.parties)
    run = _Run(built, trace, beside(built) if beside else None, seen)
    divergence = None
    try:
        run.take_all()
    except _Diverged as diverged:
        why = str(diverged)
        if trace.version != version():
            why += f" (recorded by version {trace.version}, this is {version()})"
        divergence = Divergence(run.number, why)
    taken = len(run.steps)
    return Replay(trace, built.initial, tuple(run.steps), divergence, tuple(run.inside[:taken]), tuple(run.looked[:taken]),
                  {name: party.inside for name, party in (*run.parties.items(), (TEARDOWN.name, run.teardown))})


class _Diverged(Exception):  # noqa: N818 - a signal, not an error
    pass


class _Party:
    # Where one party stands: its procedure is started anew and sent all results so far. `inside`: which of its frames are
    # under way there.

    inside: tuple[str, ...] = ()

    def __init__(self, program: Program) -> None:
        self.program, self.name = program, program.name
        self.path: list[Any] = []
        self.asked: list[Primitive | None] = []
        self.waits_on = self._stand()

    def go_on(self, result: Any) -> None:
        self.path.append(result)
        self.asked.append(self.waits_on)
        self.waits_on = self._stand()

    def _stand(self) -> Primitive | None:
        procedure, waits_on = resume(self.program, self.path, self.asked)
        self.inside = tuple(frame.gi_code.co_name for frame in chain_of(procedure)) if waits_on is not None else ()
        dismiss(self.program, procedure)
        return waits_on


class _Run:
    # `number` is that of the step being run; `before_teardown` the state in which the last party was done. `inside` and
    # `looked` may have one entry more than `steps` where the last of them could not be taken.

    def __init__(
        self, built: World, trace: Trace, beside: Beside | None, seen: Callable[[Step], None] | None
    ) -> None:
        self.world, self.trace, self.beside, self.seen = built, trace, beside, seen
        self.parties = {name: _Party(built.programs[name]) for name in trace.parties}
        self.teardown = _Party(built.teardown)
        self.shared = self.before_teardown = built.initial
        self.steps: list[Step] = []
        self.inside: list[tuple[str, ...]] = []
        self.looked: list[frozenset[str]] = []
        self.number = 0

    def take_all(self) -> None:
        """Take the recorded steps and judge; raises _Diverged."""
        wanted = (self.trace.law, self.trace.evidence)
        broken = [*self.world.broken_before, *self._judge(self.shared)]
        for recorded in self.trace.steps:
            # A shorter way to the same end: the trace is no longer the shortest, and what follows would not be
            # explored.
            if wanted in broken:
                raise _Diverged(f"law {wanted[0]} breaks here, before the end of the trace")
            self.number += 1
            taken = self._take(self._who(recorded), recorded)
            self.steps.append(taken)
            if self.seen is not None:
                self.seen(taken)
            broken = self._judge(taken.shared, *taken.notes)
        if wanted not in broken:
            broken += self._at_end()
        if wanted not in broken:
            others = "; ".join(f"{law}: {evidence}" for law, evidence in broken)
            raise _Diverged(f"law {wanted[0]} no longer breaks ({wanted[1]})" + (f", but {others}" if others else ""))

    def _judge(self, shared: bytes, *notes: Any) -> list[tuple[str, str]]:
        words = [(law.name, law.on_note(note)) for note in notes for law in self.world.laws]
        words += [(law.name, law.in_state(shared)) for law in self.world.laws]
        return [(law, evidence) for law, evidence in words if evidence is not None]

    # Deadlock, livelock, and what the state after the teardown shows, are the explorer's to say.
    def _at_end(self) -> list[tuple[str, str]]:
        torn = len(self.teardown.path) > 0
        ends = self.world.explorer(self.trace.parties).breaks_at(
            [party.path for party in self.parties.values()], self.before_teardown if torn else self.shared)
        down = sum(step.party == TEARDOWN.name for step in self.steps)
        return [(law, evidence) for law, evidence, more in ends if len(more) == down]

    def _who(self, recorded: TraceStep) -> _Party:
        name = recorded.party
        if self.world.machine.halted(self.shared):
            raise _Diverged(f"expected {name} to go on, but the kernel has panicked")
        busy = {party.name: party.waits_on for party in self.parties.values() if party.waits_on is not None}
        if name == TEARDOWN.name:
            if busy:
                raise _Diverged("expected the teardown, but " + ", ".join(f"{n} is in {p}" for n, p in busy.items()))
            if not self.teardown.path:
                self.before_teardown = self.shared
            return self.teardown
        if name not in self.parties:
            raise _Diverged(f"party {name!r} is not of this scenario ({', '.join(self.parties)})")
        if name not in busy:
            raise _Diverged(f"expected {name} to do {recorded.primitive or 'a last choice'}, but it is done")
        return self.parties[name]

    # Choices, ghosts and loads first, as far as they took no step of their own, then the one primitive of the step.
    def _take(self, party: _Party, recorded: TraceStep) -> Step:
        choices, notes, seen = list(recorded.choices), list[Any](), set[str]()
        for _ in range(SILENT_AT_MOST):
            primitive = party.waits_on
            if primitive is None or primitive.name not in SILENT or self.world.machine.halted(self.shared):
                break
            if primitive == recorded.primitive and not choices:
                break                                   # a load's own step; or from here it goes round and round
            if primitive.name == "choose":
                party.go_on(_chosen(party.name, primitive, choices))
            else:
                seen |= self._looks(party, primitive)
                outcome = perform(self.world.machine, self.shared, party.program.number, primitive)[0]
                notes += outcome.notes
                self._move(party, primitive, outcome)
        if choices:
            raise _Diverged(f"expected {party.name} to choose {choices[0]!r}, it does {primitive or 'nothing more'}")
        if primitive != recorded.primitive:
            raise _Diverged(_instead(party.name, recorded.primitive, primitive))
        self.inside.append(party.inside)
        self.looked.append(frozenset(seen if primitive is None else seen | self._looks(party, primitive)))
        if primitive is None or self._goes_round(party, primitive):
            return Step(party.name, recorded.choices, primitive, None, False, self.shared, tuple(notes))
        return self._perform(party, primitive, recorded, notes)

    # Which fields *primitive* looks at here. Who asks twice the same is answered the same, so asking once more does nothing.
    def _looks(self, party: _Party, primitive: Primitive) -> frozenset[str]:
        if primitive.name == "choose":
            return frozenset()
        seen: dict[int, int] = {}
        watched: Any = Watched(self.shared, seen)
        perform(self.world.machine, watched, party.program.number, primitive)
        names = st.layout_of(self.shared).names
        return frozenset(names[at] for at in seen)

    # A choice or tracepoint that was recorded as a step did nothing, unless the kernel stops in it.
    def _goes_round(self, party: _Party, primitive: Primitive) -> bool:
        if primitive.name == "choose":
            return True
        if primitive.name not in SILENT - LOADS:
            return False
        outcomes = perform(self.world.machine, self.shared, party.program.number, primitive)
        return not any(self.world.machine.halted(outcome.shared) for outcome in outcomes)

    def _perform(self, party: _Party, primitive: Primitive, recorded: TraceStep, notes: list[Any]) -> Step:
        outcomes = perform(self.world.machine, self.shared, party.program.number, primitive)
        if not outcomes:
            raise _Diverged(f"{party.name} is blocked in {primitive}")
        same = [o for o in outcomes if o.failed == recorded.failed]
        # The type as well as the value: True and 1 are equal, and are two results.
        for outcome in same:
            if type(outcome.result) is type(recorded.result) and outcome.result == recorded.result:
                self._move(party, primitive, outcome)
                return Step(party.name, recorded.choices, primitive, outcome.result, outcome.failed, outcome.shared,
                            (*notes, *outcome.notes))
        if not same:
            raise _Diverged(f"{primitive} of {party.name} cannot {'fail' if recorded.failed else 'succeed'} here")
        raise _Diverged(f"{primitive} of {party.name} returns {same[0].result}, recorded {recorded.result}")


    def _move(self, party: _Party, primitive: Primitive, outcome: Outcome) -> None:
        # The other host first: if it differs, this one stays where the difference was.
        if self.beside is not None:
            try:
                self.beside.step(party.program.number, primitive, outcome)
            except GuestMemfdError as error:
                raise _Diverged(str(error)) from error
        self.shared = outcome.shared
        if outcome.result is not STAY and not self.world.machine.halted(outcome.shared):
            party.go_on(outcome.result)


def _chosen(party: str, primitive: Primitive, choices: list[str]) -> Any:
    what, *options = primitive.args
    if not choices:
        raise _Diverged(f"{party} has to choose {what!r}, and no choice is recorded")
    recorded = choices.pop(0)
    for option in options:
        if f"{what} {word(option)}" == recorded:
            return option
    raise _Diverged(f"{party} chooses {what!r} of {', '.join(map(word, options))}; recorded {recorded!r}")


def _instead(party: str, expected: Primitive | None, does: Primitive | None) -> str:
    words = [str(p) if p is not None else "nothing more" for p in (expected, does)]
    if expected is not None and does is not None and words[0] == words[1]:
        words = [f"{p} as {p.caller}" for p in (expected, does)]
    return f"expected {party} to do {words[0]}, it does {words[1]}"
