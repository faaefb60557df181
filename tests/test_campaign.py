"""A run that goes on where another one ended: the same report, from a file that is never half believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.cli.main import main
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, JournalNotice
from guest_memfd.explore.engine.finding import INTERRUPTED
from guest_memfd.explore.suite import identity, journal
from guest_memfd.explore.suite.check import Limits, Report, compare
from guest_memfd.explore.suite.coverage import Coverage
from guest_memfd.explore.suite.journal import Journal
from guest_memfd.explore.suite.stop import Stop
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES

HEAD = {"code": "abc", "scenes": ["two-pages"], "failures": None}
TASKS = [Task(0, 0, ("vcpu",)), Task(1, 0, ("vcpu", "vmm")), Task(2, 0, ("vmm",))]
ANSWERS = {
    TASKS[0]: Answer(7, 9, 0.25, None, (), None, Coverage(frozenset({"a page was freed"}), frozenset({"punch", "bind"}))),
    TASKS[1]: Answer(100, 200, 1.5, "states", (("one-owner", "of \"two\"", 9, 1), ("progress", "…", 3, 0))),
}
ASKED: dict[str, Any] = {"scenes": ["for-good"], "full": False, "limits": Limits(states=50)}
LINE = ["check", "none", "--hypervisor", "gunyah", "--scene", "for-good", "--parties", "vcpu,zeropad", "-j", "1"]


def kept(path: Path, **head: Any) -> dict[Task, Answer]:
    with Journal(str(path), {**HEAD, **head}, TASKS) as file:
        return file.known


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With two answers."""
    path = tmp_path / "file"
    with Journal(str(path), HEAD, TASKS) as begun:
        assert begun.known == {}
        for task, answer in ANSWERS.items():
            begun.add(task, answer)
    return path


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_there_again(file: Path) -> None:
    assert kept(file) == ANSWERS
    with Journal(str(file), HEAD, TASKS) as more:
        more.add(TASKS[2], Answer(1, 1, 0.0, None))
    assert kept(file) == {**ANSWERS, TASKS[2]: Answer(1, 1, 0.0, None)}


@pytest.mark.parametrize("limit", ["seconds", "memory", INTERRUPTED])
def test_what_need_not_end_so_again_is_not_kept(file: Path, limit: str) -> None:
    with Journal(str(file), HEAD, TASKS) as more:
        more.add(TASKS[2], Answer(1, 1, 0.0, limit))
    assert kept(file) == ANSWERS


@pytest.mark.filterwarnings("ignore::guest_memfd.errors.JournalNotice")
def test_wherever_a_run_is_killed_the_next_one_can_read_and_write(file: Path) -> None:
    whole = file.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 7), *ends[:-1], *(end - 1 for end in ends), ends[0] + 1}:
        file.write_bytes(whole[:cut])
        there = max(sum(end <= cut for end in ends) - 1, 0)
        assert kept(file) == dict([*ANSWERS.items()][:there])
        with Journal(str(file), HEAD, TASKS) as more:
            for task in [*ANSWERS][there:]:
                more.add(task, ANSWERS[task])
        assert file.read_bytes() == whole


def test_a_line_that_was_cut_off_is_told(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(JournalNotice, match=r"the last line of .* was cut off; its scenario is explored again"):
        assert kept(file) == {TASKS[0]: ANSWERS[TASKS[0]]}


@pytest.mark.filterwarnings("ignore::guest_memfd.errors.JournalNotice")
def test_no_byte_that_is_another_is_believed(file: Path) -> None:
    whole = file.read_bytes()
    for at in {*range(0, len(whole), 2), len(whole) - 1}:
        byte = whole[at]
        for other in {byte ^ 1, ord("\n")} - {byte}:
            file.write_bytes(whole[:at] + bytes([other]) + whole[at + 1:])
            if at == len(whole) - 1:                    # as if the last line had been cut off
                assert kept(file) == {TASKS[0]: ANSWERS[TASKS[0]]}
            else:
                with pytest.raises(BadInput, match=r"\A[^\n]*\Z"):
                    kept(file)


@pytest.mark.parametrize(("text", "says"), [
    ("hello\n", "is not what --resume writes"), ("{}\n", "is not what --resume writes"),
    ("[" * 10**5, "is not what --resume writes"),
    ("\0" * 40, "is not what --resume writes"), ('{"schema": "guest-memfd-trace/3"}\n', "is not what --resume writes"),
    ("WHOLE[]\n", "line 4 of .* is damaged; give another file, or take the line out"),
    ("WHOLE\n", "line 4 of .* is damaged"), ("WHOLE{}\n", "line 4 of .* is damaged"),
])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(file: Path, text: str, says: str) -> None:
    file.write_text(text.replace("WHOLE", file.read_text()))
    before = file.read_bytes()
    with pytest.raises(BadInput, match=says):
        kept(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(("head", "says"), [
    ({"code": "abd"}, "another version of the code, and its answers"),
    ({"failures": 0}, "other options: failures null, and now 0; give the same, or another file"),
    ({"scenes": ["crossed"]}, r'other options: scenes \["two-pages"\], and now \["crossed"\]'),
])
def test_who_asks_something_else_is_told_what(file: Path, head: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        kept(file, **head)


def test_a_line_of_another_file_is_not_believed(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert kept(other, failures=0) == {}
    with other.open("ab") as end:
        end.write(file.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(BadInput, match=r"line 2 of .* is damaged"):
        kept(other, failures=0)


def test_two_runs_do_not_share_a_file(file: Path) -> None:
    code = f"import fcntl, sys; file = open({str(file)!r}, 'r+'); fcntl.lockf(file, 2); print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        with pytest.raises(BadInput, match=r"another run is writing to .*; each needs a file of its own"):
            kept(file)
        other.kill()
    with Journal(str(file), HEAD, TASKS):
        tried = ("import fcntl, sys\n"
                 f"try: fcntl.lockf(open({str(file)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError: sys.exit(7)")
        assert subprocess.run([sys.executable, "-c", tried], check=False).returncode == 7
    assert kept(file) == ANSWERS


def test_without_room_nothing_half_written_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = os.write, file.read_bytes()

    def full(descriptor: int, line: bytes) -> int:
        if len(line) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, line[:len(line) // 2])

    monkeypatch.setattr(journal.os, "write", full)
    with Journal(str(file), HEAD, TASKS) as more, pytest.raises(BadInput, match=r"cannot write to .*: No space left"):
        more.add(TASKS[2], Answer(1, 1, 0.0, None))
    assert file.read_bytes() == before


@pytest.mark.parametrize(("named", "says"), [
    (".", "cannot write to '.': Is a directory"), ("/dev/null", "'/dev/null' is no file that can be gone on with"),
    ("not/there", "cannot write to 'not/there': No such file or directory"), ("out", "--resume and --output are both 'out'"),
])
def test_a_place_where_nothing_can_be_kept(
    named: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*LINE, "--resume", named, "-o", "out"]) == 4
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert [*tmp_path.iterdir()] == []


# -- which code it was -------------------------------------------------------------------------------------------------


class Mine(OurLibrary):
    name = "mine"


class MineAsWell(OurLibrary):
    name = "mine"


def built(design: type[OurLibrary]) -> list[World]:
    return [World(design, HYPERVISORS["kvm"], [PARTIES["vcpu"]])]


def test_what_is_changed_is_other_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, mine = [world("library", "kvm")], built(Mine)
    before = identity.code_of(ours), identity.code_of(mine)
    assert before == (identity.code_of(ours), identity.code_of(mine))
    assert len({*before, identity.code_of(built(MineAsWell))}) == 3
    changed = tmp_path / "changed.py"
    changed.write_text("something else")
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(changed))
    assert (identity.code_of(ours), identity.code_of(mine) != before[1]) == (before[0], True)
    monkeypatch.setattr(sys, "version_info", (3, 99))
    assert identity.code_of(ours) != before[0]


def test_every_file_of_the_package_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.py", "below/b.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    seen = []
    for change in (lambda: None, lambda: (tmp_path / "below" / "b.py").write_text("x"), (tmp_path / "a.py").unlink):
        change()
        identity._ours.cache_clear()
        seen.append(identity._ours())
    identity._ours.cache_clear()
    assert len({*seen}) == 3


# -- a run that goes on ------------------------------------------------------------------------------------------------


@pytest.fixture
def explored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The scenarios that are explored, traces and what is only weighed left out."""
    real, done = Bench.do, list[tuple[str, ...]]()

    def do(self: Bench, task: Task) -> Answer:
        if task.trace is None and not task.apart:
            done.append(task.parties)
        return real(self, task)

    monkeypatch.setattr(Bench, "do", do)
    return done


def asked(path: Path | None, after: int | None = None) -> list[Report]:
    stop, count = Stop(), iter(range(after or 0))

    def progress(*_: object) -> None:
        if after is not None and next(count, None) in (None, after - 1):
            stop.ask()

    return compare([("none", "gunyah")], jobs=1, progress=progress, stop=stop, resume=path and str(path), **ASKED)


def timeless(report: Report) -> dict[str, Any]:
    return {**vars(report), "seconds": 0}


def test_a_run_that_goes_on_says_what_one_run_says(tmp_path: Path, explored: list[tuple[str, ...]]) -> None:
    (once,) = asked(None)
    every = [*explored]
    explored.clear()
    file = tmp_path / "file"
    for after in (3, 4):
        assert asked(file, after)[0].unfinished
    assert len(explored) == 7
    (gone_on,) = asked(file)
    assert timeless(gone_on) == timeless(once)
    assert sorted(explored) == sorted(every)            # each of them once
    assert len(file.read_text().splitlines()) == 1 + len(every)
    explored.clear()
    (all_there,) = asked(file)
    assert (timeless(all_there), explored) == (timeless(once), [])


def test_the_command_takes_the_rest_from_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, told = str(tmp_path / "file"), []
    for more in ([], ["--resume", file], ["--resume", file, "--memory", "8G", "--engine", "python", "-j", "2"]):
        assert main([*LINE, "--json", *more]) == 2
        report = json.loads(capsys.readouterr().out)
        report["reports"][0]["seconds"] = 0
        told.append(report)
    assert told[0] == told[1] == told[2]
    assert main([*LINE, "--resume", file, "--failures", "0"]) == 4
    assert "other options: failures null, and now 0" in capsys.readouterr().err


@pytest.mark.long
def test_after_a_kill_the_report_is_the_same(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "guest_memfd", "check", "guestmem-rfc1", "--hypervisor", "gunyah", "--quick", "--scene",
            "unbound", "--json"]
    once = subprocess.run(argv, capture_output=True, text=True, check=False)
    file = tmp_path / "file"
    with subprocess.Popen([*argv, "--resume", str(file)], stdout=subprocess.DEVNULL) as killed:
        while killed.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 9):
            time.sleep(0.005)
        killed.kill()
    again = subprocess.run([*argv, "--resume", str(file)], capture_output=True, text=True, check=False)
    assert again.returncode == once.returncode == 2
    reports = [json.loads(each.stdout) for each in (once, again)]
    for report in reports:
        report["reports"][0]["seconds"] = 0
    assert reports[0] == reports[1]
