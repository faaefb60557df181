"""gmem conform --pkvm: what upstream's pKVM said, the emulated pKVM says; and mistakes that are planted in it are seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pkvm_mistakes import MISTAKES

from guest_memfd.cli import conform_pkvm
from guest_memfd.cli.conform_kernel import Recorded
from guest_memfd.cli.main import main
from guest_memfd.conform.compare import BothHosts, Difference, Tally
from guest_memfd.conform.known import PKVM_KNOWN
from guest_memfd.conform.operations import PKVM_OPERATIONS, UserCall
from guest_memfd.conform.pkvm.sequences import LENGTH, STATES, random_sequence, tables
from guest_memfd.conform.sequence import Sequence
from guest_memfd.conform.subject import StepAnswer
from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import find

pytest.importorskip("unicorn")

from guest_memfd.conform.pkvm.emulated import EmulatedPkvmWorld

WORD, REFUSED, NO_CALL = 0x1122_3344_5566_7788, "0xfffffffffffffffd", "0xffffffffffffffff"
REAL = bool(os.environ.get("GMEM_KERNELS"))

# As Linux 7.3.4 said it (Debian's 7.3.4+deb13-cloud-arm64 in QEMU 10.0.2), answer by answer.
SAID: dict[str, list[tuple[str, tuple[int, ...], str, str]]] = {
    "share and unshare": [
        ("start", (1,), "ok", ""), ("guest_reads", (0, 0), "0x0", "0:SIGSEGV/2"),
        ("guest_writes", (0, 0, WORD), "0x0", "0:SIGSEGV/2"),
        ("host_reads", (0, 0), "SIGSEGV code 2 at +0x0", "0:SIGSEGV/2"),
        ("host_writes", (0, 8, 1), "SIGSEGV code 2 at +0x8", "0:SIGSEGV/2"), ("copies_from", (0,), "EFAULT", "0:SIGSEGV/2"),
        ("copies_to", (0, 1), "EFAULT", "0:SIGSEGV/2"), ("host_writes", (1, 0, 7), "ok", "0:SIGSEGV/2 1:7"),
        ("guest_reads", (1, 0), "0x7", "0:SIGSEGV/2 1:SIGSEGV/2"),
        ("share", (0, 0, 0), "0x0", f"0:{WORD:x} 1:SIGSEGV/2"), ("host_writes", (0, 0, 0x99), "ok", "0:99 1:SIGSEGV/2"),
        ("guest_reads", (0, 0), "0x99", "0:99 1:SIGSEGV/2"), ("copies_from", (0,), "0x99", "0:99 1:SIGSEGV/2"),
        ("share", (0, 0, 0), REFUSED, "0:99 1:SIGSEGV/2"), ("share", (0, 8, 0), REFUSED, "0:99 1:SIGSEGV/2"),
        ("unshare", (0, 0, 0), "0x0", "0:SIGSEGV/2 1:SIGSEGV/2"), ("unshare", (0, 0, 0), REFUSED, "0:SIGSEGV/2 1:SIGSEGV/2"),
        ("share", (0, 0, 1), REFUSED, "0:SIGSEGV/2 1:SIGSEGV/2"), ("share", (0, 8, 0), REFUSED, "0:SIGSEGV/2 1:SIGSEGV/2"),
        ("share", (2, 0, 0), "0x0", "0:SIGSEGV/2 1:SIGSEGV/2 2:0"),
        ("unshare", (3, 0, 0), REFUSED, "0:SIGSEGV/2 1:SIGSEGV/2 2:0 3:0"),
        ("discard", (0,), "ok", "0:0 1:SIGSEGV/2 2:0 3:0"), ("guest_reads", (0, 0), "0x99", "0:0 1:SIGSEGV/2 2:0 3:0")],
    "force": [
        ("start", (1,), "ok", ""), ("guest_writes", (0, 0, 0x44), "0x0", "0:SIGSEGV/2"),
        ("kernel_reads", (0,), "0x0", "0:0"),
        ("guest_writes", (1, 0, 5), "0x0", "0:0 1:SIGSEGV/2"), ("host_writes", (0, 0, 0x12), "ok", "0:12 1:SIGSEGV/2"),
        ("guest_reads", (0, 0), "KVM_RUN EFAULT", "0:12 1:SIGSEGV/2"),
        ("guest_reads", (1, 0), "KVM_RUN EFAULT", "0:12 1:SIGSEGV/2"), ("teardown", (), "ok", "0:12 1:0"),
        ("guest_reads", (1, 0), "no VM", "0:12 1:0")],
    "fork": [
        ("start", (1,), "ok", ""), ("guest_writes", (0, 0, 0x10), "0x0", "0:SIGSEGV/2"),
        ("guest_writes", (1, 0, 0x20), "0x0", "0:SIGSEGV/2 1:SIGSEGV/2"), ("share", (1, 0, 0), "0x0", "0:SIGSEGV/2 1:20"),
        ("forks", (1,), "0x20", "0:0 1:20"), ("guest_reads", (1, 0), "KVM_RUN EFAULT", "0:0 1:20")],
    "not protected": [
        ("start", (0,), "ok", ""), ("guest_writes", (0, 0, WORD), "0x0", f"0:{WORD:x}"),
        ("host_writes", (0, 0, 5), "ok", "0:5"), ("guest_reads", (0, 0), "0x5", "0:5"), ("share", (0, 0, 0), NO_CALL, "0:5"),
        ("unshare", (0, 0, 0), NO_CALL, "0:5"), ("discard", (0,), "ok", "0:0"), ("guest_reads", (0, 0), "0x0", "0:0"),
        ("guest_writes", (0, 0, 0x55), "0x0", "0:55"), ("kernel_reads", (0,), "0x55", "0:55"),
        ("teardown", (), "ok", "0:55")],
}


def difference(name: str) -> Difference | None:
    real = [StepAnswer(said, seen) for _, _, said, seen in SAID[name]]
    sequence = tuple(UserCall(op, args) for op, args, _, _ in SAID[name])
    pair = BothHosts(lambda _: Recorded([[*each] for each in real]), EmulatedPkvmWorld(), PKVM_KNOWN)
    return pair.compare(sequence, Tally())


@pytest.mark.parametrize("name", SAID)
def test_the_emulated_pkvm_says_what_the_real_one_said(name: str) -> None:
    assert difference(name) is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    assert any(difference(name) for name in SAID)


def test_what_was_lent_and_is_scrubbed_is_known_and_nothing_else() -> None:
    def seen(real: str, emulated: str, said: str = "ok, 0 was lent") -> bool:
        about = PKVM_KNOWN[0].about
        return about(UserCall("teardown", ()), StepAnswer(said, real), StepAnswer(said, emulated))

    assert seen("0:7 1:1", "0:0 1:1")
    assert not seen("0:7 1:1", "0:0 1:0"), "a page that was the host's all along"
    assert not seen("0:7 1:1", "0:8 1:1"), "no zeros"
    assert not seen("0:7 1:1", "0:0 1:1", "ok"), "nothing was lent"
    assert not PKVM_KNOWN[0].about(UserCall("share", (0, 0, 0)), StepAnswer("ok, 0 was lent", "0:7"),
                                   StepAnswer("ok, 0 was lent", "0:0"))


def test_tables_have_every_operation_in_every_state() -> None:
    laid = list(tables())
    for name, before in STATES.items():
        here = [sequence[len(before)] for sequence in laid if sequence[:-2] == before]
        assert {step.op for step in here} == set(PKVM_OPERATIONS), name
        for operation in PKVM_OPERATIONS.values():
            for place, param in enumerate(operation.params):
                asked = {step.args[place] for step in here if step.op == operation.name}
                assert asked >= (set(param.values) if param.name != "page" else {0})


def test_a_number_is_all_there_is_to_a_sequence() -> None:
    assert random_sequence(3, 4) == random_sequence(3, 4) != random_sequence(3, 5)
    kinds = [random_sequence(1, number)[0].args[0] for number in range(60)]
    assert 0 < kinds.count(0) < 30
    assert len(random_sequence(1, 1)) == LENGTH


def test_nothing_is_left_after_a_sequence() -> None:
    world = EmulatedPkvmWorld()
    for number in range(6):
        subject = world.subject()
        for step in random_sequence(9, number):
            subject.perform(step)
        assert subject.end() == []


# -- the command -------------------------------------------------------------------------------------------------------


def _there(monkeypatch: pytest.MonkeyPatch, answers: list[list[StepAnswer]]) -> list[Any]:
    asked: list[Any] = []

    def answering(arguments: Any, given: list[Sequence], *options: str) -> dict[str, Any]:
        asked.append(SimpleNamespace(arguments=arguments, given=given, options=options))
        return {"kernel": "Linux 7.3.4, aarch64", "answers": answers}

    monkeypatch.setattr(conform_pkvm, "ask", answering)
    return asked


def _emulated(sequence: Sequence) -> list[StepAnswer]:
    subject = EmulatedPkvmWorld().subject()
    return [subject.perform(step) for step in sequence]


def test_the_command_says_what_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = _emulated(random_sequence(1, 0))
    asked = _there(monkeypatch, [answers])
    options = ["conform", "--pkvm", "--kernel", "7.3", "--append", "more", "--no-tables", "--operations", "30"]
    assert main(options) == 0
    assert "0 unexplained" in capsys.readouterr().out
    assert (asked[0].arguments.arch, asked[0].arguments.append) == ("arm64", "kvm-arm.mode=protected more")
    assert (asked[0].given, asked[0].options) == ([random_sequence(1, 0)], ("--pkvm",))
    answers[3] = StepAnswer("another answer", answers[3].files)
    assert main([*options, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["emulated"] == "pKVM of 7.3, with the anonymous memory of a process"
    assert [each["real"][0] for each in told["differences"]] == ["another answer"]
    assert len(told["differences"][0]["steps"]) == 4


@pytest.mark.parametrize(("options", "code", "says"), [
    (["--replay", "x"], 4, "--replay is for the kernel of this machine, and --pkvm runs in QEMU"),
    (["--release", "7.2"], 4, "--release is for"), (["--operations", "-1"], 4, "0 at least"),
])
def test_bad_input(options: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "--pkvm", *options]) == code
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_no_kernel_is_to_be_had(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without(arch: str) -> list[str]:
        raise HostUnavailable("apt-get is not here; give the path of a kernel's image")

    for releases, says in ((without, "apt-get is not here"), (lambda _: [], "no kernel for arm64 can be had")):
        monkeypatch.setattr(find, "releases", releases)
        assert main(["conform", "--pkvm"]) == 5
        told = capsys.readouterr().err
        assert says in told
        assert told.count("\n") == 1


def test_a_kernel_without_protected_vms_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here")
    file = tmp_path / "sequences.json"
    file.write_text("[]")
    assert main(["conform", "--pkvm", "--answer", str(file)]) == 5
    told = capsys.readouterr().err
    assert "makes no protected VM (KVM_CREATE_VM of type 0x80000000 is EINVAL)" in told
    assert told.count("\n") == 1


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
def test_the_real_pkvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GMEM_CACHE")
    assert main(["conform", "--pkvm", "--operations", "600"]) == 0, capsys.readouterr().out
    assert "0 unexplained" in capsys.readouterr().out
