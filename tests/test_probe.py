"""gmem probe: the table is well formed, what is confirmed comes out as expected, and nothing a row does gets out."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from linux_driver import no_kvm

from guest_memfd.cli.main import main
from guest_memfd.probe import bugs, left, offers, report
from guest_memfd.probe.against import compare
from guest_memfd.probe.ask import child
from guest_memfd.probe.ask.calls import call, load, name_of
from guest_memfd.probe.ask.child import Slate, Unfit, perform
from guest_memfd.probe.ask.here import PAGE, SIZE, Here
from guest_memfd.probe.ask.row import SETTLED, KernelFeatures, Row, RowOutcome, judge
from guest_memfd.probe.bugs import BUG, BUGS, SEVERITIES, Bug, BugFound, find
from guest_memfd.probe.left import count, since
from guest_memfd.probe.offers import Offers, look, version_of
from guest_memfd.probe.rows import ROWS
from guest_memfd.probe.survey import Survey, survey
from guest_memfd.report.style import Style

NO_KVM = no_kvm()
needs_kvm = pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM)
NOWHERE = "/dev/kvm-that-is-not-there"


def nothing(here: Here) -> None:
    """Do nothing."""


def hangs(here: Here) -> None:
    """Never answer."""
    while True:
        time.sleep(1)


def hangs_hard(here: Here) -> None:
    """Never answer, whatever signal comes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hangs(here)


def crashes(here: Here) -> None:
    """Load from nowhere."""
    load(0x1000)


def row(act: Callable[..., object], expect: str | None = "ok", **more: Any) -> Row:
    return Row(f"planted.{act.__name__}", "planted", act, expect=expect, **more)


def probed(*rows: Row, path: str = NOWHERE, timeout: float = 2.0) -> Survey:
    return survey(path, parts=("behaviour",), rows=rows, timeout=timeout)


def gmem(*argv: str) -> int:
    return main(["probe", *argv])


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
    known = {*errno.errorcode.values(), "EOPNOTSUPP"}
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
    ("7.3.0", False, True, {"6.19 on", "7.0 on", "7.2 on"}), ("7.4.0", False, False, {"6.19 on", "7.0 on", "7.2 on"}),
    ("7.3.0", True, False, {"6.19 on", "7.0 on", "7.2 on", "in-place"}),
])
def test_what_a_release_is_known_for(release: str, in_place: bool, settled: bool, since: set[str]) -> None:
    seen: dict[str, str] = {}

    def feature(name: str, why: str = "") -> bool:
        seen[name] = why
        return not why

    offers._about_release(release, feature, in_place)
    assert (seen[SETTLED] == "") == settled
    assert {name for name in seen if not seen[name] and name != SETTLED} == since


def test_7_2_is_expected_to_have_its_fixes() -> None:
    by_id = {each.id: each for each in ROWS}
    newer = features("7.2 on", "6.19 on")
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


# -- without this and that ---------------------------------------------------------------------------------------------


def test_without_kvm_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    code = gmem("--kvm", NOWHERE, "--json")
    found = json.loads(capsys.readouterr().out)
    assert code in (0, 2, 5)
    assert found["offers"]["kvm"] == {"path": NOWHERE, "usable": False}
    verdicts = {each["id"]: each for each in found["behaviour"]}
    assert verdicts["create.size-0"]["verdict"] == "skipped"
    assert NOWHERE in verdicts["create.size-0"]["why"]
    if found["offers"]["memfd_secret"] == "present":
        assert verdicts["secret.flags-0"]["result"] == "inherited"
        expected = sum(each["verdict"] == "expected" for each in found["behaviour"])
        assert expected > 90 or SETTLED in found["offers"]["not_here"]
    assert {each["verdict"] for each in found["known_bugs"]} <= {"present", "fixed", "cannot tell", "not tested"}


def test_a_device_that_is_no_kvm_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("--kvm", "/dev/null", "--part", "offers") == 5
    out, err = capsys.readouterr()
    assert "/dev/null is no KVM" in " ".join(out.split())
    assert err.startswith("gmem: --kvm /dev/null is no KVM") or "neither KVM nor memfd_secret" in err


@needs_kvm
def test_rows_are_chosen_by_several_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    gmem("--row", "create.size-*,create.null", "--row", "fd.cloexec*", "--json")
    ids = {each["id"] for each in json.loads(capsys.readouterr().out)["behaviour"]}
    assert ids == {row.id for row in ROWS if row.id.startswith(("create.size-", "fd.cloexec")) or row.id == "create.null"}
    assert len(ids) > 5


def test_without_anything_exit_5(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_secret(here: Here, size: int = 0) -> int:
        raise Unfit("memfd_secret: ENOSYS")

    monkeypatch.setattr(Here, "secret", no_secret)
    assert gmem("--kvm", NOWHERE, "--row", "secret.flag*") == 5
    out, err = capsys.readouterr()
    assert "differs" not in out.replace("0 differs", "")
    assert err.startswith("gmem: neither KVM nor memfd_secret is here: ")
    assert NOWHERE in err
    assert "secretmem.enable=0" in err


# The report of a child that does *prepare* before it tries the rows whose ids begin with one of *prefixes*.
def in_a_child(prepare: Callable[[], None], *prefixes: str) -> dict[str, Any]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            found = survey(parts=("offers", "behaviour"), rows=[each for each in ROWS if each.id.startswith(prefixes)])
            text = json.dumps(report.as_json(found))
        except BaseException as error:
            text = json.dumps({"raised": repr(error)})
        with os.fdopen(theirs, "w") as out:
            out.write(text)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        found = json.loads(answer.read())
    os.waitpid(pid, 0)
    assert "raised" not in found, found
    assert isinstance(found, dict)
    return found


def check_no_difference(found: dict[str, Any]) -> None:
    differing = [each for each in found["behaviour"] if each["verdict"] == "differs"]
    assert [(each["id"], each["result"], each["expected"]) for each in differing] == []
    assert [each["why"] for each in found["behaviour"] if "our own failure" in each["why"]] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_as_nobody() -> None:
    found = in_a_child(lambda: os.setresuid(65534, 65534, 65534), "")
    check_no_difference(found)
    assert "root" in found["offers"]["not_here"]


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 5])
def test_with_few_descriptors_left(spare: int) -> None:
    def prepare() -> None:
        top = os.dup(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + spare, top + spare))
        os.close(top)

    check_no_difference(in_a_child(
        prepare, "create.e", "fd.", "fork.", "gup.s", "slot.fd", "slot.file", "secret.flag", "secret.size", "close.file"))


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.c_void_p)]


def refuse(answers: dict[int, int]) -> None:
    """Install a seccomp filter: system call number -> errno."""
    load_nr, equal, answer, allow = (0x20, 0, 0, 0), (0x15, 0, 1), 0x00050000, (0x06, 0, 0, 0x7FFF0000)
    code = [load_nr]
    for number, error in answers.items():
        code += [(*equal, number), (0x06, 0, 0, answer | error)]
    instructions = (Instruction * (len(code) + 1))(*(Instruction(*each) for each in (*code, allow)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(len(instructions), ctypes.addressof(instructions))), 0, 0) == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system call numbers of x86-64")
def test_behind_a_filter() -> None:
    memfd_secret, process_vm_readv, ptrace, mlock, cachestat = 447, 310, 101, 149, 451
    found = in_a_child(lambda: refuse({memfd_secret: errno.ENOSYS, process_vm_readv: errno.EPERM, ptrace: errno.EPERM,
                                       mlock: errno.ENOSYS, cachestat: errno.EPERM}),
                       "gup.", "mlock", "populate.", "fault.", "secret.")
    check_no_difference(found)
    assert found["offers"]["memfd_secret"].startswith("memfd_secret: ENOSYS")
    verdicts = {each["id"]: each for each in found["behaviour"]}
    assert verdicts["secret.flags-0"]["verdict"] == "skipped"
    if not NO_KVM:
        assert verdicts["gup.shared.process-vm-readv"]["why"] == "refused (EPERM): a seccomp filter is in force"
        assert "ENOSYS" in verdicts["mlock"]["why"]
        assert "cachestat" in verdicts["populate.POPULATE_READ"]["why"]
        assert verdicts["fault.load-past-eof"]["result"] == "SIGBUS"


def test_with_nothing_to_lock() -> None:
    check_no_difference(in_a_child(
        lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)), "secret.mem", "mlock", "mmap.l"))


def test_with_little_address_space() -> None:
    def prepare() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))

    check_no_difference(in_a_child(prepare, "mmap.", "fault.", "populate.", "slot.again", "slot.many"))


def test_without_a_dev(tmp_path: Path, python: Any) -> None:
    argv = ["probe", "--row", "*[fg][lu][ap]*", "--ktap"]
    code = f"import sys; from guest_memfd.cli.main import main; sys.exit(main({argv}))"
    places = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "PYTHONPATH": places})
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode in (0, 5), done.stdout + done.stderr
    assert "not ok" not in done.stdout


def test_without_ptrace_signals_have_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def ptrace(self, *_: object) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    real = child._libc
    monkeypatch.setattr(child, "_libc", Refusing())
    assert perform(lambda _: load(0x1000), Slate()).result == "SIGSEGV"
    found = survey(NOWHERE, parts=("behaviour",), rows=[row(crashes, "SIGSEGV SEGV_MAPERR elsewhere")])
    assert found.behaviour[0].verdict == "expected"
    assert "cannot be traced" in found.behaviour[0].why


# -- the command line --------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert gmem(*argv) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gmem: ")
    assert err.count("\n") == 1
    return err


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'behaviour'?" in refused(capsys, "--part", "behavior")
    assert "no row is called 'no.such.row'; groups: " in refused(capsys, "--row", "no.such.row")
    assert "did you mean 'slot.*'?" in refused(capsys, "--row", "fd.*,slot")
    assert "exclude each other" in refused(capsys, "--json", "--ktap")
    assert "--part leaves out" in refused(capsys, "--part", "offers", "--row", "fd.*")
    assert "unknown part ''" in refused(capsys, "--part", "")
    assert "unexpected argument" in refused(capsys, "everything")
    assert "cannot write" in refused(capsys, "-o", "/no/such/folder/x")


def test_parts_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    gmem("--kvm", NOWHERE, "--part", "offers", "--json")
    assert [*json.loads(capsys.readouterr().out)] == ["schema", "offers", "left", "seconds"]
    gmem("--kvm", NOWHERE, "--row", "secret.flag-0x1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["schema", "summary", "behaviour", "left", "seconds"]
    assert [each["id"] for each in found["behaviour"]] == ["secret.flag-0x1", "secret.flag-0x10"][:len(found["behaviour"])]


def test_vms_without_a_process_are_counted_where_debugfs_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(left, "DEBUGFS", tmp_path / "kvm")
    blind = left.count()
    assert left.since(blind).vms is None
    (tmp_path / "kvm" / f"{os.getpid()}-7").mkdir(parents=True)         # somebody's who lives
    (tmp_path / "kvm" / "exits").touch()
    before = left.count()
    (tmp_path / "kvm" / "1073741824-5").mkdir()                         # no process has such a number
    after = left.since(before)
    assert (after.vms, after.nothing, left.since(blind).vms) == (1, False, None)


def found_bugs(*verdicts: tuple[str, str]) -> Survey:
    """A survey that found *verdicts*, each a severity and what came of the bug, and tried no row."""
    planted = [BugFound(Bug(f"bug-{at}", severity, "a title", "a fix", "mind it"), verdict, f"what was seen of bug-{at}")
               for at, (severity, verdict) in enumerate(verdicts)]
    offered = Offers(KernelFeatures("6.18.0"), {"kernel": "6.18.0, x86_64"})
    return Survey(("bugs",), offered, (), tuple(planted), since(count()), 1.0)


SOME = (("trap", "present"), ("severe", "present"), ("trap", "present"), ("bug", "fixed"), ("bug", "cannot tell"),
        ("severe", "not tested"))


def test_bugs_are_tests_and_a_trap_is_an_expected_failure() -> None:
    lines = [*report.as_ktap(found_bugs(*SOME))]
    assert [line for line in lines if re.match(r"(not )?ok ", line)] == [
        "ok 1 bug.bug-0 # XFAIL mind it", "not ok 2 bug.bug-1", "ok 3 bug.bug-2 # XFAIL mind it", "ok 4 bug.bug-3",
        "ok 5 bug.bug-4 # SKIP cannot tell: what was seen of bug-4",
        "ok 6 bug.bug-5 # SKIP not tested: what was seen of bug-5"]
    assert "1..6" in lines
    assert lines[-1] == "# Totals: pass:1 fail:1 xfail:2 xpass:0 skip:2 error:0"


def test_bugs_are_summed_up_by_severity() -> None:
    summary = "3 present (1 severe, 2 traps), 1 fixed, 1 cannot tell, 1 not tested"
    assert f"known bugs: {summary}" in [*report.as_text(found_bugs(*SOME), Style())]
    assert f"# known bugs: {summary}" in [*report.as_ktap(found_bugs(*SOME))]
    assert report.as_json(found_bugs(*SOME))["bug_summary"] == {
        "present": 3, "fixed": 1, "cannot tell": 1, "not tested": 1, "present_by_severity": {"severe": 1, "trap": 2}}
    assert "known bugs: 0 present, 1 fixed, 0 cannot tell, 0 not tested" in [
        *report.as_text(found_bugs(("bug", "fixed")), Style())]


# -- against an earlier survey -----------------------------------------------------------------------------------------


def survey_of(kernel: str, rows: dict[str, str | None], bugs: dict[str, str], **kvm: Any) -> dict[str, Any]:
    return {"schema": "guest-memfd-probe/1", "offers": {"kernel": kernel, "kvm": kvm, "memfd_secret": "present"},
            "behaviour": [{"id": name, "result": result} for name, result in rows.items()],
            "known_bugs": [{"id": name, "verdict": verdict} for name, verdict in bugs.items()]}


def test_what_has_changed_is_said() -> None:
    old = survey_of("6.18", {"a": "ok", "b": "EINVAL", "c": "ok", "d": None},
                    {"x": "present", "y": "fixed", "z": "not tested"},
                    capabilities={"GUEST_MEMFD": 1, "OLD": 2}, vm_types=[0])
    new = survey_of("7.2", {"a": "ok", "b": "EEXIST", "c": None, "d": "ok"}, {"x": "fixed", "y": "present", "z": "fixed"},
                    capabilities={"GUEST_MEMFD": 1, "NEW": 3}, vm_types=[0, 1])
    found = compare("old.json", old, new)
    assert [(c.what, c.id, c.was, c.now, c.worse) for c in found.changes] == [
        ("offer", "capabilities: NEW", "nothing", "3", False), ("offer", "capabilities: OLD", "2", "nothing", False),
        ("offer", "VM types", "0", "0, 1", False), ("row", "b", "EINVAL", "EEXIST", True),
        ("bug", "x", "present", "fixed", False), ("bug", "y", "fixed", "present", True)]
    assert (found.kernel, found.alone, found.worse) == ("6.18", 3, True)
    lines = [*report.against_text(found, Style())]
    assert lines[0].startswith("against old.json (6.18): 3 offers, 1 row, 2 bugs changed; rows and bugs with an answer in")
    assert "  row   b: was EINVAL, is EEXIST" in lines
    assert "# bug y: was fixed, is present" in [*report.against_ktap(found)]
    assert report.against_json(found)["against"]["changes"][0]["now"] == "3"
    assert not compare("old.json", new, new).changes
    assert not compare("old.json", survey_of("6.18", {}, {"x": "present"}), survey_of("7.2", {}, {"x": "fixed"})).worse


def test_an_earlier_survey_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.json"
    for text, says in (("", "is not JSON"), ("[" * 5000, "is not JSON"), ("[]", "is no survey"), ("{}", "is no survey"),
                       ('{"schema": "guest-memfd-check/2"}', "is no survey")):
        file.write_text(text)
        assert says in refused(capsys, "--against", str(file))
    assert "No such file" in refused(capsys, "--against", str(tmp_path / "none.json"))
    odd = {"schema": "guest-memfd-probe/1", "offers": [],
           "behaviour": [3, {"id": "a", "result": "\x1b[31m" + "x" * 1000}, {}],
           "known_bugs": {"id": 1}}
    found = compare("\x1b.json", odd, survey_of("7.2", {"a": "ok"}, {"x": "fixed"}))
    assert "\x1b" not in "\n".join(report.against_text(found, Style()))
    assert found.changes[0].was.startswith("\\x1b[31mxxx")
    assert len(found.changes[0].was) <= 200


@needs_kvm
def test_against_itself_nothing_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "old.json")
    assert gmem("--row", "create.size-0,create.null", "--json", "-o", file) in (0, 2)
    gmem("--row", "create.size-0,create.null", "--against", file)
    assert "a kernel that it does not name): nothing changed" in " ".join(capsys.readouterr().out.split())
    old = json.loads(Path(file).read_text())
    old["behaviour"][0]["result"] = "ok"
    Path(file).write_text(json.dumps(old))
    assert gmem("--row", "create.size-0,create.null", "--against", file) == 2
