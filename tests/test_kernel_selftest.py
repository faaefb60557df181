"""The kernel's own guest_memfd_test and the probe say the same of a kernel."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from kernel_selftest import ALL, failed, one_at_a_time, program

from guest_memfd.cli.main import main

REAL = [name for name in os.environ.get("GMEM_KERNELS", "").split(",") if name]

WITNESS = {"invalid_binding": "bind-offset-overflow", "collapse": "huge-page-collapse"}
"""Sub-test -> the known bug by which it fails."""


def contradictions(wrong: dict[str, str], bugs: dict[str, str]) -> list[str]:
    """Where what failed (sub-test and flags -> why) and the verdicts on known bugs do not fit."""
    tests = {name.partition(" ")[0] for name in wrong}
    said = [f"{name} fails ({why}), and no known bug is the reason" for name, why in wrong.items()
            if bugs.get(WITNESS.get(name.partition(" ")[0], "")) != "present"]
    return said + [f"{bug} is present, and {test} passes" for test, bug in WITNESS.items()
                   if bugs.get(bug) == "present" and test not in tests]


@pytest.mark.parametrize(("wrong", "bug", "said"), [
    ({}, "fixed", []), ({"invalid_binding 3": "x"}, "present", []), ({}, "cannot tell", []),
    ({}, "present", ["bind-offset-overflow is present, and invalid_binding passes"]),
    ({"invalid_binding 1": "r"}, "fixed", ["invalid_binding 1 fails (r), and no known bug is the reason"]),
    ({"fallocate 1": "r"}, "fixed", ["fallocate 1 fails (r), and no known bug is the reason"]),
])
def test_a_contradiction_is_told(wrong: dict[str, str], bug: str, said: list[str]) -> None:
    assert contradictions(wrong, {"bind-offset-overflow": bug}) == said


def test_each_sub_test_is_made_to_ask_whether_it_is_wanted() -> None:
    source = ("#include <x.h>\n#define ____gmem_test(__test, __flags, args...) test_##__test(args);\n"
              "int main(void)\n{\n\ttest_guest_memfd_guest();\n}\n")
    made = one_at_a_time(source)
    assert "if (chosen(#__test, __flags)) test_##__test(args);" in made
    assert 'if (chosen("guest", 0)) test_guest_memfd_guest();' in made
    assert made.index("static int chosen(") < made.index("#define ____gmem_test(")
    assert r'printf("subtest %s\n", name);' in made
    with pytest.raises(AssertionError, match="has changed"):
        one_at_a_time(source.replace("test_##__test(args);", "run(args);"))


def test_what_failed_is_told_from_what_was_skipped() -> None:
    lines = ["0|mbind 1|", "4|collapse 3|skipped", "254|invalid_binding 3|r | errno", "noise"]
    assert failed(lines) == {"invalid_binding 3": "r | errno"}
    with pytest.raises(AssertionError, match="no sub-test"):
        failed(["noise"])


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("make")), reason="no gcc or no make")
@pytest.mark.parametrize("name", REAL)
def test_the_kernels_own_test_agrees(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GMEM_CACHE")
    built = program()
    built.chmod(0o755)
    capsys.readouterr()
    assert main(["kernel", "run", name, "--add", f"{built}:/guest_memfd_test", "--", "python3", "-c", ALL]) == 0
    wrong = failed(capsys.readouterr().out.splitlines())
    assert main(["probe", "--kernel", name, "--part", "bugs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["known_bugs"]
    assert contradictions(wrong, {bug["id"]: bug["verdict"] for bug in found}) == []
