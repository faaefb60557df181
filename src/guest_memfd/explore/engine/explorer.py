"""The tabulating explorer: every interleaving, breadth first, each local step executed once.

A procedure talks to the world through primitives only, so where it stands is a function of the results it has been
sent. Two tables follow from that:

* the *automaton* of a party: (local, result) -> local, filled by re-running the generator along a recorded path
  (automaton.py);
* the *host table*: (party, primitive, shared state) -> outcomes, filled by asking the host once (tables.py).

Both outlive a scenario, so a suite of hundreds pays for each entry once. A product state is one integer, shared state
in the low bits and one field per party above; exploring is table look-up and set arithmetic on those integers.
docs/explorer.md says what a verdict means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from guest_memfd.errors import DesignRaised
from guest_memfd.explore.engine.automaton import LOCAL_BITS, LOCAL_MASK
from guest_memfd.explore.engine.backwards import Arrival, Backwards
from guest_memfd.explore.engine.finding import INTERRUPTED, Finding, Result, Sight, Step, step_line
from guest_memfd.explore.engine.livelock import never_ending
from guest_memfd.explore.engine.memory import used
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import NEVER_ENDS, SHARED_BITS, SHARED_MASK, Move, Steps, Tables

T = TypeVar("T")

_SPARE, _BYTES_A_STATE = 16 << 20, 400
"""Memory that one level needs, as a rule at most: for what is worked out, and for each of its states, bytes.

It is an address range only, that no one touches."""

_MANY = 1 << 12
"""States of a level from which on memory is looked at."""

_ENDS = 20
"""Steps that a message shows of the beginning, and of the end, of a long way."""


def never() -> bool:
    """Nobody asks for the end."""
    return False


def nobody(_states: int, _level: int) -> None:
    """Nobody wants to be told how far it is."""


class Explorer:
    """One scenario: some parties on one machine, from one initial state."""

    def __init__(
        self, tables: Tables, programs: Sequence[Program], initial: bytes, teardown: Program | None = None,
        broken_before: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.tables, self.programs, self.initial, self.teardown = tables, list(programs), initial, teardown
        self.max_bytes: int | None = None
        self.ending: Callable[[], bool] = never
        self.told: Callable[[int, int], None] = nobody  # states and level, at each level
        self.broken_before = broken_before              # (law, evidence) on the way to the initial state
        self.automata = [tables.automaton(p) for p in programs]
        self.shifts = [SHARED_BITS + LOCAL_BITS * i for i in range(len(programs))]
        self.levels: list[list[int]] = []
        self.ends: list[tuple[int, int]] = []           # level, and the state, of those in which no one moves
        self.findings: dict[tuple[str, str], int] = {}  # (law, evidence) of a move -> the first level that has one
        self.lost: list[tuple[int, int]] = []           # level, and those of its states from which no end is reached

    def run(
        self, max_states: int = 1 << 40, max_seconds: float = 1e9, max_steps: int = 1 << 40, max_bytes: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Result:
        """Explore all of it, or up to a limit; what breaks within *max_steps* is found, the rest is not looked for.

        max_bytes: memory that the process may have. stopped: whether to end now, asked at every level and more often.
        """
        began = time.perf_counter()
        self.max_bytes, self.ending = max_bytes, stopped

        def reached(states: int) -> str | None:
            self.told(states, len(self.levels))
            if stopped():
                return INTERRUPTED
            if states > max_states:
                return f"more than {max_states} states"
            if time.perf_counter() - began > max_seconds:
                return f"more than {max_seconds:g} seconds"
            return f"more than {max_steps} steps" if len(self.levels) > max_steps else None

        states, transitions, limit = self._visit(reached)
        told = dict.fromkeys((*self.broken_before, *self.tables.broken[self.tables.intern(self.initial)]))
        findings = [Finding(*broken, [], self.initial) for broken in told]
        sights = [sight for sight in self._sights(complete=limit is None) if (sight.law, sight.evidence) not in told]
        runs = Backwards(_wanted(sights), self._before)
        for law, evidence, level, tails in sights:
            last = min(tails, key=lambda state: runs.rank[level, state])
            findings.append(Finding(law, evidence, runs.trace(level, last) + tails[last], self.initial))
        # Ways that were looked for once more have been asked of this one.
        _release(self._rows())
        unique: dict[tuple[str, str], Finding] = {}
        for finding in sorted(findings, key=lambda f: (len(f.steps), f.injected, f.law, f.evidence)):
            unique.setdefault((finding.law, finding.evidence), finding)
        return Result(
            states, transitions, list(unique.values()), limit, self.finals, self.depth, time.perf_counter() - began,
        )

    def out_of_memory(self) -> str:
        """The limit, in words."""
        return f"more than {self.max_bytes} bytes of memory"

    @property
    def finals(self) -> int:
        """States in which no one moves."""
        return len(self.ends)

    @property
    def depth(self) -> int:
        """Steps to the last level."""
        return len(self.levels) - 1

    # Makes the levels and the ends: how many states, how many transitions, the limit that was *reached*.
    def _visit(self, reached: Callable[[int], str | None]) -> tuple[int, int, str | None]:
        rows = self._rows()
        visited, transitions, limit = self._search(rows, reached)
        states = len(visited)
        if limit is None:
            self._look_for_lost(rows, visited)
        # Not where something raises: without memory whatever is done on the way out raises in turn.
        _release(rows)
        return states, transitions, limit

    def _give_up(self) -> None:
        _release(self._rows())
        self.levels, self.ends = [], []

    def _search(self, rows: Sequence[Row], reached: Callable[[int], str | None]) -> tuple[set[int], int, str | None]:
        frontier = [self.tables.intern(self.initial)]
        visited, transitions = set(frontier), 0
        self.levels, self.ends = [frontier], []
        while frontier:
            # Without memory Python cannot even raise: it is asked for here, a level ahead, and given back at once.
            bytes(_SPARE + _BYTES_A_STATE * len(frontier))
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
            if self.max_bytes is not None and len(frontier) > _MANY and (
                    used() + _BYTES_A_STATE * len(frontier) > self.max_bytes):
                return visited, transitions, self.out_of_memory()
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
        for broken, _ in known[1]:
            # Breadth first, so the first level is the shortest.
            if broken not in self.findings:
                self.findings[broken] = len(self.levels) - 1
        return known[0]

    def _spared(self, shared: int) -> int:
        return self.tables.spared(self.tables.shared[shared])

    # The first state of the last level in which party *i* and the shared state are as *key* says.
    def _first(self, i: int, key: int) -> int:
        keep = SHARED_MASK | LOCAL_MASK << self.shifts[i]
        return next(code for code in self.levels[-1] if code & keep == key)

    def _after(self, error: DesignRaised, level: int, code: int) -> DesignRaised:
        lines = [step_line(step) for step in Backwards({level: [code]}, self._before).trace(level, code)]
        numbered = [f"  {n}. {line}" for n, line in enumerate(lines, 1)] or ["  (at once)"]
        if len(numbered) > 2 * _ENDS:
            numbered[_ENDS:-_ENDS] = [f"  ... {len(numbered) - 2 * _ENDS} more"]
        shown = "\n".join(numbered)
        return DesignRaised(f"{error}, after\n{shown}")

    def _step(self, i: int, move: Move) -> Step:
        return Step(
            self.programs[i].name, move.choices, move.primitive, move.result, move.failed,
            self.tables.shared[move.shared], move.notes,
        )

    # All steps from states of *level* into *targets*, by target.
    def _before(self, level: int, targets: set[int]) -> dict[int, list[Arrival]]:
        found: dict[int, list[Arrival]] = {target: [] for target in targets}
        for i, shift in enumerate(self.shifts):
            others = ~(SHARED_MASK | LOCAL_MASK << shift)
            # One party moves at a time: a predecessor agrees with its successor in the places of all others.
            alike: dict[int, list[int]] = {}
            for target in targets:
                alike.setdefault(target & others, []).append(target)
            for code in self.levels[level]:
                if code & others in alike:
                    moves = self.tables.moves(self.automata[i], code >> shift & LOCAL_MASK, code & SHARED_MASK)
                    for number, move in enumerate(moves):
                        to = code & others | move.shared | move.local << shift
                        if to in found:
                            found[to].append(Arrival(code, self._saved(code), i, number, self._step(i, move)))
        return found

    # What was found, each with the states in which it is seen after the fewest steps; of these those with the fewest
    # injected failures, and of these those whose host state is the least: what is told must not depend on our numbers.
    def _sights(self, *, complete: bool) -> list[Sight]:
        sights = [*self._moves_that_break(), *self._at_ends()]
        if complete and self.lost:
            level = self.lost[0][0]
            best = Least[list[Step]]()
            for _, code in self.lost:
                best.add((-self._spared(code & SHARED_MASK), self._saved(code)), code, [])
            sights.append(Sight("progress", NEVER_ENDS, level, best.tails))
        return sights

    def _saved(self, code: int) -> bytes:
        return self.tables.shared[code & SHARED_MASK]

    def _moves_that_break(self) -> Iterator[Sight]:
        flagged = [(SHARED_MASK | LOCAL_MASK << shift, self._steps(i).flagged) for i, shift in enumerate(self.shifts)]
        for level in sorted({*self.findings.values()}):
            best = {broken: Least[list[Step]]() for broken, at in self.findings.items() if at == level}
            for code in self.levels[level]:
                for i, (keep, known) in enumerate(flagged):
                    for broken, move in known[code & keep][1] if code & keep in known else ():
                        if broken in best:
                            best[broken].add((-self._spared(move.shared), self._saved(code)), code, [self._step(i, move)])
            yield from (Sight(*broken, level, least.tails) for broken, least in best.items())

    # States from which no one moves: all done (then the world is torn down and judged), a panic, or a deadlock.
    def _at_ends(self) -> list[Sight]:
        best: dict[tuple[str, str], Least[list[Step]]] = {}
        torn: set[int] = set()
        levels: dict[int, int] = {}
        for level, code in self.ends:
            levels[code] = level
            for law, evidence, more in self._at_end(level, code, torn):
                order = level + len(more), -self._spared(code & SHARED_MASK), level, self._saved(code)
                best.setdefault((law, evidence), Least()).add(order, code, more)
        return [Sight(*broken, levels[next(iter(least.tails))], least.tails) for broken, least in best.items()]

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

    # If some procedure contains a loop every state must be seen to reach an end. Those of the first level that do not.
    def _look_for_lost(self, rows: Sequence[Row], visited: set[int]) -> None:
        # Without a cycle in any party's automaton every run is finite, so every state reaches an end. Most scenarios
        # stop here.
        if any(automaton.cyclic() for automaton in self.automata):
            stuck = never_ending(rows, self.levels, (code for _, code in self.ends), visited)
            for level, states in enumerate(self.levels):
                self.lost = [(level, code) for code in states if code in stuck]
                if self.lost:
                    return

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


class Least(Generic[T]):
    """The states for which an order is the least, each with what was first said of it."""

    def __init__(self) -> None:
        self.order: Any = None
        self.tails: dict[int, T] = {}

    def add(self, order: Any, state: int, tail: T) -> None:
        """One more; orders are compared with each other."""
        if self.order is None or order < self.order:
            self.order, self.tails = order, {}
        if order == self.order:
            self.tails.setdefault(state, tail)


def _wanted(sights: Sequence[Sight]) -> dict[int, set[int]]:
    wanted: dict[int, set[int]] = {}
    for sight in sights:
        wanted.setdefault(sight.level, set()).update(sight.tails)
    return wanted


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
