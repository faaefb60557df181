"""The host table: (party, primitive, shared state) -> outcomes, filled by asking the host once.

An entry depends on the bytes of the state that were looked at, and on nothing else (footprint.py), so it serves every state
that agrees in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from guest_memfd.errors import DesignRaised, InternalError
from guest_memfd.explore.engine.automaton import Automaton
from guest_memfd.explore.engine.finding import Step, word
from guest_memfd.explore.engine.footprint import Remembered, Watched, grow
from guest_memfd.explore.engine.frames import Frames
from guest_memfd.explore.engine.performed import Performed
from guest_memfd.explore.engine.program import MOST_SILENT, ExploredHost, Program, perform
from guest_memfd.explore.engine.silent import Passed, Place
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import LOADS, SILENT, Primitive

SHARED_BITS = 26
SHARED_MASK = (1 << SHARED_BITS) - 1
"""64 million host states. It is checked where numbers are given out, as LOCAL_MASK is."""

LIVE_LOCALS = "live-locals"
"""A reduction (liveness.py)."""

NEVER_ENDS = "from here on no operation ever ends"
"""Evidence of a livelock."""


class JudgingLaw(Protocol):
    """A law as the explorer sees it (laws/ defines them)."""

    @property
    def name(self) -> str:
        """What the law is called."""

    def in_state(self, shared: bytes) -> str | None:
        """Evidence that *shared* breaks the law, in words; None when it keeps it."""

    def on_note(self, note: Any) -> str | None:
        """Evidence that the fact *note* breaks the law."""

    def at_end(self, shared: bytes) -> str | None:
        """Evidence that *shared* breaks the law once every party is done and the world is torn down."""


class Way(NamedTuple):
    """One end of a step, for every host state that agrees in the bytes the step looks at.

    change: (offset, value) of the bytes that become others; or the whole state, if the machine keeps no footprints.
    broken: (law, evidence) by the facts noted on the way, or because the party will never come out of where it stands.
    """

    local: int
    change: bytes | tuple[tuple[int, int], ...]
    choices: tuple[str, ...] = ()
    primitive: Primitive | None = None
    result: Any = None
    failed: bool = False
    notes: tuple[Any, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()


class Move(NamedTuple):
    """One expanded transition of a party out of (local, shared). broken: (law, evidence) on the way to there."""

    local: int
    shared: int
    choices: tuple[str, ...]
    primitive: Primitive | None
    result: Any
    failed: bool
    notes: tuple[Any, ...]
    broken: tuple[tuple[str, str], ...]


class Steps(dict[int, tuple[int, ...]]):
    """Where one party stands, and the shared state -> what each of its steps adds to the code of a product state.

    Steps that break a law are kept apart, with what they break: a scenario that takes one comes to `fill` and is told, and
    the others never pay for the question.
    """

    fill: Callable[[int], tuple[int, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.flagged: dict[int, tuple[tuple[int, ...], tuple[tuple[tuple[str, str], Move], ...]]] = {}

    def __missing__(self, key: int) -> tuple[int, ...]:
        return self.fill(key)


class Tables:
    """The tables of one machine under one set of laws; kept from scenario to scenario.

    reduce: take places for one that differ in dead locals alone (liveness.py).
    """

    def __init__(self, machine: ExploredHost, laws: Sequence[JudgingLaw], *, reduce: bool = False) -> None:
        self.machine, self.laws, self.reduce = machine, laws, reduce
        self.footprints = getattr(machine, "footprints", False)
        # What third parties' hypercalls do is carried out each time, as that is how they are watched.
        watched = self.footprints and not getattr(machine, "foreign", "")
        self._performed = Performed(machine) if watched else None
        self._broken_by: dict[Any, list[tuple[str, str]]] = {}   # fact -> (law, evidence)
        self.state_laws = [law for law in laws if getattr(law, "state", True)]
        self.judges = [(law.name, Remembered(law.in_state) if self.footprints else law.in_state) for law in self.state_laws]
        self.spared: Callable[[bytes], int] = getattr(machine, "spared", lambda _shared: 0)
        self.shared_ids: dict[bytes, int] = {}
        self.shared: list[bytes] = []
        self.broken: list[tuple[tuple[str, str], ...]] = []      # per shared state: (law, evidence) it breaks
        self.halted: list[bool] = []
        self.automata: dict[Program, Automaton] = {}
        self.frames = Frames(live=reduce)
        self.share = True                                        # what one party was found to do serves the others
        self.facts: dict[tuple[str, Any], None] = {}             # (party, note), all that were ever noted
        self.steps: dict[tuple[Program, int], Steps] = {}        # by program, and its place among the parties
        self.worked_out = 0                                      # footprints of steps
        self.ends: dict[tuple[Program | None, int], list[tuple[str, str, list[Step]]]] = {}     # by teardown and state
        self.flat: dict[bytes, Any] = {}                         # of the compiled engine, by initial state

    @property
    def reductions(self) -> tuple[str, ...]:
        """The names of what is left out."""
        return (LIVE_LOCALS,) if self.reduce else ()

    def empty(self) -> Tables:
        """The same, as they were before anything was explored."""
        return Tables(self.machine, self.laws, reduce=self.reduce)

    def intern(self, saved: bytes) -> int:
        """The number of shared state *saved*; state laws are judged once, here."""
        known = self.shared_ids.get(saved)
        if known is None:
            known = self.shared_ids[saved] = len(self.shared)
            # The number would run into the bits of the first party.
            if known > SHARED_MASK:
                raise InternalError(f"more than {SHARED_MASK} host states")
            self.shared.append(saved)
            self.halted.append(self.machine.halted(saved))
            # State laws are functions of the state, so each is asked once when the state is first seen, and not again
            # by each scenario that comes to it.
            self.broken.append(tuple(
                (name, evidence) for name, judge in self.judges if (evidence := judge(saved)) is not None
            ))
        return known

    def automaton(self, program: Program) -> Automaton:
        """The automaton of *program*, made at first use."""
        known = self.automata.get(program)
        if known is None:
            known = self.automata[program] = Automaton(program, self.frames, share=self.share)
        return known

    def moves(self, automaton: Automaton, local: int, shared: int) -> Iterator[Move]:
        """Every transition of one party from here, silent primitives fused with the step that follows them."""
        for way in self.ways(automaton, local, shared):
            yield Move(way.local, self.arrive(shared, way), *way[2:])

    def ways(self, automaton: Automaton, local: int, shared: int) -> Sequence[Way]:
        """The same, as far as it does not depend on the bytes of *shared* that no one looks at."""
        # Done, or the kernel has stopped: then nothing moves.
        if automaton.waits_on[local] is None or self.halted[shared]:
            return ()
        return self.known(automaton, local, self.shared[shared])

    def known(self, automaton: Automaton, local: int, state: bytes) -> Sequence[Way]:
        """What can happen at *local*, which is not the end, in *state*, in which the machine has not stopped."""
        node = automaton.ways[local]
        # The walk down the tree of bytes: one look-up for each byte that the step reads (footprint.py).
        while type(node) is tuple:
            at, below = node
            node = below.get(state[at])
        if node is None:
            node = self._work_out(automaton, local, state)
        known: list[Way] = node
        return known

    def arrive(self, shared: int, way: Way) -> int:
        """The shared state that *way* leads to."""
        change = way.change
        if isinstance(change, bytes):
            return self.intern(change)
        # Many steps only read. The state keeps its number without being built again.
        if not change:
            return shared
        raw = bytearray(self.shared[shared])
        for at, value in change:
            raw[at] = value
        return self.intern(bytes(raw))

    def _work_out(self, automaton: Automaton, local: int, state: bytes) -> list[Way]:
        self.worked_out += 1
        seen: dict[int, int] = {}
        # `seen` is filled by everything that happens below, the silent primitives before the step included.
        start: Any = Watched(state, seen) if self.footprints else state
        passed: Passed[Way] = Passed()
        ways = [*self._expand(automaton, Way(local, start), passed, None), *passed.traps()]
        for i, way in enumerate(ways):
            whole: Any = way.change
            after = bytes(whole)
            # Only bytes that were looked at can have changed, as a write counts as a look.
            change = tuple((at, after[at]) for at, old in seen.items() if after[at] != old) if self.footprints else after
            ways[i] = way._replace(change=change, broken=(*way.broken, *self._judge(way.notes)))
            self.facts.update(((automaton.program.name, note), None) for note in way.notes)
        if self.footprints:
            automaton.ways[local] = grow(automaton.ways[local], seen, ways)
        return ways

    # The ways of one step on from *here*, whose change is the whole state; *before* is the silent place it comes from.
    def _expand(
        self, automaton: Automaton, here: Way, passed: Passed[Way], before: Place | None, behind: int = 0
    ) -> Iterator[Way]:
        primitive = automaton.waits_on[here.local]
        # Neither a wait nor a step: a procedure that only chooses and reads, at new places without end.
        if behind > MOST_SILENT:
            raise DesignRaised(f"{automaton.program} goes on and on without a step that others can see, at "
                               f"{primitive}")
        if primitive is None or primitive.name not in SILENT:
            passed.leaves(before)
            yield from (here,) if primitive is None else self._perform(automaton, here, primitive)
            return
        state: Any = here.change
        place = (here.local, bytes(state))
        for_ever = here._replace(primitive=primitive, broken=(("progress", NEVER_ENDS),))
        # This place was passed with these facts before: a loop of silent primitives ends here.
        if not passed.enter(before, place, for_ever, here.notes):
            return
        for way in self._perform(automaton, here, primitive):
            after: Any = way.change
            if self.machine.halted(after):
                passed.leaves(place)
                yield way
                continue
            # A silent primitive is not a line of the trace; the step that follows it is.
            fused = way._replace(primitive=None, result=None, failed=False)
            yield from self._expand(automaton, fused, passed, place, behind + 1)
            # A load both fuses and stands alone. With the lock held the two are the same; where a design reads first
            # and locks afterwards, only the second shows the race.
            if primitive.name in LOADS:
                passed.leaves(place)
                yield way

    # Every outcome of *primitive*, taken *here*; of a choice, every option.
    def _perform(self, automaton: Automaton, here: Way, primitive: Primitive) -> Iterator[Way]:
        if primitive.name == "choose":
            what, *options = primitive.args
            for option in options:
                yield here._replace(local=automaton.after(here.local, option),
                                    choices=(*here.choices, f"{what} {word(option)}"))
            return
        for result, shared, failed, notes in self._outcomes(automaton, here, primitive):
            stays = result is STAY or self.machine.halted(shared)       # then no one is told anything
            to = here.local if stays else automaton.after(here.local, result)
            yield Way(to, shared, here.choices, primitive, result, failed, here.notes + notes)

    # Result, state, whether it failed, and facts.
    def _outcomes(
        self, automaton: Automaton, here: Way, primitive: Primitive
    ) -> Iterator[tuple[Any, Any, bool, tuple[Any, ...]]]:
        state: Any = here.change
        if self._performed is None or type(state) is not Watched:
            for outcome in perform(self.machine, state, automaton.program.number, primitive):
                yield outcome.result, outcome.shared, outcome.failed, outcome.notes
            return
        for done in self._performed(state, automaton.program.number, primitive, automaton.asked[here.local]):
            after = state.copy()
            for at, value in done.change:
                after[at] = value
            yield done.result, after, done.failed, done.notes

    def waits(self, automaton: Automaton, local: int, shared: int) -> set[str]:
        """What a party that cannot move waits in: the primitive and, for a semaphore, its name; empty if it is done."""
        waits: set[str] = set()
        passed: set[Place] = set()
        ahead = [Way(local, self.shared[shared])]
        while ahead:
            here = ahead.pop()
            primitive = automaton.waits_on[here.local]
            place = (here.local, here.change)
            if primitive is not None and primitive.name not in SILENT:
                which = f" {primitive.args[0]}" if primitive.args and isinstance(primitive.args[0], str) else ""
                waits.add(primitive.name + which)
            elif primitive is not None and place not in passed:
                passed.add(place)
                ahead += self._perform(automaton, here, primitive)
        return waits

    def judge(self, move: Move) -> list[tuple[str, str]]:
        """(law, evidence) of every law that *move* breaks, on the way or by the state it leads to."""
        return [*move.broken, *self.broken[move.shared]]

    def _judge(self, notes: Sequence[Any]) -> Iterator[tuple[str, str]]:
        for note in notes:
            if note not in self._broken_by:
                self._broken_by[note] = [
                    (law.name, evidence) for law in self.laws if (evidence := law.on_note(note)) is not None]
            yield from self._broken_by[note]
