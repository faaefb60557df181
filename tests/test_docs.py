"""The documentation says what the code does: the laws, the examples and what they print, names, links, docstrings."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import io
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest

from guest_memfd.abstract import state as st
from guest_memfd.cli.main import VERBS, main
from guest_memfd.core import GuestMemfdOps, Library
from guest_memfd.core.gmem import PowerPolicy
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import EHWPOISON
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.laws.operations import DOCUMENTED
from guest_memfd.plugins.registry import Registry
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words import primitives

ROOT = Path(__file__).parent.parent
DOCS, SOURCE = ROOT / "docs", ROOT / "src"
EXAMPLES = DOCS / "examples"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
ALL = [PARTIES[name] for name in PARTIES]


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under *heading*, up to the next one of its level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def one_line(paragraph: str) -> str:
    return " ".join(paragraph.replace("\n> ", "\n").split())


# -- the laws ---------------------------------------------------------------------------------------------------------


def test_every_law_has_its_section_and_there_is_no_other() -> None:
    assert re.findall(r"^## (.+)$", page("laws"), re.M) == [*LAWS]


@pytest.mark.parametrize("name", LAWS)
def test_law_is_told_as_it_is(name: str) -> None:
    law = LAWS[name]
    sentence, source, when, evidence, silence = section(page("laws"), name).strip().split("\n\n")
    assert one_line(sentence) == f"> {law.sentence}"
    assert one_line(source) == f"Source: {law.source}"
    assert one_line(when) == f"Checked: {law.when}"
    assert evidence.startswith("Evidence: ")
    assert silence.startswith("Does not say: ")


# -- the library, the explorer, the abstract host ---------------------------------------------------------------------


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in *text*, heads left out."""
    lines = text.splitlines()
    ruled = {number for number, line in enumerate(lines) if line.startswith("| ---")}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for number, line in enumerate(lines) if line.startswith("|") and not {number, number + 1} & ruled
    ]


def test_operations_table_is_that_of_the_code() -> None:
    told = [row[0].strip("`") for row in rows(section(page("library"), "The operations a hypervisor supplies"))]
    operations = [name for name in vars(GuestMemfdOps) if name in GuestMemfdOps.__abstractmethods__]
    assert told[:len(operations)] == operations


OPERATIONS = {
    "fault": "guest_fault", "allocate": "allocate", "punch": "punch_hole", "to_private": "make_private",
    "to_shared": "make_shared", "unbind": "unbind", "teardown": "vm_teardown", "bind": "bind",
}
"""As the laws call it -> as the library does."""
ERRNOS = {**vars(errno), "EHWPOISON": EHWPOISON}


def test_refusals_are_those_the_laws_allow() -> None:
    told: dict[str, set[int]] = {}
    operation = ""
    for row in rows(section(page("library"), "What a refusal leaves")):
        operation = row[0] or operation
        told.setdefault(operation, set()).update(ERRNOS[name] for name in re.findall(r"-(E[A-Z]+)", row[1]))
    for law_name, name in OPERATIONS.items():
        assert told[name], name
        assert told[name] <= {errno.EINVAL, *DOCUMENTED[law_name]}, name


def test_every_power_policy_is_told() -> None:
    assert re.findall(r"^- `(\w+)`:", section(page("library"), "Power"), re.M) == [*get_args(PowerPolicy)]


def test_what_takes_no_step_is_told() -> None:
    bullets = re.findall(r"^- (.+)$", section(page("explorer"), "What takes no step of its own"), re.M)
    assert set(chain.from_iterable(re.findall(r"`(\w+)`", bullet) for bullet in bullets)) == primitives.SILENT


@pytest.mark.parametrize(("heading", "fields"), [
    ("Fields of a frame", st.FRAME_FIELDS), ("Fields of a page of the file", st.PAGE_FIELDS),
    ("Fields of a guest frame", st.GFN_FIELDS), ("Fields of a file", st.FILE_FIELDS), ("Fields of a VM", st.VM_FIELDS),
    ("Around the pages", st.GLOBALS),
])
def test_every_field_is_told(heading: str, fields: dict[str, str]) -> None:
    first = " ".join(row[0] for row in rows(section(page("abstract-host"), heading)))
    assert re.findall(r"`(\w+)`", first) == [*fields]


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


class Block(NamedTuple):
    """A fenced block, and the line of text before it."""

    before: str
    language: str
    text: str


def blocks(md: Path) -> list[Block]:
    found: list[Block] = []
    before, language, lines = "", None, []
    for line in md.read_text(encoding="utf-8").splitlines(keepends=True):
        if language is not None:
            if line == "```\n":
                found.append(Block(before, language, "".join(lines)))
                before, language, lines = "", None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            language = line[3:].strip()
        else:
            before = line.strip() or before
    return found


FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_is_shown_as_it_is(path: Path) -> None:
    shown = [
        block.text for md in DOCS.glob("*.md") for block in blocks(md)
        if block.language == "python" and f"(examples/{path.name})" in block.before
    ]
    assert shown == [path.read_text(encoding="utf-8")]


SHOWN_TO_PRINT = [
    (md.stem, code.text, printed.text) for md in sorted(DOCS.glob("*.md")) for code, printed in pairwise(blocks(md))
    if (code.language, printed.language) == ("python", "text")
]


@pytest.mark.parametrize(("where", "code", "printed"), SHOWN_TO_PRINT, ids=[shown[0] for shown in SHOWN_TO_PRINT])
def test_what_is_printed_is_what_is_shown(where: str, code: str, printed: str) -> None:
    path = f"import sys; sys.path[:0] = [{str(SOURCE)!r}, {str(EXAMPLES)!r}]\n"
    run = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == (printed, "")


def broken(world: World, *scenarios: tuple[str, ...]) -> set[str]:
    """Names of the laws that break in *scenarios*; they must have been explored to the end."""
    results = [world.explorer(parties).run() for parties in scenarios]
    assert all(result.limit is None for result in results)
    return {finding.law for result in results for finding in result.findings}


PAIRS = [("vcpu", "vmm"), ("vcpu", "zeropad"), ("vcpu", "stop"), ("vcpu", "power"), ("vmm", "device"),
         ("vcpu", "memory-failure")]


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_the_library_holds_on_the_example_hypervisor(pair: tuple[str, ...]) -> None:
    world = World(DESIGNS["library"], example("tiny_hypervisor").TINY, ALL)
    assert broken(world, pair) == set()


@pytest.mark.usefixtures("examples")
def test_doing_nothing_does_not_hold_on_the_example_hypervisor() -> None:
    world = World(DESIGNS["none"], example("tiny_hypervisor").TINY, ALL)
    assert broken(world, ("vcpu", "zeropad")) == {"host-survives"}


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("hypervisor", "laws"), [
    ("kvm", {"one-owner", "guest-private"}), ("pkvm", set()), ("gunyah", set()),
])
def test_what_the_example_design_forgets(hypervisor: str, laws: set[str]) -> None:
    world = World(example("forgetful_design").NoFlush, HYPERVISORS[hypervisor], ALL)
    assert broken(world, ("vcpu", "zeropad"), ("vcpu", "stop")) == laws


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_the_library_holds_with_the_example_party(hypervisor: str) -> None:
    world = World(DESIGNS["library"], HYPERVISORS[hypervisor], [example("preallocating_party").PREALLOC, *ALL])
    assert broken(world, ("prealloc", "vcpu"), ("prealloc", "memory-failure"), ("prealloc", "unloader")) == set()


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("fd", "laws"), [(True, set()), (False, {"lifetimes"})])
def test_a_system_call_in_flight_holds_the_file(fd: bool, laws: set[str]) -> None:
    party = replace(example("preallocating_party").PREALLOC, fd=fd)
    world = World(DESIGNS["library"], HYPERVISORS["kvm"], [party, *ALL])
    assert broken(world, ("prealloc", "vmm", "stop")) == laws


@pytest.mark.long
@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah", "tiny"])
def test_examples_in_the_whole_suite(hypervisor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    party, tiny = example("preallocating_party").PREALLOC, example("tiny_hypervisor").TINY
    monkeypatch.setitem(PARTIES._known, party.name, party)
    on = tiny if hypervisor == "tiny" else HYPERVISORS[hypervisor]
    for scene in ("two-pages", "both-shared", "two-vms"):
        world = World(DESIGNS["library"], on, [party, *ALL], scene=SCENES[scene])
        asked = [names for names in plan(world, full=False) if party.name in names or on is tiny]
        assert broken(world, *asked) == set(), scene


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("design", "hypervisor", "kept"), [
    ("library", "gunyah", True), ("library", "pkvm", True), ("library", "kvm", False),
    ("secretmem", "pkvm", False), ("secretmem", "kvm", False),
])
def test_who_keeps_the_example_law(design: str, hypervisor: str, kept: bool) -> None:
    law = example("frugal_law").ZEROED_ONCE
    world = World(DESIGNS[design], HYPERVISORS[hypervisor], ALL, laws=[law])
    assert broken(world, ("vcpu",), ("vcpu", "power")) == (set() if kept else {law.name})


def test_the_package_of_examples_registers_what_the_pages_tell() -> None:
    package = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))
    told = [tomllib.loads(block.text)["project"]["entry-points"] for md in sorted(DOCS.glob("write-a-*.md"))
            for block in blocks(md) if block.language == "toml"]
    groups = package["project"]["entry-points"]
    assert {group: entries for page in told for group, entries in page.items()} == groups
    modules = {value.partition(":")[0] for entries in groups.values() for value in entries.values()}
    assert modules == set(package["tool"]["setuptools"]["py-modules"])


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("name", "registry"), [
    ("write-a-hypervisor", HYPERVISORS), ("write-a-design", DESIGNS), ("write-a-party", PARTIES),
    ("write-a-law", LAWS),
])
def test_registering_works_as_told(
    name: str, registry: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, = (block.text for block in blocks(DOCS / f"{name}.md") if block.language == "toml")
    groups = tomllib.loads(told)["project"]["entry-points"]
    info = tmp_path / "example-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 0\n")
    (info / "entry_points.txt").write_text("".join(
        f"[{group}]\n" + "".join(f"{entry} = {value}\n" for entry, value in entries.items())
        for group, entries in groups.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    (group, entries), = groups.items()
    (entry, _), = entries.items()
    assert group == registry.group
    fresh = Registry(registry.kind, registry.group, {}, registry._check)
    assert [*fresh] == [entry]
    assert fresh.broken() == {}
    assert fresh[entry].name == entry


def test_all_that_a_design_can_replace_is_in_the_table_with_its_file() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| \[(core/\w+.py)\]", page("write-a-design"), re.M)
    told = {name: file for names, file in rows for name in re.findall(r"`(\w+)`", names)}
    procedures = dict(inspect.getmembers(Library, inspect.isgeneratorfunction))
    assert told == {name: f"core/{Path(inspect.getfile(procedure)).name}" for name, procedure in procedures.items()
                    if not name.startswith("_")}


# -- names, links, docstrings -----------------------------------------------------------------------------------------


def commands() -> set[str]:
    text = "\n".join(md.read_text(encoding="utf-8") for md in PAGES)
    return set(re.findall(r"(?:^ {4}|`|^\$ )(?:\.venv/bin/)?(gmem [a-z][^`\n]*)", text, re.M))


@pytest.mark.parametrize("command", sorted(commands()))
def test_commands_exist(command: str) -> None:
    _, verb, *rest = command.partition(" -- ")[0].split()           # what follows is another program's
    assert verb in VERBS
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([verb, *(rest[:1] if verb == "kernel" else ()), "--help"]) == 0
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in printed.getvalue(), f"gmem {verb} has no {word}"


@pytest.mark.parametrize("md", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(md: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", md.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if target and not (md.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_has_holes_to_be_filled_in(page: Path) -> None:
    assert re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", page.read_text(encoding="utf-8")) == []


def undocumented(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not ast.get_docstring(tree):
        yield f"{path.name}: the module"
    yield from _undocumented(tree, path.name)


def _undocumented(tree: ast.Module | ast.ClassDef, where: str) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _said_elsewhere(node):
            yield f"{where}: {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node, f"{where}: {node.name}")


# The setter of a property, and a method that a protocol takes over from something that has its docstring.
def _said_elsewhere(node: ast.ClassDef | ast.FunctionDef) -> bool:
    setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list)
    body = node.body[0]
    return setter or (isinstance(body, ast.Expr) and isinstance(body.value, ast.Constant) and body.value.value is ...)


def test_every_schema_is_told() -> None:
    """Also those that are put together: `guest-memfd-` and one of several strings that look like a name and a version."""
    told = set(re.findall(r"`guest-memfd-([a-z-]+/\d+)`", (DOCS / "json.md").read_text()))
    strings = {
        node.value.removeprefix("guest-memfd-")
        for path in SOURCE.rglob("*.py") if "guest-memfd-" in (text := path.read_text())
        for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert told == {each for each in strings if re.fullmatch(r"[a-z-]+/\d+", each)}


def test_every_public_name_has_a_docstring() -> None:
    assert [*chain.from_iterable(map(undocumented, sorted(SOURCE.rglob("*.py"))))] == []
