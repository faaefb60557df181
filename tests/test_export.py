"""Counterexamples for other tools: each form is what that tool reads, and says what the trace says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_html import HOSTILE, traced

from guest_memfd import Machine
from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput, Signalled, SyscallFailed, errno_name
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.replay import replay
from guest_memfd.explore.trace import write
from guest_memfd.explore.world.scenario import world
from guest_memfd.export import perfetto
from guest_memfd.export.c import c_program
from guest_memfd.export.calls import TracedCall, calls
from guest_memfd.export.markdown import markdown
from guest_memfd.export.mermaid import mermaid
from guest_memfd.export.syz import syz_program
from guest_memfd.report.counterexample import Counterexample
from guest_memfd.scenarios import SCENES
from guest_memfd.uapi.kvm import PRIVATE, SHARED, MemFlag
from guest_memfd.words.primitives import Primitive


def found(design: str, hypervisor: str, parties: tuple[str, ...], law: str) -> Counterexample:
    trace = traced(design, hypervisor, parties, law)
    return Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, replay(trace).finding)


@pytest.fixture(scope="module")
def pinned() -> Counterexample:
    return found("gunyah-v17", "gunyah", ("vcpu", "device"), "pins-respected")


@pytest.fixture(scope="module")
def refused() -> Counterexample:
    return found("guestmem-rfc1", "kvm", ("vcpu", "vmm"), "all-or-nothing")


def hostile(example: Counterexample) -> Counterexample:
    """*example* with names and words that would be markup everywhere."""
    finding = example.finding
    steps = [step._replace(choices=(HOSTILE + ";#|`*",)) for step in finding.steps]
    return replace(example, scene=replace(example.scene, title=HOSTILE), finding=Finding(
        finding.law, f"{HOSTILE} | `code` ; #x */ \\", steps, finding.initial))


# -- Markdown and Mermaid ----------------------------------------------------------------------------------------------


def cells(row: str) -> list[str]:
    """What is between the bars of a row, as GitHub's Markdown reads it: a bar behind a backslash is none."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_markdown_has_a_row_for_each_step(pinned: Counterexample) -> None:
    lines = list(markdown(pinned))
    rows = [cells(line) for line in lines if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [str(n) for n in range(1, 26)]
    assert {len(row) for row in rows} == {4}
    assert rows[12] == ["13", "device", "`gup_recheck(index=0, pfn0, foll_pin=no) -> yes`",
                        "pfn0: GUP ref 0 → 1, GUP-fast ref 1 → 0"]
    assert rows[-1][3].endswith("**pins-respected is broken**")
    assert lines[0] == "**pins-respected is broken**: gunyah-v17 on gunyah, 25 steps of vcpu, device"


def test_markdown_takes_no_markup_from_names(pinned: Counterexample) -> None:
    lines = list(markdown(hostile(pinned)))
    rows = [cells(line) for line in lines if line.startswith("|")][2:]
    assert {len(row) for row in rows} == {4}
    text = re.sub(r"`[^`]*`", "", "\n".join(lines))                     # what is code is shown as it is
    assert not re.search(r"(?<!\\)<", text)
    assert all("\n" not in line for line in lines)


STATEMENT = re.compile(r"    (title .+|participant \w+( as .+)?|p\d+(->>|-x)(kernel|hypervisor): .+"
                       r"|Note (right of p\d+|over p\d+(,p\d+)?): .+)")


def test_mermaid_is_a_sequence_diagram(pinned: Counterexample) -> None:
    head, *lines = mermaid(pinned)
    assert head == "sequenceDiagram"
    assert [line for line in lines if not STATEMENT.fullmatch(line)] == []
    arrows = [line for line in lines if "->>" in line]
    assert len(arrows) == 25
    assert arrows[-1] == "    p0->>hypervisor: 25. hypercall(donate_to_protected, pfn0) → 0"
    assert lines[-1].endswith("pins-respected is broken: a page is donated while somebody holds a reference to reach it by")


def test_mermaid_takes_no_syntax_from_names(pinned: Counterexample) -> None:
    _, *lines = mermaid(hostile(pinned))
    assert [line for line in lines if not STATEMENT.fullmatch(line)] == []
    for line in lines:
        assert ";" not in re.sub(r"#\d+;", "", line)
        assert "<" not in line.replace("<br/>", "")


# -- Perfetto ----------------------------------------------------------------------------------------------------------


NUMBER, WHO = {"type": "number", "minimum": 0}, {"pid": {"type": "integer"}, "tid": {"type": "integer"}}


def phase(name: str, required: list[str], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": ["ph", "pid", "tid", *required], "additionalProperties": False, "properties": {
        "ph": {"const": name}, **WHO, "name": {"type": "string"}, "cat": {"type": "string"}, "ts": NUMBER,
        "args": {"type": "object"}, **more}}


TRACE_EVENTS = {
    "type": "object", "required": ["traceEvents"], "additionalProperties": False,
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]}, "otherData": {"type": "object"},
        "traceEvents": {"type": "array", "items": {"anyOf": [
            phase("M", ["name", "args"]), phase("B", ["name", "ts"]), phase("E", ["ts"]),
            phase("X", ["name", "ts", "dur"], dur=NUMBER), phase("C", ["name", "ts", "args"]),
            phase("i", ["name", "ts", "s"], s={"enum": ["g", "p", "t"]})]}}},
}
"""The phases that we write, as the Trace Event Format has them."""


def loaded(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The events, in order, after what a viewer asks of them: slices of a track nest, names are known, counters count."""
    jsonschema = pytest.importorskip("jsonschema")
    assert [error.message for error in jsonschema.Draft202012Validator(TRACE_EVENTS).iter_errors(trace)] == []
    events = trace["traceEvents"]
    named = {event["tid"] for event in events if event["ph"] == "M"}
    open_since: dict[int, list[float]] = {}
    for event in events:
        assert event["tid"] in named or event["tid"] == 0
        begun = open_since.setdefault(event["tid"], [])
        if event["ph"] == "B":
            begun.append(event["ts"])
        elif event["ph"] == "E":
            assert event["ts"] >= begun.pop()
        elif event["ph"] == "X" and begun:
            assert event["ts"] >= begun[-1]
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
    assert not any(open_since.values())
    return list(events)


def test_a_counterexample_opens_in_a_trace_viewer(pinned: Counterexample) -> None:
    events = loaded(perfetto.counterexample(pinned))
    steps = [event for event in events if event["ph"] == "X"]
    assert [event["args"]["step"] for event in steps] == list(range(1, 26))
    assert [event["ts"] for event in steps] == [1000 * n for n in range(25)]
    assert [event["name"] for event in events if event["ph"] == "B"] == ["mmap", "fault"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event.get("name") == "thread_name"}
    assert {event["tid"] for event in steps[:14]} == {tracks["device"]}
    counters = {event["name"]: event["args"][event["name"]] for event in events if event["ph"] == "C"}
    assert counters == {"direct-map writes": 1, "hypercalls": 1}
    assert events[-1]["name"] == "pins-respected is broken"


def test_a_run_opens_in_a_trace_viewer(tmp_path: Path) -> None:
    pytest.importorskip("unicorn")
    target, told = tmp_path / "run.json", tmp_path / "told.json"
    assert main(["run", "hello", "--perfetto", str(target), "--json", "-o", str(told)]) == 0
    events = loaded(json.loads(target.read_text()))
    report = json.loads(told.read_text())
    names = Counter(event["name"] for event in events if event["ph"] == "X")
    silent = ("begin_op", "end_op")
    assert names == {name: number for name, number in report["primitives"].items() if name not in silent}
    assert sum(event["ph"] == "B" for event in events) == report["primitives"]["begin_op"]
    counters = {event["name"]: event["args"][event["name"]] for event in events if event["ph"] == "C"}
    assert counters["hypercalls"] == report["primitives"]["hypercall"]
    assert counters["TLB flushes"] == report["primitives"]["flush_tlb_kernel_range"]
    exits = [event for event in events if event["ph"] == "i"]
    assert [event["name"] for event in exits] == ["exit STATUS EXITED, type 1"]     # what is no MMIO of the console


def test_a_recorder_counts_what_is_under_way() -> None:
    ticks = iter(range(100))
    recorder = perfetto.Recorder(lambda: next(ticks) / 1e6)
    for name, *args in (("hypercall", "lend"), ("begin_op", "fault", 0, 1), ("clear_folio", 0), ("begin_op", "bind", 0, 1)):
        recorder(Primitive(name, tuple(args), "library"))
    events = loaded(recorder.file({"run": "four"}))
    (outside, inside) = (event for event in events if event["ph"] == "X")
    assert (outside["ts"], outside["dur"]) == (0, 1)
    assert (inside["ts"], inside["dur"]) == (2, 1)
    assert sum(event["ph"] == "E" for event in events) == 2              # both are closed at the end


# -- system calls ------------------------------------------------------------------------------------------------------


INITIAL = world("none", "kvm").initial


def step(
    party: str, *choices: str, name: str = "down_read", args: tuple[Any, ...] = ("invalidate",), result: Any = None
) -> Step:
    return Step(party, choices, Primitive(name, args, "user"), result, False, INITIAL, ())


def made_of(*steps: Step, scene: str = "two-pages", hypervisor: str = "kvm") -> Counterexample:
    parties = tuple(dict.fromkeys(each.party for each in steps))
    return Counterexample("none", hypervisor, SCENES[scene], parties, Finding("progress", "it waits", list(steps), INITIAL))


@pytest.mark.parametrize(("steps", "made"), [
    ([step("vmm", "VMM allocate", "range 0 2")], [("allocate", 0, 2)]),
    ([step("vmm-odd", "odd punch", "range 2 1")], [("punch", 2, 1)]),
    ([step("vmm2", "thread to_private")], [("to_private", 0, 2)]),
    ([step("vmm2", "thread unbind", "first page 1")], [("unbind", 1, 1)]),
    ([step("vmm", "VMM close", name="fd_close", args=())], [("close", 0, 2)]),
    ([step("vmm", "VMM map", name="mmap", args=()),
      step("vmm", "page 1", name="user_access", args=(1, True), result="fault"), step("vmm"),
      step("vmm", name="user_access", args=(1, True), result="ok"), step("vmm", "then punch")],
     [("map", 0, 2), ("touch", 1, 1), ("punch", 1, 1)]),
    ([step("vcpu", "gfn 1", name="guest_access", args=(1, True), result="fault"), step("vcpu"),
      step("vcpu", name="guest_access", args=(1, True), result="ok")], [("run", 0, 1)]),
    ([step("vmm-life", "VMM punch", "range 0 1"), step("vmm-life", "VMM punch", "range 1 1")],
     [("punch", 0, 1), ("punch", 1, 1)]),
])
def test_choices_and_accesses_are_system_calls(steps: list[Step], made: list[tuple[str, int, int]]) -> None:
    assert [(call.what, call.start, call.nr) for call in calls(made_of(*steps))] == made


def test_a_call_has_the_step_in_which_it_begins(refused: Counterexample) -> None:
    assert calls(refused) == [TracedCall(1, "vcpu", "run", 0, 1, 0), TracedCall(4, "vmm", "allocate", 0, 1, 0)]


@pytest.mark.parametrize(("example", "says"), [
    (made_of(step("zeropad", "next to 0", name="load_unaligned_zeropad", args=(0,))),
     "step 1, load_unaligned_zeropad of zeropad"),
    (made_of(step("device", name="gup_read_pte", args=(0,))), "gup_read_pte of device"),
    (made_of(step("vmm")), "has no system call"),
    (made_of(step("vmm"), hypervisor="gunyah"), "of 'gunyah', whose device no released kernel has"),
    (made_of(step("vmm"), scene="two-vms"), "scene 'two-vms'"),
])
def test_what_is_no_system_call_is_named(example: Counterexample, says: str) -> None:
    for program in (c_program, syz_program):
        with pytest.raises(BadInput, match=re.escape(says)):
            list(program(example))


ALL_CALLS = made_of(
    step("vmm", "VMM allocate", "range 0 1"), step("vmm-odd", "odd allocate", "range 2 1"),
    step("vmm-odd", "odd punch", "range 0 3"), step("vmm", name="mmap", args=()),
    step("vmm", "page 1", name="user_access", args=(1, True), result="ok"), step("vmm-odd", "odd bind", "range 1 2"),
    step("vmm-odd", "odd bind", "range 0 2"), step("vmm", "VMM punch", "range 0 2"), step("vmm", "VMM unbind", "range 0 2"),
    step("vmm", "VMM unbind", "range 0 2"), step("vmm", name="munmap", args=()), step("vmm", name="fd_close", args=()))
"""What a VMM can do on a plain VM of any kernel with the flags MMAP and INIT_SHARED."""


def on_the_machine(example: Counterexample) -> Iterator[str]:
    """The same calls on the emulated machine, told as the C program tells them."""
    page, size = 4096, example.scene.pages * 4096
    with Machine("kvm").open("/dev/kvm") as kvm, kvm.create_vm() as vm:
        file = vm.create_guest_memfd(size, SHARED)
        slots = [(slot.gfn, slot.start, slot.nr) for slot in example.scene.slots]
        for number, (gfn, start, nr) in enumerate(slots):
            vm.set_user_memory_region2(number, MemFlag.GUEST_MEMFD, gfn * page, nr * page, guest_memfd=file,
                                       guest_memfd_offset=start * page)
        mapping: Any = None
        for call in calls(example):
            start, nr = call.start * page, call.nr * page
            said = "0"
            try:
                if call.what in ("allocate", "punch"):
                    file.fallocate(1 if call.what == "allocate" else 3, start, nr)
                elif call.what == "map":
                    mapping = file.mmap()
                elif call.what == "unmap":
                    mapping.close()
                elif call.what == "touch":
                    mapping.write(start, b"\1")
                elif call.what == "bind":
                    vm.set_user_memory_region2(len(slots), MemFlag.GUEST_MEMFD, call.gfn * page, nr, guest_memfd=file,
                                               guest_memfd_offset=start)
                    slots.append((call.gfn, call.start, call.nr))
                elif call.what == "unbind":
                    there = [at for at, slot in enumerate(slots) if slot[1:] == (call.start, call.nr)]
                    said = "ENOENT" if not there else said
                    for at in there:
                        vm.set_user_memory_region2(at, MemFlag.GUEST_MEMFD, slots[at][0] * page, 0, guest_memfd=file)
                        slots[at] = (0, 0, 0)
                else:
                    file.close()
            except SyscallFailed as error:
                said = errno_name(error.errno)
            except Signalled as error:
                said = f"{error.signal} EFAULT"
            yield f"step {call.step} {call.party} {call.what}: {said}"


@pytest.fixture
def compiled(tmp_path: Path) -> Any:
    if not (cc := shutil.which("cc")):
        pytest.skip("no C compiler is here")

    def build(example: Counterexample) -> Path:
        (tmp_path / "calls.c").write_text("\n".join(c_program(example)) + "\n")
        done = subprocess.run([cc, "-Wall", "-Wextra", "-Werror", "-O1", "-o", tmp_path / "calls", tmp_path / "calls.c"],
                              capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return tmp_path / "calls"

    return build


def test_the_c_program_says_what_the_machine_says(compiled: Any) -> None:
    pytest.importorskip("unicorn")
    program = compiled(ALL_CALLS)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm is here")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    if "KVM_CREATE_GUEST_MEMFD" in done.stderr:
        pytest.skip(f"this kernel has no guest_memfd: {done.stderr.strip()}")
    assert done.stderr == ""
    told = done.stdout.splitlines()
    if "SIGBUS" in done.stdout or any(": ENODEV" in line for line in told):
        pytest.skip("this kernel's guest_memfd cannot be mapped")
    # The same pages at another address: EEXIST since 7.2, EINVAL before (bind-twice-errno).
    assert [line.replace("EINVAL", "EEXIST") for line in told] == [
        line.replace("EINVAL", "EEXIST") for line in on_the_machine(ALL_CALLS)]
    assert told[0] == "step 1 vmm allocate: 0"
    assert told[1] == "step 2 vmm-odd allocate: EINVAL"


def test_the_c_program_of_a_trace_runs_its_guest(compiled: Any, refused: Counterexample) -> None:
    program = compiled(refused)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm is here")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    if "KVM_CREATE_GUEST_MEMFD" in done.stderr:
        pytest.skip(f"this kernel has no guest_memfd: {done.stderr.strip()}")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["step 1 vcpu run", "step 4 vmm allocate"]


def test_names_cannot_leave_a_comment_or_a_string(compiled: Any, refused: Counterexample) -> None:
    finding = refused.finding
    party = 'x", 0 }; */ system("true"); /*\n\\'
    steps = [each._replace(party=party) if each.party == "vmm" else each for each in finding.steps]
    spoiled = replace(refused, finding=Finding(finding.law, '*/ int main(void) { } /* \\\n"', steps, finding.initial))
    compiled(spoiled)
    lines = list(syz_program(spoiled))
    assert [line for line in lines if not line.startswith("#")] == [
        line for line in syz_program(refused) if not line.startswith("#")]


# -- syzkaller ---------------------------------------------------------------------------------------------------------


class Syz:
    """A program read by the grammar of syzkaller's documentation (docs/program_syntax.md); raises AssertionError."""

    def __init__(self, text: str) -> None:
        self.calls: list[tuple[str, list[Any]]] = []
        self.variables: set[str] = set()
        for line in text.splitlines():
            if line and not line.startswith("#"):
                self.rest = line
                self._line()

    def _line(self) -> None:
        assigned = self._take(r"(r\d+) = ")
        name = self._take(r"([a-z_][\w$]*)\(")
        assert name
        args = self._list(")")
        assert not self.rest
        self.calls.append((name, args))
        if assigned:
            self.variables.add(assigned)

    def _take(self, pattern: str) -> str:
        match = re.match(pattern, self.rest)
        if not match:
            return ""
        self.rest = self.rest[match.end():]
        return match[1]

    def _list(self, end: str) -> list[Any]:
        found: list[Any] = []
        while not self._take(f"({re.escape(end)})"):
            assert not found or self._take("(, )")
            found.append(self._arg())
        return found

    def _arg(self) -> Any:
        if number := self._take(r"(0x[0-9a-f]+)"):
            return int(number, 16)
        if variable := self._take(r"(r\d+)"):
            assert variable in self.variables, "a variable is used before it is assigned"
            return variable
        if self._take(r"(nil)"):
            return None
        if address := self._take(r"&\((0x7f[0-9a-f]+)(?:/0x[0-9a-f]+)?\)="):
            return (int(address, 16), self._arg())
        if self._take(r"(\{)"):
            return self._list("}")
        text = self._take(r"('(?:[^'\\]|\\.)*'|\"[0-9a-f]*\")")
        assert text, f"no argument: {self.rest!r}"
        return text


def test_the_syzkaller_program_parses_by_its_grammar(refused: Counterexample) -> None:
    for example in (refused, ALL_CALLS):
        read = Syz("\n".join(syz_program(example)))
        names = [name for name, _ in read.calls]
        assert names[:3] == ["openat$kvm", "ioctl$KVM_CREATE_VM", "ioctl$KVM_CREATE_GUEST_MEMFD"]
    assert names[3 + len(ALL_CALLS.scene.slots):] == [
        "fallocate", "fallocate", "fallocate", "mmap", "getrandom", *["ioctl$KVM_SET_USER_MEMORY_REGION2"] * 2, "fallocate",
        *["ioctl$KVM_SET_USER_MEMORY_REGION2"] * 4, "munmap", "close"]


def test_the_syzkaller_program_makes_the_same_calls() -> None:
    example = made_of(step("vmm", "VMM punch", "range 1 1"), step("vmm2", "thread to_private"),
                      step("vmm-odd", "odd bind", "range -1 1"))
    read = dict(Syz("\n".join(syz_program(example))).calls)
    assert read["fallocate"] == ["r2", 3, 4096, 4096]
    _, attributes = read["ioctl$KVM_SET_MEMORY_ATTRIBUTES"][2]
    assert attributes == [0, 8192, PRIVATE, 0]
    _, region = read["ioctl$KVM_SET_USER_MEMORY_REGION2"][2]
    assert region[5] == (1 << 64) - 4096


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "refused.json"
    write(traced("guestmem-rfc1", "kvm", ("vcpu", "vmm"), "all-or-nothing"), file)
    return file


@pytest.mark.parametrize(("form", "begins"), [
    ("markdown", "**all-or-nothing is broken**"), ("mermaid", "sequenceDiagram\n"), ("c", "/*\n * all-or-nothing is broken"),
    ("syz", "# all-or-nothing is broken")])
def test_explain_writes_each_form(saved: Path, capsys: pytest.CaptureFixture[str], form: str, begins: str) -> None:
    assert main(["explain", str(saved), f"--{form}"]) == 0
    assert capsys.readouterr().out.startswith(begins)


@pytest.mark.parametrize(("argv", "says"), [
    (["--c", "--syz"], "--c and --syz exclude each other"),
    (["--json", "--mermaid"], "--json and --mermaid exclude each other"),
    (["--perfetto", "/no/where"], "cannot write to '/no/where'"),
    (["--perfetto", "same", "--html", "./same"], "each needs a file of its own")])
def test_what_cannot_be_is_one_line(saved: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["explain", str(saved), *argv]) == 4
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert says in told.err


def test_a_trace_that_diverges_has_no_diagram(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(saved.read_text().replace('"args": ["invalidate"]', '"args": ["bindings"]', 1))
    for option in (["--mermaid"], ["--perfetto", str(tmp_path / "trace")]):
        assert main(["explain", str(other), *option]) == 4
        assert f"{option[0]}: the trace diverges at step 2" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()
