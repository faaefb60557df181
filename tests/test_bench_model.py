"""The benchmark model: naive, tabulated and Spin see the same states, or comparing their speed would mean nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import engine


def test_naive_and_tabulated_agree() -> None:
    assert engine.naive(engine.SMALL)[:2] == engine.tabulated(engine.SMALL)[:2]


@pytest.mark.skipif(not engine.spin_is_here(), reason="needs the commands spin and gcc")
@pytest.mark.parametrize("size", [engine.SMALL, engine.Size(False, 1, 2)], ids=["small", "all parties"])
def test_spin_agrees(size: engine.Size) -> None:
    assert engine.spin(size)[:2] == engine.tabulated(size)[:2]


def test_a_mistake_in_the_model_is_seen() -> None:
    """Without the flush the stray load reaches the page: the model can fail."""
    machine = engine.Pages(engine.PAGES)
    machine.flush_tlb_kernel_range = lambda folios: None      # type: ignore[method-assign]
    run = engine.Explorer(engine.Tables(machine, [engine.HostSurvives()]), engine.parties(*engine.SMALL), machine.initial())
    assert run.run().verdict == "refuted"
