"""Who interrupts is told what was seen so far: nothing is proved by it, what broke is said, and nothing is left behind."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guest_memfd import check
from guest_memfd.cli import gently
from guest_memfd.cli.gently import Gently
from guest_memfd.cli.main import main
from guest_memfd.cli.stop import stoppable
from guest_memfd.explore.engine.automaton import Automaton
from guest_memfd.explore.engine.finding import INTERRUPTED
from guest_memfd.explore.suite import check as suite
from guest_memfd.explore.suite.case import Case
from guest_memfd.explore.suite.check import Limits, Report, compare
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.suite.stop import Stop
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world.scenario import world
from guest_memfd.html.compare import page
from guest_memfd.report import terminal
from guest_memfd.report.ktap import ktap
from guest_memfd.report.sentence import sentence
from guest_memfd.report.style import Style
from guest_memfd.report.table import cell, letters_for

PLACES = ["for-good"]
ASKED: dict[str, Any] = {"scenes": PLACES, "full": False, "limits": Limits(states=50)}
SOME = ["--scene", "for-good", "--quick", "--max-states", "50", "-j", "1"]


def until(scenarios: int, jobs: int, **asked: Any) -> list[Report]:
    """Ask for the end when so many scenarios are done."""
    stop, count = Stop(), itertools.count(1)

    def progress(*_: object) -> None:
        if next(count) == scenarios:
            stop.ask()

    return compare([("none", "gunyah")], jobs=jobs, progress=progress, stop=stop, **{**ASKED, **asked})


def everything() -> set[tuple[str, tuple[str, ...]]]:
    return {(place, parties) for place in PLACES
            for parties in plan(world("none", "gunyah", scene=place), full=False)}


# -- a suite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_was_seen_is_told_and_proves_nothing(jobs: int) -> None:
    (report,) = until(3, jobs)
    cut = [each for each in report.unfinished if each.limit == INTERRUPTED]
    assert len(everything()) - 3 - jobs <= len(cut) <= len(everything()) - 3
    assert {(each.scene, each.parties) for each in cut} < everything()
    assert report.scenarios == len(everything())
    assert report.states > 0
    assert "holds" not in {law.verdict for law in report.laws.values()}
    (told,) = (limit for limit in report.limits if limit.startswith("interrupted ("))
    assert told.startswith(f"interrupted ({len(cut)} of {report.scenarios} scenarios, first: ")


def test_what_was_done_before_is_as_if_nobody_had_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Any, ...]] = []
    real = Case.take

    def take(self: Case, task: Task, answer: Answer) -> None:
        taken.append((task, answer.states, answer.transitions, answer.broken, answer.limit))
        real(self, task, answer)

    monkeypatch.setattr(Case, "take", take)

    def done(scenarios: int) -> set[tuple[Any, ...]]:
        taken.clear()
        until(scenarios, 1)
        return {each for each in taken if each[-1] != INTERRUPTED}

    few, more = done(4), done(9)
    assert (len(few), len(more)) == (4, 9)
    assert few < more


def test_a_law_whose_trace_nobody_waited_for_is_broken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_trace", lambda *_: None)
    whole = check("none", "gunyah", parties=("vcpu", "zeropad"))
    real, stop = Bench.do, Stop()

    # Traces of a first look leave a process only where no other scenario came before.
    def do(self: Bench, task: Task) -> Answer:
        answer = real(self, task)
        return Answer(answer.states, answer.transitions, answer.seconds, answer.limit, answer.broken, None, answer.coverage)

    monkeypatch.setattr(Bench, "do", do)
    (report,) = compare([("none", "gunyah")], parties=("vcpu", "zeropad"), progress=lambda *_: stop.ask(), stop=stop, jobs=1)
    law, traced = report.laws["host-survives"], whole.laws["host-survives"]
    assert (report.verdict, law.verdict, law.finding, report.findings) == ("refuted", "refuted", None, ())
    assert (law.steps, law.parties, law.evidence, law.scene) == (
        traced.steps, traced.parties, traced.evidence, traced.scene)
    assert report.limits == ("interrupted before all traces were made",)
    assert "holds" not in {law.verdict for law in report.laws.values()}
    how = "9 steps with vcpu, zeropad (its trace was not made)"
    screen = terminal.check(report, [], Style(), explored="one scenario", folder=None, verbose=True)
    assert f"broken in {how}" in " ".join(" ".join(screen).split())
    assert f"after {how.replace('vcpu, zeropad', 'vcpu and zeropad')}, load_un" in sentence("none", "...", [report], "...")
    assert any(line.startswith(f"# {how}: load_unaligned_zeropad") for line in ktap([report]))
    assert cell(law, letters_for([report])) == "9 V+Z"
    text = page([report], {}, {}, "one scenario", [])
    assert "9 V+Z" in text
    assert "none-gunyah-host-survives" not in text      # there is no run to show


def test_who_interrupts_before_anything_was_seen_is_told_nothing() -> None:
    stop = Stop()
    stop.ask()
    assert compare([("none", "gunyah")], stop=stop, jobs=1, **ASKED) == []


# -- one scenario ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["python", "compiled"])
def test_in_one_scenario_the_states_so_far_count(engine: str) -> None:
    if engine != "python":
        pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

    def explored(looks: int) -> Any:
        left = iter(range(looks))
        return world("none", "kvm", engine=engine).explorer(["vcpu", "zeropad"]).run(
            stopped=lambda: next(left, None) is None)

    whole, some = explored(1 << 30), explored(12)
    assert whole.limit is None
    assert (some.limit, some.limited_by) == (INTERRUPTED, INTERRUPTED)
    assert 1 < some.states < whole.states
    ways = {(found.law, found.evidence): len(found.steps) for found in whole.findings}
    assert {(found.law, found.evidence): len(found.steps) for found in some.findings}.items() <= ways.items()


def test_who_interrupts_the_search_for_livelocks_has_no_proof_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")
    monkeypatch.setattr(Automaton, "cyclic", lambda self: True)         # so that it is searched for

    def looks(most: int) -> tuple[int, str | None]:
        left = iter(range(most))
        result = world("none", "kvm", engine="compiled").explorer(["vcpu"]).run(stopped=lambda: next(left, None) is None)
        return most - len([*left]), result.limit

    taken, limit = looks(1 << 10)
    assert limit is None
    assert looks(taken - 1)[1] == INTERRUPTED


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends these signals, one each time, from when three scenarios are done."""
    def send(*numbers: int) -> None:
        count, real, left = itertools.count(1), suite._Clock.done, iter(numbers)

        def done(self: Any, task: Task, answer: Answer) -> None:
            real(self, task, answer)
            if next(count) >= 3 and (number := next(left, None)) is not None:
                signal.raise_signal(number)

        monkeypatch.setattr(suite._Clock, "done", done)

    return send


@pytest.fixture(autouse=True)
def heard() -> Any:
    """Signals as they are where nobody has asked for silence, whatever these tests were started by."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_by_a_report(number: int, signals: Any, tmp_path: Path) -> None:
    signals(number)
    out = tmp_path / "out"
    assert main(["check", "none", "--hypervisor", "gunyah", *SOME, "--json", "-o", str(out)]) == 128 + number
    assert [*tmp_path.iterdir()] == [out]
    (report,) = json.loads(out.read_text())["reports"]
    cut = [each for each in report["unfinished"] if each["limit"] == INTERRUPTED]
    assert len(cut) == report["scenarios"] - 3
    assert report["survived"] == []
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_table_says_what_is_known(signals: Any, capsys: pytest.CaptureFixture[str]) -> None:
    signals(signal.SIGINT)
    assert main(["compare", "none", "--hypervisor", "gunyah", *(word for word in SOME if word != "--quick")]) == 130
    out, err = capsys.readouterr()
    assert err == ""
    assert "interrupted (" in " ".join(out.split())
    assert "kept  " not in out


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT,)])
def test_the_second_ends_at_once_and_so_does_one_that_wants_no_answer(
    numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    def twice(self: Any, task: Task, answer: Answer) -> None:
        for number in numbers:
            signal.raise_signal(number)

    monkeypatch.setattr(gently, "AT_ONCE", -1)
    monkeypatch.setattr(suite._Clock, "done", twice)
    there = ["-o", str(tmp_path / "out"), "--save-traces", str(tmp_path / "traces")]
    assert main(["check", "none", "--hypervisor", "gunyah", *SOME, *there]) == 128 + numbers[0]
    assert [*tmp_path.iterdir()] == []
    assert capsys.readouterr() == ("", "")


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    with stoppable(), Gently() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert (stop.asked(), stop.code) == (True, 130)


def test_what_is_ignored_is_not_heard() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable(), Gently() as stop:
        signal.raise_signal(signal.SIGINT)
    assert (stop.asked(), stop.code) == (False, 0)
