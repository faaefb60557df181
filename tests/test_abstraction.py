"""The abstraction function does not look away: whatever field it would always call 0, lock step would notice.

For each field of the state there is a schedule in which it is not 0, and in which lock step diverges in just that field
when the emulated side is told to call it 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from schedules import LARGE, SCENES, lent, schedule, seen

from guest_memfd.abstract import state as st
from guest_memfd.lockstep import refinement
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.units import PAGE

FIELDS = (*(f"{kind}.{field}" for kind, fields in st.RECORDS.items() for field in fields), *st.GLOBALS)

NEVER = {
    "pfn.of": "a page is only ever some other VM's where there are two, and a machine beside the abstract host has one",
}
"""Fields that no schedule can change, and why."""

HANDED_IN = {"failures", "given", "refusals"}
"""Fields that are the scheduler's: the machine cannot know how many failures are still to come."""

WITHIN = 60
"""A field has to show in one of so many schedules of the parties that are there to show it."""


class Directed(NamedTuple):
    """Parties under *design*, and the fields that they are there to show."""

    hypervisor: str
    design: str
    scene: str
    parties: tuple[str, ...]
    fields: tuple[str, ...]


DIRECTED = (
    Directed("kvm", "library", "two-pages", ("vcpu", "vmm", "device", "drainer"), ("pfn.get", "pfn.pin", "pfn.spec")),
    Directed("kvm", "library", "two-pages", ("vcpu", "vmm", "pfn-cache"), ("vm.gpc", "vm.gpc_fresh", "vm.gpc_readers")),
    Directed("kvm", "library", "two-pages", ("vcpu", "vcpu2", "memory-failure", "power"),
             ("pfn.poison", "pfn.handled", "away", "preparing", "frozen")),
    Directed("pkvm", "none", "two-pages", ("vcpu", "vcpu2", "power"), ("gfn.gpoison",)),
    Directed("pkvm", "library", "two-pages", ("vcpu", "vmm-pages", "vmm2"), ("pfn.withdrawn",)),
    Directed("gunyah", "none", "two-pages", ("vcpu", "vcpu2", "zeropad"), ("panic",)),
    Directed("gunyah", "library", "for-good", ("vcpu", "vcpu2", "stop"), ("pfn.stuck", "pfn.kept", "leaked", "refusals")),
    Directed("gunyah", "gunyah-v17", "two-pages", ("vcpu", "vmm", "vcpu2", "vmm2"),
             ("gfn.provided", "pfn.provided", "pfn.gstale", "file.bindings_q")),
    Directed("kvm", "kvm-7.4", "two-pages", ("vcpu", "vcpu2", "vmm-any", "vmm2"),
             ("gfn.memslot", "gfn.gmem_file", "vm.slots_lock", "vm.mmu_w", "vm.mmu_r", "vm.mmu_q", "vm.srcu", "vm.seq",
              "vm.sampled", "vm.range")),
    Directed("kvm", "library", "nothing-yet", ("creator", "unloader", "stop"), ("unloaded", "file.evictor")),
    Directed("kvm", "library", "crossed", ("vmm-any", "vmm2", "stop"),
             ("party.removed", "party.toggled", "party.places", "file.reserved", "file.invalidate_q")),
    Directed("kvm", "library", "large-folio", ("vcpu", "vmm"),
             (*(f"folio.{field}" for field in st.FOLIO_FIELDS), "party.splits")),
)


class Shown(NamedTuple):
    """The schedule that shows a field, and how many steps it takes until then."""

    steps: int
    directed: Directed
    seed: int


# ``pfn0.owner`` is of the field ``pfn.owner``.
def field_of(name: str) -> str:
    record, _, field = name.rpartition(".")
    return f"{record.rstrip('0123456789')}.{field}" if record else field


def run(directed: Directed, seed: int) -> refinement.Pair:
    return schedule(directed.hypervisor, directed.design, seed, directed.parties, directed.scene)


@cache
def shown() -> dict[str, Shown]:
    """For each field the shortest way to a state in which it is not 0, of all schedules that `DIRECTED` needs."""
    found: dict[str, Shown] = {}
    right = refinement.abstraction
    for directed in DIRECTED:
        seed = 0
        while seed < WITHIN and not found.keys() >= set(directed.fields):
            states: list[bytes] = []

            def recorded(*args: object, states: list[bytes] = states) -> bytes:
                states.append(right(*args))  # type: ignore[arg-type]
                return states[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(refinement, "abstraction", recorded)
                run(directed, seed)
            for field, steps in first_seen(states):
                if field not in found or steps < found[field].steps:
                    found[field] = Shown(steps, directed, seed)
            seed += 1
    return found


def first_seen(states: list[bytes]) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for number, state in enumerate(states):
        new = {field_of(name) for name, value in st.fields_of(state).items() if value} - seen
        yield from ((field, number) for field in new)
        seen |= new


def test_every_field_is_one_of_these() -> None:
    assert set(st.fields_of(st.State.empty(st.Sizes(*[1] * len(st.Sizes._fields))).save())) == {
        name.replace(".", "0.") for name in FIELDS}
    assert set(NEVER) | HANDED_IN <= set(FIELDS)
    assert {directed.scene for directed in DIRECTED} <= {*SCENES, *LARGE}


@pytest.mark.parametrize("directed", DIRECTED, ids=lambda directed: "-".join((directed.hypervisor, *directed.parties)))
def test_the_parties_show_what_they_are_there_for(directed: Directed) -> None:
    assert set(directed.fields) <= shown().keys()


@pytest.mark.parametrize("field", FIELDS)
def test_it_does_not_look_away(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if field in NEVER:
        assert field not in shown(), f"it can be seen: not that {NEVER[field]}"
        return
    there = shown()[field]
    right = refinement.abstraction

    def blind(*args: object) -> bytes:
        state = bytearray(right(*args))  # type: ignore[arg-type]
        for at, name in enumerate(st.layout_of(bytes(state)).names):
            if field_of(name) == field:
                state[at] = 0
        return bytes(state)

    monkeypatch.setattr(refinement, "abstraction", blind)
    with pytest.raises(refinement.Diverged) as diverged:
        run(there.directed, there.seed)
    said = re.findall(r"(\S+): abstract \d+, emulated (\d+)", str(diverged.value))
    assert {(field_of(name), number) for name, number in said} == {(field, "0")}


# -- what it reads, and from where -------------------------------------------------------------------------------------

def test_a_page_that_the_guest_did_not_ask_for_is_told_apart() -> None:
    both = lent()
    before = seen(both)
    assert before["pfn0.asked"] == 1
    both.host.machine.tracer.asked.clear()
    assert seen(both) == {**before, "pfn0.asked": 0}


@pytest.mark.parametrize("more", [-1, 1])
def test_references_of_no_kind_are_refused(more: int) -> None:
    both = lent()
    both.host.machine.pages[both.host.machine.watched[0] // PAGE].refcount += more
    with pytest.raises(AssertionError, match=r"pfn 0x[0-9a-f]+: \d+ references, \d+ by kind"):
        seen(both)


def test_a_tlb_entry_of_a_user_that_the_table_no_longer_has_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent()
    before = seen(both)
    assert before["pfn0.user"] == 0
    monkeypatch.setattr(type(both.host.machine), "user_indexes", lambda machine, pa: [1] if pa == machine.watched[0] else [])
    assert seen(both) == {**before, "pfn0.user": 2}


def test_it_goes_before_an_entry_that_the_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent()
    first = both.host.machine.watched[0]
    monkeypatch.setattr(type(both.host.machine), "user_indexes", lambda machine, pa: [0, 1] if pa == first else [])
    mapping = SimpleNamespace(lookup=lambda index: first if index == 0 else None, vmas=[], present={})
    monkeypatch.setattr(both.host.inode, "mapping", mapping)
    assert seen(both)["pfn0.user"] == 2
    mapping.lookup = lambda index: first
    assert seen(both)["pfn0.user"] == 1


def test_it_is_told_of_all_frames_that_are_watched() -> None:
    both = lent()
    sizes = both.world.machine.sizes
    for frames in (sizes.frames - 1, sizes.frames + 1):
        with pytest.raises(ValueError, match="zip"):
            seen(both, sizes._replace(frames=frames))


@pytest.mark.parametrize(("start", "nr", "mask"), [(1, 6, 0b110), (-1, 3, 0b011), (0, 3, 0b111)])
def test_what_an_operation_is_about_ends_where_the_file_does(start: int, nr: int, mask: int) -> None:
    both = lent("three-pages")
    vmm = both.world.programs["vmm2"].number
    for name, args in (("begin_op", ("punch", start, nr, None)), ("tree_reserve", ("attributes", start, nr))):
        asked = Primitive(name, args, "library")
        both.step(vmm, asked, both.outcomes(vmm, asked)[0])
    assert (seen(both)[f"party{vmm}.scope"], seen(both)["file0.reserved"]) == (mask, mask)


def test_all_that_a_task_has_announced_counts() -> None:
    both = lent("three-pages")
    vmm = both.world.programs["vmm2"].number
    both.host.machine.tracer.announced[vmm] = (range(1), range(2, 3))
    assert seen(both)[f"party{vmm}.announced"] == 0b101


def test_the_cache_of_the_vm_maps_the_frame_that_it_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent()
    monkeypatch.setattr(both.host.vm, "gpc", SimpleNamespace(pa=both.host.machine.watched[1]))
    assert seen(both)["vm0.gpc"] == 2
