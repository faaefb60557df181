"""Names: a class's name is one thing's alone, and tests that are named are there. Docstrings say something."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "guest_memfd"

SHARED = {
    "Stage2": "of a hypervisor, what it says of a page's tables; of the architecture, the registers of a walk",
}
"""Names that two files have, and why."""


def twice(files: dict[str, str]) -> dict[str, list[str]]:
    """Names of classes that more than one of *files*, by name, has."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(name)
    return {name: sorted(places) for name, places in found.items() if len(places) > 1}


def test_a_name_is_one_class_s_alone() -> None:
    texts = {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    found = twice(texts)
    assert {name: places for name, places in found.items() if name not in SHARED} == {}
    assert SHARED.keys() <= found.keys(), "no longer shared: take it off the list"


@pytest.mark.parametrize(("other", "told"), [("class Vm: ...", {"Vm": ["a.py", "b.py"]}), ("class Other: ...", {})])
def test_two_of_a_name_are_told(other: str, told: dict[str, list[str]]) -> None:
    assert twice({"a.py": "class Vm: ...", "b.py": other}) == told


# ``tests/test_x.py (test_this, test_that)``: in words of the source, the manual, and tools.
MENTION = re.compile(r"tests/(test_\w+)\.py|\b(test_\w{6,})\b(?!\.py|[_*])")
TOLD = sorted(path for place, form in (("src", "*.py"), ("tools", "*.py"), ("docs", "*.md"))
              for path in (ROOT / place).rglob(form))


def test_tests_that_words_name_are_where_the_words_say() -> None:
    lost = []
    for path in TOLD:
        file = None
        for mention in MENTION.finditer(path.read_text(encoding="utf-8")):
            file = mention[1] or file
            where = ROOT / "tests" / f"{file}.py"
            text = where.read_text(encoding="utf-8") if where.exists() else ""
            if file and not (text and (not mention[2] or f"def {mention[2]}(" in text)):
                lost.append(f"{path.relative_to(ROOT)}: {mention[0]} of {file}")
    assert lost == []


def short(files: dict[str, str]) -> list[str]:
    """Docstrings of three words or fewer in *files*, by name: they say what the name says, or nothing."""
    return [f"{name}: {text}" for name, source in files.items() for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node))
            and len(text.split()) <= 3]


def test_a_docstring_says_more_than_three_words() -> None:
    assert short({str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}) == []


@pytest.mark.parametrize(("text", "told"), [("As it says.", ["a.py: As it says."]), ("All that it says.", [])])
def test_a_short_docstring_is_told(text: str, told: list[str]) -> None:
    assert short({"a.py": f'def f():\n    """{text}"""'}) == told


def too_long(files: dict[str, int]) -> list[str]:
    """Test files, by name and number of lines, that nobody reads in one sitting."""
    return [f"{name}: {lines} lines" for name, lines in sorted(files.items()) if lines > 700]


def test_a_test_file_is_read_in_one_sitting() -> None:
    assert too_long({path.name: len(path.read_text(encoding="utf-8").splitlines())
                     for path in Path(__file__).parent.rglob("*.py")}) == []
    assert too_long({"a.py": 700, "b.py": 701}) == ["b.py: 701 lines"]
