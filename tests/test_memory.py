"""Memory is a limit like any other: what was seen counts, and the kernel has nothing to kill."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import pytest

from guest_memfd import check, compare
from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput
from guest_memfd.explore.engine import explorer, memory
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.suite.verdict import Limits
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world.scenario import World, world

pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

import numpy as np

from guest_memfd.explore.engine.compiled import flat, load, rows, space, teardown
from guest_memfd.explore.engine.compiled.encoding import ROWS

ENGINES = ("python", "compiled", "numpy")
ROOM = 1000
"""Bytes that there are, in these tests."""


def short_of_memory(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """Let all be used up when memory is looked at for the *looks*th time; every engine looks often."""
    left = [looks]

    def used() -> int:
        left[0] -= 1
        return 0 if left[0] > 0 else 1 << 40

    monkeypatch.setattr(explorer, "used", used)
    monkeypatch.setattr(explorer, "_MANY", 0)
    monkeypatch.setattr(explorer, "_BYTES_A_STATE", 0)
    monkeypatch.setattr(rows, "used", used)
    monkeypatch.setattr(rows, "FEW", 16)
    for name in ("numba", "numpy"):
        monkeypatch.setattr(load.loops(name), "SPARE", 64)
    monkeypatch.setattr(load.loops("numpy"), "CHUNK", 16)
    monkeypatch.setattr(rows.Rows, "must_fit", _as_if_nothing_were_needed)


def _as_if_nothing_were_needed(self: Any, more: int) -> None:
    if rows.used() > self.max_bytes:
        raise memory.Full


def explored(engine: str, looks: int, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        short_of_memory(patch, looks)
        return world("none", "kvm", engine=engine).explorer(["vcpu", "vmm2"]).run(max_bytes=ROOM)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_seen_until_then_counts(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world("none", "kvm", engine=engine).explorer(["vcpu", "vmm2"]).run(max_bytes=1 << 60)
    assert whole.limit is None
    told = {(f.law, f.evidence): len(f.steps) for f in whole.findings}
    seen = [explored(engine, looks, monkeypatch) for looks in (1, 5, 11)]
    assert [result.limited_by for result in seen] == ["memory"] * 3
    assert seen[0].states < seen[1].states < seen[2].states < whole.states
    for result in seen:
        # Shortest first: what is found within the levels that were seen is found in as few steps.
        assert all(told[f.law, f.evidence] <= len(f.steps) for f in result.findings)
        assert result.verdict == ("refuted" if result.findings else "undetermined")
    assert seen[-1].findings


def test_it_is_the_reports_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "library", "--hypervisor", "kvm", "--parties", "vcpu,vmm2", "-j", "1", "--engine", "python"]
    monkeypatch.setattr(explorer, "_MANY", 0)
    assert main([*argv, "--memory", "64K"]) == 3
    assert "limit: library on kvm: more than 65536 bytes of memory in all (1 of 1 scenarios" in capsys.readouterr().out
    monkeypatch.setattr(memory, "_left", lambda: iter([0]))
    monkeypatch.setattr(memory, "used", lambda: 0)
    assert main(argv) == 3
    assert "limit: library on kvm: more memory than there is (1 of 1" in capsys.readouterr().out
    assert main([*argv, "--memory", "12Q"]) == 4
    assert capsys.readouterr().err == "gmem: --memory '12Q' is no size; write 64K, 16M or 2G\n"
    with pytest.raises(BadInput, match="the limit of memory must be at least 1 byte, not 0"):
        Limits(memory=0)


def test_what_earlier_scenarios_have_left_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([world("library", "kvm", engine="python")], None, None, ROOM)
    monkeypatch.setattr(explorer, "_MANY", 0)
    monkeypatch.setattr(explorer, "used", lambda: 0 if bench._tables is None or len(bench._tables.shared) < 40 else ROOM)
    assert bench.do(Task(0, 0, ("vcpu",))).limit == "memory"
    monkeypatch.setattr(explorer, "_BYTES_A_STATE", 0)
    first = Bench([world("library", "kvm", engine="python")], None, None, 1 << 60).do(Task(1, 0, ("zeropad",)))
    assert bench.do(Task(1, 0, ("zeropad",))) .states == first.states
    assert bench.do(Task(1, 0, ("zeropad",))).limit is None


def test_who_has_explored_has_gone_when_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states may be what takes the room."""
    made: list[weakref.ref[Any]] = []
    right = World.explorer

    def noted(self: World, *args: Any) -> Any:
        assert [ref() for ref in made] == [None] * len(made)
        one = right(self, *args)
        made.append(weakref.ref(one))
        return one

    bench = Bench([world("library", "kvm", engine="python")], None, None, ROOM)
    monkeypatch.setattr(World, "explorer", noted)
    monkeypatch.setattr(explorer, "_MANY", 0)
    monkeypatch.setattr(explorer, "used", lambda: 0 if len(made) == 1 else ROOM)
    for order in range(2):
        bench.do(Task(order, 0, ("vcpu",)))
    assert len(made) == 3


def test_all_processes_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.share(1000, 4) == 250
    monkeypatch.setattr(memory, "used", lambda: 7)
    monkeypatch.setattr(memory, "_left", lambda: iter([3000, 2000]))
    assert memory.share(None, 2) == 7 + 900
    monkeypatch.setattr(memory, "_left", lambda: iter([]))
    assert memory.share(None, 2) is None


@pytest.mark.parametrize("enough", [True, False])
def test_what_is_too_large_for_a_share_has_all_memory_afterwards(enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right, alone = Bench.do, []

    def do(self: Bench, task: Task) -> Answer:
        whole = self.max_bytes is not None and self.max_bytes >= 1 << 40
        if task.parties == ("vcpu", "vmm2") and not task.apart:
            alone.extend([(self.max_bytes, self.threads)] * whole)
            if not (whole and enough):
                return Answer(7, 7, 0.1, "memory")
        return right(self, task)

    whole = compare([("library", "kvm")], size=2, jobs=1)[0]
    monkeypatch.setattr(Bench, "do", do)
    (report,) = compare([("library", "kvm")], size=2, jobs=2, limits=Limits(memory=1 << 40))
    assert alone == [(1 << 40, 2)]
    if enough:
        assert (report.verdict, report.states, report.limits) == ("holds", whole.states, ())
    else:
        assert report.verdict == "undetermined"
        assert "(1 of " in report.limits[0]
        assert report.unfinished[0].parties == ("vcpu", "vmm2")


def test_what_is_used_is_known_here() -> None:
    before = memory.used()
    some = bytes(range(256)) * (1 << 18)
    assert memory.used() > before > 1 << 20
    assert len(some) == 1 << 26
    assert check("library", "kvm", parties=["vcpu2"], jobs=1).limits == ()


def test_pages_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda _name: 0)
    assert memory.used() == 0


@pytest.mark.parametrize("name", ["numba", "numpy"])
def test_rows_become_wider_without_being_copied(name: str) -> None:
    loops = load.loops(name)
    known = flat.Flat(bytes(20), loops)
    table = rows.Rows(known, 1, loops)
    table.grow(200_000)
    before = np.arange(len(table.rows), dtype=np.uint64)
    table.rows[:, 0], table.count[ROWS] = before, len(before) - 1
    tracemalloc.start()
    try:
        for _ in range(2):
            table._widen()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert table.rows.shape == (len(before), 3)
    assert (table.rows[:-1, 0] == before[:-1]).all()
    assert not table.rows[:-1, 1:].any()
    # What is traced is the new memory and what is needed on the way: not the old memory and the new.
    assert most < 1.3 * table.rows.nbytes


def test_no_room_to_become_wider_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    widen = rows.Rows._widen

    def too_wide(self: rows.Rows) -> None:
        if self.rows.shape[1] == 2:
            raise memory.Full
        widen(self)

    monkeypatch.setattr(rows.Rows, "_widen", too_wide)
    result = world("library", "kvm", engine="compiled").explorer(["vcpu", "vmm2"]).run(max_bytes=1 << 40)
    assert (result.limited_by, result.verdict) == ("memory", "undetermined")


def test_no_room_for_the_end_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        raise memory.Full

    monkeypatch.setattr(teardown.Teardown, "sights", full)
    result = world("library", "kvm", engine="compiled").explorer(["vcpu2", "stop"]).run(max_bytes=1 << 40)
    assert (result.limited_by, result.verdict) == ("memory", "undetermined")


@pytest.mark.parametrize(("engine", "threads"), [("python", 1), ("compiled", 1), ("compiled", 2), ("numpy", 1)])
def test_what_a_scenario_was_explored_with_goes_with_it(engine: str, threads: int) -> None:
    """No one collects cycles in a suite, so there must be none: tables of a world that is done would stay for ever."""
    built = world("none", "kvm", engine=engine)
    tables = built.tables.empty()
    explorer = built.explorer(["vcpu", "vmm2", "zeropad"], tables, threads)
    gone = weakref.ref(tables), weakref.ref(explorer)
    gc.collect()
    gc.disable()
    try:
        assert explorer.run().findings
        del tables, explorer
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("engine", "threads"), [("compiled", 1), ("compiled", 2), ("numpy", 1)])
def test_the_next_scenario_has_the_memory_of_the_last(engine: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not clean, and nobody notices: larger, smaller, with other parties, every one is as on memory of its own."""
    monkeypatch.setattr(rows, "FEW", 16)
    built = world("none", "pkvm", engine=engine)
    kept, spaces = built.tables.empty(), set()
    for names in (["vcpu", "vmm2"], ["vcpu", "zeropad"], ["vmm2", "stop"], ["vcpu", "vmm2"]):
        explorer: Any = built.explorer(names, kept, threads)
        spaces.add(id(explorer.rows.space))
        again, fresh = explorer.run(), built.explorer(names, built.tables.empty(), threads).run()
        assert (again.states, again.transitions, again.depth, again.findings) == (
            fresh.states, fresh.transitions, fresh.depth, fresh.findings), names
    assert len(spaces) == 1


def test_a_table_begins_as_long_as_the_last_one_had_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FEW", 16)
    built = world("none", "pkvm", engine="compiled")
    tables, begun = built.tables.empty(), []
    for names in (["vcpu", "vmm2"], ["vcpu"], ["vcpu", "vmm2"], ["vcpu", "vmm2"]):
        explorer: Any = built.explorer(names, tables)
        begun.append(len(explorer.rows.table))
        explorer.run()
    states = len(explorer.rows)
    assert begun[0] == 32
    assert 0.3 * begun[1] < states < 0.6 * begun[1] == 0.6 * begun[3]
    assert begun[2] < begun[1]


def test_two_explorers_at_a_time_have_memory_of_their_own() -> None:
    built = world("none", "pkvm", engine="compiled")
    tables = built.tables.empty()
    built.explorer(["vcpu", "vmm"], tables).run()
    one: Any = built.explorer(["vcpu", "zeropad"], tables)
    two: Any = built.explorer(["vcpu", "zeropad"], tables)
    assert one.rows.space is not two.rows.space
    assert one.run().states == two.run().states


def test_memory_that_was_written_to_is_not_counted_again() -> None:
    used = space.Space()
    used.rows(100, 2)
    assert (used.missing(200, 0), used.missing(300, 200)) == (1600, 800)
    used.leave(150, 64)
    assert (used.missing(200, 0), used.missing(200, 180), used.missing(100, 0)) == (400, 160, 0)
    table = used.table(64)
    table[:] = 7
    assert (used.missing_of_table(64), used.missing_of_table(128)) == (0, 512)
    assert not used.table(32).any()
    assert not used.table(64)[:32].any()
