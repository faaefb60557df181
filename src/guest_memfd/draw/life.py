"""The life of a page: its states and what leads from one to another, read off the states that the explorer reaches.

Nothing is drawn from memory. A state or an edge is there because an exploration has come to it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from guest_memfd.abstract.state import State
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput
from guest_memfd.explore.engine.automaton import LOCAL_MASK
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.tables import SHARED_MASK, Move
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words.pagestate import ALIVE, OWNERS, PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import OPS
from guest_memfd.words.units import FIRST_PAGE, Pfn

RUNS = (("two-pages", ("vcpu", "vmm")), ("both-shared", ("vmm", "vmm2")), ("two-pages", ("vcpu2", "vmm2", "stop")))
"""Scenes and parties. In the first the page begins private, in the second shared and allocated; in the third the VM ends."""

ATTRIBUTES = {PRIVATE_PAGE: "private", SHARED_PAGE: "shared"}
NOBODY = "-"
MAPPED, ZAPPED, OUT = "mapped", "zapped, not flushed", "out"
NO_FILE = "no file"
NO_ATTRIBUTE = "no attribute"
"""Of designs that keep none, in a file that is there."""


class Node(NamedTuple):
    """A state of the page. *owner* and *direct* (the direct map) are NOBODY's while it has no folio."""

    attribute: str
    cached: bool
    owner: str = NOBODY
    direct: str = NOBODY


class Edge(NamedTuple):
    """What leads from one state to another: one *primitive*."""

    source: Node
    target: Node
    primitive: str


@dataclass
class Life:
    """How many states of the explorer are in each node; the operations in which each edge is taken."""

    nodes: Counter[Node] = field(default_factory=Counter)
    edges: defaultdict[Edge, set[str]] = field(default_factory=lambda: defaultdict(set))
    states: int = 0
    start: dict[Node, str] = field(default_factory=dict)
    """Where a run begins, and in which scene."""


def node(shared: bytes) -> Node:
    """What state *shared* of the abstract host says of the first page of the file."""
    state = State(shared)
    page = state.page(FIRST_PAGE)
    attribute = ATTRIBUTES.get(page.attr) or (NO_ATTRIBUTE if state.file(0).inode == ALIVE or page.cached else NO_FILE)
    if not page.cached:
        return Node(attribute, False)
    frame = state.frame(Pfn(page.cached - 1))
    return Node(attribute, True, OWNERS[frame.owner], MAPPED if frame.s1 else ZAPPED if frame.stale else OUT)


def life(
    design: str = "library", runs: Sequence[tuple[str, tuple[str, ...]]] = RUNS, hypervisor: str = "pkvm"
) -> Life:
    """Explore *runs* of *design* under *hypervisor*, without failures, and look at the page in every state.

    Raises UnknownName, BadInput where the design was not posted for the hypervisor.
    """
    posted = DESIGNS[design].hypervisors
    if posted is not None and hypervisor not in posted:
        raise BadInput(f"design {design!r} was posted for {', '.join(posted)} only, not for {hypervisor!r}")
    found = Life()
    for scene, names in runs:
        parties = [PARTIES[name] for name in names]
        # All states are looked at, and the engine in Python lists them.
        world = World(DESIGNS[design], HYPERVISORS[hypervisor], parties, scene=SCENES[scene], failures=0, laws=[],
                      engine="python")
        explorer = world.explorer(names)
        result = explorer.run()
        assert result.limit is None
        found.states += result.states
        found.start[node(world.initial)] = scene
        _add(found, explorer)
    return found


def _add(found: Life, explorer: Explorer) -> None:
    nodes = [node(shared) for shared in explorer.tables.shared]
    # A party's move depends on where it stands and on the host's state. States that agree in both need one look.
    places = {(at, code >> shift & LOCAL_MASK, code & SHARED_MASK)
              for code in _codes(explorer) for at, shift in enumerate(explorer.shifts)}
    found.nodes.update(nodes[code & SHARED_MASK] for code in _codes(explorer))
    for at, local, shared in places:
        automaton = explorer.automata[at]
        for move in explorer.tables.moves(automaton, local, shared):
            # Most steps change nothing about this page: an edge to the same node would say so, and hide those that do.
            if nodes[move.shared] != nodes[shared]:
                edge = Edge(nodes[shared], nodes[move.shared], _asked(move))
                found.edges[edge].add(_operation(edge.primitive, State(explorer.tables.shared[shared]).ghost(
                    automaton.program.number).op))


def _codes(explorer: Explorer) -> Iterable[int]:
    return (code for level in explorer.levels for code in level)


# What the step is: of a hypercall, which.
def _asked(move: Move) -> str:
    primitive = move.primitive
    assert primitive is not None
    return str(primitive.args[0]) if primitive.name == "hyp_call" else primitive.name


# In which operation: number *op* of OPS + 1, or 0.
def _operation(primitive: str, op: int) -> str:
    if op:
        return f"`{OPS[op - 1]}`"
    return "the guest's own call" if primitive == "guest_consents" else "the end of the file"


def ordered(found: Life) -> list[Node]:
    """All nodes, those without a folio first, then by attribute, owner and direct map."""
    owners, directs = (NOBODY, *OWNERS), (NOBODY, MAPPED, ZAPPED, OUT)
    return sorted(found.nodes, key=lambda n: (n.cached, n.attribute, owners.index(n.owner), directs.index(n.direct)))


def letters(found: Life) -> dict[Node, str]:
    """What each node is called in the picture and in the table."""
    return {each: chr(ord("A") + at) for at, each in enumerate(ordered(found))}


def numbered(found: Life) -> Iterator[tuple[int, Edge]]:
    """All edges with their numbers: in the order of their sources, then of their targets."""
    order = ordered(found)
    yield from enumerate(sorted(found.edges, key=lambda e: (order.index(e.source), order.index(e.target), e.primitive)), 1)
