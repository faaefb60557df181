"""States that make no difference are left out: fewer states, the same verdicts, evidence and lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from toy import PAGE, US, Toy, ToyLaw, end

from guest_memfd import check
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import DesignRaised
from guest_memfd.explore.engine import naive, place
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.engine.liveness import live_at
from guest_memfd.explore.engine.program import Program, resume
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world import choice
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import SCENES
from guest_memfd.words.primitives import Steps

# -- which variables are live ------------------------------------------------------------------------------------------


def nothing_is_read_again(a: int, b: int) -> Iterator[int]:
    yield a + b


def one_is(a: int, b: int) -> Iterator[int]:
    yield a
    yield b


def written_first(a: int, b: int) -> Iterator[int]:
    yield 0
    a = b
    yield a


def on_one_way_of_two(a: int, b: int) -> Iterator[int]:
    yield 0
    yield a if b else 0


def next_time_round(a: int, b: int) -> Iterator[int]:
    for _ in range(2):
        yield a
        a = b


def by_a_handler(a: int, b: int) -> Iterator[int]:
    try:
        yield 0
        b = 0
        b = 1 // b
    except ZeroDivisionError:
        yield a


def by_a_finally(a: int, b: int) -> Iterator[int]:
    try:
        yield b
    finally:
        print(a)


def by_a_closure(a: int, b: int) -> Iterator[int]:
    def later() -> int:
        return a

    yield b
    yield later()


def all_at_once(a: int, b: int) -> Iterator[int]:
    yield b
    yield len(locals())


def deleted(a: int, b: int) -> Iterator[int]:
    yield b
    del a


@pytest.mark.parametrize(("procedure", "live"), [
    (nothing_is_read_again, ""), (one_is, "b"), (written_first, "b"), (on_one_way_of_two, "ab"), (next_time_round, "b"),
    (by_a_handler, "a"), (by_a_finally, "a"), (by_a_closure, "a"), (all_at_once, "ab"), (deleted, "a")])
def test_what_may_be_read_after_the_first_step(procedure: Callable[[int, int], Any], live: str) -> None:
    suspended = procedure(1, 2)
    next(suspended)
    found = live_at(suspended.gi_code, suspended.gi_frame.f_lasti)
    assert {"a", "b"} & (found if found is not None else {"a", "b"}) == {*live}


def test_instructions_that_are_not_known_make_everything_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def procedure(a: int) -> Iterator[int]:
        yield a

    monkeypatch.setattr("guest_memfd.explore.engine.liveness._EFFECTS", {})
    suspended = procedure(1)
    next(suspended)
    assert live_at(suspended.gi_code, suspended.gi_frame.f_lasti) is None


# -- counts ------------------------------------------------------------------------------------------------------------

COUNTS = Toy(folio_ref_count=lambda byte, party, args: [end(0, byte), end(1, byte)],
             clear_folio=lambda byte, party, args: [end(None, (byte + 1) % 4)])


def forgets() -> Steps[None]:
    count = yield from US.folio_ref_count(PAGE)
    yield from US.clear_folio(PAGE)
    count = 0 if count is None else 1
    for _ in range(count):
        yield from US.clear_folio(PAGE)


def never_asks_again() -> Steps[None]:
    count = yield from US.folio_ref_count(PAGE)
    del count
    _count = yield from US.folio_ref_count(PAGE)
    yield from US.clear_folio(PAGE)
    yield from US.clear_folio(PAGE)


def asks_for_it() -> Steps[None]:
    found = yield from US.folio_ref_count(PAGE)
    yield from (US.clear_folio(PAGE) if found else US.lock_folio(PAGE))


def states(procedure: Any, *, reduce: bool) -> int:
    return Explorer(Tables(COUNTS, [ToyLaw()], reduce=reduce), [Program(0, "p", procedure)], b"\0").run().states


def test_what_is_never_read_again_makes_no_place() -> None:
    assert (states(never_asks_again, reduce=False), states(never_asks_again, reduce=True)) == (7, 5)


def test_what_is_read_makes_one() -> None:
    assert states(forgets, reduce=True) == states(forgets, reduce=False)


def test_what_was_asked_for_is_dead_and_tells_places_apart_all_the_same() -> None:
    assert states(asks_for_it, reduce=True) == states(asks_for_it, reduce=False) == 4


MODELS = [("library", "pkvm", "two-pages", ["vcpu2", "zeropad"]), ("none", "kvm", "both-shared", ["vcpu2", "stop"]),
          ("gunyah-v17", "gunyah", "two-pages", ["vcpu2", "unloader"])]


@pytest.mark.parametrize(("design", "hypervisor", "scene", "parties"), MODELS)
def test_the_naive_engine_counts_as_many(
    design: str, hypervisor: str, scene: str, parties: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand(program: Program, path: Any) -> Any:
        generator, primitive = resume(program, path)
        return (place.local_key(generator, live=True), primitive) if primitive else "done"

    built = world(design, hypervisor, scene=scene, reduce=True)
    result = built.explorer(parties).run()
    monkeypatch.setattr(naive, "_stand", stand)
    assert (result.states, result.transitions) == naive.explore(
        built.machine, [built.programs[name] for name in parties], built.initial)


def test_taking_live_for_dead_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "live_at", lambda code, offset: frozenset(code.co_freevars))
    for design, hypervisor, scene, parties in MODELS:
        wrong, right = (world(design, hypervisor, scene=scene, reduce=reduce) for reduce in (True, False))
        # As a rule two histories share a place then, and go on differently.
        with suppress(DesignRaised):
            assert told(wrong, parties) != told(right, parties)


# -- verdicts ----------------------------------------------------------------------------------------------------------

def told(built: World, parties: Any) -> Any:
    """All that a reduction must not change."""
    result: Result = built.explorer(parties).run()
    return result.verdict, sorted((f.law, f.evidence, len(f.steps), f.injected) for f in result.findings)


WORLDS = [(design.name, hypervisor.name, scene) for design in DESIGNS.values() for hypervisor in HYPERVISORS.values()
          for scene in SCENES if design.hypervisors is None or hypervisor.name in design.hypervisors]


def differences(worlds: Sequence[tuple[str, str, str]], stride: int = 1) -> tuple[int, list[Any]]:
    """How many scenarios of the first look were compared, one of *stride* in each of *worlds*, and those that differ."""
    compared, differ = 0, []
    for design, hypervisor, scene in worlds:
        whole, reduced = (world(design, hypervisor, scene=scene, reduce=reduce) for reduce in (False, True))
        for parties in plan(whole, full=False)[::stride]:
            compared += 1
            if told(whole, parties) != told(reduced, parties):
                differ.append((design, hypervisor, scene, parties))
    return compared, differ


def test_a_sample_of_verdicts_evidence_and_lengths_is_the_same() -> None:
    compared, differ = differences(WORLDS[::29], stride=12)
    assert (compared > 30, differ) == (True, [])


@pytest.mark.long
def test_verdicts_evidence_and_lengths_are_the_same() -> None:
    choice.prepare(None)
    compared, differ = differences(WORLDS[::17])
    assert (compared > 700, differ) == (True, [])


def test_the_report_says_what_was_left_out() -> None:
    reports = [check("library", "kvm", parties=["vcpu", "vmm2"], jobs=1, reduce=reduce) for reduce in (False, True)]
    assert [report.reductions for report in reports] == [(), ("live-locals",)]
    assert reports[1].states < reports[0].states
    assert reports[1].laws == reports[0].laws


def test_default_of_worlds_is_every_state() -> None:
    assert inspect.signature(world).parameters["reduce"].default is False
