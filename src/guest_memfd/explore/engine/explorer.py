"""The tabulating explorer: every interleaving, breadth first, each local step executed once.

A procedure talks to the world through primitives only, so where it stands is a function of the results it has been
sent. Two tables follow from that:

* the *automaton* of a party: (local, result) -> local, filled by re-running the generator along a recorded path;
* the *host table*: (party, primitive, shared state) -> outcomes, filled by asking the host once.

Both outlive a scenario, so a suite of hundreds pays for each entry once. A product state is one integer, shared state
in the low bits and one field per party above; exploring is table look-up and set arithmetic on those integers.
docs/explorer.md says what a verdict means.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, NamedTuple, Protocol

from guest_memfd.compat import override
from guest_memfd.errors import DesignRaised, InternalError, NotAPrimitive, place_of, shown
from guest_memfd.explore.engine.asked import unlike
from guest_memfd.explore.engine.footprint import Remembered, Watched, grow
from guest_memfd.explore.engine.livelock import never_ending
from guest_memfd.explore.engine.place import freeze, local_key
from guest_memfd.explore.engine.silent import Passed, Place
from guest_memfd.plugins.guard import Guard, asked_twice
from guest_memfd.words.outcome import STAY, Outcome
from guest_memfd.words.primitives import LOADS, PRIMITIVES, SILENT, Host, Primitive

# 64 million host states, and 65 thousand places for each party. Both limits are checked where numbers are given out,
# so a model that is too large ends in an error and never in a wrong answer.
SHARED_BITS, LOCAL_BITS = 26, 16
SHARED_MASK, LOCAL_MASK = (1 << SHARED_BITS) - 1, (1 << LOCAL_BITS) - 1

MOST_OPTIONS = 1000
"""Options of a choice, and one."""

MOST_STEPS = 1000
"""Primitives that lead a party to where it stands: the longest way of what is shipped takes a tenth of them."""

_ENDS = 20
"""Steps that a message shows of the beginning, and of the end, of a long way."""

MOST_SILENT = 200
"""Silent primitives that a party may take one after the other."""

NEVER_ENDS = "from here on no operation ever ends"
"""Evidence of a livelock."""


class ExploredHost(Protocol):
    """What is explored: a host whose whole state is a bytes object.

    A machine with a true attribute `footprints` promises that its outcomes depend on nothing but the bytes it reads,
    one by one, as ``state[at]``, and that all its states are of one length. Then it may be handed a `Watched` state,
    and has to return watched ones; each step is worked out once for all states that agree in what was read.

    One with a method `spared` (state -> int) says how many failures it has not injected yet: of two runs of one length the
    one with fewer failures is told.
    """

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> Sequence[Outcome]:
        """All ways *primitive* can end now; none when *party* has to wait."""

    def halted(self, shared: bytes) -> bool:
        """Whether the machine has stopped permanently (panic): nothing moves, and that is no deadlock."""


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


@dataclass(frozen=True)
class Program:
    """A party: its number (which lock holder it is, the same in every scenario), its name, how to start its procedure.

    Several programs may have one number, as long as no scenario has two of them. anew: how to start it on new instances of
    design and hypervisor, where any of it is a third party's; then it is watched. of: whose design it is, in words.
    """

    number: int
    name: str
    start: Callable[[], Generator[Primitive, Any, Any]]
    anew: Callable[[], Generator[Primitive, Any, Any]] | None = None
    of: str = ""

    @override
    def __str__(self) -> str:
        return f"party {self.name!r}{self.of}"

    def guard(self) -> Guard:
        """Around all of its code."""
        return Guard(self, timed=self.anew is not None)


class Step(NamedTuple):
    """One line of a trace."""

    party: str
    choices: tuple[str, ...]
    primitive: Primitive | None
    result: Any
    failed: bool
    shared: bytes
    notes: tuple[Any, ...]


@dataclass
class Finding:
    """A law that broke: the evidence, and the shortest way there; of ways as short, one with the fewest failures."""

    law: str
    evidence: str
    steps: list[Step] = field(default_factory=list)
    initial: bytes = b""

    @property
    def injected(self) -> int:
        """How many of the steps are injected failures."""
        return sum(step.failed for step in self.steps)


@dataclass
class Result:
    """What an exploration saw. `limit` names the limit that was reached, if one was: then nothing is proved."""

    states: int
    transitions: int
    findings: list[Finding]
    limit: str | None = None
    finals: int = 0
    depth: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """``refuted``, ``undetermined`` or ``holds``."""
        return "refuted" if self.findings else "undetermined" if self.limit else "holds"


def check_primitive(program: Program, primitive: object, generator: Generator[Any, Any, Any]) -> Primitive:
    """Return *primitive* if it is one; raises `NotAPrimitive` naming the line that yielded something else."""
    if isinstance(primitive, Primitive) and primitive.name in PRIMITIVES:
        wrong = unlike(primitive) if program.anew is not None else None
        if wrong is not None:
            raise NotAPrimitive(f"{program}: {wrong} ({where(generator)})")
        if primitive.name == "choose" and len(primitive.args) > MOST_OPTIONS:
            raise DesignRaised(f"{program} offers {len(primitive.args) - 1} options to choose from at {where(generator)}; "
                               f"at most {MOST_OPTIONS - 1} can be explored")
        return primitive
    meant = "that is a procedure: write 'yield from' for 'yield'" if inspect.isgenerator(primitive) else (
        "a procedure may only 'yield from' the primitives of its host (words/primitives.py)")
    raise NotAPrimitive(f"{program} yielded {shown(primitive)} at {where(generator)}; {meant}")


def where(generator: Generator[Any, Any, Any]) -> str:
    """``file:line in function`` of the innermost frame of a suspended procedure that is a third party's, if one is."""
    inner: Any = generator
    frames = []
    while inner is not None and inspect.isgenerator(inner) and inner.gi_frame is not None:
        frames.append((inner.gi_frame, inner.gi_frame.f_lineno))
        inner = inner.gi_yieldfrom
    asking = [frame for frame in frames if frame[0].f_globals.get("__name__") != Host.__module__]
    return place_of(asking or frames) if frames else "its end"


Started = tuple[Generator[Primitive, Any, Any], Primitive | None]
"""A procedure that is suspended, and the primitive it waits on (None: done)."""


def resume(
    program: Program, path: Sequence[Any], asked: Sequence[Primitive | None] | None = None, *, anew: bool = False
) -> Started:
    """Start *program*, *anew* on new instances, and send it *path*. *asked*: what it asked for before, on the same path.

    Raises DesignRaised when the procedure raises, does not come back, or asks for something else this time; NotAPrimitive
    when it yields something else than primitives.
    """
    # All code of a third party runs inside of a guard: it may raise anything, or not come back, and must then be
    # named.
    with program.guard():
        start = program.anew if anew and program.anew else program.start
        generator = start()
        if not isinstance(generator, GeneratorType):
            raise DesignRaised(f"{program} is no procedure: it is {shown(generator)}; one that has nothing to ask for says "
                               "'yield from ()'")
        at = 0
        try:
            primitive = next(generator)
            for at, result in enumerate(path, 1):
                # The path was taken before, so what was asked for is known. To compare costs little, and it is the
                # check on which both tables rest: the same results lead to the same primitives.
                if asked is None:
                    check_primitive(program, primitive, generator)
                elif primitive != asked[at - 1]:
                    raise differs(program, at - 1, asked[at - 1], primitive, generator)
                primitive = generator.send(result)
        # A procedure that ends before all results are used was longer the last time.
        except StopIteration:
            if at < len(path):
                raise differs(program, at, asked[at] if asked else "something", None, generator) from None
            return generator, None
        return generator, check_primitive(program, primitive, generator)


def dismiss(program: Program, generator: Generator[Primitive, Any, Any]) -> None:
    """Let go of a suspended procedure; what it asks for in a `finally` is no one's to do."""
    # Our own procedures need no closing: they have nothing to do in a `finally`, and the collector takes them.
    for _ in range(MOST_SILENT if program.anew is not None else 0):
        with program.guard():
            try:
                generator.close()
            except RuntimeError:                        # it has ignored GeneratorExit, and may do so once more
                continue
        return


def differs(
    program: Program, results: int, before: object, now: object, generator: Generator[Any, Any, Any]
) -> DesignRaised:
    """*program* is not deterministic: what it asked for *before*, and what *now*, after so many *results*."""
    words = ["came to its end" if what is None else f"did {what if isinstance(what, Primitive) else shown(what)}"
             for what in (before, now)]
    return DesignRaised(f"{program} is not deterministic: after the same {results} results it {words[0]} and then "
                        f"{words[1]} ({where(generator)}); what it does must follow from the results alone")


def send(program: Program, generator: Generator[Primitive, Any, Any], result: Any) -> Primitive:
    """Let the procedure of *program* go on with *result*: what it waits on next; StopIteration at its end.

    Raises DesignRaised when the procedure raises or does not come back, NotAPrimitive when it yields something else.
    """
    with program.guard():
        try:
            return check_primitive(program, generator.send(result), generator)
        except StopIteration as stop:
            ended = stop
    raise ended


def perform(machine: ExploredHost, shared: bytes, party: int, primitive: Primitive) -> tuple[Outcome, ...]:
    """The outcomes of *primitive*; raises DesignRaised when carrying it out raises (wrong arguments, a hypercall).

    A machine with a true attribute `foreign` runs code of third parties: it is asked twice, and has to answer the same.
    """
    theirs = getattr(machine, "foreign", "")
    asked = Asked(primitive, theirs)
    outcomes, again = asked_twice(asked, lambda: tuple(machine.outcomes(shared, party, primitive)), theirs=bool(theirs))
    # A hypervisor's hypercalls are third-party code as well, run on the state. What differs between two runs would
    # make the table depend on which of them came first.
    if theirs and again != outcomes:
        first, second = next(pair for pair in itertools.zip_longest(outcomes, again) if pair[0] != pair[1])
        raise DesignRaised(f"{asked} is not deterministic: in the same state it {_end(first)} and then {_end(second)}")
    return outcomes


class Asked(NamedTuple):
    """Who asks for *primitive*, in words, for a message; *theirs*: whose hypervisor carries it out."""

    primitive: Primitive
    theirs: str

    @override
    def __str__(self) -> str:
        return f"{self.primitive}, asked for by {self.primitive.caller}{self.theirs},"


def _end(outcome: Outcome | None) -> str:
    return "did not end so" if outcome is None else f"returned {outcome.result}"


class Automaton:
    """All places where one party can stand, discovered as results arrive. Local 0 is its start."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids: dict[Any, int] = {}
        self.before: list[int] = []                              # per place: the one that it was first reached from
        self.paths: list[tuple[Any, ...]] = []
        self.waits_on: list[Primitive | None] = []
        self.ways: list[Any] = []                                # per place: the tree of what was worked out (Tables)
        self.moves: dict[tuple[int, Any], int] = {}
        # Place 0 is the start of the procedure, before any result.
        self._run(-1, ())

    # Where *path* leads to, by way of the place *before*.
    def _run(self, before: int, path: tuple[Any, ...]) -> int:
        asked = self._asked(before)
        generator, primitive = resume(self.program, path, asked)
        # The same path on new instances of design and hypervisor: what an instance remembers of earlier runs would
        # show here.
        if self.program.anew is not None:
            now, again = resume(self.program, path, asked, anew=True)
            if again != primitive:
                raise differs(self.program, len(path), primitive, again, now)
            dismiss(self.program, now)
        with self.program.guard():                      # of what they keep in local variables
            # The key is read while the generator is suspended: closing it runs its `finally` blocks and changes its
            # frames.
            known = self._intern(local_key(generator) if primitive else "done", before, path, primitive)
        dismiss(self.program, generator)
        return known

    def _asked(self, local: int) -> list[Primitive | None]:
        asked = []
        while local >= 0:
            asked.append(self.waits_on[local])
            local = self.before[local]
        asked.reverse()
        return asked

    def _intern(self, key: Any, before: int, path: tuple[Any, ...], primitive: Primitive | None) -> int:
        try:
            known = self.ids.get(key)
        except TypeError as error:
            raise DesignRaised(f"{self.program} keeps what has no hash in a local variable ({error}); "
                               "use tuples, numbers and strings") from error
        if known is None:
            known = self.ids[key] = len(self.paths)
            if known > LOCAL_MASK:
                raise DesignRaised(f"{self.program} has more than {LOCAL_MASK} places to stand; does it "
                                   "count without end, or keep objects that equal nothing but themselves?")
            if len(path) > MOST_STEPS:
                raise DesignRaised(f"{self.program} goes on and on: {MOST_STEPS} steps have led to no end, and to no place "
                                   f"where it has stood before, at {primitive}; does it count without end?")
            self.before.append(before)
            self.paths.append(path)
            self.waits_on.append(primitive)
            self.ways.append(None)
        # The key says too little: something that the procedure depends on is not in it. To go on would hide
        # interleavings.
        elif self.waits_on[known] != primitive:
            raise DesignRaised(
                f"{self.program}: two histories share a local state but continue with "
                f"{self.waits_on[known]} and {primitive}; keep loop state in local variables"
            )
        return known

    def after(self, local: int, result: Any) -> int:
        """The local state that *result* leads to from *local*."""
        # A result may be a list or a named tuple; two that are equal lead to the same place.
        memo = (local, freeze(result))
        known = self.moves.get(memo)
        if known is None:
            known = self.moves[memo] = self._run(local, (*self.paths[local], result))
        return known

    def cyclic(self) -> bool:
        """Whether some place can be reached again from itself (so that running it might never end)."""
        follow: dict[int, set[int]] = {}
        for (local, _), to in self.moves.items():
            follow.setdefault(local, set()).add(to)
        done: set[int] = set()
        path: set[int] = set()
        stack: list[tuple[int, bool]] = [(0, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.discard(node)
                done.add(node)
            elif node in path:
                return True
            elif node not in done:
                path.add(node)
                stack.append((node, True))
                stack.extend((n, False) for n in follow.get(node, ()) if n not in done)
        return False


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
    """The tables of one machine under one set of laws; kept from scenario to scenario."""

    def __init__(self, machine: ExploredHost, laws: Sequence[JudgingLaw]) -> None:
        self.machine, self.laws = machine, laws
        self.footprints = getattr(machine, "footprints", False)
        self.judges = [(law.name, Remembered(law.in_state) if self.footprints else law.in_state) for law in laws
                       if getattr(law, "state", True)]
        self.spared: Callable[[bytes], int] = getattr(machine, "spared", lambda _shared: 0)
        self.shared_ids: dict[bytes, int] = {}
        self.shared: list[bytes] = []
        self.broken: list[tuple[tuple[str, str], ...]] = []      # per shared state: (law, evidence) it breaks
        self.halted: list[bool] = []
        self.automata: dict[Program, Automaton] = {}
        self.facts: dict[tuple[str, Any], None] = {}             # (party, note), all that were ever noted
        self.steps: dict[tuple[Program, int], Steps] = {}        # by program, and its place among the parties
        self.ends: dict[tuple[Program | None, int], list[tuple[str, str, list[Step]]]] = {}     # by teardown and state

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
            known = self.automata[program] = Automaton(program)
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
        state = self.shared[shared]
        node = automaton.ways[local]
        # The walk down the tree of bytes: one look-up for each byte that the step reads (footprint.py).
        while type(node) is tuple:
            at, below = node
            node = below.get(state[at])
        if node is None:
            return self._work_out(automaton, local, state)
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
        state: Any = here.change
        for outcome in perform(self.machine, state, automaton.program.number, primitive):
            stays = outcome.result is STAY or self.machine.halted(outcome.shared)     # then no one is told anything
            to = here.local if stays else automaton.after(here.local, outcome.result)
            yield Way(to, outcome.shared, here.choices, primitive, outcome.result, outcome.failed,
                      here.notes + outcome.notes)

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
            for law in self.laws:
                if (evidence := law.on_note(note)) is not None:
                    yield law.name, evidence


def word(option: Any) -> str:
    """How a choice is called in a trace."""
    return " ".join(map(str, option)) if isinstance(option, tuple) and not hasattr(option, "_fields") else str(option)


class Explorer:
    """One scenario: some parties on one machine, from one initial state."""

    def __init__(
        self, tables: Tables, programs: Sequence[Program], initial: bytes, teardown: Program | None = None,
        broken_before: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.tables, self.programs, self.initial, self.teardown = tables, list(programs), initial, teardown
        self.broken_before = broken_before              # (law, evidence) on the way to the initial state
        self.automata = [tables.automaton(p) for p in programs]
        self.shifts = [SHARED_BITS + LOCAL_BITS * i for i in range(len(programs))]
        self.levels: list[list[int]] = []
        self.ends: list[tuple[int, int]] = []           # level, and the state, of those in which no one moves
        self.findings: dict[tuple[str, str], tuple[int, int, int, Move]] = {}

    def run(self, max_states: int = 1 << 40, max_seconds: float = 1e9, max_steps: int = 1 << 40) -> Result:
        """Explore all of it, or up to a limit; what breaks within *max_steps* is found, the rest is not looked for."""
        began = time.perf_counter()

        def reached(states: int) -> str | None:
            if states > max_states:
                return f"more than {max_states} states"
            if time.perf_counter() - began > max_seconds:
                return f"more than {max_seconds:g} seconds"
            return f"more than {max_steps} steps" if len(self.levels) > max_steps else None

        rows = self._rows()
        visited, transitions, limit = self._visit(rows, reached)
        states = len(visited)
        lost = [] if limit else self._lost(rows, visited)
        _release(rows)
        findings = [Finding(*b, [], self.initial) for b in (*self.broken_before, *self.tables.broken[self.levels[0][0]])]
        findings += [self._finding(broken, *at) for broken, at in self.findings.items()]
        findings += self._at_ends()
        findings += [Finding("progress", NEVER_ENDS, self.trace(*at), self.initial) for at in lost]
        unique: dict[tuple[str, str], Finding] = {}
        for finding in sorted(findings, key=lambda f: (len(f.steps), f.injected)):
            unique.setdefault((finding.law, finding.evidence), finding)
        return Result(
            states, transitions, list(unique.values()), limit, len(self.ends), len(self.levels) - 1,
            time.perf_counter() - began,
        )

    # Makes the levels and the ends: all states that were seen, how many transitions, the limit that was *reached*.
    def _visit(self, rows: Sequence[Row], reached: Callable[[int], str | None]) -> tuple[set[int], int, str | None]:
        frontier = [self.tables.intern(self.initial)]
        visited, transitions = set(frontier), 0
        self.levels, self.ends = [frontier], []
        while frontier:
            found, idle = _spread(rows, frontier)
            self.ends += ((len(self.levels) - 1, code) for code in idle)
            transitions += len(found)
            # The difference of two sets of integers, in C: nearly all the work of an exploration. No state stores
            # where it came from.
            fresh = set(found) - visited
            visited |= fresh
            if (limit := reached(len(visited))) is not None:
                return visited, transitions, limit
            frontier = list(fresh)
            if frontier:
                self.levels.append(frontier)
        return visited, transitions, None

    def _rows(self) -> list[Row]:
        return [(SHARED_MASK | LOCAL_MASK << shift, self._steps(i)) for i, shift in enumerate(self.shifts)]

    def _steps(self, i: int) -> Steps:
        steps = self.tables.steps.setdefault((self.programs[i], i), Steps())
        # The table outlives this explorer, but a missing entry is worked out by the one that runs. `_release` takes
        # the reference away, or the table would keep all levels alive.
        steps.fill = lambda key: self._fill(i, key, steps)
        return steps

    def _fill(self, i: int, key: int, steps: Steps) -> tuple[int, ...]:
        known = steps.flagged.get(key)
        if known is None:
            tables, automaton, shift = self.tables, self.automata[i], self.shifts[i]
            local, shared = key >> shift, key & SHARED_MASK
            try:
                ways = tables.ways(automaton, local, shared)
            except DesignRaised as error:
                raise self._after(error, len(self.levels) - 1, self._first(i, key)) from error
            to: list[int] = []
            flagged = False
            for way in ways:
                after = tables.arrive(shared, way)
                flagged = flagged or bool(way.broken or tables.broken[after])
                # The difference of two codes can be added to any product state with this key, whatever the other
                # parties do. It may be negative.
                step = (after | way.local << shift) - key
                if step not in to:
                    to.append(step)
            # An entry that breaks nothing is used from now on without a question. One that breaks a law is kept
            # apart, so that each scenario that takes it is told.
            if not flagged:
                steps[key] = added = tuple(to)
                return added
            moves = tables.moves(automaton, local, shared)
            known = steps.flagged[key] = tuple(to), tuple((broken, m) for m in moves for broken in tables.judge(m))
        level = len(self.levels) - 1
        for broken, move in known[1]:
            told = self.findings.get(broken)
            # Breadth first, so the first level is the shortest. Of equally short runs the one that needs fewer
            # injected failures is the better example.
            if told is None or (told[0] == level and self._spared(move.shared) > self._spared(told[3].shared)):
                self.findings[broken] = level, self._first(i, key), i, move
        return known[0]

    def _spared(self, shared: int) -> int:
        return self.tables.spared(self.tables.shared[shared])

    # The first state of the last level in which party *i* and the shared state are as *key* says.
    def _first(self, i: int, key: int) -> int:
        keep = SHARED_MASK | LOCAL_MASK << self.shifts[i]
        return next(code for code in self.levels[-1] if code & keep == key)

    def _after(self, error: DesignRaised, level: int, code: int) -> DesignRaised:
        lines = [step_line(step) for step in self.trace(level, code)]
        numbered = [f"  {n}. {line}" for n, line in enumerate(lines, 1)] or ["  (at once)"]
        if len(numbered) > 2 * _ENDS:
            numbered[_ENDS:-_ENDS] = [f"  ... {len(numbered) - 2 * _ENDS} more"]
        shown = "\n".join(numbered)
        return DesignRaised(f"{error}, after\n{shown}")

    def _finding(self, broken: tuple[str, str], level: int, code: int, i: int, move: Move) -> Finding:
        steps = self.trace(level, code)
        steps.append(self._step(i, move))
        return Finding(*broken, steps, self.initial)

    def _step(self, i: int, move: Move) -> Step:
        return Step(
            self.programs[i].name, move.choices, move.primitive, move.result, move.failed,
            self.tables.shared[move.shared], move.notes,
        )

    def trace(self, level: int, code: int) -> list[Step]:
        """A shortest run to product state *code*, which lies on *level*."""
        steps: list[Step] = []
        for states in reversed(self.levels[:level]):
            code, i, move = self._into(states, code)
            steps.append(self._step(i, move))
        steps.reverse()
        return steps

    def _into(self, states: Sequence[int], target: int) -> tuple[int, int, Move]:
        # Only states that agree with the target in all parties but one can lead to it.
        for code in states:
            for i, shift in enumerate(self.shifts):
                others = ~(SHARED_MASK | LOCAL_MASK << shift)
                # One party moves at a time: a predecessor agrees with its successor in the places of all others.
                if (code ^ target) & others:
                    continue
                for move in self.tables.moves(self.automata[i], code >> shift & LOCAL_MASK, code & SHARED_MASK):
                    if code & others | move.shared | move.local << shift == target:
                        return code, i, move
        raise InternalError("no predecessor: the levels of the exploration do not fit together")

    # States from which no one moves: all done (then the world is torn down and judged), a panic, or a deadlock.
    def _at_ends(self) -> list[Finding]:
        shortest: dict[tuple[str, str], tuple[tuple[int, int], int, int, list[Step]]] = {}
        torn: set[int] = set()
        for level, code in self.ends:
            for law, evidence, more in self._at_end(level, code, torn):
                length = level + len(more), -self._spared(code & SHARED_MASK)
                known = shortest.get((law, evidence))
                if known is None or length < known[0]:
                    shortest[law, evidence] = (length, level, code, more)
        return [
            Finding(law, evidence, self.trace(level, code) + more, self.initial)
            for (law, evidence), (_, level, code, more) in shortest.items()
        ]

    def _at_end(self, level: int, code: int, torn: set[int]) -> list[tuple[str, str, list[Step]]]:
        shared = code & SHARED_MASK
        if self.tables.halted[shared]:
            return []
        stuck = {
            wait for automaton, shift in zip(self.automata, self.shifts, strict=True)
            for wait in self.tables.waits(automaton, code >> shift & LOCAL_MASK, shared)
        }
        # At least one party waits, and no one moves: that others are done does not help it.
        if stuck:
            return [("progress", f"deadlock: {', '.join(sorted(stuck))}", [])]
        if shared in torn:                              # a shorter way to the same end has been judged
            return []
        torn.add(shared)
        try:
            return self._tear_down(shared)
        except DesignRaised as error:
            raise self._after(error, level, code) from error

    def _tear_down(self, shared: int) -> list[tuple[str, str, list[Step]]]:
        known = self.tables.ends.get((self.teardown, shared))
        if known is None:
            known = self.tables.ends[self.teardown, shared] = list(self._judge_end(shared))
        return known

    def _judge_end(self, shared: int) -> Iterator[tuple[str, str, list[Step]]]:
        tables, local = self.tables, 0
        steps: list[Step] = []
        if self.teardown is not None:
            automaton = tables.automaton(self.teardown)
            while automaton.waits_on[local] is not None and not tables.halted[shared]:
                # The teardown runs alone and without failures: it asks whether everything can be given back, not
                # whether it always succeeds.
                move = next((m for m in tables.moves(automaton, local, shared) if not m.failed), None)
                if move is None:
                    yield "progress", f"teardown waits for ever in {automaton.waits_on[local]}", steps
                    return
                # A teardown that goes round would never end, and it is a finding and not an error of ours.
                if len(steps) > 1000:
                    yield "progress", "teardown does not end", steps
                    return
                steps.append(Step(self.teardown.name, move.choices, move.primitive, move.result, move.failed,
                                  tables.shared[move.shared], move.notes))
                yield from ((law, evidence, steps[:]) for law, evidence in tables.judge(move))
                local, shared = move.local, move.shared
        if not tables.halted[shared]:
            for law in tables.laws:
                if (evidence := law.at_end(tables.shared[shared])) is not None:
                    yield law.name, evidence, steps

    # If some procedure contains a loop every state must be seen to reach an end. The first that does not, and its level.
    def _lost(self, rows: Sequence[Row], visited: set[int]) -> list[tuple[int, int]]:
        # Without a cycle in any party's automaton every run is finite, so every state reaches an end. Most scenarios
        # stop here.
        if not any(automaton.cyclic() for automaton in self.automata):
            return []
        stuck = never_ending(rows, self.levels, (code for _, code in self.ends), visited)
        return [(level, code) for level, states in enumerate(self.levels) for code in states if code in stuck][:1]

    def breaks_at(self, paths: Sequence[Sequence[Any]], shared: bytes) -> list[tuple[str, str, list[Step]]]:
        """What breaks, by no one's doing, where the parties have come to by the results *paths*, in *shared*.

        (law, evidence, steps of the teardown) if no one can move there, a livelock if no end can be reached.
        """
        code = self.tables.intern(shared)
        for automaton, shift, path in zip(self.automata, self.shifts, paths, strict=True):
            local = 0
            for result in path:
                local = automaton.after(local, result)
            code |= local << shift
        self.levels = [[code]]                          # which may be no first state: where a step that raises is told
        rows = self._rows()
        idle, ending = _spread(rows, [code])[1], self._can_end(rows, code)
        _release(rows)
        if idle:
            return self._at_end(0, code, set())
        return [] if ending else [("progress", NEVER_ENDS, [])]

    def _can_end(self, rows: Sequence[Row], code: int) -> bool:
        visited = {code}
        while self.levels[-1]:
            found, idle = _spread(rows, self.levels[-1])
            if idle:
                return True
            fresh = set(found) - visited
            visited |= fresh
            self.levels.append(list(fresh))
        return False


Row = tuple[int, Steps]
"""What the step of a party depends on, as a mask of the code of a product state, and the table of its steps."""


def _spread(rows: Sequence[Row], states: list[int]) -> tuple[list[int], list[int]]:
    """Where all steps from *states* lead, as often as they do, and those of *states* in which no one moves."""
    found: list[int] = []
    idle = states
    for keep, steps in rows:
        # `steps[...]` fills itself for a key that is new (Steps.__missing__).
        found += [code + step for code in states for step in steps[code & keep]]
        idle = [code for code in idle if not steps[code & keep]]
    return found, idle


# What fills the tables holds the explorer, and with it all levels; the tables outlive them.
def _release(rows: Sequence[Row]) -> None:
    for _, steps in rows:
        del steps.fill


def step_line(step: Step) -> str:
    """``party: [choices] primitive -> result`` of one step."""
    chosen = f"[{', '.join(step.choices)}] " if step.choices else ""
    if step.primitive is None:
        return f"{step.party}: {chosen}done"
    failed = " (injected failure)" if step.failed else ""
    result = "" if step.result is None else f" -> {step.result}"
    return f"{step.party}: {chosen}{step.primitive}{result}{failed}"
