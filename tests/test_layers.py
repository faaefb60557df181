"""The layers of the house: a file imports from its own layer's unit, and from layers below, in every kind of import.

LAYERS is the plan; README.md draws it. A unit is a package with everything in it, but for packages that are units of their
own. Imports inside of functions and for type checkers count as any other: what a reader has to know is the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "guest_memfd"

LAYERS = (
    ("errors", "printable", "compat", "distinct", "words.units"),
    ("words", "uapi", "machine.hw", "kernels"),
    ("core", "linux", "machine.hw.arm64"),
    ("plugins", "asm", "machine.linux", "machine.el2.gunyah", "machine.el2.kvm", "probe.ask"),
    ("hypervisors", "designs", "guests", "machine.el2.gunyah.rm", "machine.el2.pkvm", "machine.el2.modelled", "probe.rows"),
    ("abstract", "scenarios", "machine.hypcalls"),
    ("laws", "machine.board"),
    ("explore.engine", "machine.primitives"),
    ("explore.world", "machine.dev"),
    ("explore.suite", "machine.dev.gunyah", "machine.dev.kvm"),
    ("explore", "machine"),
    ("report", "draw"),
    ("lockstep", "vmm", "probe"),
    ("html", "export", "testing"),
    ("conform",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. No two units of one layer import each other."""

PUBLIC = "guest_memfd"
"""`__init__.py` at the top gives the public names, lazily: it may name everything, and nothing below it uses it."""

LARGEST_CYCLE = 5


class Import(NamedTuple):
    """*module*, imported by the module *by*, in line *line* of its file."""

    by: str
    module: str
    line: int


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(by: str, text: str) -> Iterator[Import]:
    """All imports of our own modules in *text*, wherever they stand; import_module() of a constant, too."""
    for node in ast.walk(ast.parse(text)):
        for name in _named(node):
            if name in modules() and name != by:
                yield Import(by, name, getattr(node, "lineno", 0))


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in modules() else str(node.module)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(one for name, path in modules().items() for one in imports_of(name, path.read_text(encoding="utf-8")))


def unit_of(module: str) -> str:
    """The unit that *module* belongs to: the longest name of LAYERS that it begins with."""
    if module == PUBLIC:
        return PUBLIC
    inner = module.removeprefix(f"{PUBLIC}.")
    units = [unit for layer in LAYERS for unit in layer if f"{inner}.".startswith(f"{unit}.")]
    return max(units, key=len, default="")


def upward(found: tuple[Import, ...]) -> list[str]:
    """Imports that do not go down, each with its file and line."""
    level = {unit: at for at, layer in enumerate(LAYERS) for unit in layer}
    wrong = []
    for one in found:
        by, to = unit_of(one.by), unit_of(one.module)
        if by != PUBLIC and by != to and (to == PUBLIC or level[by] <= level[to]):
            path = modules()[one.by].relative_to(ROOT)
            wrong.append(f"{path}:{one.line}: {by} imports {one.module}, which is not below it")
    return wrong


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if not unit_of(name) and list(imports_of("", modules()[name].read_text()))] == []


def test_every_unit_is_there() -> None:
    assert [unit for layer in LAYERS for unit in layer if f"{PUBLIC}.{unit}" not in modules()] == []


def test_imports_go_down() -> None:
    assert upward(imports()) == []


@pytest.mark.parametrize(("by", "text"), [
    ("core.fault", "import guest_memfd.hypervisors"),
    ("words.facts", "from guest_memfd.core import ops"),
    ("machine.linux.mm", "def f():\n    from guest_memfd.machine.boot import Machine"),
    ("laws.law", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from guest_memfd.explore import trace"),
    ("uapi.kvm", "from guest_memfd.words.facts import Note"),
    ("report.json", "from guest_memfd import check"),
    ("asm.assembler", "import importlib\nimportlib.import_module('guest_memfd.cli.main')")])
def test_one_that_does_not_is_told_with_file_and_line(by: str, text: str) -> None:
    (told,) = upward(tuple(imports_of(f"{PUBLIC}.{by}", text)))
    line = len(text.splitlines())
    assert told.startswith(f"src/guest_memfd/{by.replace('.', '/')}.py:{line}: {unit_of(f'{PUBLIC}.{by}')} imports ")


def test_modules_that_need_each_other_are_few_and_in_one_unit() -> None:
    for cycle in cycles({name: {one.module for one in imports() if one.by == name} for name in modules()}):
        assert len({unit_of(name) for name in cycle}) == 1, cycle
        assert len(cycle) <= LARGEST_CYCLE, cycle


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of more than one node that reach each other."""
    reach = {node: _reached(node, graph) for node in graph}
    rings = {frozenset(other for other in reach[node] if node in reach[other]) for node in graph}
    return [set(ring) for ring in rings if len(ring) > 1]


def _reached(node: str, graph: dict[str, set[str]]) -> set[str]:
    seen, left = set[str](), [node]
    while left:
        for follows in graph[left.pop()] - seen:
            seen.add(follows)
            left.append(follows)
    return seen


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [{"a", "b", "c"}]


def test_the_readme_draws_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^ {4}(\d+) +(.+)$", text[text.index("## The house"):], re.M)
    assert [tuple(units.split()) for _, units in drawn] == [*LAYERS]
    assert [int(number) for number, _ in drawn] == [*range(1, len(LAYERS) + 1)]
