"""The public names: each is there, is imported when it is used and not before, and is all that the documents use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import guest_memfd

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py")])
MODULES = ("errors", "uapi", "testing")
"""Public modules: what is in them may be imported from them."""

IMPORT = re.compile(r"^\s*(?:>>> )?(?:from (guest_memfd[\w.]*) import ([\w, ]+)|import (guest_memfd[\w.]*))", re.M)


@pytest.mark.parametrize("name", guest_memfd.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(guest_memfd, name) is not None
    assert name in dir(guest_memfd)


def test_the_names_that_mypy_is_shown_are_those_that_are_there() -> None:
    text = Path(guest_memfd.__file__).read_text(encoding="utf-8")
    shown = re.findall(r"^ +from guest_memfd\S* import (\w+) as \1$", text, re.M)
    assert sorted(shown) == sorted(guest_memfd.__all__)


def test_another_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'guest_memfd' has no attribute 'Desing'"):
        guest_memfd.Desing  # noqa: B018 - looking it up is the test


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, guest_memfd; print(sorted(name for name in sys.modules if name.startswith('guest_memfd')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['guest_memfd']"


def private(text: str) -> list[str]:
    """What *text* imports of this package and is not public."""
    found = []
    for package, names, module in IMPORT.findall(text):
        inner = (package or module).removeprefix("guest_memfd").lstrip(".").partition(".")[0]
        if inner and inner not in MODULES:
            found.append(package or module)
        if not inner:
            found += [name for name in re.split(r",\s*", names.strip()) if name and name not in guest_memfd.__all__]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_documents_use_public_names_only(page: Path) -> None:
    assert private(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("text", "names"), [
    ("from guest_memfd import check, Desing", ["Desing"]),
    ("    from guest_memfd.explore.trace import load", ["guest_memfd.explore.trace"]),
    ("import guest_memfd.machine.boot", ["guest_memfd.machine.boot"]),
    ("from guest_memfd.uapi.kvm import PRIVATE", [])])
def test_a_private_name_is_told(text: str, names: list[str]) -> None:
    assert private(text) == names
