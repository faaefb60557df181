"""Completion and man page: what a shell offers is what there is, and both are read by whom they are for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from guest_memfd.cli import shell
from guest_memfd.cli.main import VERBS, main
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import HostUnavailable
from guest_memfd.laws import LAWS

pytest.importorskip("shtab")
pytest.importorskip("argparse_manpage")


def written(what: str, folder: Path) -> Path:
    file = folder / what
    assert main(["shell", what, "-o", str(file)]) == 0
    return file


OFFER = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMPREPLY=()
$(complete -p gmem | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(script: Path, *words: str) -> set[str]:
    command = ["bash", "-c", OFFER, "bash", str(script), "gmem", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return {*done.stdout.split()}


def test_bash_offers_verbs_names_and_options(tmp_path: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("no bash is here")
    script = written("bash", tmp_path)
    assert offered(script, "") >= {*VERBS}
    assert offered(script, "check", "") >= {*DESIGNS}
    assert offered(script, "check", "none", "--law", "") >= {*LAWS}
    assert offered(script, "check", "none", "--hypervisor", "gu") == {"gunyah"}
    assert offered(script, "run", "he") == {"hello"}
    assert offered(script, "explain", "--ht") == {"--html"}


@pytest.mark.parametrize(("name", "check"), [("zsh", ["-n"]), ("fish", ["--no-execute"]), ("bash", ["-n"])])
def test_the_script_is_one_of_its_shell(tmp_path: Path, name: str, check: list[str]) -> None:
    if not (program := shutil.which(name)):
        pytest.skip(f"no {name} is here")
    script = written(name, tmp_path)
    done = subprocess.run([program, *check, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(design in script.read_text() for design in DESIGNS)


def test_the_man_page_has_every_verb_and_option(tmp_path: Path) -> None:
    text = re.sub(r"\\f.|\\", "", written("man", tmp_path).read_text())
    for verb in VERBS:
        assert f"gmem {verb}" in text
    for option in ("--save-traces", "--perfetto", "--kernel", "--steady"):
        assert option in text
    if (groff := shutil.which("groff")) is not None:
        done = subprocess.run([groff, "-ww", "-man", "-Tutf8", tmp_path / "man"], capture_output=True, text=True,
                              check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("argv", "says"), [
    (["basch"], "unknown shell 'basch'; did you mean 'bash'?"), (["man", "--json"], "have no such form"), ([], "WHAT")])
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["shell", *argv]) == 4
    assert says in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(HostUnavailable, match=re.escape("shtab is not here: pip install 'guest-memfd[shell]'")):
        shell._completion("bash")
