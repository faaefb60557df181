"""What a reader is told about a run beside its steps: which of them are one operation, and which lead to the broken law."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_html import traced

from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.trace import Trace
from guest_memfd.explore.world.scenario import world
from guest_memfd.report.blame import offending
from guest_memfd.report.operations import operations
from guest_memfd.report.steps import lock_holders
from guest_memfd.report.story import Lead, blamed, leads
from guest_memfd.report.touched import MOST, touched
from guest_memfd.words.primitives import Entries, Folio, Primitive
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import Pfn


@pytest.fixture(scope="module")
def pinned() -> Replay:
    return replay(traced("gunyah-v17", "gunyah", ("vcpu", "device"), "pins-respected"))


@pytest.fixture(scope="module")
def load() -> Replay:
    return replay(traced("none", "gunyah", ("vcpu", "zeropad"), "host-survives"))


def story(again: Replay) -> list[Lead]:
    names = lock_holders(again.steps, again.initial)
    wrong = blamed(again.initial, again.steps, names, offending(again.finding))
    return leads(again, wrong, operations(again))


# -- a replay knows where it is ----------------------------------------------------------------------------------------


def test_a_replay_says_which_procedures_are_under_way(pinned: Replay) -> None:
    inside = pinned.inside
    assert inside[0][:3] == ("device", "map_pages", "mmap")
    assert all("user_fault" in names for names in inside[3:10])
    assert "lend_safe" in inside[20]
    assert pinned.standing["vcpu"][:4] == ("vcpu", "touch", "handle_fault", "guest_fault")
    assert pinned.standing["device"][:1] == ("device",)


# The oracle: fields are turned over one by one, and a step that ends otherwise must have looked at that one.
def test_a_replay_says_what_a_step_looks_at(pinned: Replay) -> None:
    machine = world("gunyah-v17", "gunyah").machine
    names = st.layout_of(pinned.initial).names
    checked = pinned.steps[20].primitive
    assert checked is not None
    assert checked.name == "folio_mapped"
    before = pinned.steps[19].shared
    (usual,) = machine.outcomes(before, 0, checked)
    seen = set()
    for at, number in enumerate(before):
        if names[at].startswith("number of"):
            continue
        other = before[:at] + bytes([1 - min(number, 1)]) + before[at + 1:]
        ends = machine.outcomes(other, 0, checked)
        if [end.result for end in ends] != [usual.result]:
            seen.add(names[at])
    assert seen == {"pfn0.user", "frozen", "unloaded"} & seen
    assert "pfn0.user" in seen
    assert seen <= pinned.looked[20]


# -- operations ----------------------------------------------------------------------------------------------------------


def test_steps_of_one_operation_belong_together(pinned: Replay, load: Replay) -> None:
    told = [(it.party, it.name, it.steps[0], it.steps[-1], it.came_to) for it in operations(pinned)]
    assert told == [
        ("device", "mmap", 1, 3, "returns 0"), ("device", "user_fault", 4, 10, "done"),
        ("device", "gup_fast", 11, 13, "done"), ("device", "munmap", 14, 14, "done"),
        ("vcpu", "guest_fault", 16, 25, "under way when the run ends")]
    (fault,) = operations(load)
    assert (fault.steps, fault.pages, fault.over) == (list(range(2, 9)), (0,), False)


def test_an_operation_goes_on_where_another_party_was_between() -> None:
    again = replay(traced("guestmem-rfc1", "kvm", ("vcpu", "vmm"), "all-or-nothing"))
    by_party = {it.party: it for it in operations(again) if len(it.steps) > 1}
    fault = by_party["vcpu"]
    assert set(range(fault.steps[0], fault.steps[-1])) - {*fault.steps}      # somebody was between
    for operation in by_party.values():
        assert {again.steps[number - 1].party for number in operation.steps} == {operation.party}
    assert fault.came_to == "returns -EEXIST"


def test_two_operations_of_a_kind_are_two() -> None:
    tree = ("tree_load", ("attributes", 0, 1), (2,), INITIAL, ())
    again = a_run(("vcpu", *tree), ("vcpu", *tree), ("device", *tree), ("vcpu", *tree))
    chosen = replace(again, steps=(again.steps[0], *(step._replace(choices=("gfn 0",)) for step in again.steps[1:])))
    assert [it.steps for it in operations(again)] == [[1, 2, 4]]
    assert [it.steps for it in operations(chosen)] == [[1], [2], [4]]


def test_an_end_that_is_told_with_the_next_step_is_that_of_the_operation() -> None:
    again = replay(traced("guestmem-rfc1", "gunyah", ("vcpu", "vmm"), "all-or-nothing"))
    fault = next(it for it in operations(again) if it.party == "vcpu")
    assert len(again.steps) not in fault.steps
    assert fault.came_to == "returns -EEXIST"


def test_every_party_that_begins_something_is_known_by_its_number(load: Replay) -> None:
    assert set(lock_holders(load.steps, load.initial).values()) == {"vcpu"}
    again = replay(traced("guestmem-rfc1", "kvm", ("vcpu", "vmm"), "all-or-nothing"))
    assert set(lock_holders(again.steps, again.initial).values()) == {"vcpu", "vmm"}


def test_what_was_not_run_has_no_operations(pinned: Replay) -> None:
    assert operations(Replay(pinned.trace, pinned.initial, pinned.steps)) == []


# -- what leads there ------------------------------------------------------------------------------------------------------


def test_the_pin_the_munmap_and_the_checks_that_ask_something_else(pinned: Replay) -> None:
    told = {lead.step: " ".join(lead.why) for lead in story(pinned)}
    assert list(told) == [13, 14, 21, 22]
    assert "since this step pfn0 GUP ref (GUP without FOLL_PIN: vmsplice, /proc/pid/mem) is 1" in told[13]
    assert told[14] == ("decides what step 21 is told: pfn0 VMM maps it page 0 -> none "
                        "decides what step 22 is told: VMAs 1 -> 0")
    assert told[21] == "a check, in lend_safe(): it looks at pfn0 VMM maps it, and not at pfn0 GUP ref"
    assert told[22] == "a check, in lend_safe(): it looks at VMAs, and not at pfn0 GUP ref"


def test_the_page_that_was_given_away(load: Replay) -> None:
    assert story(load) == [
        Lead(8, ("since this step pfn0 owner is guest, pfn0 host stage 2 is withheld: part of what breaks the law",))]


def test_a_call_that_is_made_to_fail_leads_there() -> None:
    again = replay(traced("guestmem-rfc1", "gunyah", ("vmm",), "host-survives"))
    assert [lead.why for lead in story(again)] == [("this call is made to fail",)]


INITIAL = world("none", "kvm").initial


def made(**fields: int) -> bytes:
    raw = bytearray(INITIAL)
    for name, number in fields.items():
        raw[st.layout_of(INITIAL).names.index(name.replace("__", "."))] = number
    return bytes(raw)


def a_run(*steps: tuple[str, str, tuple[Any, ...], Any, bytes, tuple[str, ...]]) -> Replay:
    """A run of (party, primitive, arguments, result, state after it, fields it looks at), all of it in one guest fault."""
    taken = tuple(Step(party, (), Primitive(name, args, "library"), result, False, after, ())
                  for party, name, args, result, after, _ in steps)
    trace = Trace("none", "kvm", Scene(), 1, ("vcpu", "device"), "pins-respected", "it is pinned", (), "0.1.0")
    return Replay(trace, INITIAL, taken, None,
                  tuple((step[0], "guest_fault" if step[0] == "vcpu" else "device", "_do") for step in steps),
                  tuple(frozenset(step[5]) for step in steps))


FOLIO = Folio(Pfn(0))
PINNED = made(pfn0__pin=1)


def told_of(again: Replay, *wrong: str) -> dict[int, str]:
    fields = blamed(again.initial, again.steps, {}, wrong)
    return {lead.step: " ".join(lead.why) for lead in leads(again, fields, operations(again))}


def test_a_check_that_was_true_when_it_asked() -> None:
    again = a_run(
        ("vcpu", "folio_maybe_dma_pinned", (FOLIO,), False, INITIAL, ("pfn0.pin",)),
        ("device", "gup_recheck", (0, FOLIO, True), True, PINNED, ("pfn0.pin",)),
        ("vcpu", "hyp_call", ("lend", FOLIO), 0, made(pfn0__pin=1, pfn0__owner=1), ()))
    told = told_of(again, "pfn0.pin", "pfn0.owner")
    assert told[1] == "a check, in guest_fault(): it looks at pfn0 FOLL_PIN ref, and step 2 changes that afterwards"
    assert told[2].startswith("since this step pfn0 FOLL_PIN ref (FOLL_PIN of a device or io_uring) is 1")


def test_a_check_of_another_page_is_none() -> None:
    again = a_run(
        ("device", "gup_recheck", (0, FOLIO, True), True, PINNED, ()),
        ("vcpu", "folio_mapped", (Folio(Pfn(1)),), False, PINNED, ("pfn1.user",)),
        ("vcpu", "hyp_call", ("lend", FOLIO), 0, made(pfn0__pin=1, pfn0__owner=1), ()))
    assert list(told_of(again, "pfn0.pin", "pfn0.owner")) == [1]


def test_what_is_wrong_all_along_or_by_the_last_step_is_not_said_to_be_missed() -> None:
    again = a_run(
        ("vcpu", "folio_mapped", (FOLIO,), False, INITIAL, ("pfn0.user",)),
        ("vcpu", "hyp_call", ("lend", FOLIO), 0, made(pfn0__owner=1), ()))
    assert told_of(again, "pfn0.s1", "pfn0.owner")[1] == "a check, in guest_fault(): it looks at pfn0 VMM maps it"


def test_what_the_operation_itself_has_changed_before_its_check_decides_nothing() -> None:
    unlocked = made(pfn0__uptodate=1)
    again = a_run(
        ("vcpu", "folio_mark_uptodate", (FOLIO,), None, unlocked, ()),
        ("vcpu", "folio_mapped", (FOLIO,), False, unlocked, ("pfn0.uptodate",)),
        ("vcpu", "hyp_call", ("lend", FOLIO), 0, made(pfn0__uptodate=1, pfn0__owner=1), ()))
    assert list(told_of(again, "pfn0.owner")) == [2]


def test_a_write_that_changes_nothing_is_said_to_be_in_vain() -> None:
    again = a_run(
        ("vcpu", "set_direct_map_invalid_noflush", (FOLIO,), 0, INITIAL, ("pfn0.handled",)),
        ("vcpu", "hyp_call", ("lend", FOLIO), 0, made(pfn0__owner=1), ()))
    told = told_of(again, "pfn0.owner")
    assert told[1] == "changes nothing here, in guest_fault(): it looks at pfn0 memory failure handled"


def test_a_run_of_somebody_elses_names_has_a_story(pinned: Replay) -> None:
    strange = replace(pinned, inside=tuple((*names[:-1], "<b>") for names in pinned.inside))
    assert any("<b>()" in why for lead in story(strange) for why in lead.why)


# -- what a step touches -------------------------------------------------------------------------------------------------


def test_arguments_of_a_strangers_trace_may_be_anything() -> None:
    strange = (("tree_store", ("bindings", 0, 7)), ("tree_store", ("bindings", 0, Entries(0, 1 << 63))),
               ("vma_covers", ("a", -1)), ("tree_load", (None, 1 << 70, True)), ("filemap_get_folio", (-1,)),
               ("no_such", (1, 2)))
    for name, args in strange:
        step = Step("vcpu", (), Primitive(name, args, "library"), None, False, INITIAL, ())
        assert len(touched(step, INITIAL)) <= MOST


@pytest.mark.parametrize(("name", "args", "about"), [
    ("vma_covers", (0, 2), ("page0", "page1")), ("tree_load", ("attributes", 1, 1), ("page1",)),
    ("tree_store", ("provided", 1, (3, 3)), ("gfn1", "gfn2")), ("tree_load", ("bindings", 0, 2), ("page0", "page1"))])
def test_ranges_are_named(name: str, args: tuple[Any, ...], about: tuple[str, ...]) -> None:
    step = Step("vcpu", (), Primitive(name, args, "library"), None, False, INITIAL, ())
    assert touched(step, INITIAL) == about
