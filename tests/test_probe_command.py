"""The probe's command line, and what it does without this and that."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from probes import NO_KVM, NOWHERE, crashes, gmem, needs_kvm, refused, row

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe import left, report
from guest_memfd.probe.against import compare
from guest_memfd.probe.ask import child
from guest_memfd.probe.ask.calls import load
from guest_memfd.probe.ask.child import Slate, Unfit, perform
from guest_memfd.probe.ask.here import Here
from guest_memfd.probe.ask.row import SETTLED, KernelFeatures
from guest_memfd.probe.bugs import Bug, BugFound
from guest_memfd.probe.left import count, since
from guest_memfd.probe.offers import Offers
from guest_memfd.probe.rows import ROWS
from guest_memfd.probe.survey import Survey, survey
from guest_memfd.report.style import Style

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
