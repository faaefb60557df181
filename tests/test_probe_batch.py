"""Rows that share a process, on a machine that is made for the probe: quicker, and with the same results."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
from probes import NOWHERE, crashes, needs_kvm, row

from guest_memfd.probe.ask.child import Slate, Unfit
from guest_memfd.probe.ask.here import Here
from guest_memfd.probe.ask.row import SETTLED, KernelFeatures, Row
from guest_memfd.probe.bugs import _closed_slot_uaf, _interleave, _thp
from guest_memfd.probe.offers import look
from guest_memfd.probe.rows import ROWS, memory, poison
from guest_memfd.probe.survey import Survey, survey

HERE = os.getcwd()


def probed(*rows: Row, timeout: float = 2.0) -> Survey:
    return survey(NOWHERE, parts=("behaviour",), rows=[replace(each, id=f"planted.{n}") for n, each in enumerate(rows)],
                  timeout=timeout, expendable=True)


@pytest.fixture
def processes(tmp_path: Path) -> Path:
    return tmp_path / "processes"


def noting(processes: Path) -> Row:
    def notes(here: Here) -> None:
        with processes.open("a") as file:
            file.write(f"{os.getpid()}\n")

    return row(notes)


def test_rows_share_a_process(processes: Path) -> None:
    assert [each.verdict for each in probed(*[noting(processes)] * 90).behaviour] == ["expected"] * 90
    assert len(set(processes.read_text().split())) == 3


def test_on_a_machine_that_others_need_none_does(processes: Path) -> None:
    survey(NOWHERE, parts=("behaviour",), rows=[noting(processes)] * 5)
    assert len(set(processes.read_text().split())) == 5


def test_one_that_ends_the_process_is_asked_again_alone(processes: Path) -> None:
    plain = noting(processes)
    found = probed(plain, row(crashes), plain, plain).behaviour
    assert [each.result for each in found] == ["ok", "SIGSEGV SEGV_MAPERR elsewhere", "ok", "ok"]
    assert len(processes.read_text().split()) == 3, "each of the others once"


def test_one_that_hangs_is_asked_again_alone(processes: Path) -> None:
    def hangs(here: Here) -> None:
        time.sleep(60)

    plain = noting(processes)
    found = probed(plain, row(hangs), plain, timeout=0.2).behaviour
    assert [each.verdict for each in found] == ["expected", "skipped", "expected"]
    assert found[1].why.startswith("no answer in 0.2 s")


def test_what_a_row_did_to_its_process_is_no_result_of_the_next() -> None:
    def leaves(here: Here) -> None:
        os.chdir("/")

    def stays(here: Here) -> str:
        return os.getcwd()

    def opens(here: Here) -> str:
        os.open("/proc", os.O_RDONLY)
        return f"{len(os.listdir('/proc/self/fd'))}"

    def limits(here: Here) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))

    def limited(here: Here) -> str:
        return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 16)

    def unfit(here: Here) -> None:
        raise Unfit("not today")

    found = probed(row(leaves), row(stays, HERE), row(limits), row(limited, "False"), row(unfit),
                   row(limits, "EPERM")).behaviour
    assert [each.result for each in found] == ["ok", HERE, "ok", "False", None, "ok"]
    assert [each.verdict for each in found] == ["expected"] * 4 + ["skipped", "differs"]
    counted = {each.result for each in probed(*[row(opens, " | ".join(map(str, range(99))))] * 5).behaviour}
    assert len(counted) == 1, "what a row has opened is closed"


def test_what_could_break_a_machine_needs_one_that_is_expendable() -> None:
    assert all("memory failure" in each.needs for each in poison.ROWS)
    plain, rig = look(NOWHERE).features, look(NOWHERE, expendable=True).features
    assert "memory failure" not in plain
    assert plain.why("memory failure").startswith(("it could break this machine", "this kernel is built without"))
    assert ("memory failure" in rig) == ("no memory failure" not in rig)


@needs_kvm
def test_rows_have_the_same_results_in_batches() -> None:
    prefixes = ("create.", "fallocate.", "mmap.", "slot.", "secret.memlock")
    rows = [each for each in ROWS if each.id.startswith(prefixes)]
    alone, shared = (survey(parts=("behaviour",), rows=rows, expendable=each).behaviour for each in (False, True))
    assert [(each.row.id, each.result, each.verdict) for each in shared] == [
        (each.row.id, each.result, each.verdict) for each in alone]


# -- bugs that only such a machine is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "verdict"), [
    ([0, 1] * 4, "fixed"), ([1, 0] * 4, "fixed"), ([0] * 8, "present"), ([1] * 8, "present"), ([0, 1, 0, 0] * 2, "present"),
    ([0, -14] * 4, "cannot tell"),
])
def test_interleaving_is_told_by_the_nodes(nodes: list[int], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "interleaved", lambda here: nodes)
    assert _interleave(Here(Slate(), NOWHERE, KernelFeatures("7.3"))).startswith(f"{verdict}: eight pages")


def test_a_race_is_run_where_a_crash_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_memfd.probe.bugs._race", lambda here: 7)
    for release, has, says in (
            ("6.17.1", (), "not tested: "), ("6.17.1", ("slots",), "not tested: "),
            ("6.17.1", ("expendable",), "not tested: "),
            ("6.17.1", ("slots", "expendable"), "cannot tell: 7 slots were deleted while their file went"),
            ("7.3.4", (), "fixed: by its release, this kernel has the fix; it was not tried"),
            ("6.12.59", ("slots", "expendable"), "fixed: by its release, this kernel has the fix; 7 slots were deleted")):
        here = Here(Slate(), NOWHERE, KernelFeatures(release, frozenset((SETTLED, *has))))
        assert _closed_slot_uaf(here).startswith(says), (release, has)


@pytest.mark.parametrize(("built", "has", "says"), [
    ("n", ("expendable",), "cannot tell: this kernel is built without"), ("y", (), "cannot tell: with READ_ONLY_THP_FOR_FS"),
    ("?", (), "cannot tell: this kernel's configuration"), ("y", ("expendable",), "tried True"),
    ("?", ("expendable",), "tried False"),
])
def test_a_huge_page_is_made_where_a_warning_does_no_harm(
    built: str, has: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("guest_memfd.probe.bugs._config", lambda name: built)
    monkeypatch.setattr("guest_memfd.probe.bugs._collapsed", lambda here, with_option: f"tried {with_option}")
    assert _thp(Here(Slate(), NOWHERE, KernelFeatures("7.3", frozenset(has)))).startswith(says)
