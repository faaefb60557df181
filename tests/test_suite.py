"""The suite: the same report however the work is split, limits that never pass for a proof, errors that arrive whole."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from guest_memfd.check import work
from guest_memfd.check.pool import Schedule
from guest_memfd.check.suite import NAMED, Limits, Report, check, check_many, suite
from guest_memfd.check.work import Task
from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, DesignRaised, GuestMemfdError, InternalError, NotAPrimitive
from guest_memfd.hosts.host import Folio, Steps
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.scenarios import PARTIES

SHORT = Limits(states=200)
"""Enough of every scenario to find something in bad designs, in seconds."""


class NoFlush(OurLibrary):
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


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


def test_the_suite_is_every_pair_and_then_every_triple() -> None:
    assert suite("abcd") == [tuple(s) for s in [
        "a", "b", "c", "d", "ab", "ac", "ad", "bc", "bd", "cd", "abc", "abd", "acd", "bcd"]]


def test_the_default_is_the_whole_suite() -> None:
    report = check("library", "gunyah", limits=Limits(states=1))
    parties = sum(name != "pfn-cache" for name in PARTIES)
    assert report.scenarios == sum(math.comb(parties, size) for size in (1, 2, 3))


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


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_what_breaks_is_refuted_with_its_shortest_trace() -> None:
    report = check("none", "gunyah", parties=("vcpu", "zeropad"))
    law = report.laws["host-survives"]
    assert (report.verdict, law.verdict, law.parties) == ("refuted", "refuted", ("vcpu", "zeropad"))
    assert law.finding is not None
    assert law.steps == len(law.finding.steps) == 8
    assert report.laws["nothing-lost"].verdict == "holds"
    assert [law.law for law in report.laws.values()] == list(LAWS)


def test_findings_are_distinct_and_the_shortest_comes_first() -> None:
    report = check("gunyah-v17", "gunyah", limits=SHORT)
    lengths = [len(found.finding.steps) for found in report.findings]
    assert lengths == sorted(lengths)
    ways = [(found.law, found.evidence) for found in report.findings]
    assert len(set(ways)) == len(ways)
    for law in report.laws.values():
        first = next((found for found in report.findings if found.law == law.law), None)
        assert law.finding is (first and first.finding)


def test_bounded_cost_is_reported_and_not_judged() -> None:
    assert check("none", "gunyah", parties=["zeropad"]).laws["bounded-cost"].verdict == "reported"
    with pytest.raises(BadInput, match="'bounded-cost' is counted, not judged"):
        check("none", "gunyah", parties=["zeropad"], laws=["bounded-cost"])


def test_only_the_laws_asked_for_are_judged() -> None:
    report = check("gunyah-v17", "gunyah", parties=("vcpu", "vmm"), laws=["library-alone", "nothing-lost"])
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
    report = check("library", "gunyah", limits=Limits(states=30), jobs=jobs)
    assert report.verdict == "undetermined"
    assert {law.verdict for law in report.laws.values()} == {"undetermined", "reported"}
    (limit,) = report.limits
    assert limit.startswith("more than 30 states (")
    assert limit.endswith(f"of {report.scenarios} scenarios, first: vcpu)")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_limit_of_seconds_ends_the_whole_run(jobs: int) -> None:
    began = time.monotonic()
    (first, second) = check_many([("library", "kvm"), ("library", "pkvm")], limits=Limits(seconds=0.5), jobs=jobs)
    assert time.monotonic() - began < 20
    for report in (first, second):
        assert report.verdict == "undetermined"
        assert report.limits[0].startswith("more than 0.5 seconds in all (")


def test_what_breaks_before_a_limit_is_refuted_all_the_same() -> None:
    report = check("gunyah-v17", "gunyah", limits=SHORT)
    assert report.verdict == "refuted"
    assert report.limits
    assert report.laws["no-stale-data"].verdict == "undetermined"


# -- the same whatever the split ---------------------------------------------------------------------------------------

CASES = [("none", "gunyah"), ("guestmem-rfc1", "kvm"), ("gunyah-v17", "gunyah")]
REPORTS = f"""
import dataclasses
from guest_memfd.check.suite import Limits, check_many
from guest_memfd.check.trace import dumps, trace_of
for report in check_many({CASES!r}, limits=Limits(states=200), jobs=JOBS):
    print(dataclasses.replace(report, seconds=0.0))
    for found in report.findings:
        print(dumps(trace_of(report, found)))
"""


def test_reports_do_not_depend_on_hash_seed_or_jobs(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    outputs = set()
    for seed, jobs in ((0, 1), (1, 2), (2, 2), (3, 3)):
        done = python(REPORTS.replace("JOBS", str(jobs)), PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count('"schema"') > 10


def test_reports_do_not_depend_on_what_the_tables_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = check_many(CASES, limits=SHORT, jobs=1)
    monkeypatch.setattr(work, "ROOMY", -1)
    assert list(map(timeless, check_many(CASES, limits=SHORT, jobs=1))) == list(map(timeless, kept))


def test_each_pair_is_judged_as_if_alone() -> None:
    together = check_many(CASES, limits=SHORT, jobs=2)
    alone = [check(*case, limits=SHORT, jobs=1) for case in CASES]
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


def test_progress_goes_up_to_a_hundred() -> None:
    told: list[tuple[int, int, str]] = []
    check("library", "gunyah", limits=SHORT, jobs=2, progress=lambda *what: told.append(what))
    assert all(before[0] <= after[0] for before, after in pairwise(told))
    assert told[-1][:2] == (100, 100)
    assert told[0][2].startswith("library on gunyah: ")


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
     "party 'pfn-cache' cannot exist with design 'library' under 'gunyah'"),
    ({"design": "gunyah-v17"}, "design 'gunyah-v17' was posted for gunyah only, not for 'kvm'"),
    ({"parties": ["vcpu"], "scenario": "hibernate"}, "either parties or a scenario, not both (vcpu and 'hibernate')"),
])
def test_a_question_that_cannot_be_put_is_refused_in_one_line(what: dict[str, str], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        check(**{"design": "library", "hypervisor": "kvm", **what})     # type: ignore[arg-type]
    assert str(refused.value) == words


def failure(design: type[Design], jobs: int) -> GuestMemfdError:
    with pytest.raises(GuestMemfdError) as raised:
        check(design, "gunyah", limits=SHORT, jobs=jobs)
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
    with pytest.raises(InternalError, match=r"has died \(signal SIGKILL\); fewer jobs, or a limit of states"):
        check(KillsItsProcess, "gunyah", jobs=2)


def test_without_fork_everything_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert check(KillsItsProcess, "gunyah", limits=SHORT, jobs=2).verdict == "undetermined"


def test_interrupting_ends_all_processes_at_once() -> None:
    # A shell that runs us in the background has ^C ignored, and children inherit that.
    code = ("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from guest_memfd.check.suite import check\nprint('go', flush=True)\ncheck('library', 'kvm', jobs=2)")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in err
    assert err.count(b"Traceback") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


