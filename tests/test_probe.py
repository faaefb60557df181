"""The probe: rows, verdicts, rows in their children, this kernel."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from probes import NOWHERE, crashes, needs_kvm, nothing, row

from guest_memfd.probe import bugs, offers, report
from guest_memfd.probe.ask.calls import call, load, name_of
from guest_memfd.probe.ask.child import Slate, Unfit, perform
from guest_memfd.probe.ask.here import SIZE, Here
from guest_memfd.probe.ask.row import SETTLED, SINCE_6_1, KernelFeatures, Row, RowOutcome, judge
from guest_memfd.probe.bugs import BUG, BUGS, SEVERITIES, Bug, find
from guest_memfd.probe.left import count, since
from guest_memfd.probe.offers import look, version_of
from guest_memfd.probe.rows import ROWS
from guest_memfd.probe.survey import Survey, survey
from guest_memfd.report.style import Style


def hangs(here: Here) -> None:
    """Never answer."""
    while True:
        time.sleep(1)


def hangs_hard(here: Here) -> None:
    """Never answer, whatever signal comes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hangs(here)


def probed(*rows: Row, path: str = NOWHERE, timeout: float = 2.0) -> Survey:
    return survey(path, parts=("behaviour",), rows=rows, timeout=timeout)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_rows_are_well_formed() -> None:
    assert len(ROWS) >= 150
    assert [name for name, number in Counter(row.id for row in ROWS).items() if number > 1] == []
    for each in ROWS:
        assert re.fullmatch(r"[\w.-]+", each.id), each.id
        assert len(each.says.split()) >= 3, each.id
        assert each.says == each.says.strip(), each.id
        assert "  " not in each.says, each.id
        assert each.act.__doc__, each.id
        assert each.expect, each.id
        assert each.expect != "", each.id


def test_rows_say_results_as_results_are_said() -> None:
    known = {*errno.errorcode.values(), "EOPNOTSUPP", "EHWPOISON"}
    for each in ROWS:
        for value in (each.expect, *(value for _, value in each.rules)):
            for word in re.findall(r"\bE[A-Z0-9]{3,}\b", value or ""):
                assert word in known, (each.id, word)


def test_needs_and_rules_name_features_that_there_are() -> None:
    found = look(NOWHERE).features
    names = found.has | set(found.lacks) | {f"no flag {1 << bit}" for bit in range(64)} | {SETTLED}
    for each in ROWS:
        assert {*each.needs, *(feature for feature, _ in each.rules)} <= names, each.id
    for bug in BUGS:
        assert {*bug.needs} <= names, bug.id


def test_bugs_are_well_formed() -> None:
    assert len({bug.id for bug in BUGS}) == len(BUGS) >= 20
    for bug in BUGS:
        assert bug.title, bug.id
        assert bug.severity in SEVERITIES, bug.id
        assert bug.commit, bug.id
        assert bug.means, bug.id
        assert (bug.act is None) == bool(bug.why), bug.id


def test_documentation_names_every_kind_of_row() -> None:
    text = (Path(__file__).parent.parent / "docs" / "probe.md").read_text(encoding="utf-8")
    table = text.split("| ids | about |")[1].split("\n\n")[0]
    told = re.findall(r"`([\w.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert [each.id for each in ROWS if not each.id.startswith(tuple(told))] == []
    assert [prefix for prefix in told if not any(each.id.startswith(prefix) for each in ROWS)] == []
    assert re.findall(r"(\d+) rows: \d+ expected", text) == [str(len(ROWS))]
    for verdict in (*report.ROW_VERDICTS, *bugs.VERDICTS):
        assert verdict in text


# -- verdicts ----------------------------------------------------------------------------------------------------------


def features(*has: str, **lacks: str) -> KernelFeatures:
    return KernelFeatures("6.18.0", frozenset({SETTLED, "ptrace", "unfiltered", "enough memory", *has} - set(lacks)), lacks)


@pytest.mark.parametrize(("result", "expect", "verdict"), [
    ("ok", "ok", "expected"), ("EINVAL", "ok", "differs"), ("ok", "EINVAL", "differs"),
    ("EEXIST", "EINVAL | EEXIST", "expected"),
    ("EPERM", "ok", "differs"), ("ENOSYS", "ok", "skipped"), ("EMFILE", "ok", "skipped"), ("ENOMEM", "ok", "differs"),
    ("EINVAL, 1 pages", "EINVAL, 0 pages", "differs"), ("SIGBUS", "SIGBUS BUS_ADRERR at offset 0x0", "differs"),
])
def test_verdict(result: str, expect: str, verdict: str) -> None:
    assert judge(row(nothing, expect), RowOutcome(result), features()).verdict == verdict


@pytest.mark.parametrize(("lacking", "result", "expect", "verdict"), [
    ("unfiltered", "EPERM", "ok", "skipped"), ("unfiltered", "EPERM", "EPERM", "expected"),
    ("enough memory", "ENOMEM", "ok", "skipped"), ("ptrace", "SIGBUS", "SIGBUS BUS_ADRERR at offset 0x0", "expected"),
    ("ptrace", "SIGSEGV", "SIGBUS BUS_ADRERR at offset 0x0", "differs"), (SETTLED, "ok", "ok", "unknown"),
])
def test_verdict_where_something_is_in_the_way(lacking: str, result: str, expect: str, verdict: str) -> None:
    judged = judge(row(nothing, expect), RowOutcome(result), features(**{lacking: "because"}))
    assert judged.verdict == verdict
    if verdict == "skipped":
        assert "because" in judged.why


def test_rules_come_before_releases() -> None:
    ruled = row(nothing, "EINVAL", rules=(("new", "EEXIST"), ("newer", None)))
    assert ruled.expected(features()) == "EINVAL"
    assert ruled.expected(features("new", **{SETTLED: "too new"})) == "EEXIST"
    assert ruled.expected(features("newer")) is None
    assert ruled.expected(features(**{SETTLED: "too new"})) is None


@pytest.mark.parametrize(("release", "version"), [
    ("6.18.44-fc-v657", (6, 18)), ("7.2.0-rc4+", (7, 2)), ("10.0", (10, 0)), ("rolling", (0, 0))])
def test_release_is_read(release: str, version: tuple[int, int]) -> None:
    assert version_of(release) == version


@pytest.mark.parametrize(("release", "in_place", "settled", "since"), [
    ("6.17.9", False, False, set()), ("6.18.0", False, True, set()), ("6.19.1", False, True, {"6.19 on"}),
    ("7.3.0", False, True, {"6.19 on", "7.0 on"}), ("7.4.0", False, False, {"6.19 on", "7.0 on"}),
    ("7.3.0", True, False, {"6.19 on", "7.0 on", "in-place"}),
])
def test_what_a_release_is_known_for(release: str, in_place: bool, settled: bool, since: set[str]) -> None:
    seen: dict[str, str] = {}

    def feature(name: str, why: str = "") -> bool:
        seen[name] = why
        return not why

    offers._about_release(release, feature, in_place)
    assert (seen[SETTLED] == "") == settled
    assert {name for name in seen if not seen[name] and name not in (SETTLED, SINCE_6_1)} == since


@pytest.mark.parametrize(("release", "known"), [("6.0.9", False), ("6.1.0", True), ("6.12.117", True), ("7.3.4", True),
                                                ("7.4.0", False)])
def test_what_memfd_secret_does_is_known_from_6_1_on(release: str, known: bool) -> None:
    seen: dict[str, str] = {}
    offers._about_release(release, lambda name, why="": bool(seen.setdefault(name, why)), False)
    assert (seen[SINCE_6_1] == "") == known
    by_id = {each.id: each for each in ROWS}
    old = KernelFeatures(release, frozenset({SINCE_6_1}))
    assert by_id["secret.mlock"].expected(old) == "ENOMEM"
    assert by_id["secret.guest"].expected(old) is None          # a guest's row is about KVM, too
    assert by_id["create.flags-0"].expected(old) is None


@pytest.mark.parametrize(("row", "plain", "counted"), [
    ("secret.memlock-4-5", "EAGAIN", "mapped"), ("secret.touch-4", "EAGAIN", "4 pages"),
    ("secret.madvise-DONTNEED", "EINVAL", "ok, kept"), ("secret.madvise-REMOVE", "EINVAL", "EOPNOTSUPP"),
    ("secret.madvise-GUARD_INSTALL", "EINVAL", "ok, kept"), ("secret.smaps-flags", None, "rd wr sh mr mw ms dd"),
])
def test_memory_of_memfd_secret_that_is_counted_per_user_is_not_locked(row: str, plain: str | None, counted: str) -> None:
    by_id = {each.id: each for each in ROWS}
    assert plain is None or by_id[row].expected(features(SINCE_6_1)) == plain
    assert by_id[row].expected(features(SINCE_6_1, "secret counted per user")) == counted


def test_what_is_fixed_is_expected_where_the_fix_is_seen() -> None:
    by_id = {each.id: each for each in ROWS}
    newer = features("binding offsets unsigned", "overlap is EEXIST", "inodes of its own")
    assert by_id["slot.offset-overflow"].expected(newer) == "EINVAL"
    assert by_id["slot.file-twice"].expected(newer) == "EEXIST"
    assert by_id["mbind.second-mapping"].expected(newer) == "bind"
    assert by_id["slot.offset-overflow"].expected(features()) == "ok"
    assert by_id["create.flags-1"].expected(features("no flag 1")) == "EINVAL"
    assert by_id["create.flag-0x4"].expected(features("flag 4")) == "ok"


# -- a row in its child ------------------------------------------------------------------------------------------------


def test_a_row_that_hangs_is_tried_again_and_then_skipped() -> None:
    found = probed(row(hangs), row(hangs_hard), timeout=0.1)
    assert [(judged.result, judged.verdict) for judged in found.behaviour] == [(None, "skipped")] * 2
    assert {judged.why for judged in found.behaviour} == {
        "no answer in 0.1 s, and when it was tried again none in 0.5 s"}
    assert not found.differing
    assert probed(row(nothing)).behaviour[0].verdict == "expected"


def test_a_row_that_was_late_once_has_its_result(tmp_path: Path) -> None:
    def late(here: Here) -> None:
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            hangs(here)

    assert perform(lambda page: late(Here(page, NOWHERE, features())), Slate(), 2.0).result == "ok"


def test_a_bug_about_which_no_answer_comes_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "perform", lambda act, slate: perform(act, slate, 0.05))
    planted = Bug("planted", BUG, "planted", "none", "nothing", lambda here: str(hangs(here)))
    found = find(planted, Slate(), NOWHERE, features())
    assert found.verdict == "cannot tell"
    assert found.seen.startswith("no answer in 0.05 s, and when it was tried again")


def test_a_row_that_crashes_is_a_result(capfd: pytest.CaptureFixture[str]) -> None:
    def aborts(here: Here) -> None:
        os.abort()

    def killed(here: Here) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    found = probed(row(crashes, "SIGSEGV SEGV_MAPERR elsewhere"), row(aborts), row(killed), row(nothing))
    assert [judged.result for judged in found.behaviour] == ["SIGSEGV SEGV_MAPERR elsewhere", "SIGABRT", "SIGKILL", "ok"]
    assert found.behaviour[0].verdict == "expected"
    assert capfd.readouterr().err == ""


def test_a_signal_tells_where() -> None:
    def past_the_end(here: Here) -> None:
        load(here.map(here.temporary(), 4 * SIZE) + 2 * SIZE + 24)

    found = probed(row(past_the_end))
    assert found.behaviour[0].result == f"SIGBUS BUS_ADRERR at offset {2 * SIZE + 24:#x}"


def test_what_a_row_builds_on_and_our_own_mistakes_skip_it() -> None:
    def unfit(here: Here) -> None:
        raise Unfit("no such thing here")

    def mistaken(here: Here) -> None:
        raise ZeroDivisionError

    found = probed(row(unfit), row(mistaken))
    assert [(judged.verdict, judged.result) for judged in found.behaviour] == [("skipped", None)] * 2
    assert found.behaviour[0].why == "no such thing here"
    assert "ZeroDivisionError" in found.behaviour[1].why


def test_errno_goes_by_name() -> None:
    def refused(here: Here) -> None:
        call("read", -1, 0, 0)

    def too_long(here: Here) -> str:
        return "x" * (1 << 17)

    found = probed(row(refused), row(too_long))
    assert found.behaviour[0].result == "EBADF"
    assert set(found.behaviour[1].result or "") == {"x"}
    assert name_of(OSError(95, "")) == "EOPNOTSUPP"


def test_what_a_row_starts_ends_with_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    def leaves_a_child(here: Here) -> None:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        told.write_text(str(pid))

    before = count()
    probed(row(leaves_a_child))
    pid = int(told.read_text())
    for _ in range(100):
        # It is a child of init by now, which may take its time to bury it.
        with suppress(OSError):
            if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.02)
                continue
        break
    else:
        pytest.fail(f"process {pid} is still there")
    assert since(before).nothing


def test_exec_in_a_row_is_no_answer_of_its_own() -> None:
    def becomes_another(here: Here) -> None:
        os.execv("/bin/sh", ["sh", "-c", "exit 0"])

    assert probed(row(becomes_another)).behaviour[0].verdict == "skipped"


def test_the_caller_is_left_as_it_was() -> None:
    before, mask, limits = count(), signal.pthread_sigmask(signal.SIG_BLOCK, ()), resource.getrlimit(resource.RLIMIT_NOFILE)
    handler = signal.getsignal(signal.SIGALRM)

    def spoils_everything(here: Here) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        os.chdir("/")
        for _ in range(10):
            os.open("/proc", os.O_RDONLY)

    where = os.getcwd()
    assert probed(row(spoils_everything), row(crashes), row(nothing)).left.nothing
    assert since(before).nothing
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert signal.getsignal(signal.SIGALRM) == handler
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert os.getcwd() == where


def test_what_is_left_is_counted() -> None:
    before = count()
    fd = os.dup(1)
    pid = os.fork()
    if pid == 0:
        signal.pause()
    left = since(before)
    os.close(fd)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (left.descriptors, left.children, left.nothing) == (1, 1, False)


# -- this kernel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here_and_now() -> Survey:
    return survey()


# One class, so that one worker has them all (conftest.py): the survey takes seconds.
@needs_kvm
class TestThisKernel:
    def test_this_kernel_is_as_expected(self, here_and_now: Survey) -> None:
        if SETTLED not in here_and_now.offers.features:
            pytest.skip(here_and_now.offers.features.why(SETTLED))
        differing = [(j.row.id, j.result, j.expected) for j in here_and_now.behaviour if j.verdict in ("differs", "unknown")]
        assert differing == []
        assert [j.why for j in here_and_now.behaviour if "our own failure" in j.why] == []
        assert sum(j.verdict == "expected" for j in here_and_now.behaviour) >= 150

    def test_nothing_is_left_behind(self, here_and_now: Survey) -> None:
        assert here_and_now.left.nothing

    def test_bugs_have_verdicts(self, here_and_now: Survey) -> None:
        found = {each.bug.id: each for each in here_and_now.bugs}
        assert [*found] == [bug.id for bug in BUGS]
        assert all(each.verdict in bugs.VERDICTS and each.seen for each in found.values())
        assert [each.seen for each in found.values() if "unexpected" in each.seen or "our own failure" in each.seen] == []
        overflow = next(j for j in here_and_now.behaviour if j.row.id == "slot.offset-overflow")
        if overflow.result is not None:
            assert found["bind-offset-overflow"].verdict == {"ok": "present", "EINVAL": "fixed"}[overflow.result]

    def test_json_has_its_schema(self, here_and_now: Survey) -> None:
        found = json.loads(json.dumps(report.as_json(here_and_now)))
        assert found["schema"] == "guest-memfd-probe/1"
        assert {"kernel", "kvm", "vcpu", "memfd_secret", "page_sizes", "limits", "module_parameters", "direct_map_kb",
                "hibernation", "transparent_hugepages", "not_here"} <= found["offers"].keys()
        assert {"api_version", "capabilities", "guest_memfd_flags", "vm_types", "max_slots"} <= found["offers"]["kvm"].keys()
        for each in found["behaviour"]:
            assert [*each] == ["id", "says", "operation", "input", "result", "expected", "verdict", "why"]
            assert each["verdict"] in report.ROW_VERDICTS
            assert (each["verdict"] == "skipped") <= bool(each["why"])
        for each in found["known_bugs"]:
            assert [*each] == ["id", "title", "severity", "verdict", "seen", "commit", "means"]
        assert found["summary"]["rows"] == len(found["behaviour"]) == sum(
            found["summary"][verdict] for verdict in report.ROW_VERDICTS)
        assert {"descriptors", "children", "mappings", "vms", "direct_map_split_kb"} == found["left"].keys()

    def test_ktap_has_a_plan_and_a_line_per_row(self, here_and_now: Survey) -> None:
        lines = [*report.as_ktap(here_and_now)]
        tests = [line for line in lines if re.match(r"(not )?ok ", line)]
        assert lines[0] == "KTAP version 1"
        assert f"1..{len(tests)}" in lines
        assert len(tests) == len(ROWS) + len(BUGS)
        assert lines[-1].startswith("# Totals: pass:")
        totals = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", lines[-1])}
        assert sum(totals.values()) == len(tests)
        assert totals["fail"] == sum(line.startswith("not ok") for line in tests)
        assert totals["xfail"] == sum("# XFAIL" in line for line in tests)

    def test_text_fits_and_verbose_shows_every_row(self, here_and_now: Survey) -> None:
        brief = [*report.as_text(here_and_now, Style())]
        long = [*report.as_text(here_and_now, Style(), verbose=True)]
        assert max(map(len, brief)) <= 100
        assert len(long) > 2 * len(ROWS) > len(brief)
        assert all(any(f" {each.id}: " in line for line in long) for each in ROWS)
        assert "\033[" in "\n".join(report.as_text(here_and_now, Style(colours=True)))


@needs_kvm
def test_a_wrong_expectation_is_found() -> None:
    chosen = [each for each in ROWS if each.id in ("create.size-0", "private.load", "create.null")]
    wrong = {"create.size-0": "ok", "private.load": "SIGBUS BUS_ADRERR at offset 0x0"}
    planted = tuple(replace(each, expect=wrong.get(each.id, each.expect)) for each in chosen)
    found = survey(parts=("behaviour",), rows=planted)
    if SETTLED not in found.offers.features:
        pytest.skip(found.offers.features.why(SETTLED))
    assert {judged.row.id for judged in found.behaviour if judged.verdict == "differs"} == {*wrong} - {
        judged.row.id for judged in found.behaviour if judged.verdict == "skipped"}
    assert found.differing
    lines = [*report.as_ktap(found)]
    assert "not ok 1 create.size-0" in lines


@needs_kvm
def test_a_bug_that_crashes_its_child_is_no_verdict() -> None:
    def crash(here: Here) -> str:
        load(0x1000)
        return "fixed: never"

    planted = Bug("planted", BUG, "planted", "none", "nothing", crash)
    found = find(planted, Slate(), "/dev/kvm", features())
    assert (found.verdict, found.seen) == ("cannot tell", "unexpected: SIGSEGV SEGV_MAPERR elsewhere")
