"""How gmem ends for want of memory, descriptors or room, and by a signal: in one line, with nothing left. What it prints."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import on_a_terminal

from guest_memfd.cli.main import LONGEST, main
from guest_memfd.cli.output import Output
from guest_memfd.cli.stop import Stopped
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.explore.suite import pool
from guest_memfd.explore.suite.crew import Schedule
from guest_memfd.explore.suite.pool import Pool
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.report.counterexample import pasted
from guest_memfd.report.style import WIDTH, Style, columns

LOAD = ["check", "none", "--hypervisor", "gunyah", "--parties", "vcpu,zeropad"]
GMEM = [sys.executable, "-m", "guest_memfd.cli.main"]
LIST = [*GMEM, "list", "designs"]
MIB = 1 << 20


def ended(*argv: str, where: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code and standard error of gmem as a process of its own, in folder *where*, after *before*."""
    done = subprocess.run([*GMEM, *argv], capture_output=True, text=True, cwd=where, preexec_fn=before, timeout=600,
                          check=False)
    return done.returncode, done.stderr


def one_line(said: str) -> str:
    assert said.startswith("gmem: "), said
    assert said.count("\n") == 1, said
    assert len(said) <= LONGEST + 30, said
    assert "internal error" not in said
    return said


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "mib", "says"), [
    (["check", "library", "--parties", "vcpu,vmm,stop", "-j", "1"], 80, "no memory left to explore vcpu, vmm, stop"),
    pytest.param(["check", "library", "--hypervisor", "kvm", "--scene", "two-pages,crossed", "--parties", "vcpu,vmm,stop",
                  "-j", "2"], 80, "no memory left to explore vcpu, vmm, stop", marks=pytest.mark.long),
    (["check", "library", "--parties", "vcpu"], 30, "there is no memory left; fewer processes"),
    (["run", "hello"], 200, "no address range for RAM of 0x10000000 bytes"),
    (["run", "hello"], 370, "a CPU that executes on Unicorn needs"),
], ids=["here", "in workers", "from the start", "RAM", "Unicorn"])
def test_no_memory_is_one_line_with_an_advice(tmp_path: Path, argv: list[str], mib: int, says: str) -> None:
    if "run" in argv:
        pytest.importorskip("unicorn")
    more = ["--save-traces", "traces"] if "check" in argv else []
    code, said = ended(*argv, "-o", "out", *more, where=tmp_path,
                       before=lambda: resource.setrlimit(resource.RLIMIT_AS, (mib * MIB, mib * MIB)))
    assert (code, says in one_line(said)) == (5, True), said
    assert re.search("ulimit -v|--max-states", said)
    assert not [*tmp_path.iterdir()]


def test_memory_that_a_design_runs_out_of_is_no_failure_of_the_design(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: object, **__: object) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise BadInput("design 'x' raised MemoryError") from error

    monkeypatch.delenv("GMEM_DEBUG", raising=False)
    monkeypatch.setattr("guest_memfd.cli.options.compare", runs_out)
    assert main(LOAD) == 5
    assert one_line(capsys.readouterr().err).startswith("gmem: there is no memory left; fewer processes")


class Short(Bench):
    """Where no task finds memory."""

    def do(self, task: Task) -> Any:
        raise MemoryError


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_without_memory_ends_the_run(jobs: int) -> None:
    tasks = [Task(at, 0, ("vcpu",)) for at in range(3)]
    with pytest.raises(HostUnavailable, match="no memory left to"), Pool(Short([], None, None), jobs) as workers:
        workers.run(Schedule(tasks, dict.fromkeys(tasks, 1.0)), lambda task, answer: None)


def test_without_room_for_workers_this_process_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def full(self: Pool, *_: object) -> None:
        started.append(1)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pool.Pool, "_start", full)
    assert main([*LOAD, "--scene", "two-pages,crossed", "-j", "2", "-q"]) == 2
    assert started


# -- signals -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# What these tests were started by may ignore some, as nohup does, and what is ignored stays so.
def heard() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """gmem check in a folder of its own, with two workers that have begun."""
    with subprocess.Popen([*GMEM, "check", "library", "-j", "2", "-o", "out", "--save-traces", "traces"], cwd=tmp_path,
                          stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        while len(children(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        yield process
        process.kill()


@pytest.mark.parametrize("name", [
    pytest.param("SIGHUP", marks=pytest.mark.long), pytest.param("SIGINT", marks=pytest.mark.long), "SIGQUIT", "SIGTERM"])
def test_a_signal_leaves_nothing_behind(busy: subprocess.Popen[str], tmp_path: Path, name: str) -> None:
    workers = children(busy.pid)
    assert [*tmp_path.iterdir()]
    number = signal.Signals[name]
    busy.send_signal(number)
    assert busy.communicate()[1] == ""
    assert busy.returncode == 128 + number
    assert [*tmp_path.iterdir()] == []
    while not all(map(gone, workers)):
        time.sleep(0.02)


class Asks(Bench):
    """Answers with the signal that this process gets when its parent ends."""

    def do(self, task: Task) -> Any:
        number = ctypes.c_int()
        assert ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0) == 0       # PR_GET_PDEATHSIG
        return Answer(number.value, 0, 0.0, None)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    task = Task(0, 0, ("vcpu",))
    with Pool(Asks([], None, None), 2) as workers:
        answers = workers.run(Schedule([task], {task: 1.0}), lambda task, answer: None)
    assert answers[task].states == signal.SIGKILL


def test_what_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(*_: object, **__: object) -> None:
        seen.append(signal.getsignal(signal.SIGHUP))
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("guest_memfd.cli.options.compare", look)
        assert main([*LOAD, "-o", str(tmp_path / "out")]) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]
    assert [*tmp_path.iterdir()] == []
    assert str(Stopped(signal.SIGTERM)) == "SIGTERM"


# -- streams and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [
    '"$@" -o /dev/stdout >> log', '"$@" -o log >> log', '"$@" -o /dev/fd/5 5>> log',
    '"$@" -o "$PWD/link" >> log', '{ echo first; "$@" -o /dev/stdout; echo last; } > log',
    pytest.param('exec 6>>log; "$@" -o /proc/$$/fd/6', marks=pytest.mark.long),
])
def test_a_stream_is_written_and_not_replaced(tmp_path: Path, shell: str) -> None:
    log = tmp_path / "log"
    log.write_text("first\n")
    (tmp_path / "link").symlink_to("/dev/stdout")
    inode = log.stat().st_ino
    subprocess.run(["sh", "-c", shell, "sh", *LIST], cwd=tmp_path, check=True, timeout=600, stderr=subprocess.DEVNULL)
    lines = log.read_text().splitlines()
    assert lines[:2] == ["first", "designs"]
    assert (lines[-1] == "last") == ("last" in shell)
    assert log.stat().st_ino == inode
    assert {path.name for path in tmp_path.iterdir()} == {"log", "link"}


@pytest.mark.parametrize(("named", "says"), [("/dev/fd/77", "Bad file descriptor"), ("/dev/fd/9", "open for reading only")])
def test_a_descriptor_that_cannot_be_written_is_found_out_first(tmp_path: Path, named: str, says: str) -> None:
    done = subprocess.run(["sh", "-c", f'"$@" -o {named} 9</dev/null', "sh", *LIST], capture_output=True, text=True,
                          cwd=tmp_path, timeout=600, check=False)
    assert (done.returncode, says in one_line(done.stderr)) == (4, True)


def written(path: Path) -> os.stat_result:
    assert main(["list", "designs", "-o", str(path)]) == 0
    assert path.read_text().startswith("designs\n")
    return path.stat()


def test_a_file_keeps_mode_owner_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out"
    file.write_text("a long text that is longer than nothing, " * 1000)
    file.chmod(0o604)
    before = file.stat()
    after = written(file)
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o604, before.st_uid, before.st_gid)
    os.link(file, tmp_path / "again")
    file.write_text("x")
    written(file)
    assert (tmp_path / "again").read_text() == file.read_text()
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        after = written(file)
        assert (after.st_uid, after.st_gid) == (65534, 65534)
    (tmp_path / "again").unlink()

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")    # as a file that is a mount point

    monkeypatch.setattr(os, "replace", busy)
    file.write_text("old")
    written(file)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_letters_that_utf_8_has_not_are_escaped(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out")) as out:
        out.write("a \udcff name")
    assert (tmp_path / "out").read_text() == "a \\udcff name\n"


def test_paths_to_be_pasted_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "it's a\nfolder\x1b[31m"
    assert main([*LOAD, "--save-traces", str(folder)]) == 2
    (file,) = folder.iterdir()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    (command,) = re.findall(r"^  replay   (gmem replay .*)$", out, re.M)
    for path in (str(file), "plain/name.json", "a b", "$(x)", "\udcff'\\"):
        said = subprocess.run(["bash", "-c", f"printf %s {pasted(path)}"], capture_output=True, check=True, timeout=600)
        assert said.stdout == os.fsencode(path)
    assert command == f"gmem replay {pasted(str(file))}"
    assert main(["explain", str(file)]) == 0
    assert command in capsys.readouterr().out


# -- traces that somebody else has written -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("traces")
    assert main([*LOAD, "-q", "--save-traces", str(folder)]) == 2
    (file,) = folder.iterdir()
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


ODD: list[Any] = [
    {"folio": ["x", "y"]}, {"folio": [0, 1 << 40]}, {"folio": [0, -1]}, {"folio": [-1, 0]}, {"entries": [0, -1, 0]},
    {"entries": [0, True, 0]}, {"entries": ["a", 1, 0]}, {"lookup": [1, 2]}, {"lookup": [{"folio": [0, 0]}, "x"]},
    {"locked": [0, 1, 2, 3]}, {"locked": ["x", True, True, True]}, 10**30, -(10**20), "a" * 5000,
    {"tuple": [{"tuple": [{"folio": [0, []]}]}]},
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: json.dumps(value)[:40])
@pytest.mark.parametrize("where", ["result", "args"])
def test_a_value_that_means_nothing_is_refused(
    trace: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any, where: str
) -> None:
    steps = [dict(step) for step in trace["steps"]]
    steps[5][where] = value if where == "result" else [value]
    (tmp_path / "t.json").write_text(json.dumps({**trace, "steps": steps}))
    for verb in ("explain", "replay"):
        assert main([verb, str(tmp_path / "t.json")]) == 4
        one_line(capsys.readouterr().err)


def test_nesting_has_an_end(trace: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value: Any = 1
    for _ in range(60):
        value = {"tuple": [value]}
    (tmp_path / "t.json").write_text(json.dumps({**trace, "scene": value}))
    assert main(["replay", str(tmp_path / "t.json")]) == 4
    assert "nests deeper than 50 levels" in one_line(capsys.readouterr().err)


EVIL = "\x1b[31m\x07\u202e\x9b\ud800"


@pytest.mark.parametrize("field", [
    "design", "hypervisor", "law", "evidence", "version", "parties", "schema", "scene", "step party", "step choices",
    "step primitive", "step caller", "step args", "step result"])
def test_no_control_character_of_a_trace_reaches_the_terminal(
    trace: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    changed = {**trace, "steps": [dict(step) for step in trace["steps"]], "scene": dict(trace["scene"])}
    about, _, name = field.rpartition(" ")
    there = changed["steps"][3] if about else changed
    if name == "scene":
        there, name = changed["scene"], "title"
    there[name] = [EVIL] if isinstance(there[name], list) else EVIL
    (tmp_path / "t.json").write_text(json.dumps(changed))
    for verb in ("explain", "replay"):
        assert main([verb, str(tmp_path / "t.json")]) in (0, 2, 3, 4)
        out, err = capsys.readouterr()
        assert not set(out + err) & set(EVIL) - set("[31m"), out + err


# -- numbers, folders, descriptors -------------------------------------------------------------------------------------

MANY = "9" * 5000


@pytest.mark.parametrize("argv", [
    f"check none --max-states {MANY}", f"check none -j {MANY}", f"check none --failures {MANY}", "check none -j 1025",
    f"run hello --memory {MANY}", f"run hello --memory 0x{MANY}", f"run hello --ram {MANY}G", f"run hello --timeout {MANY}",
    f"run hello --fail kernel:{MANY}", "run hello --fail kernel:\u00b2", f"run {MANY}", f"check {MANY}", MANY,
    f"list {MANY}", f"check none --{MANY}", f"probe --row {MANY}", f"explain {MANY}", f"list -o /{MANY}",
    f"probe --against {MANY}",
])
def test_long_arguments_are_one_short_line(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 4
    out, err = capsys.readouterr()
    assert out == ""
    one_line(err)


def test_control_characters_of_arguments_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["run", "/\x1b[31m\u202e.s"], ["list", "-o", "/no\x1b/where"], ["\x1b[0m"], ["list", "a", "\x07"]):
        assert main(argv) == 4
        assert not set(one_line(capsys.readouterr().err)) & set("\x1b\u202e\x07")


def test_an_exception_that_cannot_say_what_it_is_about(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fail(*_: object, **__: object) -> None:
        raise MuteError

    monkeypatch.delenv("GMEM_DEBUG", raising=False)
    monkeypatch.setattr("guest_memfd.cli.options.compare", fail)
    assert main(LOAD) == 1
    assert "internal error: MuteError, which cannot say" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["list", "designs", "-o", "out"], 4, "cannot write to 'out'"), (["explain", "t.json"], 4, "No such file"),
    ([*LOAD, "--save-traces", "traces"], 4, "cannot make folder 'traces'"), (["list", "designs"], 0, ""),
])
def test_a_working_directory_that_is_gone(tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    got, said = ended(*argv, where=gone, before=gone.rmdir)
    assert (got, says in said) == (code, True), said
    if code:
        one_line(said)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", ["--version", "list"])
def test_a_full_device_for_standard_output(argv: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*GMEM, argv], stdout=full, stderr=subprocess.PIPE, text=True, timeout=600, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 4
    assert "standard output" in one_line(done.stderr)
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(("raised", "code", "says"), [(lambda: Stopped(15), 143, ""), (MemoryError, 5, "no memory left")])
@pytest.mark.parametrize("at", [20, 50])
def test_what_ends_a_run_half_way_is_no_broken_law(
    at: int, raised: Callable[[], BaseException], code: int, says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("unicorn")
    from guest_memfd.machine.primitives.host import EmulatedHost

    real, count = EmulatedHost.perform, iter(range(at))

    def perform(self: EmulatedHost, *args: Any) -> Any:
        if next(count, None) is None:
            raise raised()
        return real(self, *args)

    monkeypatch.setattr(EmulatedHost, "perform", perform)
    assert main(["run", "hello", "--on", "emulated:arm64/gunyah"]) == code
    said = capsys.readouterr()
    assert "law" not in said.err + said.out
    assert says in said.err


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 250)
    assert main(["list", "laws", "-o", str(file)]) == 0
    assert file.read_text().count("host-survives")
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_device_is_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "/dev/zero"]) == 4
    assert "'/dev/zero' is a device; a file or a pipe is wanted" in capsys.readouterr().err


def test_without_descriptors_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (6, 6))
    assert main(["probe"]) == 5
    assert "needs 64 descriptors, and a process may have 6 here" in capsys.readouterr().err


@pytest.mark.parametrize("descriptors", [6, 10])
def test_few_descriptors(tmp_path: Path, descriptors: int) -> None:
    code, said = ended(*LOAD, "--scene", "two-pages,crossed", "-j", "2", "-q", "-o", "out", where=tmp_path,
                       before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)))
    assert code in (2, 4, 5), said
    if code != 2:
        one_line(said)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


# -- the width ---------------------------------------------------------------------------------------------------------


def lines_on_a_terminal(width: int, *argv: str, **env: str) -> list[str]:
    """The lines of gmem on a terminal of *width* columns, without colours."""
    return on_a_terminal(*argv, width=width, NO_COLOR="1", **env).decode().replace("\r", "").splitlines()


@pytest.mark.parametrize(("argv", "uses"), [
    (LOAD, 110), (["check", "--help"], 90),
    pytest.param(["compare", "none", "library", "--parties", "vcpu,zeropad"], 110, marks=pytest.mark.long),
])
def test_text_is_as_wide_as_the_terminal(argv: list[str], uses: int) -> None:
    assert max(map(len, lines_on_a_terminal(80, *argv))) <= 80
    assert uses < max(map(len, lines_on_a_terminal(140, *argv))) <= 140


def test_columns_is_obeyed() -> None:
    assert max(map(len, lines_on_a_terminal(140, "list", COLUMNS="80"))) <= 80


def test_where_there_is_no_terminal_text_is_as_wide_as_a_mail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        assert columns(stream) == WIDTH
        for given, wide in (("70", 70), ("1", 40), ("x", WIDTH), ("", WIDTH), ("-5", WIDTH), (MANY, WIDTH), ("0", WIDTH)):
            monkeypatch.setenv("COLUMNS", given)
            assert columns(stream) == wide


def test_wrapping_is_at_words_and_a_head_keeps_its_colour() -> None:
    style = Style(colours=True, width=40)
    assert style.wrap("a-b " * 20, "first: ")[1].startswith("       a-b")
    assert style.lead("head", style.bad, " and " + "text " * 20)[0].startswith("\033[1;31mhead\033[0m and text")
    assert style.wrap("", "only this  ") == ["only this"]
