"""The two ways to keep guest memory out of a hibernation image, and none: compared on one scenario."""

from __future__ import annotations

from errno import EPERM

import pytest
from driver import Bench
from scripted import asked

from guest_memfd.abstract import state as st
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.kvm.default import KvmOps
from guest_memfd.scenarios import PARTIES

PARTNERS = ("vcpu", "power")


class ByCount(OurLibrary):
    power = "count"


class ByNobody(OurLibrary):
    power = "none"


def explored(design: type[OurLibrary], hypervisor: str) -> tuple[set[str], bool]:
    world = World(design, HYPERVISORS[hypervisor], [PARTIES[n] for n in PARTNERS], engine="python")     # lists states
    result = world.explorer(PARTNERS).run()
    frozen = any(st.State(shared).frozen for shared in world.tables.shared)
    return {finding.law for finding in result.findings}, frozen


@pytest.mark.parametrize(("hypervisor", "law"), [
    ("kvm", "guest-private"), ("pkvm", "no-stale-data"), ("gunyah", "host-survives"),
])
def test_policies(hypervisor: str, law: str) -> None:
    """Both keep the laws; suspend to RAM freezes under each, and without a veto the image copy breaks one."""
    assert explored(OurLibrary, hypervisor) == (set(), True)
    assert explored(ByCount, hypervisor) == (set(), True)
    assert law in explored(ByNobody, hypervisor)[0]


@pytest.mark.parametrize(("design", "answer"), [(OurLibrary, 0), (ByCount, -EPERM)])
def test_count_is_blunter(design: type[OurLibrary], answer: int) -> None:
    """While no page is away the notifier lets the machine hibernate; the count refuses because a file is open."""
    assert Bench("kvm", design).do(lambda lib: lib.hibernate_prepare()) == answer
    assert Bench("kvm", design, opened=False).do(lambda lib: lib.hibernate_prepare()) == 0


@pytest.mark.parametrize(("design", "asked_for"), [
    (OurLibrary, ["pm_prepare(hibernate)", "pm_post()"]), (ByCount, ["open_files()"]), (ByNobody, [])])
def test_each_policy_asks_for_its_own_and_no_more(design: type[OurLibrary], asked_for: list[str]) -> None:
    library = design(KvmOps(), 1)
    steps = [*asked(library.hibernate_prepare(), lambda _: 0)[1], *asked(library.hibernate_post(), lambda _: None)[1]]
    assert steps == asked_for
