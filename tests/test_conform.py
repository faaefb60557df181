"""gmem conform: the emulated /dev/kvm against this kernel's, what it would see, and what comes of a difference."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conform_mistakes import MISTAKES
from hypothesis import given, settings
from hypothesis import strategies as st
from linux_driver import no_guests

from guest_memfd.cli.main import main
from guest_memfd.conform.c_program import program
from guest_memfd.conform.child import Child
from guest_memfd.conform.compare import BothHosts, Difference, Tally
from guest_memfd.conform.emulated import EmulatedWorld
from guest_memfd.conform.linux import LinuxSubject
from guest_memfd.conform.operations import OPERATIONS, UserCall
from guest_memfd.conform.release import shown
from guest_memfd.conform.sequence import LENGTH, Sequence, as_json, random_sequence, read, tables
from guest_memfd.conform.shrink import shrink
from guest_memfd.conform.subject import TOO_MUCH, StepAnswer
from guest_memfd.conform.touch import Toucher
from guest_memfd.errors import Signalled
from guest_memfd.uapi.kvm import PATH

pytest.importorskip("unicorn")
REASON = no_guests()
here = pytest.mark.skipif(bool(REASON), reason=REASON)
SEED, MOST = 7, 400
"""Of random sequences, within so many of which a planted mistake has to show."""
GCC = shutil.which("gcc") or ""


def _file(*steps: object) -> str:
    return json.dumps({"schema": "guest-memfd-conform/1", "steps": steps})


@pytest.fixture(scope="module")
def pair() -> BothHosts:
    return BothHosts(partial(Child, partial(LinuxSubject, PATH)), EmulatedWorld(shown(PATH), "x86_64"))


# -- this kernel -------------------------------------------------------------------------------------------------------


@here
def test_a_thousand_operations(pair: BothHosts) -> None:
    tally = Tally()
    for number in range(1000 // LENGTH):
        found = pair.compare(random_sequence(11, number), tally)
        assert found is None, found
    assert set(tally.by_operation) == set(OPERATIONS)


@here
@pytest.mark.long
def test_every_operation_with_every_edge(pair: BothHosts) -> None:
    tally = Tally()
    for sequence in list(tables())[::3]:
        found = pair.compare(sequence, tally, resume=True)
        assert found is None, found
    assert tally.steps > 25_000


@here
@pytest.mark.long
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(pair: BothHosts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch)
    pair.world.renew()
    try:
        assert any(pair.compare(random_sequence(SEED, number), Tally()) for number in range(MOST))
    finally:
        pair.world.renew()


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 15


@here
def test_a_difference_is_shrunk_saved_and_replayed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        MISTAKES["a_mapping_ends_with_the_file"](patch)
        assert main(["conform", "--no-tables", "--operations", "400", "--save", str(tmp_path / "found")]) == 2
        assert "1 unexplained" in capsys.readouterr().out
        saved = tmp_path / "found" / "difference-1.json"
        assert [step.op for step in read(str(saved))] == ["create", "map"]
        assert main(["conform", "--replay", str(saved)]) == 2
        assert "answered in two ways" in capsys.readouterr().out
    assert main(["conform", "--replay", str(saved)]) == 0
    assert capsys.readouterr().out == "2 steps, answered alike\n"
    assert main(["conform", "--replay", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": "guest-memfd-conform-replay/1", "same": True, "known": {}}
    assert (tmp_path / "found" / "difference-1.c").read_text().startswith("// On /dev/kvm of Linux")


@here
def test_a_release_that_the_kernel_is_not_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "7.2" if shown(PATH) == "6.18" else "6.18"
    file = tmp_path / "twice.json"
    binds = (["region", 0, slot, 4, slot << 28, 4096, 0, 0, 0] for slot in (1, 2))
    file.write_text(_file(["create", 0, 0, 4096, 3], *binds))
    assert main(["conform", "--replay", str(file)]) == 0
    capsys.readouterr()
    assert main(["conform", "--replay", str(file), "--release", other, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert {found["real"][0], found["emulated"][0], found["at"]} == {"EINVAL", "EEXIST", 3}


@here
@pytest.mark.skipif(not GCC, reason="no gcc")
def test_a_sequence_in_c_says_what_it_says_in_python(tmp_path: Path) -> None:
    for number in range(4):
        sequence = random_sequence(5, number)
        (tmp_path / "one.c").write_text(program(sequence, "a test"))
        built = subprocess.run([GCC, "-O1", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-missing-field-initializers",
                                "-o", tmp_path / "one", tmp_path / "one.c"], capture_output=True, text=True)
        assert (built.returncode, built.stderr) == (0, "")
        said = subprocess.run([tmp_path / "one"], capture_output=True, text=True, check=True).stdout.splitlines()
        ours = Child(partial(LinuxSubject, PATH), sequence).answers()
        assert [line.partition(" -> ")[2] for line in said] == [str(answer) for answer in ours]


@here
def test_what_kills_the_process_is_the_answer() -> None:
    class Dying(LinuxSubject):
        def unmap(self, register: int) -> str | None:
            os.kill(os.getpid(), 9)
            return None

    answers = Child(Dying, (UserCall("stat", (0,)), UserCall("unmap", (0,)), UserCall("stat", (0,)))).answers()
    assert [answer.said for answer in answers] == ["EBADF", "the process is killed by SIGKILL"]


# -- sequences, shrinking ----------------------------------------------------------------------------------------------


def test_a_number_is_all_there_is_to_a_sequence() -> None:
    assert random_sequence(3, 4) == random_sequence(3, 4) != random_sequence(3, 5)
    assert not {step.op for step in random_sequence(3, 4, frozenset(("map", "region")))[5:]} & {"map", "region"}


def test_tables_have_every_operation_with_every_value() -> None:
    seen = {(step.op, place, value) for sequence in tables() for step in sequence for place, value in enumerate(step.args)}
    for operation in OPERATIONS.values():
        for place, param in enumerate(operation.params):
            assert {(operation.name, place, value) for value in param.values} <= seen


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_sequence_goes_through_a_file(number: int) -> None:
    sequence = random_sequence(1, number)
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(as_json(sequence), file)
        file.flush()
        assert read(file.name) == sequence


@pytest.mark.parametrize(("text", "says"), [
    ("{", "is no JSON"), ("[]", "schema 'list'"), ('{"schema": "guest-memfd-conform/2"}', "this program replays"),
    ('{"schema": "guest-memfd-conform/1"}', "no steps"), (_file(["clsoe", 0]), "did you mean 'close'"),
    (_file(["close", "0"]), "step 0: an operation and its numbers"), (_file(["close"]), "close takes 1 numbers, file"),
    (_file(["close", 9]), "file of close is one of 0, 1, 2, 3, 4, not 9"),
    (_file(["fallocate", 0, 1, 0, 1 << 64]), "nr 0x10000000000000000 does not fit 64 bits"),
    (_file(["read", 0, 0, 1 << 50]), "nr of read is one of"),
])
def test_a_file_that_is_none(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sequence.json"
    file.write_text(text)
    assert main(["conform", "--replay", str(file)]) == 4
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("options", "code", "says"), [
    (["--replay", "/nothing"], 4, "/nothing: No such file"), (["--kvm", "/dev/null"], 5, "/dev/null is no KVM"),
    (["--kvm", "/dev/nothing"], 5, "/dev/nothing: No such file"), (["--operations", "-1"], 4, "0 at least"),
    (["--save", "/dev/null/x"], 4, "--save /dev/null/x"), (["--kernel", "7.3", "--save", "x"], 4, "kernel of this machine"),
])
def test_bad_input(options: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", *options]) == code
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


@here
@pytest.mark.parametrize("options", [["--release", "6.19"], ["--design", "nothing"]])
def test_a_name_that_is_none(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", *options]) == 4
    assert "unknown" in capsys.readouterr().err


@given(st.integers(0, 10_000), st.lists(st.integers(5, LENGTH - 1), min_size=1, max_size=3, unique=True))
@settings(max_examples=40, deadline=None)
def test_shrinking_leaves_what_is_needed_and_nothing_else(number: int, places: list[int]) -> None:
    whole = random_sequence(2, number)
    needed = [whole[place] for place in sorted(places)]

    def attempt(sequence: Sequence) -> Difference | None:
        at, left = 0, [step.op for step in needed]
        for at, step in enumerate(sequence):
            if left and step.op == left[0]:
                left.pop(0)
            if not left:
                return Difference(sequence[:at + 1], StepAnswer("a", ""), StepAnswer("b", ""))
        return None

    first = attempt(whole)
    assert first is not None
    smallest = shrink(first, attempt)
    assert [step.op for step in smallest.sequence] == [step.op for step in needed]
    assert all(value == param.usual[0] for step in smallest.sequence
               for value, param in zip(step.args, OPERATIONS[step.op].params, strict=True))


# -- comparing ---------------------------------------------------------------------------------------------------------


class Said:
    def __init__(self, *said: str) -> None:
        self._answers = [StepAnswer(each, "") for each in said]

    def answers(self) -> list[StepAnswer]:
        return self._answers


class Echo:
    """A world whose subject answers as it was told to."""

    def __init__(self, *said: str) -> None:
        self._said = list(said)

    def subject(self) -> Any:
        return self

    def perform(self, step: UserCall) -> StepAnswer:
        return StepAnswer(self._said.pop(0), "")

    def end(self) -> list[str]:
        return []


OVERFLOWING = UserCall("region", (0, 1, 4, 0x1000_0000, 4096, 0, 0, (1 << 63) - 4096))


def compared(real: list[str], emulated: list[str], step: UserCall, **more: bool) -> tuple[Difference | None, Tally]:
    tally = Tally()
    world: Any = Echo(*emulated)
    return BothHosts(lambda _: Said(*real), world).compare((step,) * len(emulated), tally, **more), tally


def test_a_known_difference_ends_a_random_sequence() -> None:
    found, tally = compared(["ok", "a"], ["EINVAL", "b"], OVERFLOWING)
    assert (found, tally.steps, dict(tally.known)) == (None, 1, {"bind-offset-overflow": 1})


def test_after_a_known_difference_a_table_is_made_anew_and_goes_on() -> None:
    undone = len(OPERATIONS["region"].undo or ())
    found, _ = compared(["ok", *"x" * undone, "a"], ["EINVAL", *"y" * undone, "b"], OVERFLOWING, resume=True)
    assert found is not None
    assert len(found.sequence) == undone + 2


@pytest.mark.parametrize(("real", "emulated"), [("ok", "EBADF"), ("EINVAL", "ok")])
def test_no_operation_as_such_is_known_to_differ(real: str, emulated: str) -> None:
    found, _ = compared([real], [emulated], OVERFLOWING)
    assert found is not None


def test_a_process_that_died_is_compared_as_far_as_it_came() -> None:
    found, _ = compared(["ok", "the process is killed by SIGSEGV"], ["ok", "ok", "ok"], UserCall("close", (0,)))
    assert found is not None
    assert (len(found.sequence), found.real.said) == (2, "the process is killed by SIGSEGV")


# -- touching ----------------------------------------------------------------------------------------------------------


def killed_by(act: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        act()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no code for this machine")
def test_a_touch_survives_its_signal_and_nothing_else_does() -> None:
    def touches() -> None:
        toucher = Toucher()
        toucher.arm()
        memory = mmap.mmap(-1, 3 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        toucher.store(at + 8, 0x1234_5678_9ABC_DEF0)
        good = toucher.load(at + 8) == 0x1234_5678_9ABC_DEF0 and memory[8:16] == bytes.fromhex("f0debc9a78563412")
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + 4096), 4096, mmap.PROT_READ)
        for access in (partial(toucher.load, 16), partial(toucher.store, at + 4096 + 24, 1)):
            try:
                access()
                good = False
            except Signalled as error:
                good = good and (error.signal, error.address, error.code) in (("SIGSEGV", 16, 1), ("SIGSEGV", at + 4120, 2))
        os.kill(os.getpid(), signal.SIGUSR1 if good else signal.SIGUSR2)

    def elsewhere() -> None:
        Toucher().arm()
        ctypes.string_at(16)

    assert killed_by(touches) == signal.SIGUSR1
    assert killed_by(elsewhere) in (signal.SIGILL, signal.SIGTRAP)


@here
@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - 4096])
def test_no_call_takes_all_memory(pair: BothHosts, size: int) -> None:
    sequence = (UserCall("create", (0, 0, size, 3)), UserCall("map", (0, 0, 0, 1 << 41, 0)),
                *(UserCall("fallocate", (0, 1, 0, nr)) for nr in (1 << 40, 1 << 39, 4096)),
                *(UserCall("advise", (0, advice, 0, 1 << 40)) for advice in (22, 23)))
    assert pair.compare(sequence, Tally()) is None
    said = [answer.said for answer in Child(partial(LinuxSubject, PATH), sequence).answers()]
    assert said == ["ok", "ok", *[TOO_MUCH] * 2, "ok", *[TOO_MUCH] * 2]
