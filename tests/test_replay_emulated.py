"""Counterexamples on the emulated machine: the same law, with the machine's own evidence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.trace import Trace, trace_of, write
from guest_memfd.lockstep.evidence import OnMachine, on_machine
from guest_memfd.scenarios import SCENES

DOC = Path(__file__).parents[1] / "docs" / "emulated-host.md"
FOUND = [
    ("none", "gunyah", "vcpu,zeropad", "host-survives"), ("none", "pkvm", "vcpu,power", "no-stale-data"),
    ("none", "kvm", "vcpu", "one-owner"), ("secretmem", "kvm", "vcpu,vmm,kcore", "guest-private"),
    ("fixup", "gunyah", "vcpu,power", "host-survives"), ("guestmem-rfc1", "gunyah", "vcpu", "no-stale-data"),
    ("guestmem-rfc1", "pkvm", "vmm", "host-survives"), ("gunyah-v17", "gunyah", "vcpu", "library-alone"),
    ("gunyah-v17", "gunyah", "vcpu,device", "pins-respected"), ("gunyah-v17", "gunyah", "vcpu,vmm", "progress"),
    ("gunyah-v17", "gunyah", "vmm", "nothing-lost"), ("gunyah-v17", "gunyah", "vcpu,vmm", "one-owner"),
    ("gunyah-v17", "gunyah", "vmm", "no-false-refusal"), ("gunyah-v17", "gunyah", "vcpu,vmm", "fault-served"),
    ("guestmem-rfc1", "gunyah", "vcpu,memory-failure", "poison-contained"),
    ("guestmem-rfc1", "gunyah", "vcpu,vmm2", "all-or-nothing"), ("guestmem-rfc1", "gunyah", "vcpu,vmm", "bounded-cost"),
]
ELSEWHERE = [
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "crossed"),
    ("none", "kvm", "vcpu", "one-owner", "both-private"),
    ("none", "gunyah", "vcpu2,vmm2,zeropad", "host-survives", "both-shared"),
    ("gunyah-v17", "gunyah", "vcpu2", "library-alone", "unbound"),
    ("none", "gunyah", "creator,vcpu,zeropad", "host-survives", "nothing-yet"),
    ("guestmem-rfc1", "kvm", "creator,vcpu2", "lifetimes", "nothing-yet"),
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "for-good"),
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "no-direct-map-changes"),
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "quiet-free"),
    ("none", "kvm", "vcpu", "one-owner", "three-pages"),
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "failing-twice"),
    ("none", "gunyah", "vcpu,zeropad", "host-survives", "on-demand"),
]
"""The same in other scenes."""


def found(design: str, hypervisor: str, parties: str, law: str, scene: str = "two-pages") -> Trace:
    report = check(design, hypervisor, scenes=[scene], parties=tuple(parties.split(",")), laws=[law])
    return trace_of(report, report.laws[law])


@pytest.mark.parametrize(("design", "hypervisor", "parties", "law"), FOUND)
def test_it_ends_in_the_same_law(design: str, hypervisor: str, parties: str, law: str) -> None:
    shown = on_machine(found(design, hypervisor, parties, law))
    assert shown.same, shown.again.divergence


@pytest.mark.parametrize(("design", "hypervisor", "parties", "law", "scene"), ELSEWHERE)
def test_it_does_in_other_scenes(design: str, hypervisor: str, parties: str, law: str, scene: str) -> None:
    shown = on_machine(found(design, hypervisor, parties, law, scene))
    assert shown.same, shown.again.divergence
    assert len(shown.both.host.machine.watched) == SCENES[scene].frames


def test_every_scene_but_one_is_on_the_machine() -> None:
    there = {name for name, scene in SCENES.items() if not scene.order}
    assert there == {"two-pages", "two-vms", *(scene for *_, scene in ELSEWHERE)}
    trace = found("none", "gunyah", "other-vcpu,zeropad", "host-survives", "two-vms")
    with pytest.raises(BadInput, match="scene 'two-vms' is none for a machine"):
        on_machine(trace)


@pytest.fixture(scope="module")
def panic() -> OnMachine:
    return on_machine(found("none", "gunyah", "vcpu,zeropad", "host-survives"))


def test_the_panic_is_the_kernels_own(panic: OnMachine) -> None:
    text = "\n".join(panic.lines())
    assert "Internal error: synchronous external abort: 0000000096000010 [#1] SMP" in text
    assert "pc : load_unaligned_zeropad+0x0/0x8" in text
    assert "Kernel panic - not syncing" in text
    assert "ESR 0x96000010" in panic.evidence()
    assert re.search(r"stage 2 +withheld from the host, owner guest", text)


def test_a_step_that_the_machine_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from guest_memfd.machine.primitives.host import EmulatedHost

    monkeypatch.setattr(EmulatedHost, "folio_ref_count", lambda self, folio: 7)
    monkeypatch.setattr(EmulatedHost, "folio_mark_uptodate", lambda self, folio: None)
    shown = on_machine(found("none", "gunyah", "vcpu,zeropad", "host-survives"))
    assert not shown.same
    assert "uptodate" in str(shown.again.divergence)


def test_the_command_and_the_page_in_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(found("none", "gunyah", "vcpu,zeropad", "host-survives"), tmp_path / "t.json")
    assert main(["replay", str(tmp_path / "t.json"), "--on", "emulated"]) == 2
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = DOC.read_text(encoding="utf-8").split("## A counterexample on the machine")[1].split("## Liberties")[0]
    block = [line.strip() for line in shown.splitlines() if line.startswith("    ") and line.strip() != "..."]
    assert len(block) > 10
    assert [line for line in block if line not in printed] == []


def test_the_machine_may_be_named_and_has_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(found("none", "gunyah", "vcpu,zeropad", "host-survives"), tmp_path / "t.json")
    assert main(["replay", str(tmp_path / "t.json"), "--on", "emulated:arm64/gunyah"]) == 2
    assert main(["replay", str(tmp_path / "t.json"), "--on", "emulated:arm64/pkvm"]) == 4
    assert "the trace is of gunyah" in capsys.readouterr().err


def test_an_unknown_host_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "t.json"), "--on", "emulatde"]) == 4
    assert "did you mean 'emulated'" in capsys.readouterr().err
