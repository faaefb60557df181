"""Three engines, one result, byte for byte: Python, compiled loops, and the same loops in numpy alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from drawn import BYTES, CALLS, CODE, machine, procedure
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import PANIC, US, Toy, ToyLaw, end

from guest_memfd import check
from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import DesignRaised, EngineNotice, HostUnavailable, UnknownName
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Result, step_line
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world import choice
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import SCENES
from guest_memfd.words.primitives import Steps

pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

from guest_memfd.explore.engine.compiled import flat, jit, load, rows, search, threads

NAMES = ("numba", "numpy")


def told(result: Result) -> list[Any]:
    """All of *result* but the seconds, to be compared."""
    return [replace(result, seconds=0.0, findings=[]), *(
        (f.law, f.evidence, f.initial, [(step_line(step), step.shared, step.notes) for step in f.steps])
        for f in result.findings)]


def run_all(machine: Any, law: Any, programs: Sequence[Program], initial: bytes, teardown: Program | None = None,
            **limits: Any) -> Result:
    """Explore in all three, each on tables of its own; they say the same, and it is returned."""
    def scenario() -> Any:
        return Tables(machine, law), programs, initial, teardown

    results = [Explorer(*scenario()).run(**limits)]
    results += [search.CompiledExplorer(*scenario(), loops=load.loops(name)).run(**limits) for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        # Threads wait for one another at every level, and have little room.
        patch.setattr(search, "FEW", 1)
        patch.setattr(threads, "MADE", 4)
        results.append(search.CompiledExplorer(*scenario(), loops=load.loops("numba"), threads=3).run(**limits))
    assert [told(result) for result in results[1:]] == [told(results[0])] * 3
    return results[0]


def agree(built: World, parties: Sequence[str], **limits: Any) -> Result:
    programs = [built.programs[name] for name in parties]
    return run_all(built.machine, built.laws, programs, built.initial, built.teardown, **limits)


# -- the shipped models ----------------------------------------------------------------------------------------------

SAMPLE = [
    ("library", "pkvm", "two-pages", "vcpu zeropad"), ("library", "kvm", "two-pages", "vcpu2 kcore zeropad"),
    ("library", "gunyah", "two-vms", "stop other-stop vcpu2"), ("library", "pkvm", "nothing-yet", "creator vcpu2"),
    ("library", "kvm", "failing-twice", "vcpu2 stop"), ("library", "gunyah", "for-good", "vcpu2 stop"),
    ("none", "kvm", "two-pages", "vcpu2 zeropad power"), ("none", "pkvm", "two-pages", "vcpu kcore"),
    ("none", "gunyah", "both-shared", "vcpu2 repeater"), ("secretmem", "pkvm", "two-pages", "vcpu2 stop"),
    ("fixup", "pkvm", "two-pages", "vcpu2 zeropad"), ("guestmem-rfc1", "kvm", "failing-twice", "vcpu2 stop"),
    ("library", "tdx", "large-for-good", "vcpu2 stop"), ("library", "snp", "mixed-block", "vcpu2 vmm2"),
    ("gunyah-v17", "gunyah", "two-pages", "vcpu2 stop"), ("gunyah-v17", "gunyah", "two-pages", "vcpu2 unloader"),
    ("direct-map-v12", "kvm", "failing-twice", "vcpu2 vmm2"), ("firecracker-2026", "kvm", "two-pages", "uffd zeropad"),
    ("filemap-hook", "kvm", "two-pages", "writer pfn-cache-v2"), ("alloc-unmapped", "gunyah", "two-pages", "vcpu2 launcher"),
    ("library", "cca", "large-for-good", "vcpu2 stop"), ("kvm-7.4", "kvm", "two-pages", "vcpu2 stop"),
    ("guestmem-rfc2", "gunyah", "both-shared", "vcpu vcpu2"), ("guestmem-v5", "kvm", "failing-twice", "vcpu2 drainer"),
    ("guestmem-v6", "kvm", "two-pages", "vcpu2 zeropad"),
    ("none", "s390", "two-pages", "vcpu2 page-cache-reader"),
    ("gmem-2m", "snp", "large-folio", "vcpu2 vmm2"), ("hugetlb-rfc2", "kvm", "two-large-folios", "vmm2"),
    ("hugetlb-2026", "tdx", "mixed-block", "vcpu2 vmm2"),
]


@cache
def explored(design: str, hypervisor: str, scene: str, parties: str) -> Result:
    return agree(world(design, hypervisor, scene=scene), parties.split())


@pytest.mark.parametrize(("design", "hypervisor", "scene", "parties"), SAMPLE)
def test_they_say_the_same(design: str, hypervisor: str, scene: str, parties: str) -> None:
    assert explored(design, hypervisor, scene, parties).states > 50


def test_the_sample_has_findings_of_many_kinds() -> None:
    found = [finding for each in SAMPLE for finding in explored(*each).findings]
    assert len({finding.law for finding in found}) >= 5
    assert len(found) >= 8


def test_every_design_and_hypervisor_is_in_the_sample() -> None:
    assert {design for design, *_ in SAMPLE} == {*DESIGNS}
    assert {hypervisor for _, hypervisor, *_ in SAMPLE} == {*HYPERVISORS}


@pytest.mark.parametrize("limits", [{"max_states": 20}, {"max_steps": 7}, {"max_states": 1}, {"max_steps": 1}])
def test_they_stop_at_the_same_limit(limits: dict[str, int]) -> None:
    assert agree(world("none", "kvm"), ["vcpu", "zeropad"], **limits).limit is not None


def test_no_time_is_a_limit() -> None:
    built = world("library", "pkvm", engine="compiled")
    assert built.explorer(["vcpu", "vmm2"]).run(max_seconds=0.0).limit == "more than 0 seconds"


@pytest.mark.parametrize("engine", ["python", "compiled"])
def test_tables_kept_from_other_scenarios_change_nothing(engine: str) -> None:
    kept = world("none", "pkvm", engine=engine)
    for parties in (["vcpu"], ["vcpu2", "kcore"], ["vcpu", "zeropad"], ["zeropad", "stop"], ["vcpu2", "kcore"], ["vcpu"]):
        fresh = kept.explorer(parties, Tables(kept.machine, kept.laws)).run()
        assert told(kept.explorer(parties).run()) == told(fresh)


def test_tables_serve_several_initial_states() -> None:
    built = world("none", "kvm", engine="compiled")
    programs = [built.programs[name] for name in ("vcpu", "zeropad")]
    for failures in (0, 1, 2, 1, 0):
        initial = world("none", "kvm", failures=failures).initial
        kept, fresh = (choice.explorer("compiled", tables, programs, initial, built.teardown, ()).run()
                       for tables in (built.tables, Tables(built.machine, built.laws)))
        assert told(kept)[0] == told(fresh)[0]


def test_facts_are_the_same() -> None:
    facts = []
    for engine in choice.ENGINES:
        built = world("none", "pkvm", engine=engine)
        built.explorer(["vcpu", "zeropad"]).run()
        facts.append(set(built.tables.facts))
    assert facts[0] == facts[1] == facts[2]


@pytest.mark.long
@pytest.mark.parametrize(("design", "hypervisor"), [
    *(("library", hypervisor) for hypervisor in HYPERVISORS if hypervisor != "s390"), ("none", "kvm"),
    ("gunyah-v17", "gunyah")])
def test_they_say_the_same_in_the_whole_first_look(design: str, hypervisor: str) -> None:
    compared = 0
    for scene in SCENES:
        built = world(design, hypervisor, scene=scene)
        # To each its own, kept for all scenarios of a scene, as in a suite.
        engines = [(make, Tables(built.machine, built.laws)) for make in (Explorer, compiled)]
        for parties in plan(built, full=False):
            programs = [built.programs[name] for name in parties]
            plain, fast = (make(tables, programs, built.initial, built.teardown, built.broken_before).run()
                           for make, tables in engines)
            assert told(fast) == told(plain), (scene, parties)
            compared += 1
    assert compared > 150


def compiled(*arguments: Any) -> Explorer:
    return search.CompiledExplorer(*arguments, loops=load.loops("numba"), threads=2)


# -- machines that nobody would write --------------------------------------------------------------------------------

class Watched(Toy):
    """A toy that keeps footprints, as every outcome looks at its byte. What is spared: its two lowest bits."""

    footprints = True

    def spared(self, shared: bytes) -> int:
        return shared[0] & 3


def watched(call: Any) -> Watched:
    plain = machine(call)
    return Watched(**{name: does for name, does in plain.does.items() if name not in ("lock_folio", "unlock_folio")})


def programs_of(codes: Sequence[Any]) -> list[Program]:
    return [Program(i, f"p{i}", procedure(code)) for i, code in enumerate(codes)]


@settings(max_examples=100, deadline=None)
@given(CALLS, st.lists(CODE, min_size=1, max_size=5), st.sets(st.integers(0, BYTES - 1), max_size=2),
       st.sets(st.integers(0, BYTES - 1), max_size=2), st.none() | CODE)
def test_they_say_the_same_of_whatever_is_drawn(
    calls: list[Any], codes: list[Any], bad: set[int], bad_ends: set[int], last: Any
) -> None:
    def call(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        ends = dict.fromkeys(calls[args[1]][byte])
        return [end(result, to, f"from {byte}", failed=result > 0 and to > byte) for result, to in ends]

    law = ToyLaw(states=tuple(bad), notes=("from 3",), ends=tuple(bad_ends))
    teardown = Program(13, "teardown", procedure(last)) if last is not None else None
    run_all(watched(call), [law], programs_of(codes), b"\0", teardown, max_states=3000)


def flips(times: int) -> Callable[[], Steps[None]]:
    def steps() -> Steps[None]:
        for _ in range(times):
            yield from US.hyp_call("flip")
    return steps


def test_a_party_of_many_places_gets_room_for_them() -> None:
    toy = Watched(hyp_call=lambda byte, party, args: [end(None, byte ^ 1)])
    assert run_all(toy, [ToyLaw()], [Program(0, "a", flips(300)), Program(1, "b", flips(3))], b"\0").states == 4 * 301


def test_a_byte_of_all_values_gets_room_for_them() -> None:
    toy = Watched(hyp_call=lambda byte, party, args: [end(None, (byte + 1) % PANIC)])
    result = run_all(toy, [ToyLaw(states=(100,))], [Program(0, "a", flips(150))], b"\0")
    assert [len(finding.steps) for finding in result.findings] == [100]


def test_more_parties_than_a_word_has_room_for() -> None:
    toy = Watched(hyp_call=lambda byte, party, args: [end(None, byte ^ 1)])
    assert run_all(toy, [ToyLaw()], [Program(i, f"p{i}", flips(1)) for i in range(10)], b"\0").states == 1 << 10


def test_a_stopped_machine_is_an_end_and_no_deadlock() -> None:
    toy = Watched(hyp_call=lambda byte, party, args: [end(None, PANIC, "stops")])
    result = run_all(toy, [ToyLaw(notes=("stops",))], [Program(i, f"p{i}", flips(2)) for i in range(2)], b"\0")
    assert [(finding.evidence, len(finding.steps)) for finding in result.findings] == [("note stops", 1)]


def test_a_teardown_that_never_ends_and_one_that_waits() -> None:
    def for_ever() -> Steps[None]:
        while True:
            yield from US.hyp_call("flip")

    def waits() -> Steps[None]:
        yield from US.lock_folio(0)                     # type: ignore[arg-type]

    toy = Watched(hyp_call=lambda byte, party, args: [end(None, byte ^ 1)])
    for last, evidence in ((for_ever, "teardown does not end"), (waits, "teardown waits for ever in lock_folio(0)")):
        teardown = Program(13, "teardown", last)
        result = run_all(toy, [ToyLaw()], [Program(0, "a", flips(3))], b"\0", teardown)
        assert [finding.evidence for finding in result.findings] == [evidence]


def test_what_raises_is_told_as_in_python() -> None:
    def breaks(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        return [end(byte // (3 - byte), byte + 1)]

    messages = []
    programs = [Program(0, "a", flips(9)), Program(1, "b", flips(9))]
    for make in (Explorer, compiled):
        with pytest.raises(DesignRaised) as raised:
            make(Tables(Watched(hyp_call=breaks), [ToyLaw()]), programs, b"\0", None, ()).run()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "after\n  1. " in messages[0]


def test_after_an_error_nothing_is_waited_for() -> None:
    failing = [True]

    def sometimes(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        if byte == 2 and failing:
            raise ValueError("not now")
        return [end(None, byte + 1)]

    tables = Tables(Watched(hyp_call=sometimes), [ToyLaw()])
    with pytest.raises(DesignRaised):
        compiled(tables, [Program(0, "a", flips(5))], b"\0").run()
    failing.clear()
    assert compiled(tables, [Program(0, "a", flips(5))], b"\0").run().states == 6


# -- which engine ----------------------------------------------------------------------------------------------------

def test_a_host_without_footprints_is_explored_in_python() -> None:
    tables = Tables(Toy(), [ToyLaw()])
    assert type(choice.explorer("compiled", tables, [Program(0, "a", flips(0))], b"\0", None, ())) is Explorer


def test_small_scenarios_load_nothing() -> None:
    run = ("import sys; from guest_memfd.cli.main import main; "
           "main(['check', 'library', '--hypervisor', 'pkvm', '--scenario', 'zero-padding-load', '-q', '-j', '1']); "
           "sys.exit('numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", run], capture_output=True, check=False).returncode == 0


def test_large_scenarios_are_handed_over_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = world("none", "kvm", engine="python").explorer(["vcpu", "zeropad"]).run()
    loaded = []
    monkeypatch.setattr(choice, "MANY", 20)
    monkeypatch.setattr(choice, "_load", lambda engine: loaded.append(engine) or load.loops("numba"))
    choice._fastest.cache_clear()
    assert told(world("none", "kvm").explorer(["vcpu", "zeropad"]).run()) == told(plain)
    assert loaded == ["compiled"]


def test_a_limit_before_that_is_reached_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MANY", 20)
    monkeypatch.setattr(choice, "_is_loaded", lambda: False)
    monkeypatch.setattr(choice, "_fastest", lambda: pytest.fail("nothing is to be loaded"))
    assert world("none", "kvm").explorer(["vcpu", "zeropad"]).run(max_states=10).limit == "more than 10 states"


@pytest.mark.parametrize("engine", choice.ENGINES)
def test_reports_are_equal(engine: str) -> None:
    def report(engine: str) -> Any:
        return replace(check("none", "kvm", parties=["vcpu", "zeropad"], jobs=1, engine=engine), seconds=0.0)

    assert report(engine) == report("python")


def without(*names: str) -> Callable[[str], object]:
    return lambda name: None if name in names else name


def test_an_engine_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choice, "find_spec", without("numba"))
    assert main(["check", "library", "--scenario", "zero-padding-load", "--engine", "compiled"]) == 5
    assert capsys.readouterr().err == (
        "gmem: the compiled engine is not here: there is no numba; pip install 'guest-memfd[fast]' installs what it needs\n")
    assert main(["check", "library", "--scenario", "zero-padding-load", "--engine", "quick"]) == 4
    assert "unknown engine 'quick'" in capsys.readouterr().err


def test_without_numba_numpy_and_without_both_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MANY", 20)
    plain = told(world("none", "kvm", engine="python").explorer(["vcpu", "zeropad"]).run())
    for missing, here in ((["numba"], load.loops("numpy")), (["numba", "numpy"], None)):
        monkeypatch.setattr(choice, "find_spec", without(*missing))
        choice._fastest.cache_clear()
        assert choice._fastest() is here
        assert told(world("none", "kvm").explorer(["vcpu", "zeropad"]).run()) == plain
    choice._fastest.cache_clear()


def test_a_numba_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: Any) -> None:
        raise RuntimeError("LLVM is not here")

    monkeypatch.setattr(load, "_compile", fails)
    load.loops.cache_clear()
    choice._fastest.cache_clear()
    try:
        with pytest.warns(EngineNotice, match="does not work here, a slower one explores: RuntimeError: LLVM"):
            assert choice._fastest() is load.loops("numpy")
        with pytest.raises(HostUnavailable, match="compiled engine does not work here: RuntimeError: LLVM is not here"):
            world("none", "kvm", engine="compiled").explorer(["vcpu"])
    finally:
        load.loops.cache_clear()
        choice._fastest.cache_clear()


def test_an_engine_that_there_is_not() -> None:
    with pytest.raises(UnknownName, match="unknown engine 'copmiled'; did you mean 'compiled'"):
        world("library", "pkvm", engine="copmiled")


def test_a_state_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WORD_MASK", 0)
    plain = told(world("none", "kvm", engine="python").explorer(["vcpu", "zeropad"]).run())
    with pytest.warns(EngineNotice, match="what the compiled engine cannot: the states of a scenario do not fit"):
        assert told(world("none", "kvm", engine="compiled").explorer(["vcpu", "zeropad"]).run()) == plain
    monkeypatch.setattr(flat, "PART_MASK", 3)
    with pytest.warns(EngineNotice, match="the state of the host changes in too many bytes"):
        assert told(world("none", "kvm", engine="compiled").explorer(["vcpu", "zeropad"]).run()) == plain


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_room(self: Any, spare: int) -> None:
        raise MemoryError

    monkeypatch.setattr(rows.Rows, "grow", no_room)
    assert main(["check", "library", "--hypervisor", "pkvm", "--parties", "vcpu", "--engine", "compiled", "-j", "1"]) == 5
    assert "no memory left" in capsys.readouterr().err


# -- compiling -------------------------------------------------------------------------------------------------------

def test_loops_are_compiled_for_one_set_of_types() -> None:
    module = load.loops("numba")
    agree(world("none", "pkvm"), ["vcpu2", "zeropad"])
    for name in ("expand", "before", "breaking", "clear", "run_down", "rehash"):
        assert len(getattr(module, name).signatures) == 1, name


def test_where_compiled_loops_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked, other = tmp_path / "locked", tmp_path / "other"
    locked.write_text("a file, so that there can be no folder")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "pycache_prefix", str(locked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    jit.folder.cache_clear()
    kept = jit.folder()
    assert kept is not None
    assert kept.parent == other / "guest-memfd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    jit.folder.cache_clear()
    assert jit.folder() is None
    jit.folder.cache_clear()


RUN = """
import json, sys, warnings
from guest_memfd.explore.world.scenario import world
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    states = world("library", "pkvm", engine="compiled").explorer(["vcpu"]).run().states
print(json.dumps([states, [str(each.message) for each in told]]))
"""


def fresh(**environment: str) -> Any:
    """A run in a process of its own: states, and what was told."""
    out = subprocess.run([sys.executable, "-c", RUN], env={**os.environ, **environment}, capture_output=True, check=True)
    return json.loads(out.stdout)


def test_a_numba_that_compiles_nothing_is_told() -> None:
    asked = ["check", "library", "--hypervisor", "pkvm", "--parties", "vcpu", "--engine", "compiled", "-j", "1"]
    out = subprocess.run([sys.executable, "-m", "guest_memfd", *asked], env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
                         capture_output=True, text=True, check=False)
    assert out.returncode == 5
    assert "NUMBA_DISABLE_JIT is set, and numba compiles nothing" in out.stderr


@pytest.mark.long
def test_the_first_use_says_that_it_compiles_and_the_second_does_not(tmp_path: Path) -> None:
    states, (said,) = fresh(NUMBA_CACHE_DIR=str(tmp_path))
    assert states > 50
    assert f"once; it is kept in {tmp_path}" in said
    assert fresh(NUMBA_CACHE_DIR=str(tmp_path)) == [states, []]


SEEN = """
import numpy as np
from guest_memfd import check
from guest_memfd.explore.engine.compiled import load, memo, search
search.FEW = 1
# What one probe in four billion comes to: nothing is there, and the upper half of the hash is zero.
load.loops("numba").touch(np.zeros((1, 1), np.uint64), np.zeros(8, np.uint64), np.full(3, 5, np.uint64), 2)
for parties in ["vcpu2", "vmm2", "pfn-cache"], ["vcpu", "patient-vcpu", "vmm2"]:
    print([check("library", "pkvm", parties=parties, engine="compiled", jobs=jobs).states for jobs in (1, 2)])
# The last levels are small, so one of two threads takes them, and parts get room there; then both look for the ends.
memo.FEW, search.FEW = 0, 1000
print(check("library", "pkvm", parties=["patient-vcpu", "vmm"], engine="compiled", jobs=2).states)
"""


@pytest.mark.long
def test_no_loop_reaches_over_the_end_of_an_array(tmp_path: Path) -> None:
    """Compiled so that it is told; else memory of something else would be written."""
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = [subprocess.run([sys.executable, "-W", "ignore", "-c", SEEN], env={**os.environ, **more}, capture_output=True,
                          text=True, check=True, timeout=600) for more in (checked, {})]
    assert ran[0].stdout == ran[1].stdout
    assert ran[0].stdout


@pytest.mark.long
def test_nowhere_to_keep_it_is_said_each_time(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.write_text("")
    for _ in range(2):
        states, (said,) = fresh(NUMBA_CACHE_DIR=str(locked), PYTHONPYCACHEPREFIX=str(locked), XDG_CACHE_HOME=str(locked))
        assert states > 50
        assert "can be written" in said
