"""Designs, hypervisors, parties and laws of a file: no package is needed, and what is wrong with the file is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.plugins import guard

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"

DESIGN = '''
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.kvm.default import KVM      # which is not this file's
from beside import TITLE


class Base(OurLibrary):
    pass


class One(Base):
    name, title, source = "one", TITLE, "a test"


class Two(One):
    name = "two"


NUMBER = 42
'''


def gmem(*argv: str, at: Path) -> tuple[int, str, str]:
    command = [sys.executable, "-P", "-m", "guest_memfd.cli.main", *argv]
    done = subprocess.run(command, cwd=at, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}, timeout=500, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(DESIGN)
    (tmp_path / "beside.py").write_text("TITLE = 'a title'\n")
    return tmp_path


SMALL = ("--hypervisor", "kvm", "--parties", "drainer", "-q")


def test_a_design_of_a_file_is_checked_and_leaves_nothing_there(folder: Path) -> None:
    assert gmem("check", "mine.py:One", *SMALL, at=folder) == (0, "one on kvm: holds, 16 laws kept\n", "")
    assert gmem("check", "mine.py:two", *SMALL, at=folder) == (0, "two on kvm: holds, 16 laws kept\n", "")
    assert gmem("check", "two", "--load", "mine.py", *SMALL, at=folder) == (0, "two on kvm: holds, 16 laws kept\n", "")
    assert gmem("check", f"{folder}/mine.py:Two", "--load", "mine.py:Two", *SMALL, at=ROOT)[0] == 4     # there is none here
    assert sorted(each.name for each in folder.iterdir()) == ["beside.py", "mine.py"]


def test_all_kinds_are_loaded_and_the_way_to_see_it_again_works(tmp_path: Path) -> None:
    files = ("tiny_hypervisor.py:TINY", "preallocating_party.py", "frugal_law.py")
    loads = [word for file in files for word in ("--load", str(EXAMPLES / file))]
    listed = gmem("list", *loads, at=tmp_path)[1]
    for name in ("tiny", "prealloc", "zeroed-once"):
        assert f"\n  {name} " in listed
    code, told, _ = gmem("check", "none", "--hypervisor", "tiny", "--parties", "vcpu,zeropad", "--law", "host-survives",
                         "--save-traces", "traces", *loads, at=tmp_path)
    assert code == 2
    again = f"gmem replay traces/none-tiny-host-survives.json {' '.join(loads)}"
    assert f"  replay   {again}\n" in told
    assert gmem(*again.split()[1:], at=tmp_path)[:2][0] == 2
    assert gmem(*again.replace("replay", "explain", 1).split()[1:], at=tmp_path)[0] == 0
    assert "unknown hypervisor 'tiny'" in gmem("replay", "traces/none-tiny-host-survives.json", at=tmp_path)[2]


@pytest.mark.parametrize(("argv", "words"), [
    ("check mine.py:Tow", "mine.py:Tow: the file has no 'Tow'; did you mean 'Two'?"),
    ("check mine.py", "mine.py: it has the designs one, two; FILE:NAME names one"),
    ("check mine.py:NUMBER", "mine.py:NUMBER is 42, and none of designs, hypervisors, parties or laws"),
    ("check mine.py:KVM", "mine.py:KVM: that is no design; FILE:NAME names one"),
    ("check mine.py:Base", "mine.py:Base: there is a design called 'library'; choose another name"),
    ("check none.py:X", "cannot load 'none.py': No such file or directory"),
    ("check library --load .", "cannot load '.': Is a directory"),
    ("check library --load beside.py", "beside.py has no designs, hypervisors, parties or laws"),
    ("check library --load notes.txt", "cannot load 'notes.txt': that is no Python file (.py)"),
    ("check library --load in/json.py", "cannot load 'in/json.py': there is a module 'json' already ("),
    ("check broken.py:X", "broken.py does not load: SyntaxError: "),
    ("check exits.py:X", "exits.py does not load: SystemExit: 0 (exits.py:1 in <module>)"),
    ("check taken.py:X", "taken.py:X: there is a design called 'library'; choose another name"),
    ("check wrong.py:X", "wrong.py:X: design plugin 'x': its title is 7, and has to be a line of words"),
    ("compare wrong.py:X", "wrong.py:X: design plugin 'x': its title is 7, and has to be a line of words"),
    ("list --load exits.py", "exits.py does not load: SystemExit: 0 (exits.py:1 in <module>)"),
])
def test_what_is_wrong_with_a_file_is_told(
    folder: Path, argv: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    design = "from guest_memfd.designs.ours import OurLibrary\nclass X(OurLibrary):\n    "
    (folder / "in").mkdir()
    for name, text in (("in/json.py", ""), ("broken.py", "def"), ("exits.py", "raise SystemExit(0)"), ("notes.txt", "x"),
                       ("taken.py", f"{design}title = 'another'"), ("wrong.py", f"{design}name, title = 'x', 7")):
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(DESIGNS, "_known", dict(DESIGNS._known))
    before = {*sys.modules}
    assert main(argv.split()) == 4
    for name in {"mine", "beside", "taken", "wrong"} - before:
        sys.modules.pop(name, None)
    assert not {"broken", "exits"} & {*sys.modules}     # what did not load is not there
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"gmem: {words}")
    assert told.err.count("\n") == 1


DEPENDS = """
import os
from guest_memfd.designs.ours import OurLibrary


class X(OurLibrary):
    name, title, source = "x", "a test", "a test"

    def zap(self, folio):
        yield from self.host.warn(f"{%s}")
        return (yield from super().zap(folio))
"""


@pytest.mark.parametrize("on", [
    "hash('a')", pytest.param("os.getpid() % 2", marks=pytest.mark.long), pytest.param("id(self)", marks=pytest.mark.long),
    pytest.param("[*{'a', 'b', 'c', 'd', 'e', 'f'}]", marks=pytest.mark.long)])
def test_what_follows_a_hash_or_a_process_is_told(folder: Path, on: str) -> None:
    (folder / "depends.py").write_text(DEPENDS % on)
    code, out, error = gmem("check", "depends.py:X", "--hypervisor", "kvm", "--parties", "vcpu2", "-q", at=folder)
    assert (code, out) == (4, "")
    assert error.startswith("gmem: party 'vcpu2' of design 'x' on 'kvm' is not deterministic: after the same ")


@pytest.mark.long
def test_compare_tells_it_as_well_and_what_a_plugin_prints_is_no_answer(folder: Path) -> None:
    (folder / "depends.py").write_text("print('hello')\n" + DEPENDS % "hash('a')")
    small = ("--hypervisor", "kvm", "--parties", "vcpu2", "-q")
    assert gmem("compare", "depends.py:X", *small, at=folder)[0] == 4
    (folder / "same.py").write_text("print('hello')\n" + DEPENDS % "1")
    assert gmem("check", "same.py:X", *small, at=folder)[:2] == (0, "x on kvm: holds, 16 laws kept\n")


def test_what_a_plugin_prints_goes_to_standard_error(folder: Path) -> None:
    (folder / "mine.py").write_text(f"print('hello')\n{DESIGN}")
    code, out, error = gmem("list", "designs", "--json", "--load", "mine.py", at=folder)
    assert (code, error) == (0, "hello\n")
    assert "one" in [entry["name"] for entry in json.loads(out)["designs"]]


def test_a_file_that_never_ends_is_told_with_its_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "TICK", 0.02)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (folder / "endless.py").write_text("while True:\n    pass\n")
    assert main(["list", "--load", f"{folder}/endless.py"]) == 4
    still = "does not come back: after 0.6 seconds it is still at endless.py:"
    assert capsys.readouterr().err.startswith(f"gmem: {folder}/endless.py {still}")


def test_what_lies_about_is_not_run(folder: Path) -> None:
    (folder / "json.py").write_text("open('ran', 'w'); raise SystemExit(4)")
    (folder / "same.py").write_text(DEPENDS % "1")
    code, _, error = gmem("check", "same.py:X", "--hypervisor", "kvm", "--parties", "vcpu2", "-q", at=folder)
    assert (code, error) == (0, "")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(("file", "text", "words"), [
    ("leaves.py", "import os; os._exit(0)", "leaves.py does not load: SystemExit: os._exit(0)"),
    ("abc_leaves.py", DEPENDS % "os._exit(0)", "raised SystemExit: os._exit(0)"),
    ("forks.py", DEPENDS % "os.fork()", "is not deterministic"),
])
def test_who_leaves_by_another_door_is_told(folder: Path, file: str, text: str, words: str) -> None:
    (folder / file).write_text(text)
    code, out, error = gmem("check", f"{file}:X", "--hypervisor", "kvm", "--parties", "vcpu2", "-q", at=folder)
    assert (code, out) == (4, "")
    assert words in error


def test_what_raises_in_another_process_alone_is_told(folder: Path) -> None:
    (folder / "depends.py").write_text(DEPENDS % "1 // (os.environ.get('PYTHONHASHSEED') is None)")
    code, _, error = gmem("check", "depends.py:X", "--hypervisor", "kvm", "--parties", "vcpu2", "-q", at=folder)
    assert code == 4
    assert " results it did warn(1) -> None, and in another process nothing more; " in error
