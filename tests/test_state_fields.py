"""Nothing in the abstract host is dead: every field of a state changes, every primitive is asked for, somewhere.

And one thing that docs/explorer.md rests on: the library's trees are read and written under its lock.
"""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from guest_memfd.check.explorer import Program, Tables
from guest_memfd.check.scenario import World, run_alone
from guest_memfd.designs import DESIGNS
from guest_memfd.hosts.abstract import AbstractHost
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.host import PRIMITIVES, Entries
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES

Scenario = tuple[str, ...]

EXPLORED: dict[tuple[str, str], tuple[Scenario, ...]] = {
    ("library", "kvm"): (*combinations(PARTIES, 2), ("vmm", "unloader", "stop")),   # unloaded takes VM and file to go
    ("library", "pkvm"): (("vcpu", "vmm"),),                # a page that the guest shares with the host
    ("gunyah-v17", "gunyah"): (("vcpu", "vmm"),),           # bindings_lock, the provided tree, NOSYNC
    ("guestmem-rfc1", "gunyah"): (("vcpu", "device"),),     # BUG_ON, folio_maybe_dma_pinned
    ("secretmem", "kvm"): (("vcpu", "power"),),             # secretmem_users
    ("none", "pkvm"): (("vcpu", "power"),),                 # force reclaim
}

RECORDS = {"pfn": st.FRAME_FIELDS, "page": st.PAGE_FIELDS, "party": st.PARTY_FIELDS, "": st.GLOBALS}
FIELDS = [f"{record}.{name}".lstrip(".") for record, names in RECORDS.items() for name in names]


def explored(design: str, hypervisor: str, scenarios: tuple[Scenario, ...]) -> Tables:
    named = [PARTIES[name] for name in PARTIES if any(name in scenario for scenario in scenarios)]
    world = World(DESIGNS[design], HYPERVISORS[hypervisor], named, laws=())
    for scenario in scenarios:
        world.explorer(scenario).run()
    return world.tables


@pytest.fixture(scope="module")
def tables() -> list[Tables]:
    return [explored(*which, scenarios) for which, scenarios in EXPLORED.items()]


@pytest.fixture(scope="module")
def values(tables: list[Tables]) -> dict[str, set[int]]:
    """Field, without the number of its record -> the values it takes."""
    taken: dict[str, set[int]] = {}
    columns = zip(*chain.from_iterable(table.shared for table in tables), strict=True)
    for at, column in enumerate(columns):
        record, dot, name = st.field_name(at).rpartition(".")
        taken.setdefault(f"{record.rstrip('0123456789')}{dot}{name}", set()).update(column)
    return taken


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_takes_two_values(values: dict[str, set[int]], field: str) -> None:
    assert len(values[field]) > 1, f"{field} is always {values[field]}"


@pytest.mark.parametrize(("field", "words"), [
    ("pfn.owner", st.OWNERS), ("pfn.content", st.CONTENTS), ("vm", st.VM_STATES),
])
def test_every_word_of_an_enumeration_occurs(values: dict[str, set[int]], field: str, words: tuple[str, ...]) -> None:
    assert values[field] == set(range(len(words)))


def setting_the_scene() -> set[str]:
    """What create and bind ask for, before any party runs."""
    world = World(DESIGNS["library"], HYPERVISORS["kvm"], [])
    asked: set[str] = set()
    shared = world.machine.initial()
    for start in (lambda: world.library.create(st.PAGES, (1,)), lambda: world.library.bind(0, 0, st.PAGES)):
        shared, _ = run_alone(world.machine, Program(0, "scene", start), shared, lambda p, _: asked.add(p.name))
    return asked


def test_every_primitive_is_asked_for(tables: list[Tables]) -> None:
    asked = {
        primitive.name for table in tables for automaton in table.automata.values()
        for primitive in automaton.waits_on if primitive is not None
    }
    of_large_folios = {"split_folio", "filemap_find_folio"}   # the explorer's files have two single pages
    assert sorted(PRIMITIVES - asked - setting_the_scene() - of_large_folios) == []


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_the_library_uses_its_trees_under_the_invalidate_lock(hypervisor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(DESIGNS["library"], HYPERVISORS[hypervisor], [PARTIES[name] for name in PARTIES], laws=())
    load, store = AbstractHost.xa_load, AbstractHost.xa_store
    bare: set[tuple[str, str]] = set()

    def loads(host: AbstractHost, tree: str, start: int, nr: int) -> tuple[int, ...]:
        if not (host.state.invalidate_w or host.state.invalidate_r):
            bare.add(("load", tree))
        return load(host, tree, start, nr)

    def stores(host: AbstractHost, tree: str, start: int, values: Entries) -> int:
        if not host.state.invalidate_w:
            bare.add(("store", tree))
        return store(host, tree, start, values)

    monkeypatch.setattr(AbstractHost, "xa_load", loads)
    monkeypatch.setattr(AbstractHost, "xa_store", stores)
    for parties in (("vcpu", "vmm"), ("vcpu", "stop"), ("vmm", "device"), ("vmm", "memory-failure")):
        world.explorer(parties).run()
    assert bare == set()
