"""Refinement: whatever the machine does, its abstraction is what the abstract host says, step by step."""

from __future__ import annotations

import pytest
from schedules import PAIRS, steps

from guest_memfd.check.refine import Diverged
from guest_memfd.hosts.emulated.kernel.kernel_flush import KernelFlush

LONG = 100_000
"""Steps that the long test takes at least, over all designs and hypervisors."""


@pytest.mark.parametrize(("hypervisor", "design"), PAIRS)
def test_every_step_is_the_abstract_step(hypervisor: str, design: str) -> None:
    taken, broken = steps(hypervisor, design, range(12))
    assert taken > 200
    if design == "library":
        assert not broken, broken


@pytest.mark.long
def test_a_hundred_thousand_steps(capsys: pytest.CaptureFixture[str]) -> None:
    taken, first = 0, 100
    while taken < LONG:
        for hypervisor, design in PAIRS:
            more, broken = steps(hypervisor, design, range(first, first + 25))
            taken += more
            assert design != "library" or not broken, broken
        first += 25
    with capsys.disabled():
        print(f"\nrefinement: {taken} steps, seeds 100 to {first - 1} of each of {len(PAIRS)} pairs")


def test_a_divergence_names_the_seed_the_step_and_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelFlush, "__call__", lambda self, start, end: None)
    with pytest.raises(Diverged, match=r"seed \d+, parties .*flush_tlb_kernel_range.*\n.*stale: abstract 0, emulated 1"):
        steps("kvm", "library", range(50), ("vcpu", "vmm"))
