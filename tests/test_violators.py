"""Every law names a design that breaks it, and it does: with that evidence, and on no shorter way with another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import mistakes
import planted
import pytest

from guest_memfd.cli.main import main
from guest_memfd.core import GuestMemfdOps
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.suite.verdict import Found
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS, Law, Violator
from guest_memfd.laws.law import lacks

BROKEN = [law for law in LAWS.values() if law.broken_by is not None]


def found(law: str, by: Violator) -> list[Found]:
    """How *by* breaks the law, shortest first."""
    design: str | type[Design] = by.design
    hypervisor = HYPERVISORS[by.hypervisor]
    if by.planted:
        mistake = getattr(planted, by.design, None) or getattr(mistakes, by.design)
        design = "library" if issubclass(mistake, GuestMemfdOps) else mistake
        hypervisor = replace(hypervisor, ops=mistake) if issubclass(mistake, GuestMemfdOps) else hypervisor
    scenes = None if by.scene is None else [by.scene]
    return list(check(design, hypervisor, parties=by.parties, scenes=scenes, laws=[law], jobs=1).findings)


def test_who_breaks_it_is_said_of_every_law_that_is_judged() -> None:
    assert [law.name for law in LAWS.values() if law.broken_by is None] == []
    posted = [law.broken_by for law in BROKEN if law.broken_by and not law.broken_by.planted]
    assert all(by.design in DESIGNS and by.design != "library" for by in posted)


@pytest.mark.parametrize("law", BROKEN, ids=[law.name for law in BROKEN])
def test_it_is_broken_as_it_is_said(law: Law) -> None:
    assert law.broken_by is not None
    shortest, *_ = found(law.name, law.broken_by)
    assert (shortest.law, shortest.evidence) == (law.name, law.broken_by.evidence)


@pytest.mark.parametrize("by", [
    Violator("NoFlush", "kvm", ("vcpu",), "guest and host both reach a private page", planted=True),
    Violator("NotUnmapped", "kvm", ("vcpu", "vmm"),
             "the guest reaches a page that it no longer owns, through a guest mapping", planted=True),
])
def test_a_law_may_be_broken_by_a_planted_mistake(by: Violator) -> None:
    assert by.evidence in {each.evidence for each in found("one-owner", by)}
    assert str(by).startswith(f"design {by.design} of the tests, under kvm, by vcpu")


def test_the_example_law_is_broken_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "docs" / "examples"))
    monkeypatch.setattr(LAWS, "_known", dict(LAWS._known))
    from frugal_law import ZEROED_ONCE
    LAWS.add(ZEROED_ONCE.name, ZEROED_ONCE)
    assert found(ZEROED_ONCE.name, ZEROED_ONCE.broken_by)[0].evidence == ZEROED_ONCE.broken_by.evidence
    del sys.modules["frugal_law"]


def test_what_is_no_violator_is_refused() -> None:
    assert str(lacks(replace(BROKEN[0], broken_by="none"))).startswith("what it is broken by is no")       # type: ignore


def test_list_says_who_breaks_a_law_and_how_to_see_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "laws"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for law in BROKEN:
        assert f"broken by: {law.broken_by}" in told
    command = "gmem check none --hypervisor kvm --parties vcpu --law one-owner"
    assert f"see: {command}" in told
    assert main(command.split()[1:]) == 2
    assert "guest and host both reach a private page" in capsys.readouterr().out
