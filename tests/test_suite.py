"""The suite: the same report however the work is split, limits that never pass for a proof, errors that arrive whole."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, DesignRaised, GuestMemfdError, HostUnavailable, NotAPrimitive
from guest_memfd.explore.suite import work
from guest_memfd.explore.suite.check import Limits, Report, check, compare
from guest_memfd.explore.suite.crew import Schedule
from guest_memfd.explore.suite.plan import FEW, LONG, NAMED, QUICK, TRIPLES, partners_of, plan
from guest_memfd.explore.suite.work import Task
from guest_memfd.explore.world.scenario import world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.scene import Scene, Slot

SHORT = Limits(states=200)
"""Enough of every scenario to find something in bad designs, in seconds."""

PLAIN = ["two-pages"]
LOAD = ("vcpu", "zeropad")


class NoFlush(OurLibrary):
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


class FlushesTwice(OurLibrary):
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from super().flush(folios)
        yield from super().flush(folios)


class TouchesToBegin(OurLibrary):
    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from Host("kvm").set_direct_map_default_noflush(Folio(0))
        return (yield from super().bind(gfn, start, nr))


class Raises(OurLibrary):
    def munmap(self) -> Steps[None]:
        raise KeyError("vma")
        yield


class YieldsNonsense(OurLibrary):
    def munmap(self) -> Steps[None]:
        yield 42                                        # type: ignore[misc]


class KillsItsProcess(OurLibrary):
    home = os.getpid()

    def munmap(self) -> Steps[None]:
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().munmap()


def timeless(report: Report) -> Report:
    return dataclasses.replace(report, seconds=0.0)


# -- scenarios ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_scenarios_can_be_and_none_is_there_twice(hypervisor: str, scene: str, full: bool) -> None:
    there = world("library", hypervisor, scene=scene)
    asked = plan(there, full=full)
    assert len({frozenset(scenario) for scenario in asked}) == len(asked)
    for scenario in asked:
        there.must_have(scenario)
        assert list(scenario) == [name for name in there.programs if name in scenario]
    sizes = [len(scenario) for scenario in asked]
    assert sizes == sorted(sizes)
    # Where nobody lends, or takes large folios, such a scene has nothing of its own.
    alone = (there.scene.lends and there.library.lender is None) or (there.scene.order and not there.library.order)
    assert (3 in sizes) == (scene in (TRIPLES if full else QUICK) and not alone)
    assert not alone or max(sizes) == 1


def test_in_the_whole_suite_everybody_is_everywhere_alone_and_in_pairs() -> None:
    for scene in SCENES:
        there = world("library", "gunyah" if SCENES[scene].lends else "kvm", scene=scene)
        asked = plan(there)
        # A VMM of several operations is in scenes with large folios only where it is named.
        lone = {name for name in there.programs if name not in LONG or not SCENES[scene].order or scene in LONG[name]}
        assert {names[0] for names in asked if len(names) == 1} == lone
        usual = [name for name in there.programs if name not in LONG]
        pairs = {pair for pair in itertools.combinations(usual, 2) if there.apart(pair)}
        assert {pair for pair in pairs if scene not in FEW or {*FEW[scene]} & {*pair}} <= set(asked)


def test_who_lives_long_has_pairs_where_the_plan_says() -> None:
    for name, places in LONG.items():
        for scene, others in places.items():
            assert {*others} <= set(PARTIES)
            there = world("library", "gunyah" if SCENES[scene].lends else "kvm", scene=scene)
            assert {pair for pair in plan(there) if len(pair) == 2 and name in pair} >= {
                tuple(sorted(pair, key=list(there.programs).index)) for pair in ((name, other) for other in others)}


def test_in_a_scene_that_the_plan_does_not_name_they_have_all_their_pairs() -> None:
    assert partners_of("vmm-life", "of-my-own") == (
        "vcpu", "vmm2", "stop", "memory-failure", "page-cache-reader", "vcpu2")
    assert partners_of("vmm-life", "both-shared") == ("memory-failure",)
    assert partners_of("vmm-life", "crossed") == ()


def test_named_triples_are_where_the_plan_has_them() -> None:
    for chosen, full in ((TRIPLES, True), (QUICK, False)):
        for scene, names in chosen.items():
            asked = plan(world("library", "gunyah" if SCENES[scene].lends else "kvm", scene=scene), full=full)
            assert {frozenset(s) for s in asked if len(s) == 3} == {frozenset(NAMED[name]) for name in names}
    assert all({*names} <= {*TRIPLES[scene]} for scene, names in QUICK.items())


@pytest.mark.parametrize("scene", list(SCENES))
def test_a_first_look_is_a_part_of_the_suite(scene: str) -> None:
    there = world("library", "kvm", scene=scene)
    first, whole = plan(there, full=False), plan(there)
    assert set(first) < set(whole)
    assert not any(name in LONG for scenario in first for name in scenario)
    assert ("vcpu",) in first
    if not there.scene.made:
        assert ("vcpu2", "creator") in first
    elif there.scene.vms > 1:
        assert ("vcpu2", "other-vcpu") in first


def test_the_default_is_the_whole_suite_in_all_scenes() -> None:
    report = check("library", "gunyah", limits=Limits(states=1))
    assert report.scenes == tuple(SCENES)
    assert report.scenarios == sum(len(plan(world("library", "gunyah", scene=scene))) for scene in SCENES)
    assert report.refused == ("no-direct-map-changes",)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_so_many_parties_together_are_all_that_are_different_tasks(size: int) -> None:
    there = world("library", "kvm")
    roles = {name: PARTIES[name].role or name for name in there.programs if name not in LONG}
    tasks_of = itertools.groupby(sorted(roles, key=roles.__getitem__), key=roles.__getitem__)
    groups = [[*names] for _, names in tasks_of]
    every = {frozenset(names) for some in itertools.combinations(groups, size) for names in itertools.product(*some)}
    asked = plan(there, size=size)
    assert {frozenset(names) for names in asked} == every
    assert len(asked) == len(every)
    order = [*there.programs]
    assert all(sorted(names, key=order.index) == [*names] for names in asked)


def test_so_many_parties_are_explored_in_the_plainest_scene() -> None:
    (report,) = compare([("none", "gunyah")], size=3, limits=Limits(states=2), jobs=1, engine="python")
    assert (report.scenes, report.scenarios) == (("two-pages",), len(plan(world("none", "gunyah"), size=3)))
    (alone,) = compare([("none", "gunyah")], size=1, scenes=["crossed"], limits=Limits(states=2), jobs=1)
    assert alone.scenes == ("crossed",)


@pytest.mark.parametrize(("asked", "says"), [
    ({"size": 0}, "a scenario needs at least one party, not 0"),
    ({"size": 99}, "there are no 99 different parties in two-pages"),
    ({"size": 2, "parties": LOAD}, "either vcpu, zeropad or every 2 parties, not both"),
])
def test_so_many_parties_that_cannot_be(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        compare([("none", "gunyah")], **asked)


def test_named_scenarios_are_pairs_or_triples_in_the_order_of_the_suite() -> None:
    order = list(PARTIES)
    for parties in NAMED.values():
        assert len(parties) in (2, 3)
        assert sorted(parties, key=order.index) == list(parties)
    assert len(set(NAMED.values())) == len(NAMED)


def test_one_scenario_by_its_parties_or_its_name() -> None:
    by_name = check("none", "gunyah", scenario="zero-padding-load")
    assert timeless(by_name) == timeless(check("none", "gunyah", parties=("zeropad", "vcpu")))
    assert by_name.scenarios == 1
    assert by_name.findings[0].parties == ("vcpu", "zeropad")


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_one_scenario_is_put_into_the_plainest_scene_or_those_asked_for() -> None:
    plain = check("none", "gunyah", parties=LOAD)
    assert (plain.scenes, plain.scenarios) == (("two-pages",), 1)
    assert plain.findings[0].scene == SCENES["two-pages"]
    some = check("none", "gunyah", parties=LOAD, scenes=["crossed", SCENES["both-shared"]])
    assert (some.scenes, some.scenarios) == (("crossed", "both-shared"), 2)


def test_a_finding_is_told_in_the_scene_with_the_shortest_run_and_the_first_of_those() -> None:
    mine = Scene("mine", frames=1)
    law = check("none", "gunyah", parties=LOAD, scenes=["both-shared", "crossed", "two-pages", mine]).laws["host-survives"]
    assert law.scene == SCENES["crossed"]               # where both pages are shared nothing breaks
    assert law.steps == check("none", "gunyah", parties=LOAD).laws["host-survives"].steps
    alone = check("none", "gunyah", parties=LOAD, scenes=["both-shared"])
    assert alone.laws["host-survives"].scene is None
    assert alone.verdict == "holds"


def test_a_scene_may_be_ones_own() -> None:
    mine = Scene("mine", pages=3, frames=4, slots=(Slot(0, 0, 3),), failures=0)
    report = check("library", "kvm", parties=["vcpu2", "kcore"], scenes=[mine])
    assert (report.verdict, report.scenes) == ("holds", ("mine",))


def test_failures_are_those_of_the_scene_unless_said_otherwise() -> None:
    def states(scene: Scene, **limits: int) -> int:
        return check("library", "kvm", parties=["vcpu2"], scenes=[scene], limits=Limits(**limits)).states

    none, one = Scene(failures=0), Scene(failures=1)
    assert states(none) < states(one)
    assert states(none, failures=1) == states(one) == states(one, failures=1)
    assert check("library", "kvm", parties=["vcpu2"]).failures is None


def test_a_kernel_that_a_design_will_not_work_on_is_named() -> None:
    report = check("library", "kvm", parties=["vcpu2", "kcore"], scenes=["no-direct-map-changes", "two-pages"])
    assert (report.verdict, report.refused) == ("holds", ("no-direct-map-changes",))
    assert check("none", "kvm", parties=["vcpu2"], scenes=["no-direct-map-changes"]).refused == ()


def test_a_law_that_breaks_while_the_scene_is_set_is_found_in_no_steps() -> None:
    law = check(TouchesToBegin, "kvm", parties=["drainer"], scenes=["unbound"]).laws["library-alone"]
    assert (law.verdict, law.steps, law.parties, law.scene) == ("refuted", 0, ("drainer",), SCENES["unbound"])


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_what_breaks_is_refuted_with_its_shortest_trace() -> None:
    report = check("none", "gunyah", parties=("vcpu", "zeropad"))
    law = report.laws["host-survives"]
    assert (report.verdict, law.verdict, law.parties) == ("refuted", "refuted", ("vcpu", "zeropad"))
    assert law.finding is not None
    assert law.steps == len(law.finding.steps) == 9
    assert report.laws["nothing-lost"].verdict == "holds"
    assert [law.law for law in report.laws.values()] == [law.name for law in LAWS.values() if not law.promised]


def test_findings_are_distinct_and_the_shortest_comes_first() -> None:
    report = check("gunyah-v17", "gunyah", scenes=PLAIN, full=False, limits=SHORT)
    lengths = [len(found.finding.steps) for found in report.findings]
    assert lengths == sorted(lengths)
    ways = [(found.law, found.evidence) for found in report.findings]
    assert len(set(ways)) == len(ways)
    for law in report.laws.values():
        first = next((found for found in report.findings if found.law == law.law), None)
        assert law.finding is (first and first.finding)


def test_what_an_operation_costs_is_judged_like_everything_else() -> None:
    law = check(FlushesTwice, "kvm", parties=["vcpu2"], laws=["bounded-cost"]).laws["bounded-cost"]
    assert (law.verdict, law.evidence) == ("refuted", "fault of 1 pages takes 2 TLB flushes, and at most 1 are stated")
    assert check("library", "kvm", parties=["vcpu2"], laws=["bounded-cost"]).verdict == "holds"


def test_only_the_laws_asked_for_are_judged() -> None:
    report = check("gunyah-v17", "gunyah", parties=("vcpu2", "vmm"), laws=["library-alone", "nothing-lost"])
    assert list(report.laws) == ["nothing-lost", "library-alone"]
    assert {found.law for found in report.findings} <= set(report.laws)
    assert check("gunyah-v17", "gunyah", parties=["vcpu"], laws=["no-stale-data"]).verdict == "holds"


def test_designs_and_hypervisors_can_be_given_themselves() -> None:
    report = check(NoFlush, HYPERVISORS["kvm"], parties=("vcpu", "kcore"))
    assert report.laws["guest-private"].verdict == "refuted"


def test_failures_are_counted() -> None:
    some, none = (check("library", "gunyah", parties=["vcpu"], limits=Limits(failures=n)) for n in (1, 0))
    assert some.states > none.states
    assert (some.failures, none.failures) == (1, 0)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "words"), [
    ({"states": 0}, "the limit of states must be at least 1, not 0"),
    ({"states": -5}, "the limit of states must be at least 1, not -5"),
    ({"seconds": 0}, "the limit of seconds must be more than 0, not 0"),
    ({"seconds": -1.5}, "the limit of seconds must be more than 0, not -1.5"),
    ({"seconds": float("nan")}, "the limit of seconds must be more than 0, not nan"),
    ({"failures": -1}, "the number of injected failures must be 0 to 255, not -1"),
    ({"failures": 256}, "the number of injected failures must be 0 to 255, not 256"),
])
def test_a_limit_that_cannot_be_is_refused(limit: dict[str, int], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        Limits(**limit)
    assert str(refused.value) == words


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_limit_of_states_leaves_the_verdict_undetermined_and_is_named(jobs: int) -> None:
    report = check("library", "gunyah", scenes=["both-shared", "two-pages"], full=False, limits=Limits(states=30), jobs=jobs)
    assert report.verdict == "undetermined"
    assert {law.verdict for law in report.laws.values()} == {"undetermined"}
    (limit,) = report.limits
    assert limit.startswith("more than 30 states (")
    assert limit.endswith(f"of {report.scenarios} scenarios, first: vcpu in both-shared)")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_limit_of_seconds_ends_the_whole_run(jobs: int) -> None:
    pairs = [("library", "kvm"), ("library", "pkvm")]
    (first, second) = compare(pairs, scenes=PLAIN, full=False, limits=Limits(seconds=0.5), jobs=jobs)
    for report in (first, second):
        assert report.verdict == "undetermined"
        assert report.limits[0].startswith("more than 0.5 seconds in all (")


def test_what_breaks_before_a_limit_is_refuted_all_the_same() -> None:
    report = check("gunyah-v17", "gunyah", scenes=PLAIN, full=False, limits=SHORT)
    assert report.verdict == "refuted"
    assert report.limits
    assert report.laws["no-stale-data"].verdict == "undetermined"


# -- the same whatever the split ---------------------------------------------------------------------------------------

CASES = [("none", "gunyah"), ("guestmem-rfc1", "kvm"), ("gunyah-v17", "gunyah")]
PLACES = ["two-vms", "nothing-yet"]
REPORTS = f"""
import dataclasses
from guest_memfd.explore.suite.check import Limits, compare
from guest_memfd.explore.trace import dumps, trace_of
for report in compare({CASES!r}, scenes={PLACES!r}, full=False, limits=Limits(states=60), jobs=JOBS):
    print(dataclasses.replace(report, seconds=0.0))
    for found in report.findings:
        print(dumps(trace_of(report, found)))
"""


def test_reports_do_not_depend_on_hash_seed_or_jobs(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    outputs = set()
    for seed, jobs in ((0, 1), (1, 2), (2, 3)):
        done = python(REPORTS.replace("JOBS", str(jobs)), PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count('"schema"') > 10


def test_reports_do_not_depend_on_what_the_tables_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def reports() -> list[Report]:
        return list(map(timeless, compare(CASES, scenes=PLACES, full=False, limits=SHORT, jobs=1)))

    kept = reports()
    monkeypatch.setattr(work, "ROOMY", -1)
    assert reports() == kept


def test_each_pair_is_judged_as_if_alone() -> None:
    together = compare(CASES, scenes=PLACES, full=False, limits=SHORT, jobs=2)
    alone = [check(*case, scenes=PLACES, full=False, limits=SHORT, jobs=1) for case in CASES]
    assert list(map(timeless, together)) == list(map(timeless, alone))


# -- who does what -----------------------------------------------------------------------------------------------------


def tasks(*worlds: int) -> list[Task]:
    return [Task(order, world, (f"p{order}",)) for order, world in enumerate(worlds)]


def test_a_process_stays_with_its_world_and_takes_the_biggest_first() -> None:
    given = tasks(0, 0, 1, 1, 0)
    schedule = Schedule(given, dict(zip(given, (1.0, 3.0, 1.0, 9.0, 2.0), strict=True)))
    order = []
    last = None
    while (task := schedule.next(last)) is not None:
        order.append(task.order)
        last = task.world
    assert order == [3, 2, 1, 4, 0]


def test_another_process_opens_another_world_and_helps_at_the_end() -> None:
    given = tasks(0, 0, 0, 1)
    schedule = Schedule(given, dict.fromkeys(given, 1.0))
    first = schedule.next(None)
    second = schedule.next(None)
    assert first is not None
    assert second is not None
    assert (first.world, second.world) == (0, 1)
    helped = schedule.next(1)
    assert helped is not None
    assert helped.world == 0


def test_after_a_failure_only_what_comes_before_is_done() -> None:
    given = tasks(0, 0, 1, 1)
    schedule = Schedule(given, dict.fromkeys(given, 1.0))
    schedule.drop_after(2)
    assert {task.order for task in iter(lambda: schedule.next(None), None) if task} == {0, 1}


def test_what_could_not_be_done_is_the_next_unless_nobody_wants_it_any_more() -> None:
    given = tasks(0, 0, 0)
    schedule = Schedule(given, dict.fromkeys(given, 1.0))
    first, second = schedule.next(None), schedule.next(0)
    assert first is not None
    assert second is not None
    schedule.put_back(first)
    assert schedule.next(0) == first
    schedule.drop_after(first.order)
    schedule.put_back(second)
    assert schedule.next(0) is None
    assert schedule.left[0] == 1.0


def test_progress_goes_up_to_a_hundred() -> None:
    told: list[tuple[int, int, str]] = []
    check("library", "gunyah", scenes=PLACES, full=False, limits=SHORT, jobs=2, progress=lambda *what: told.append(what))
    assert all(before[0] <= after[0] for before, after in pairwise(told))
    assert told[-1][:2] == (100, 100)
    assert {what.partition(":")[0] for _, _, what in told} == {f"library on gunyah, {place}" for place in PLACES}


@pytest.mark.parametrize("jobs", [0, -2])
def test_a_number_of_jobs_that_cannot_be_is_refused(jobs: int) -> None:
    with pytest.raises(BadInput, match=f"at least 1, not {jobs}"):
        check("library", "kvm", jobs=jobs)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "words"), [
    ({"design": "libary"}, "unknown design 'libary'; did you mean 'library'?"),
    ({"hypervisor": "gunja"}, "unknown hypervisor 'gunja'; did you mean 'gunyah'?"),
    ({"parties": ["vcpu", "zeropads"]}, "unknown party 'zeropads'; did you mean 'zeropad'?"),
    ({"laws": ["host-survive"]}, "unknown law 'host-survive'; did you mean 'host-survives'?"),
    ({"scenario": "hibernat"}, "unknown scenario 'hibernat'; did you mean 'hibernate'?"),
    ({"parties": []}, "a scenario needs at least one party"),
    ({"laws": []}, "no law to judge by"),
    ({"parties": ["vcpu", "vcpu"]}, "a party can be in a scenario only once, not as in vcpu, vcpu"),
    ({"parties": ["pfn-cache"], "hypervisor": "gunyah"},
     "party 'pfn-cache' cannot exist with design 'library' under 'gunyah' in scene 'two-pages'"),
    ({"parties": ["creator"]}, "party 'creator' cannot exist with design 'library' under 'kvm' in scene 'two-pages'"),
    ({"parties": ["vmm", "pinner"]}, "vmm, pinner: two of these are the same task doing different things"),
    ({"scenes": ["crosed"]}, "unknown scene 'crosed'; did you mean 'crossed'?"),
    ({"scenes": []}, f"no scene to explore; known: {', '.join(SCENES)}"),
    ({"design": "gunyah-v17"}, "design 'gunyah-v17' was posted for gunyah only, not for 'kvm'"),
    ({"parties": ["vcpu"], "scenario": "hibernate"}, "either parties or a scenario, not both (vcpu and 'hibernate')"),
])
def test_a_question_that_cannot_be_put_is_refused_in_one_line(what: dict[str, str], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        check(**{"design": "library", "hypervisor": "kvm", **what})     # type: ignore[arg-type]
    assert str(refused.value) == words


def failure(design: type[Design], jobs: int) -> GuestMemfdError:
    with pytest.raises(GuestMemfdError) as raised:
        check(design, "gunyah", scenes=PLAIN, full=False, limits=SHORT, jobs=jobs)
    return raised.value


@pytest.mark.parametrize(("design", "kind", "words"), [
    (Raises, DesignRaised, "raised KeyError: 'vma' (test_suite.py:"),
    (YieldsNonsense, NotAPrimitive, "yielded 42 at test_suite.py:"),
])
def test_an_error_in_a_worker_is_the_same_error_here(design: type[Design], kind: type, words: str) -> None:
    here, there = failure(design, 1), failure(design, 2)
    assert type(here) is type(there) is kind
    assert str(here) == str(there)
    assert words in str(here)


def test_a_design_that_raises_is_told_with_the_trace_to_it() -> None:
    assert ", after\n  1. vmm: [VMM map, page 0] mmap() -> 0\n" in str(failure(Raises, 2))


def test_a_worker_that_dies_is_named() -> None:
    with pytest.raises(HostUnavailable, match=r"has died \(signal SIGKILL\); fewer processes .* or a limit"):
        check(KillsItsProcess, "gunyah", scenes=PLAIN, full=False, jobs=2)


def test_without_fork_everything_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert check(KillsItsProcess, "gunyah", scenes=PLAIN, full=False, limits=SHORT, jobs=2).verdict == "undetermined"


def test_interrupting_ends_all_processes_at_once() -> None:
    # A shell that runs us in the background has ^C ignored, and children inherit that.
    code = ("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from guest_memfd.explore.suite.check import check\nprint('go', flush=True)\ncheck('library', 'kvm', jobs=2)")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert b"KeyboardInterrupt" in err
    assert err.count(b"Traceback") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


