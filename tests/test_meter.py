"""How far a scenario is that takes long is told while it is explored, by whichever process explores it."""

from __future__ import annotations

import re

import pytest

from guest_memfd.explore.suite import check, work
from guest_memfd.explore.suite.meter import Meter, Now

PARTIES = ["vcpu", "vmm2", "zeropad"]
LINE = re.compile(r"library on kvm, two-pages: vcpu, vmm2, zeropad; "
                  r"level (\d+), ([\d,]+) states, [\d,]+ a second, \d+\.\d GB")


@pytest.mark.parametrize("jobs", [1, 2])
def test_levels_states_and_memory_are_told_on_the_way(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []
    monkeypatch.setattr(check, "LOOK", 0.0)
    monkeypatch.setattr(check, "LARGE", 3)
    monkeypatch.setattr(work, "MANY", 1)
    (report,) = check.compare([("library", "kvm")], parties=PARTIES, jobs=jobs, engine="python",
                              progress=lambda *how_far: told.append(how_far))
    on_the_way = [LINE.fullmatch(words) for _, _, words in told[:-1]]
    assert all(on_the_way)
    assert len(told) > 10
    levels = [int(match[1]) for match in on_the_way if match]
    states = [int(match[2].replace(",", "")) for match in on_the_way if match]
    assert levels == sorted(levels)
    assert states == sorted(states)
    assert states[-1] <= report.states
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert (told[0][0] < 50, told[-2][0] <= 99, told[-1][0]) == (True, True, 100)


def test_what_more_states_than_expected_have_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(check, "LOOK", 0.0)
    monkeypatch.setattr(work, "MANY", 1)
    # Without a guess one scenario is thought to have one state.
    check.compare([("library", "kvm")], parties=PARTIES, jobs=1, engine="python",
                  progress=lambda done, *_: told.append(done))
    assert {*told[:-1]} == {99}
    assert told[-1] == 100


def test_the_largest_comes_first_and_what_is_done_is_gone() -> None:
    meter = Meter(3)
    for line, states in enumerate((5, 70, 30)):
        meter.note(line, Now(line + 7, 2, states, 1 << 40))
    assert [now.order for now in meter.running()] == [8, 9, 7]
    meter.clear(1)
    assert meter.running() == [Now(9, 2, 30, 1 << 40), Now(7, 2, 5, 1 << 40)]
