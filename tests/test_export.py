"""Counterexamples for other tools: each form is what that tool reads, and says what the trace says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from errno import ENOTTY
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import syzkaller
import trace_events
from test_html import HOSTILE, traced

from guest_memfd import Machine
from guest_memfd.abstract import state as st
from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput, Signalled, SyscallFailed, errno_name
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.replay import replay
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.trace import trace_of, write
from guest_memfd.explore.world.scenario import world
from guest_memfd.export import perfetto
from guest_memfd.export.c import c_program
from guest_memfd.export.calls import TracedCall, calls
from guest_memfd.export.markdown import markdown
from guest_memfd.export.mermaid import mermaid
from guest_memfd.export.syz import syz_program
from guest_memfd.linux.system import System
from guest_memfd.report.counterexample import Counterexample
from guest_memfd.scenarios import SCENES
from guest_memfd.uapi.kvm import PRIVATE, SHARED, MemFlag, MemoryAttributes2
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


SHIPPED = [
    ("none", "kvm", "vcpu", "two-pages"), ("none", "kvm", "vcpu zeropad", "two-pages"),
    ("none", "pkvm", "vcpu page-cache-reader", "two-pages"), ("none", "gunyah", "vcpu zeropad", "large-folio"),
    ("guestmem-rfc1", "kvm", "vcpu vmm", "two-pages"), ("guestmem-rfc1", "pkvm", "vcpu vmm", "two-pages"),
    ("guestmem-rfc1", "kvm", "vcpu", "both-shared"), ("guestmem-rfc1", "gunyah", "vcpu device", "two-pages"),
    ("gunyah-v17", "gunyah", "vcpu vmm", "two-pages"), ("gunyah-v17", "gunyah", "vcpu device", "two-pages"),
    ("secretmem", "kvm", "vcpu vmm-odd", "failing-twice"), ("secretmem", "pkvm", "vcpu stop", "for-good"),
]
"""Questions of which every design answers some with a law that breaks: design, hypervisor, parties, scene."""


@cache
def shipped() -> list[Counterexample]:
    """The counterexamples of all that breaks there."""
    found = []
    for design, hypervisor, parties, scene in SHIPPED:
        report = check(design, hypervisor, parties=parties.split(), scenes=[scene], jobs=1)
        for law in report.laws.values():
            if law.finding is not None:
                trace = trace_of(report, law)
                found.append(Counterexample(design, hypervisor, trace.scene, trace.parties, replay(trace).finding))
    return found


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
    assert arrows[-1] == "    p0->>hypervisor: 25. hyp_call(donate_to_protected, pfn0) → 0"
    assert lines[-1].endswith("pins-respected is broken: a page is donated while somebody holds a reference to reach it by")


def test_mermaid_takes_no_syntax_from_names(pinned: Counterexample) -> None:
    _, *lines = mermaid(hostile(pinned))
    assert [line for line in lines if not STATEMENT.fullmatch(line)] == []
    for line in lines:
        assert ";" not in re.sub(r"#\d+;", "", line)
        assert "<" not in line.replace("<br/>", "")


# -- Perfetto ----------------------------------------------------------------------------------------------------------


def loaded(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The events, in order, of a file in which a strict reader finds nothing wrong."""
    pytest.importorskip("jsonschema")
    assert trace_events.problems(trace) == []
    return list(trace["traceEvents"])


WHO = {"pid": 1, "tid": 1}
NAMED = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "p"}},
         {"ph": "M", "name": "thread_name", **WHO, "args": {"name": "t"}}]


@pytest.mark.parametrize(("events", "says"), [
    ([{"ph": "X", "name": "a", **WHO, "ts": 0, "dur": 5}, {"ph": "X", "name": "b", **WHO, "ts": 4, "dur": 5}],
     "b at 4 of track (1, 1) ends after a, in which it begins"),
    ([{"ph": "X", "name": "a", **WHO, "ts": 0, "dur": 5}, {"ph": "B", "name": "b", **WHO, "ts": 4},
      {"ph": "E", **WHO, "ts": 9}], "ends after a"),
    ([{"ph": "B", "name": "b", **WHO, "ts": 0}, {"ph": "X", "name": "a", **WHO, "ts": 1, "dur": 5},
      {"ph": "E", **WHO, "ts": 3}], "closes no B"),
    ([{"ph": "E", **WHO, "ts": 0}], "closes no B"), ([{"ph": "B", "name": "b", **WHO, "ts": 0}], "open"),
    ([{"ph": "B", "name": "b", **WHO, "ts": 0}, {"ph": "E", "name": "c", **WHO, "ts": 1}], "an E of c closes b"),
    ([{"ph": "X", "name": "a", **WHO, "ts": 0}], "'dur' is a required property"),
    ([{"ph": "X", "name": "a", **WHO, "ts": -1, "dur": 1}], "less than the minimum"),
    ([{"ph": "X", "name": "a", "pid": 1, "tid": 2, "ts": 0, "dur": 1}], "track 2 of process 1 has no name"),
    ([{"ph": "Z", "name": "a", **WHO, "ts": 0}], "'Z' is not one of"),
    ([{"ph": "C", "name": "a", **WHO, "ts": 0, "args": {"a": "1"}}], "is not of type 'number'"),
    ([{"ph": "i", "name": "a", **WHO, "ts": 0, "s": "x"}], "'x' is not one of"),
    ([{"ph": "M", "name": "thread_nmae", **WHO, "args": {"name": "t"}}], "no metadata 'thread_nmae'"),
    ([{"ph": "f", "name": "a", **WHO, "ts": 0, "id": 7}], "f of 7 comes before it begins")])
def test_the_strict_reader_forgives_nothing(events: list[dict[str, Any]], says: str) -> None:
    pytest.importorskip("jsonschema")
    assert trace_events.problems({"traceEvents": NAMED}) == []
    assert says in "; ".join(trace_events.problems({"traceEvents": [*NAMED, *events]}))


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


def test_leaves_that_are_split_are_counted() -> None:
    trace = traced("none", "gunyah", ("vcpu", "zeropad"), "host-survives", scenes=["large-folio"])
    again = replay(trace)
    example = Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, again.finding)
    events = loaded(perfetto.counterexample(example))
    splits = [event["args"] for event in events if event["ph"] == "C" and event["name"] == perfetto.SPLITS]
    # The oracle: leaves of a larger order that are smaller in the next state, of all frames that had one.
    before, split = again.initial, 0
    for each in again.steps:
        split += any(name.endswith("s2_leaf") and new < old for name, old, new in st.changes(before, each.shared))
        before = each.shared
    assert splits[-1] == {perfetto.SPLITS: split}


@pytest.mark.long
def test_every_shipped_counterexample_opens_in_a_trace_viewer() -> None:
    for example in shipped():
        events = loaded(perfetto.counterexample(example))
        assert sum(event["ph"] == "X" for event in events) == len(example.finding.steps)


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
    assert counters["hypercalls"] == report["primitives"]["hyp_call"]
    assert counters["TLB flushes"] == report["primitives"]["flush_tlb_kernel_range"]
    exits = [event for event in events if event["ph"] == "i"]
    assert [event["name"] for event in exits] == ["exit STATUS EXITED, type 1"]     # what is no MMIO of the console


def test_a_recorder_counts_what_is_under_way() -> None:
    ticks = iter(range(100))
    recorder = perfetto.Recorder(lambda: next(ticks) / 1e6)
    for name, *args in (("hyp_call", "lend"), ("begin_op", "fault", 0, 1), ("clear_folio", 0), ("begin_op", "bind", 0, 1)):
        recorder(Primitive(name, tuple(args), "library"))
    events = loaded(recorder.file({"run": "four"}))
    (outside, inside) = (event for event in events if event["ph"] == "X")
    assert (outside["ts"], outside["dur"]) == (0, 1)
    assert (inside["ts"], inside["dur"]) == (2, 1)
    assert sum(event["ph"] == "E" for event in events) == 2              # both are closed at the end


def test_primitives_outside_of_operations_do_not_run_into_each_other() -> None:
    ticks = iter([0.0, 1e-6, 1.2e-6, 1.25e-6, 9e-6, 9.1e-6])
    recorder = perfetto.Recorder(lambda: next(ticks))
    for _ in range(3):
        recorder(Primitive("hyp_call", ("lend",), "user"))
    loaded(recorder.file({}))


def test_each_cpu_has_tracks_of_its_own() -> None:
    ticks = iter(range(100))
    recorder = perfetto.Recorder(lambda: next(ticks) / 1e6)
    recorder(Primitive("begin_op", ("fault", 0, 1), "library"))
    recorder.cpu = lambda: 2
    recorder(Primitive("load_unaligned_zeropad", (0,), "mm"))
    recorder(Primitive("end_op", (0,), "library"))
    events = loaded(recorder.file({"run": "it"}))
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert names == {1: "CPU 0: it", 3: "CPU 2: it"}
    assert [event["pid"] for event in events if event["ph"] in "BXE"] == [1, 3, 1]


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


def sequence(*asked: str) -> Counterexample:
    """A run of these calls: ``allocate 0 2``, ``map``, ``touch 1``, ``run 0``; what touches or runs goes through."""
    alone = {"map": "mmap", "unmap": "munmap", "close": "fd_close"}
    steps = []
    for what, *numbers in map(str.split, asked):
        if what in alone:
            steps.append(step("vmm", name=alone[what], args=()))
        elif what in ("touch", "run"):
            name = "user_access" if what == "touch" else "guest_access"
            steps.append(step("vmm" if what == "touch" else "vcpu", name=name, args=(int(numbers[0]), True), result="ok"))
        else:
            steps.append(step("vmm", f"VMM {what}", f"range {' '.join(numbers)}"))
    return made_of(*steps)


SEQUENCES = {
    "all": ALL_CALLS,
    "punch": sequence("allocate 0 2", "map", "touch 0", "punch 0 1", "touch 0", "punch 0 2", "unmap"),
    "bind": sequence("unbind 0 2", "bind 0 1", "bind 1 1", "bind 0 1", "bind 1 2", "unbind 1 1", "bind 1 1", "unbind 0 2"),
    "close": sequence("map", "close", "touch 0", "punch 0 1", "allocate 0 1", "bind 0 1"),
    "mmap": sequence("map", "touch 1", "unmap", "touch 1", "map", "touch 1"),
    "range": sequence("allocate 1 1", "allocate 2 1", "punch 2 1", "punch 1 2", "bind 2 1", "bind 1 1"),
}
"""What is said the same by a released kernel and by the emulated machine."""
CONVERSIONS = sequence("allocate 0 2", "to_private 0 1", "to_shared 0 2", "to_private 1 1", "punch 1 1")


def told_by(kvm: Any, example: Counterexample) -> Iterator[str]:
    """The same calls by way of *kvm*, the emulated machine's or the real one, told as the C program tells them."""
    page, size = 4096, example.scene.pages * 4096
    with kvm, kvm.create_vm() as vm, ExitStack() as stack:
        file = vm.create_guest_memfd(size, SHARED)
        stack.callback(_let_go, file)
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
                    stack.callback(_let_go, mapping)
                elif call.what == "unmap":
                    mapping.close()
                    mapping = None
                elif call.what == "touch":
                    said = said if mapping is not None else "EFAULT"
                    if mapping is not None:
                        mapping.write(start, b"\1")
                elif call.what == "bind":
                    at = next((at for at, slot in enumerate(slots) if not slot[2]), len(slots))
                    vm.set_user_memory_region2(at, MemFlag.GUEST_MEMFD, call.gfn * page, nr, guest_memfd=file,
                                               guest_memfd_offset=start)
                    slots[at:at + 1] = [(call.gfn, call.start, call.nr)]
                elif call.what == "unbind":
                    there = [at for at, slot in enumerate(slots) if slot[1:] == (call.start, call.nr)]
                    said = "ENOENT" if not there else said
                    for at in there[:1]:
                        vm.set_user_memory_region2(at, MemFlag.GUEST_MEMFD, slots[at][0] * page, 0, guest_memfd=file)
                        slots[at] = (0, 0, 0)
                elif call.what in ("to_private", "to_shared"):
                    _convert(vm, file, start, call.gfn * page, nr, PRIVATE if call.what == "to_private" else 0)
                else:
                    file.close()
            except (SyscallFailed, BadInput) as error:          # a descriptor that is closed is no argument
                said = errno_name(error.errno) if isinstance(error, SyscallFailed) else "EBADF"
            except Signalled as error:
                said = f"{error.signal} EFAULT"
            yield f"step {call.step} {call.party} {call.what}: {said}"


def _let_go(what: Any) -> None:
    with suppress(BadInput):                            # it has been closed already
        what.close()


def _convert(vm: Any, file: Any, start: int, gpa: int, nr: int, attributes: int) -> None:
    try:
        file.set_memory_attributes2(MemoryAttributes2(start, nr, attributes))
    except SyscallFailed as error:
        if error.errno != ENOTTY:
            raise
        vm.set_memory_attributes(gpa, nr, attributes)


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


def said(program: Path) -> list[str]:
    """What the program prints, a line a call; skips where this kernel has no guest_memfd that user space can map."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm is here")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    if "KVM_CREATE_GUEST_MEMFD" in done.stderr:
        pytest.skip(f"this kernel has no guest_memfd: {done.stderr.strip()}")
    assert done.stderr == ""
    if "SIGBUS" in done.stdout or ": ENODEV" in done.stdout:
        pytest.skip("this kernel's guest_memfd cannot be mapped")
    return done.stdout.splitlines()


# The same pages at another address: EEXIST since 7.2, EINVAL before (bind-twice-errno).
def alike(lines: Iterable[str]) -> list[str]:
    return [line.replace("EINVAL", "EEXIST") for line in lines]


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_c_program_says_what_the_machine_and_the_kernel_say(compiled: Any, name: str) -> None:
    pytest.importorskip("unicorn")
    example = SEQUENCES[name]
    told = said(compiled(example))
    assert len(told) == len(calls(example))
    assert alike(told) == alike(told_by(Machine("kvm").open("/dev/kvm"), example))
    assert told == list(told_by(System(), example))


def test_the_c_program_refuses_what_the_machine_refuses(compiled: Any) -> None:
    told = said(compiled(SEQUENCES["range"]))
    assert [line.partition(": ")[2] for line in told] == ["0", "EINVAL", "0", "0", "EINVAL", "EEXIST"]


# Which kernel has which conversion is for the probe to say; the kernel's own word is what the program has to print.
def test_a_conversion_says_what_this_kernel_says(compiled: Any) -> None:
    told = said(compiled(CONVERSIONS))
    assert told == list(told_by(System(), CONVERSIONS))
    done = subprocess.run([sys.executable, "-m", "guest_memfd", "probe", "--part", "offers", "--json"], capture_output=True,
                          text=True, timeout=120, check=False)
    offered = json.loads(done.stdout)["offers"]["kvm"]["capabilities"]
    convert = any(number for name, number in offered.items() if "MEMORY_ATTRIBUTES" in name)
    assert convert or [line.partition(": ")[2] for line in told] == ["0", "ENOTTY", "ENOTTY", "ENOTTY", "0"]


def test_the_c_program_runs_its_guest_where_pages_are_and_where_none_are(compiled: Any) -> None:
    told = said(compiled(sequence("run 0", "punch 0 1", "run 1", "unbind 0 2", "run 0")))
    assert [line.partition(": ")[2] for line in told[:4]] == ["0"] * 4
    assert told[4] in ("step 5 vcpu run: exit reason 6 0", "step 5 vcpu run: EFAULT")       # MMIO: nothing is bound there


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


def of_calls() -> list[Counterexample]:
    """All that are shipped and consist of system calls."""
    found = []
    for example in shipped():
        with suppress(BadInput):
            calls(example)
            found.append(example)
    return found


def fits(example: Counterexample) -> list[syzkaller.SyzCall]:
    """The calls of the program, in which neither the grammar nor the descriptions find anything wrong."""
    read = syzkaller.read("\n".join(syz_program(example)))
    assert syzkaller.misfits(read) == []
    assert syzkaller.overlaps(read) == []
    return read


def test_the_syzkaller_program_parses_by_its_grammar(refused: Counterexample) -> None:
    for example in (refused, ALL_CALLS):
        names = [call.name for call in fits(example)]
        assert names[:3] == ["openat$kvm", "ioctl$KVM_CREATE_VM", "ioctl$KVM_CREATE_GUEST_MEMFD"]
    assert names[3 + len(ALL_CALLS.scene.slots):] == [
        "fallocate", "fallocate", "fallocate", "mmap", "getrandom", *["ioctl$KVM_SET_USER_MEMORY_REGION2"] * 2, "fallocate",
        *["ioctl$KVM_SET_USER_MEMORY_REGION2"] * 4, "munmap", "close"]


@pytest.mark.long
def test_every_shipped_program_of_system_calls_is_one_of_syzkaller() -> None:
    seen = 0
    for example in of_calls():
        made, read = calls(example), fits(example)
        runs = sum(call.what == "run" for call in made)
        assert sum(call.name == "ioctl$KVM_RUN" for call in read) == runs
        assert sum(call.name == "fallocate" for call in read) == sum(call.what in ("allocate", "punch") for call in made)
        assert sum(call.name == "ioctl$KVM_CREATE_VCPU" for call in read) == (runs > 0)
        seen += 1
    assert seen >= 5


@pytest.mark.parametrize(("line", "says"), [
    ("r0 = openat$kvm(0xffffffffffffff9c", "no comma"), ("close(r0)", "r0 is used before it is assigned"),
    ("close(12)", "no argument"), ("close(0x1) # done", "after the call"), ("Close(0x1)", "no call"),
    ("close(&(0x7f0000000000)=)", "no argument"), ("close({0x1)", "no comma"), ("close('\\x00)", "no argument"),
    ("close(0x1) (fail: 3)", "no properties"), ('close("0")', "no argument")])
def test_the_grammar_refuses_what_is_none(line: str, says: str) -> None:
    with pytest.raises(syzkaller.SyzError, match=re.escape(says)):
        syzkaller.read(line)


def test_the_grammar_reads_what_we_do_not_write() -> None:
    text = "r1 = a$b(&AUTO={'x\\x00', <r2=>0x0, [0x1, nil], @u=0x2}, AUTO) (fail_nth: 5)\nc(r2, r1+0x3)\n"
    first, _ = syzkaller.read(text)
    assert first.args[0] == syzkaller.Pointer(None, None, syzkaller.Struct((syzkaller.Text(b"x\0"), 0, (1, None), ("u", 2))))


@pytest.mark.parametrize(("old", "new", "says"), [
    ("ioctl$KVM_CREATE_VM(r0, 0xae01", "ioctl$KVM_CREATE_VM(r0, 0xae02", "is not the constant 0xae01"),
    ("fallocate(r2", "fallocate(r1", ""), ("KVM_RUN(r3", "KVM_RUN(r1", "fd_kvmvm is no fd_kvmcpu"),
    (", r2})", ", r1})", "fd_kvmvm is no fd_guest_memfd"), ("close(r2)", "close(r2, 0x0)", "takes 1 arguments"),
    ("=nil, 0x0, r2", ", 0x0, r2", ""), ("munmap(&(0x7f0000800000", "munmap(&(0x7e0000800000", "no pointer into the area"),
    ("getrandom(", "getentropy(", "is not described")])
def test_the_descriptions_refuse_what_does_not_fit(refused: Counterexample, old: str, new: str, says: str) -> None:
    texts = ["\n".join(syz_program(example)) for example in (refused, ALL_CALLS)]
    assert any(old in text for text in texts)
    found = [why for text in texts for why in syzkaller.misfits(syzkaller.read(text.replace(old, new)))]
    assert (says in "; ".join(found)) if says else found == []


def test_the_syzkaller_program_makes_the_same_calls() -> None:
    example = made_of(step("vmm", "VMM punch", "range 1 1"), step("vmm2", "thread to_private"),
                      step("vmm-odd", "odd bind", "range -1 1"))
    made = {call.name: call.args for call in fits(example)}
    assert made["fallocate"] == (syzkaller.Variable("r2"), 3, 4096, 4096)
    assert made["ioctl$KVM_SET_MEMORY_ATTRIBUTES"][2].at.members == (0, 8192, PRIVATE, 0)
    assert made["ioctl$KVM_SET_USER_MEMORY_REGION2"][2].at.members[5] == (1 << 64) - 4096


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
