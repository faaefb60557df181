"""The command line with what third parties have installed: good plugins, bad ones, and those that end the process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import ALL, LOAD, run

PLUGIN = '''
from dataclasses import replace

from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.words import facts
from guest_memfd.hypervisors.kvm.default import KVM, KvmOps
from guest_memfd.laws import Law
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.scenarios.party import Party


class Good(OurLibrary):
    name, title, source = "good", "a third party's design", "a list"


class Raises(OurLibrary):
    name = "raises"

    def guest_fault(self, gfn, index):
        yield from self.host.down_read("invalidate")
        raise TypeError("oops")


class Junk(OurLibrary):
    name = "junk"

    def guest_fault(self, gfn, index):
        yield "not a primitive"


class Nameless(Design):
    pass


class HalfOps(GuestMemfdOps):
    module = "kvm"


half = replace(KVM, name="half", ops=HalfOps)
number = 42


def frees(note):
    return "a page is freed" if isinstance(note, facts.Freed) else None


hoards = Law("hoards-every-page-for-ever", "no page is ever freed", "a test", "when a page is freed", note=frees)
stumbles = Law("stumbles", "this law cannot count", "a test", "in every state", state=lambda state: 1 // 0)
mute = Law("mute", "this law says nothing", "a test", "never")
'''
ENTRIES = """
[guest_memfd.designs]
good = gmem_test_plugin:Good
raises = gmem_test_plugin:Raises
junk = gmem_test_plugin:Junk
nameless = gmem_test_plugin:Nameless
number = gmem_test_plugin:number
absent = gmem_test_plugin:Absent
gone = gmem_test_no_such_module:Gone

[guest_memfd.hypervisors]
half = gmem_test_plugin:half

[guest_memfd.parties]
nobody = gmem_test_plugin:number

[guest_memfd.laws]
mute = gmem_test_plugin:mute
"""


def installed(folder: Path, entries: str) -> Path:
    (folder / "gmem_test_plugin.py").write_text(PLUGIN)
    info = folder / "gmem_test_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gmem-test-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(entries)
    return folder


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an installed distribution with good and bad plugins in it."""
    return installed(tmp_path_factory.mktemp("site"), ENTRIES)


LEFT_OUT = ("gmem: left out: law plugin 'mute': it judges nothing: it needs one of state, note, end\n"
            "gmem: left out: party plugin 'nobody': 42 is no guest_memfd.scenarios.Party\n")


def test_a_good_plugin_is_one_more_design_and_what_is_left_out_is_told(plugins: Path) -> None:
    done = run("check", "good", "--hypervisor", "kvm", *LOAD, path=plugins)
    assert (done.returncode, done.stderr) == (0, LEFT_OUT)
    assert "good on kvm: holds" in done.stdout


@pytest.mark.parametrize(("argv", "says"), [
    ("check gone", "design plugin 'gone' (gmem_test_no_such_module:Gone) does not import: ModuleNotFoundError"),
    ("check absent", "does not import: AttributeError"),
    ("check number", "design plugin 'number': 42 is no subclass of guest_memfd.designs.Design"),
    ("check nameless", "design plugin 'nameless': Nameless lacks name, title, source"),
    ("check library --hypervisor half", "hypervisor plugin 'half': HalfOps lacks the operation(s) invalidate"),
    ("check library --hypervisor kvm --parties nobody", "party plugin 'nobody'"),
    ("check junk --hypervisor kvm", "yielded 'not a primitive' at gmem_test_plugin.py:"),
])
def test_a_bad_plugin_is_named_with_what_is_wrong(plugins: Path, argv: str, says: str) -> None:
    done = run(*argv.split(), *([] if "--parties" in argv else LOAD), path=plugins)
    assert (done.returncode, done.stdout) == (4, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_good_law_is_one_more_law(tmp_path: Path) -> None:
    plugins = installed(tmp_path, f"{ENTRIES}hoards-every-page-for-ever = gmem_test_plugin:hoards\n")
    done = run("check", "library", "--hypervisor", "kvm", "--parties", "vcpu,stop", path=plugins)
    assert (done.returncode, done.stderr) == (2, LEFT_OUT)
    assert re.search(r"^  hoards-every-page-for-ever broken in \d+ steps of vcpu", done.stdout, re.MULTILINE)
    assert f"1 of {ALL + 1} laws broken" in done.stdout
    alone = run("check", "library", "--hypervisor", "kvm", *LOAD, "--law", "hoards-every-page-for-ever", path=plugins)
    assert alone.returncode == 2                        # in the end all pages are freed
    listed = run("list", "laws", path=plugins).stdout
    assert re.search(r"^  hoards-every-page-for-ever +no page is ever freed$", listed, re.MULTILINE)


def test_a_law_that_raises_is_named(tmp_path: Path) -> None:
    plugins = installed(tmp_path, f"{ENTRIES}stumbles = gmem_test_plugin:stumbles\n")
    done = run("check", "library", "--hypervisor", "kvm", *LOAD, path=plugins)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.fullmatch(re.escape(LEFT_OUT) +
                        r"gmem: law 'stumbles', asked about a State, raised ZeroDivisionError: integer division or "
                        r"modulo by zero \(gmem_test_plugin.py:\d+ in <lambda>\)\n", done.stderr)


def test_list_says_which_laws_do_not_load(plugins: Path) -> None:
    done = run("list", "laws", path=plugins)
    assert done.returncode == 0
    assert "does not load: law plugin 'mute': it judges nothing: it needs one of state, note, end" in done.stdout


def test_a_design_that_raises_is_shown_with_the_way_there(plugins: Path) -> None:
    done = run("check", "raises", "--hypervisor", "kvm", *LOAD, path=plugins)
    assert (done.returncode, done.stdout) == (4, "")
    assert "TypeError: oops (gmem_test_plugin.py:" in done.stderr
    assert "in Raises.guest_fault), after" in done.stderr
    assert re.search(r"^  1\. vcpu: .*guest_access", done.stderr, re.MULTILINE)


def test_compare_tells_which_designs_and_hypervisors_it_leaves_out(plugins: Path) -> None:
    done = run("compare", "--scene", "two-pages", "--parties", "drainer", "-q", path=plugins)
    assert done.returncode == 0
    for name in ("design plugin 'gone'", "design plugin 'number'", "hypervisor plugin 'half'", "party plugin 'nobody'",
                 "law plugin 'mute'"):
        assert done.stderr.count(f"gmem: left out: {name}") == 1


@pytest.mark.parametrize(("ends", "words"), [
    ("raise SystemExit(0)", "SystemExit: 0"), ("raise GeneratorExit", "GeneratorExit"),
    ("raise BaseException", "BaseException"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise type('X', (Exception,), {'__str__': lambda self: 1 / 0})", r"X: \(its __str__ raises\)"),
    ("def", "SyntaxError: invalid syntax .*"),
])
def test_a_plugin_that_ends_the_process_at_import_is_told(tmp_path: Path, ends: str, words: str) -> None:
    plugins = installed(tmp_path, "[guest_memfd.designs]\ngood = gmem_test_plugin:Good\n")
    (plugins / "gmem_test_plugin.py").write_text(ends)
    done = run("check", "good", "--hypervisor", "kvm", *LOAD, path=plugins)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.match(rf"gmem: design plugin 'good' \(gmem_test_plugin:Good\) does not import: {words}", done.stderr)
    assert "does not load: design plugin 'good'" in run("list", "designs", path=plugins).stdout


def test_list_says_which_plugins_do_not_load(plugins: Path) -> None:
    done = run("list", path=plugins)
    assert (done.returncode, done.stderr) == (0, "")
    assert "does not load: design plugin 'gone'" in done.stdout
    assert "\n  good " in done.stdout
