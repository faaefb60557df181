"""States from which no end is left to be reached: the walks against the plain way, backwards over all transitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from drawn import BYTES, CALLS, CODE, machine, procedure
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import end, explorer

from guest_memfd.explore.engine.automaton import LOCAL_MASK
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.livelock import never_ending
from guest_memfd.explore.engine.tables import NEVER_ENDS, SHARED_MASK

Graph = Mapping[int, Iterable[int]]


def backwards(graph: Graph) -> set[int]:
    """The nodes of *graph* from which no path leads to one without successors."""
    before: dict[int, list[int]] = {}
    for node, successors in graph.items():
        for to in successors:
            before.setdefault(to, []).append(node)
    alive = [node for node, successors in graph.items() if not successors]
    ending = set(alive)
    while alive:
        for node in before.get(alive.pop(), ()):
            if node not in ending:
                ending.add(node)
                alive.append(node)
    return set(graph) - ending


def walked(graph: Graph, order: Sequence[int]) -> set[int]:
    """The same, as the explorer asks for it: two parties, one for the even steps and one for the odd."""
    every = 1 << 30
    rows = [(every - 1, {node: tuple(to - node for to in graph[node] if to % 2 == parity) for node in graph})
            for parity in range(2)]
    ends = [node for node, successors in graph.items() if not successors]
    return never_ending(rows, [order], ends, set(graph))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12).flatmap(lambda size: st.tuples(
    st.lists(st.sets(st.integers(0, size - 1), max_size=3), min_size=size, max_size=size),
    st.permutations(range(size)))))
def test_walks_find_what_is_found_backwards(drawn: tuple[list[set[int]], list[int]]) -> None:
    graph = dict(enumerate(drawn[0]))
    assert walked(graph, drawn[1]) == backwards(graph)


@pytest.mark.parametrize("size", [1, 2, 50, 2000])
def test_a_ring_with_one_way_out_ends_wherever_it_is_entered(size: int) -> None:
    ring = {node: [(node + 1) % size] for node in range(size)}
    assert walked(ring, range(size)) == set(ring)
    for exit_ in {0, size // 2, size - 1}:
        graph = {**ring, exit_: [*ring[exit_], size], size: []}
        for order in (range(size + 1), range(size, -1, -1)):
            assert walked(graph, order) == set()


def product(engine: Explorer) -> dict[int, set[int]]:
    """Every state that *engine* has seen, and its successors."""
    graph: dict[int, set[int]] = {}
    for code in (code for states in engine.levels for code in states):
        graph[code] = set()
        for automaton, shift in zip(engine.automata, engine.shifts, strict=True):
            rest = code & ~(SHARED_MASK | LOCAL_MASK << shift)
            graph[code] |= {rest | move.shared | move.local << shift for move in engine.tables.moves(
                automaton, code >> shift & LOCAL_MASK, code & SHARED_MASK)}
    return graph


@settings(max_examples=150, deadline=None)
@given(CALLS, st.lists(CODE, min_size=1, max_size=3))
def test_livelocks_are_found_where_they_begin(calls: list[Any], codes: list[Any]) -> None:
    def call(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        return [end(result, to % BYTES) for result, to in dict.fromkeys(calls[args[1]][byte])]

    engine = explorer(machine(call), *map(procedure, codes))
    result = engine.run()
    stuck = backwards(product(engine))
    first = [level for level, states in enumerate(engine.levels) if stuck.intersection(states)][:1]
    assert [len(f.steps) for f in result.findings if f.evidence == NEVER_ENDS] == first
