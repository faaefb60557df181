"""The mutants: operators do what they say, names last, the dead are dead and the living live."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from mutants import tested, watch
from mutants.apply import swap
from mutants.baseline import Ran, reached
from mutants.change import replaced, rewritten, source
from mutants.children import Died, each
from mutants.cli import main
from mutants.equivalent import entries, listed, mistakes
from mutants.explore import Explored
from mutants.killer import Killer, Seen, Tried
from mutants.mutant import Mutant, mutants, of_site
from mutants.operators import OPERATORS
from mutants.operators.loops import part_of_batch
from mutants.run import chosen, known
from mutants.site import Site, sites
from mutants.targets import SOURCES, TARGETS, Target
from mutants.trial import KILLED, SAME, SURVIVED, UNREACHED, Fate, Known, attempt

LIBRARY = TARGETS["library"]
ALONE = Target("alone", LIBRARY.files, (Explored(most=1, scenes=("two-pages",)),))

SAMPLE = '''
SIZE: int = 2
TABLE = {"a": 1, "b": 2}

class Part:
    """Words."""

    title = "words"
    flag = True

    def step(self, start: int, nr: int) -> Steps[int]:
        """Words."""
        yield from self.host.begin_op("punch", start, nr)
        yield from self.host.down_write("invalidate")
        ret = yield from self.host.tree_reserve("attributes", start, nr)
        if ret:
            yield from self.host.up_write("invalidate")
            return ret
        for held in folios:
            if held.gfn is not None and start < nr:
                yield from self.ops.reclaim(held.gfn, held.folio)
        yield from self.host.up_write("invalidate")
        return 0

    def names(self) -> Steps[Conversion]:
        return Conversion(-EAGAIN, max(index, start))

    @abstractmethod
    def nothing(self) -> int:
        return 1
'''


def of_sample(path: Path, text: str = SAMPLE) -> list[Mutant]:
    (path / "sample.py").write_text(text)
    return [mutant for site in sites("core/sample.py", path / "sample.py") for mutant in of_site(site)]


def done(found: list[Mutant], name: str, operator: str) -> list[str]:
    return [f"{m.change.was} -> {m.change.now}" for m in found if m.site.name == name and m.operator == operator]


STEP = {
    "drop-undo": ["yield from self.host.up_write('invalidate') -> nothing"],
    "drop-step": ["yield from self.host.down_write('invalidate') -> nothing",
                  "ret = (yield from self.host.tree_reserve('attributes', start, nr)) -> ret = 0",
                  "yield from self.host.up_write('invalidate') -> nothing",
                  "yield from self.ops.reclaim(held.gfn, held.folio) -> nothing"],
    "no-lock": ["yield from self.host.down_write('invalidate'); yield from self.host.up_write('invalidate'); "
                "yield from self.host.up_write('invalidate') -> nothing"],
    "other-mode": ["down_write .. up_write .. up_write -> down_read .. up_read .. up_read"],
    "return-zero": ["ret -> 0"],
    "return-error": ["0 -> -EAGAIN"],
    "negate": ["ret -> not ret",
               "held.gfn is not None and start < nr -> not (held.gfn is not None and start < nr)",
               "held.gfn is not None -> held.gfn is None", "start < nr -> start >= nr"],
    "drop-operand": ["held.gfn is not None and start < nr -> (start < nr)",
                     "held.gfn is not None and start < nr -> (held.gfn is not None)"],
    "and-or": ["held.gfn is not None and start < nr -> (held.gfn is not None) or (start < nr)"],
    "compare": ["start < nr -> start <= nr", "start < nr -> start == nr"],
    "part-of-batch": ["folios -> folios[:1]", "folios -> folios[-1:]", "folios -> folios[1:]", "folios -> folios[::-1]"],
    "other-place": ["held.gfn -> held.pgoff", "held.gfn -> held.pgoff"],
    "swap-arguments": ["start, nr -> nr, start"],
    "other-call": ["self.host.tree_reserve -> self.host.tree_load", "self.ops.reclaim -> self.ops.make_private",
                   "self.ops.reclaim -> self.ops.make_shared"],
}
NAMES = {
    "return-zero": ["Conversion(-EAGAIN, max(index, start)) -> Conversion(0)"],
    "drop-index": ["Conversion(-EAGAIN, max(index, start)) -> Conversion(-EAGAIN)"],
    "index-off-by-one": ["max(index, start) -> max(index, start) + 1", "max(index, start) -> max(index, start) - 1"],
    "drop-clamp": ["max(index, start) -> min(index, start)", "max(index, start) -> index", "max(index, start) -> start"],
    "sign": ["-EAGAIN -> EAGAIN"],
    "other-errno": ["EAGAIN -> EBUSY"],
}


@pytest.mark.parametrize(("name", "operator", "expected"), [
    *(("Part.step", operator, expected) for operator, expected in STEP.items()),
    *(("Part.names", operator, expected) for operator, expected in NAMES.items()),
    ("SIZE", "off-by-one", ["2 -> 3", "2 -> 1"]),
    ("TABLE", "drop-entry", ["'a': 1 -> nothing", "'b': 2 -> nothing"]),
    ("TABLE", "swap-entries", ["1, 2 -> 2, 1"]),
    ("Part.flag", "flip-bool", ["True -> False"]),
])
def test_an_operator_does_what_it_says(tmp_path: Path, name: str, operator: str, expected: list[str]) -> None:
    assert done(of_sample(tmp_path), name, operator) == expected


def test_what_has_no_parts_is_made_a_list_first(tmp_path: Path) -> None:
    text = "def f(pages, there):\n    for page in zip(pages) if there else ():\n        print(page)\n"
    changed = of_sample(tmp_path, text)
    assert done(changed, "f", "part-of-batch")[0] == (
        "zip(pages) if there else () -> [*(zip(pages) if there else ())][:1]")
    assert all(compile(mutant.tree(), "sample.py", "exec") for mutant in changed)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_a_loop_goes_over_has_parts(name: str) -> None:
    everywhere = [site for file in TARGETS[name].paths() for site in sites(file, SOURCES / file)]
    assert sum(1 for site in everywhere for _ in part_of_batch(site)) > 10


def test_cases_of_one_question_are_not_swapped(tmp_path: Path) -> None:
    text = """
def handle(stop):
    if isinstance(stop, Hvc):
        return call(stop)
    if isinstance(stop, Wfi):
        return wait(stop)
    if busy():
        return again(stop)
"""
    swapped = [m.description for m in of_sample(tmp_path, text) if m.operator == "swap-steps"]
    assert len(swapped) == 1
    assert swapped[0].startswith("if isinstance(stop, Wfi):; if busy():")


def test_what_cannot_go_wrong_is_left_alone(tmp_path: Path) -> None:
    found = of_sample(tmp_path)
    assert {mutant.site.name for mutant in found} == {"SIZE", "TABLE", "Part.flag", "Part.step", "Part.names"}
    assert not any("begin_op" in ast.dump(node) for mutant in found for node in mutant.change.edits)


def test_a_procedure_without_steps_is_still_one(tmp_path: Path) -> None:
    (mutant,) = [m for m in of_sample(tmp_path, "def f(host):\n    yield from host.mmap()\n") if m.operator == "drop-step"]
    space: dict[str, Any] = {}
    exec(compile(mutant.tree(), "sample", "exec"), space)
    assert list(space["f"](None)) == []


def test_names_outlive_other_functions(tmp_path: Path) -> None:
    before = {m.id: m.description for m in of_sample(tmp_path)}
    more = "    def more(self, start):\n        yield from self.flush(start + 1)\n\n    def names"
    after = {m.id: m.description for m in of_sample(tmp_path, f"# a line\n{SAMPLE.replace('    def names', more)}")}
    assert len(after) > len(before)
    assert after.items() >= before.items()


@cache
def everything() -> list[Mutant]:
    return mutants(LIBRARY)


# One class, so that one worker makes them.
class TestAllOfThem:
    def test_every_operator_finds_something_and_every_name_is_its_own(self) -> None:
        names = [mutant.id for mutant in everything()]
        assert len(set(names)) == len(names)
        nowhere = {"wait-for-lock"}                         # the library no longer tries for a lock
        assert {mutant.operator for mutant in everything()} == set(OPERATORS) - nowhere
        assert "core/convert.py:make_private_locked:drop-step:3" in names

    def test_a_pattern_of_names_saves_work_and_nothing_else(self) -> None:
        for name in ("core/direct_map.py:*", "*.py:zap:*", "*:zap:*", "core/*zap*", None):
            assert [m.id for m in chosen(mutants(LIBRARY, name), name, None, 1)] == [
                m.id for m in chosen(everything(), name, None, 1)]

    def test_mutants_are_python(self) -> None:
        for mutant in everything()[::5]:
            compile(mutant.tree(), mutant.site.file, "exec")

    def test_a_sample_is_drawn_in_order_and_always_the_same(self) -> None:
        drawn = chosen(everything(), "core/convert.py:*:drop-step:*", 5, 1)
        assert len(drawn) == 5
        assert drawn == chosen(everything(), "core/convert.py:*:drop-step:*", 5, 1) != chosen(everything(), None, 5, 1)
        assert [m.id for m in drawn] == [m.id for m in everything() if m in drawn]


def test_the_list_of_equivalents_names_mutants_and_gives_reasons() -> None:
    files = {name.partition(":")[0] for name in listed()}
    places = {name.rpartition(":")[0].rpartition(":")[0] for name in listed()}
    names = [mutant.id for file in files for site in sites(file, SOURCES / file) if f"{file}:{site.name}" in places
             for mutant in of_site(site)]
    assert mistakes(listed(), names, {}) == []
    assert all(any(file in target.paths() for target in TARGETS.values()) for file in files)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_files_and_tests(name: str) -> None:
    target = TARGETS[name]
    assert target.paths()
    for killer in target.killers:
        if isinstance(killer, tested.Tested):
            assert all(list(tested.TESTS.glob(file)) for file in killer.files)


def test_mistakes_of_the_list_are_told() -> None:
    read = dict(entries(["# words", "", "a:1  # is the same", "b:1", "c:1  # dead", "d:1  # gone"]))
    fates = {"a:1": Fate(SURVIVED), "c:1": Fate(KILLED, "kvm: vcpu", "one-owner: two")}
    assert mistakes(read, ["a:1", "b:1", "c:1"], fates) == [
        "b:1: no reason is given", "c:1: it is killed, by kvm: vcpu (one-owner: two)", "d:1: there is no such mutant",
    ]


def test_the_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "core/direct_map.py:zap:drop-step:*"]) == 0
    assert "yield from gmem.flush((folio,)) -> nothing" in capsys.readouterr().out


# -- trials, on every party alone ------------------------------------------------------------------------------------


@cache
def known_alone() -> Known:
    return known(ALONE)


def fate(mutant: Mutant, base: Known | None = None, seconds: float = 60) -> Fate:
    ((_, answer),) = each([(0, partial(attempt, mutant, base or known_alone(), seconds))], jobs=1, seconds=60)
    assert not isinstance(answer, Died), answer
    return answer


def named(name: str) -> Mutant:
    file, site, *_ = name.split(":")
    return next(mutant for mutant in of_site(function(site, (file,))) if mutant.id == name)


def function(name: str, files: Sequence[str] = LIBRARY.paths()) -> Site:
    return next(site for file in files for site in sites(file, SOURCES / file) if site.name == name)


def unchanged(name: str = "make_private_locked") -> Mutant:
    site = function(name)
    stmt = next(stmt for stmt in site.statements() if isinstance(stmt, ast.Return))
    assert stmt.value is not None
    return Mutant(site, "nothing", 1, replaced(stmt.value, source(stmt.value)))


class Suspicious(Killer):
    """Explores everything again, in new worlds."""

    def against(self, mutant: Mutant, seen: Seen) -> Tried:
        return Tried(ALONE.killers[0].scenarios())


class TestTrials:
    def test_a_known_mistake_is_killed(self) -> None:
        killed = fate(named("core/direct_map.py:zap:drop-step:2"))
        assert killed.fate == KILLED
        assert killed.why.startswith("one-owner: ")

    def test_a_value_is_a_mutant_too(self) -> None:
        assert fate(named("hypervisors/kvm/pkvm.py:PKVM:swap-entries:1")).fate == KILLED

    def test_a_mutant_that_changes_nothing_takes_the_same_steps(self) -> None:
        assert fate(unchanged()).fate == SAME

    def test_and_survives_all_scenarios(self) -> None:
        ((_, without),) = known_alone()
        assert fate(unchanged(), [(Suspicious(), without)]).fate == SURVIVED

    def test_a_mutant_in_code_that_no_scenario_reaches(self) -> None:
        assert fate(unchanged("split")).fate == UNREACHED
        ((killer, base),) = known_alone()
        assert not list(reached(unchanged("split"), base.ran, killer))


def test_a_step_that_never_ends_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK", 0.2)
    site = function("Library.has")
    endless = Mutant(site, "endless", 1, rewritten(next(site.statements()), "while True: pass"))
    assert fate(endless).why == "a step never ends"


def test_one_that_takes_memory_without_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK", 0.01)
    monkeypatch.setattr(watch, "MEMORY", 1)
    assert fate(unchanged()).why == "memory is taken without end"


def test_the_code_of_whatever_is_a_function_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from functools import cache

class Part:
    at = 0

    @property
    def place(self):
        return 1

    @place.setter
    def place(self, to):
        self.at = to + 1

    @staticmethod
    def still():
        return 1

    @classmethod
    def made(cls):
        return 1

NUMBERS = [n for n in (1, 2)]
LATER = lambda: 1

@cache
def once():
    return 1
"""
    module = ModuleType("guest_memfd.part")
    monkeypatch.setitem(sys.modules, "guest_memfd.part", module)
    exec(compile(text, "part.py", "exec"), vars(module))
    swap("part.py", compile(re.sub(r"\b1\b", "2", text), "part.py", "exec"))
    part = module.Part()
    part.place = 10
    assert (part.at, part.place, part.still(), part.made(), module.once()) == (12, 2, 2, 2, 2)


def test_a_child_that_dies_is_told_apart() -> None:
    ((key, answer),) = each([("x", lambda: sys.exit(3))], jobs=1, seconds=1)
    assert (key, answer) == ("x", Died("exit status 1"))


# A killer whose scenarios are tests of pytest. Under pytest there can be no other loop, so a process of its own runs it.
TESTED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from mutants import tested
from mutants.killer import Killer
tested.TESTS = Path(sys.argv[2])
killer = tested.Tested("test_drawn.py")
killer.within(lambda: print([(scenario.label.rpartition("::")[2], scenario.run()) for scenario in killer.scenarios()]))
"""


def test_tests_are_scenarios(tmp_path: Path, python: Any) -> None:
    (tmp_path / "test_drawn.py").write_text("def test_right(): pass\n\ndef test_wrong(): assert 1 == 2, 'no'\n")
    tools = str(Path(__file__).parent.parent / "tools")
    ran = python(TESTED.replace("sys.argv[1]", repr(tools)).replace("sys.argv[2]", repr(str(tmp_path))))
    assert ran.stdout.splitlines()[-1] == "[('test_right', None), ('test_wrong', 'AssertionError: no')]", ran.stderr


def test_of_a_value_who_imports_its_module_can_tell() -> None:
    value = next(m for m in mutants(TARGETS["machine"], "machine/el2/gunyah/rm/errors.py") if m.site.function is None)
    killer = tested.Tested("test_gunyah_*.py", "test_machine_gup.py")
    lookers = killer.looking_at("guest_memfd.machine.el2.gunyah.rm.lifecycle")
    assert lookers >= {"test_gunyah_numbers.py", "test_gunyah_rm.py"}
    ran = [Ran(f"{file}::test", file, 0.1, None, frozenset()) for file in ("test_gunyah_numbers.py", "test_machine_gup.py")]
    assert [run.world for run in reached(value, ran, killer)] == ["test_gunyah_numbers.py"]


# Tests that know the package only by what a folder of tests has imported, and one that is interrupted.
ANEW = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from mutants import tested
from mutants.apply import SOURCES, import_anew
tested.TESTS = Path(sys.argv[2])
killer = tested.Tested("test_*.py")
def work():
    import_anew("words/outcome.py", compile((Path(SOURCES) / "words/outcome.py").read_text(), "outcome.py", "exec"))
    for scenario in killer.scenarios():
        try:
            print(scenario.label, scenario.run())
        except KeyboardInterrupt as end:
            print(scenario.label, "ends with", end)
killer.within(work)
"""


def test_tests_are_imported_anew_with_all_that_they_share(tmp_path: Path, python: Any) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "part.py").write_text("from guest_memfd.words.primitives import Folio, Primitive as known\n")
    (tmp_path / "test_same.py").write_text(
        "from shared import part\nfrom guest_memfd.words.primitives import Primitive\n\n"
        "def test_same(): assert part.known is Primitive\n")
    (tmp_path / "test_wait.py").write_text("def test_wait(): raise KeyboardInterrupt('the time is over')\n")
    tools = str(Path(__file__).parent.parent / "tools")
    ran = python(ANEW.replace("sys.argv[1:3]", repr([tools, str(tmp_path)])).replace("sys.argv[2]", repr(str(tmp_path))))
    assert ran.stdout.splitlines()[-2:] == [
        "all of test_same.py None", "all of test_wait.py ends with the time is over"], ran.stdout + ran.stderr


def test_no_tests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"there are no tests in test_nothing\.py"):
        tested.Tested("test_nothing.py").within(lambda: None)


# In a process of its own: pytest in a child of pytest waits for its parent's watchdog for ever.
@pytest.mark.long
def test_of_a_sample_all_but_a_few_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mutants", "--sample", "60", "--seed", "2", "--jobs", "1"]
    tools = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent.parent / "tools"), *sys.path))}
    ran = subprocess.run(command, cwd=tmp_path, env=tools, capture_output=True, text=True)
    # The goal of the tool: 97 % of those that are not judged equivalent.
    assert ran.returncode == 0, ran.stdout + ran.stderr
