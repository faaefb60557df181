"""What a world has been found to do, as trees: Python is asked once for all states that agree, and the answer made flat.

The steps of parties are those of the project's tables (footprint.py), which both engines fill and use. Judgements of states,
whether the machine has stopped, and what is broken at the end are asked for in the same way, on watched states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import proxy

from guest_memfd.explore.engine.compiled.encoding import BREAKS, BREAKS_AT_END, FACT, FAILED, HALTS
from guest_memfd.explore.engine.compiled.flat import Flat, FlatWay, Path
from guest_memfd.explore.engine.compiled.space import Space
from guest_memfd.explore.engine.footprint import Remembered, path_of
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables, Way

Broken = tuple[str, str]
"""(law, evidence)."""


class Payload(NamedTuple):
    """What a way was made of: what it breaks, and the ends of the step that it stands for; of a judgement none."""

    broken: tuple[Broken, ...]
    ends: tuple[Way, ...] = ()


class Known:
    """The trees of *tables*, for all scenarios that begin in *initial*."""

    def __init__(self, tables: Tables, initial: bytes, loops: Any) -> None:
        # They have this one, and who explores collects no cycles (suite/pool.py): it would keep them for ever.
        tables = proxy(tables)
        self.tables, self.flat = tables, Flat(initial, loops)
        self.spare: Space | None = None                 # memory of a scenario that is over
        self.payloads: dict[Broken, list[int]] = {}     # those that break it
        self._trees: dict[Program, int] = {}
        self._new: dict[tuple[int, int, Path], Any] = {}        # of several threads that ask the same, one is answered
        questions: dict[int, Callable[[Any], Any]] = {
            HALTS: lambda state: [("", "")] * bool(tables.machine.halted(state)),
            BREAKS: lambda state: [
                (law.name, said) for law in tables.state_laws if (said := law.in_state(state)) is not None],
            BREAKS_AT_END: lambda state: [
                (law.name, said) for law in tables.laws if (said := law.at_end(state)) is not None],
        }
        self._judges = {tree: Remembered(question) for tree, question in questions.items()}

        # Values that are known beforehand spare making trees again.
        for automaton in tables.automata.values():
            for root in automaton.ways:
                self._learn_values(root)

    def _learn_values(self, root: Any) -> None:
        ahead = [root]
        while ahead:
            node = ahead.pop()
            if type(node) is tuple:
                at, below = node
                self.flat.learn((at, value) for value in below)
                ahead += below.values()
            else:
                for way in node or ():
                    self.flat.learn(way.change)

    def tree(self, program: Program) -> int:
        """The number of its tree."""
        known = self._trees.get(program)
        if known is None:
            known = self._trees[program] = self.flat.add_tree()
        return known

    def learn_step(self, program: Program, local: int, state: bytes) -> None:
        """Find out how *program* goes on from *local*; raises what third parties raise."""
        automaton = self.tables.automaton(program)
        if automaton.waits_on[local] is None:
            self._new[self.tree(program), local, ()] = ()
            return
        ways = self.tables.known(automaton, local, state)
        self._new[self.tree(program), local, tuple(path_of(automaton.ways[local], state))] = ways

    def learn(self, tree: int, state: bytes) -> None:
        """Find out what judgement *tree* says of *state*."""
        judge = self._judges[tree]
        said = judge(state)
        self._new[tree, 0, tuple(path_of(judge.root, state))] = said

    def flatten(self) -> None:
        """Make flat what has been learned."""
        flat = self.flat
        for (tree, _, path), said in self._new.items():
            flat.learn(path)
            if tree not in self._judges:
                for way in said:
                    flat.learn(way.change)
        flat.make_room()
        for (tree, local, path), said in self._new.items():
            ways = _judgement(said) if tree in self._judges else _steps(local, dict(path), said)
            # What a teardown breaks, or its end, is found by length and not by level.
            if tree != BREAKS_AT_END:
                for number, way in enumerate(ways, len(flat.payload)):
                    for broken in way.payload.broken:
                        self.payloads.setdefault(broken, []).append(number)
            flat.add(tree, local, path, ways)
        flat.put()
        self._new.clear()


def _judgement(said: Sequence[Broken]) -> list[FlatWay]:
    return [FlatWay(0, (), 0, Payload(tuple(said)))] if said else []


# The ends of a step; those that lead to the same are one way, as they are one transition.
def _steps(local: int, before: dict[int, int], ends: Sequence[Way]) -> list[FlatWay]:
    alike: dict[tuple[int, Any], list[Way]] = {}
    for end in ends:
        alike.setdefault((end.local, end.change), []).append(end)
    ways = []
    for (to, change), same in alike.items():
        payload = Payload(tuple(broken for end in same for broken in end.broken), tuple(same))
        flags = FACT * bool(payload.broken) | FAILED * all(end.failed for end in same)
        ways.append(FlatWay(local ^ to, [(at, before[at], new) for at, new in change], flags, payload))
    return ways


def changes(end: Way) -> Sequence[tuple[int, int]]:
    """(byte, value) that *end* changes: the machine keeps footprints."""
    assert isinstance(end.change, tuple)
    return end.change
