"""What the code does as it is: which statements each scenario executes, and what it costs.

A mutant is the code as it is until one of its statements is reached, so only scenarios that reach one can notice it.
"""

from __future__ import annotations

import ast
import builtins
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mutants.apply import import_anew, module_of, swap
from mutants.killer import Killer, Member, Seen
from mutants.mutant import Mutant, Place
from mutants.targets import SOURCES


class Ran(NamedTuple):
    """A scenario that was run: its cost in seconds of CPU time, what it found, and the statements it can reach."""

    label: str
    world: str
    seconds: float
    found: str | None
    seen: frozenset[Place]


class Baseline(NamedTuple):
    """All scenarios, the cheapest first, and what their parties were seen to reach."""

    ran: list[Ran]
    parties: Seen


def baseline(killer: Killer, files: Sequence[str]) -> Baseline:
    """Run every scenario. Leaves marks in the code: for a child."""
    seen: set[Place] = set()
    vars(builtins)["_seen"] = seen.add
    for file in files:
        swap(file, compile(marked(file), str(SOURCES / file), "exec"))
    with killer.watching(seen) as parties:
        ran = list(_run_all(killer, seen, parties))
    return Baseline(sorted(ran, key=lambda run: run.seconds), parties)


def wrong_anew(killer: Killer, file: str) -> str | None:
    """The first scenario that finds something with the package imported anew, *file* unchanged, and what. For a child."""
    path = SOURCES / file
    import_anew(file, compile(path.read_text(), str(path), "exec"))
    return next((f"{scenario.label}, imported anew: {found}"
                 for scenario in killer.scenarios() if (found := scenario.run()) is not None), None)


# What a party has done before is done again by no one, and the time of its first scenario is that of all of them. What is
# seen before a scenario runs is setting the scene; what no party does is done by the host.
def _run_all(killer: Killer, seen: set[Place], parties: Seen) -> Iterator[Ran]:
    alone: dict[Member, float] = {}
    scene: set[Place] = set()
    for scenario in killer.scenarios():
        scene |= seen
        seen.clear()
        began = time.process_time()
        found = scenario.run()
        seconds = time.process_time() - began
        keys = [(scenario.world, party) for party in scenario.parties]
        for key in keys:
            alone.setdefault(key, seconds)
        seconds += sum(alone[key] for key in keys)
        reached = scene.union(seen, *(parties[key] for key in keys))
        seen.clear()
        yield Ran(scenario.label, scenario.world, seconds, found, frozenset(reached))


def marked(file: str) -> ast.Module:
    """The file, each statement of its functions saying that it is reached."""
    tree: ast.Module = _Marks(file).visit(ast.parse((SOURCES / file).read_text()))
    return ast.fix_missing_locations(tree)


class _Marks(ast.NodeTransformer):
    def __init__(self, file: str) -> None:
        self.file, self.depth = file, 0

    def visit(self, node: ast.AST) -> Any:
        inside = self.depth > 0
        self.depth += isinstance(node, ast.FunctionDef)
        new: Any = self.generic_visit(node)
        self.depth -= isinstance(node, ast.FunctionDef)
        return [self._mark(node), new] if inside and isinstance(node, ast.stmt) else new

    def _mark(self, stmt: ast.stmt) -> ast.stmt:
        place: Place = self.file, stmt.lineno, stmt.col_offset
        return ast.parse(f"_seen({place})").body[0]


def reached(mutant: Mutant, ran: Sequence[Ran], killer: Killer) -> Iterator[Ran]:
    """The scenarios of *killer* that can notice *mutant*: those that reach it; of a value, all where its file is used."""
    if mutant.site.function is not None:
        places = mutant.places()
        yield from (run for run in ran if not places.isdisjoint(run.seen))
    else:
        worlds = {run.world for run in ran if any(file == mutant.site.file for file, _, _ in run.seen)}
        worlds |= killer.looking_at(module_of(mutant.site.file))
        yield from (run for run in ran if run.world in worlds or not worlds)
