"""Nothing in the abstract host is dead: every field of a state changes, every primitive is asked for, somewhere.

And one thing that docs/explorer.md rests on: the library's trees are read and written under its lock.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.world.scenario import world as built
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.words.pagestate import CONTENTS, INODE_STATES, OWNERS, VM_STATES
from guest_memfd.words.primitives import PRIMITIVES, Entries

Scenario = tuple[str, ...]

class Seen(NamedTuple):
    design: str
    hypervisor: str
    scene: str
    scenarios: tuple[Scenario, ...]


EXPLORED = (
    Seen("library", "kvm", "two-pages", (
        ("vmm", "power"), ("vmm", "memory-failure"), ("vcpu2", "pfn-cache"), ("vmm", "device"), ("vmm2", "repeater"),
        ("vcpu2", "kcore"), ("vcpu2", "zeropad"), ("vmm2", "stop"), ("vmm", "unloader", "stop"), ("drainer", "pinner"),
        ("vmm-odd",))),                                                 # unloaded takes VM and file to go
    Seen("library", "pkvm", "two-pages", (("vcpu", "vmm"),)),           # a page that the guest shares with the host
    Seen("library", "pkvm", "failing-twice", (("vcpu", "vmm-pages"),)),  # ... and is told that it is the guest's again
    Seen("library", "pkvm", "for-good", (("vcpu", "stop"),)),           # what never comes back
    Seen("library", "pkvm", "two-vms", (("vcpu", "other-vcpu", "other-stop"),)),
    Seen("library", "kvm", "nothing-yet", (("creator",),)),
    Seen("gunyah-v17", "gunyah", "two-pages", (("vcpu", "vmm"),)),      # bindings_lock, the provided tree, NOSYNC
    Seen("guestmem-rfc1", "gunyah", "two-pages", (("vcpu", "device"), ("page-cache-reader", "vcpu2"))),    # BUG_ON, pins
    Seen("secretmem", "kvm", "two-pages", (("vcpu", "power"),)),        # secretmem_users
    Seen("none", "pkvm", "two-pages", (("vcpu", "power"),)),            # force reclaim
    Seen("library", "kvm", "large-folio", (("vcpu2", "vmm2"), ("vcpu2", "vmm"))),
    Seen("library", "pkvm", "mixed-block", (("vcpu2", "vmm2"),)),       # a merge, blocks in both tables of stage 2
    Seen("library", "kvm", "large-folio", (("vcpu2", "memory-failure", "vmm2"),)),
    Seen("kvm-7.4", "kvm", "two-pages", (("vcpu2", "vmm2"), ("vcpu2", "stop"))),    # mmu_lock, SRCU, memslots
    Seen("filemap-hook", "kvm", "two-pages", (("writer", "pfn-cache-v2"), ("launcher", "uffd"))),
)

FIELDS = [f"{record}.{name}" for record, names in st.RECORDS.items() for name in names] + list(st.GLOBALS)


def explored(seen: Seen) -> Tables:
    world = built(seen.design, seen.hypervisor, scene=seen.scene, laws=(), engine="python")     # which lists the states
    for scenario in seen.scenarios:
        world.explorer(scenario).run()
    return world.tables


@pytest.fixture(scope="module")
def tables() -> list[Tables]:
    return [explored(seen) for seen in EXPLORED]


@pytest.fixture(scope="module")
def values(tables: list[Tables]) -> dict[str, set[int]]:
    """Field, without the number of its record -> the values it takes."""
    taken: dict[str, set[int]] = {}
    for table in tables:
        names = st.layout_of(table.shared[0]).names
        for name, column in zip(names, zip(*table.shared, strict=True), strict=True):
            record, dot, field = name.rpartition(".")
            taken.setdefault(f"{record.rstrip('0123456789')}{dot}{field}", set()).update(column)
    return taken


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_takes_two_values(values: dict[str, set[int]], field: str) -> None:
    assert len(values[field]) > 1, f"{field} is always {values[field]}"


@pytest.mark.parametrize(("field", "words"), [
    ("pfn.owner", OWNERS), ("pfn.content", CONTENTS), ("vm.vm", VM_STATES), ("file.inode", INODE_STATES),
])
def test_every_word_of_an_enumeration_occurs(values: dict[str, set[int]], field: str, words: tuple[str, ...]) -> None:
    assert values[field] == set(range(len(words)))


def test_every_primitive_is_asked_for(tables: list[Tables]) -> None:
    asked = {
        primitive.name for table in tables for automaton in table.automata.values()
        for primitive in automaton.waits_on if primitive is not None
    }
    of_large_folios = {"filemap_find_folio"}                  # the explorer's files have few pages
    of_other_locks = {"down_read_trylock"}                    # the library waits; a design may not
    assert sorted(PRIMITIVES - asked - of_large_folios - of_other_locks) == []


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_the_library_uses_its_trees_under_the_invalidate_lock(hypervisor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = built("library", hypervisor, laws=())
    load, store = AbstractHost.tree_load, AbstractHost.tree_store
    bare: set[tuple[str, str]] = set()

    def loads(host: AbstractHost, tree: str, start: int, nr: int) -> tuple[int, ...]:
        if not (host.file.invalidate_w or host.file.invalidate_r):
            bare.add(("load", tree))
        return load(host, tree, start, nr)

    def stores(host: AbstractHost, tree: str, start: int, values: Entries) -> int:
        if not host.file.invalidate_w:
            bare.add(("store", tree))
        return store(host, tree, start, values)

    monkeypatch.setattr(AbstractHost, "tree_load", loads)
    monkeypatch.setattr(AbstractHost, "tree_store", stores)
    for parties in (("vcpu2", "vmm"), ("vcpu", "stop"), ("vmm2", "device"), ("vmm2", "memory-failure")):
        world.explorer(parties).run()
    assert bare == set()
