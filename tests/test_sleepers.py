"""Steps that commute are made once, and nothing is lost: all states, on the same levels, with the same transitions."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

import numpy as np

from guest_memfd.explore.engine.compiled import encoding, flat, load, search
from guest_memfd.explore.engine.compiled.search import CompiledExplorer
from guest_memfd.explore.world.scenario import world

PARTIES = "vcpu2", "vmm2", "pfn-cache"


def explored(
    design: str = "library", parties: tuple[str, ...] = PARTIES, hypervisor: str = "pkvm", threads: int = 1
) -> CompiledExplorer:
    """On warm tables, so that no step is put aside: what was, is made whoever is asleep."""
    built = world(design, hypervisor, engine="compiled")
    built.explorer(parties).run()
    explorer = CompiledExplorer(built.tables, [built.programs[name] for name in parties], built.initial, built.teardown,
                                loops=load.loops("numba"), threads=threads)
    explorer.run()
    return explorer


def seen(explorer: CompiledExplorer) -> tuple[list[int], int]:
    """How many states there are up to each level, and the transitions."""
    return explorer.bounds, int(explorer.rows.count[encoding.TRANSITIONS])


def wrongly(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """From now on *wrong* is done to the trees after each leaf that is added."""
    put = flat.Flat.put

    def and_wrong(self: flat.Flat) -> None:
        put(self)
        wrong(self.trees)

    monkeypatch.setattr(flat.Flat, "put", and_wrong)


@pytest.fixture(scope="module")
def right() -> tuple[list[int], int]:
    """What is seen where nobody is ever asleep."""
    with pytest.MonkeyPatch.context() as patch:
        wrongly(patch, lambda trees: trees.touched.fill(np.uint64((1 << 64) - 1)))
        return seen(explored())


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_lost(threads: int, right: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "FEW", 1)
    assert seen(explored(threads=threads)) == right


def test_somebody_is_asleep() -> None:
    """Or the other tests would say nothing."""
    levels = []
    next_level = CompiledExplorer._next_level

    def noted(self: CompiledExplorer, lo: int, hi: int) -> Any:
        levels.append(int(np.count_nonzero(self.asleep[:hi - lo])) / (hi - lo))
        return next_level(self, lo, hi)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledExplorer, "_next_level", noted)
        explored()
    assert max(levels) > 0.5


def test_steps_that_do_not_commute_are_not_left_out(
    right: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if no step looked at anything: states are lost."""
    wrongly(monkeypatch, lambda trees: trees.touched.fill(0))
    assert seen(explored())[0][-1] < right[0][-1]


@pytest.mark.parametrize("touched", [slice(0, encoding.TOUCHED), slice(encoding.TOUCHED, None)])
def test_what_is_read_and_what_is_written_both_count(
    touched: slice, right: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrongly(monkeypatch, lambda trees: trees.touched[:, touched].fill(0))
    assert seen(explored())[0][-1] < right[0][-1]


def test_whoever_stops_the_machine_commutes_with_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = "zeropad", "vcpu", "vmm"
    before = explored("none", parties, "gunyah")
    assert before.stopped
    wrongly(monkeypatch, lambda trees: trees.halts.fill(0))
    assert len(explored("none", parties, "gunyah").rows) < len(before.rows)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of a level move first: the first way to a state is then no longer the least in any order."""
    through = CompiledExplorer._through

    def from_the_end(self: CompiledExplorer, queue: Any, base: int, moved: Any) -> Any:
        return through(self, queue[::-1].copy(), base, moved)

    monkeypatch.setattr(CompiledExplorer, "_through", from_the_end)
    monkeypatch.setattr(search, "FEW", 1)
    monkeypatch.setattr(load.loops("numba"), "CHUNK", 64)


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_lost_in_whatever_order(threads: int, right: tuple[list[int], int]) -> None:
    assert seen(explored(threads=threads)) == right


def test_whoever_is_awake_on_one_way_is_awake() -> None:
    """The proof needs it. In no scenario was a state seen to be lost without, so this asks the loop itself."""
    level = encoding.Level(10, 20, np.array([0b111, 0b101, 0b110], np.uint16), 0, np.zeros(0, np.uint8))
    load.threaded().wake(level, np.array([[10, 0b011], [12, 0b100], [10, 0b110], [11, 0]]), 3)
    assert level.asleep.tolist() == [0b010, 0b101, 0b100]
