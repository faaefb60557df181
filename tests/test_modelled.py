"""A hypervisor that is given by its model runs on the emulated machine as on the abstract host: a third party's, ours."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from errno import EBUSY, ENOMEM, EPERM
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from schedules import steps

from guest_memfd.cli.main import main
from guest_memfd.core.hypervisor import DATA_ABORT, Hypervisor, Stage2
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, PluginError
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.gunyah.client import GUNYAH
from guest_memfd.hypervisors.kvm.default import KVM
from guest_memfd.hypervisors.kvm.pkvm import PKVM
from guest_memfd.hypervisors.kvm.s390 import S390
from guest_memfd.hypervisors.names import CALLERS, lacks
from guest_memfd.lockstep.refinement import Diverged
from guest_memfd.machine.board import hostcpu
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.el2.modelled.el2 import ModelledStage2
from guest_memfd.machine.el2.modelled.host_map import HostMap
from guest_memfd.machine.linux.kcore import read_kcore
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "tiny_hypervisor.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_hypervisor", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY: Hypervisor = example().TINY
MODELS = {
    "tiny": TINY,
    "fixable": replace(TINY, name="fixable", abort=DATA_ABORT),
    "gunyah-model": replace(GUNYAH, name="gunyah-model"),
    "pkvm-model": replace(PKVM, name="pkvm-model", force_reclaim=Hypervisor.force_reclaim),
    "kvm-model": replace(KVM, name="kvm-model"),
}
"""A third party's, with either kind of abort, and the models of those whose EL2 on the machine is in files of its own."""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    force = replace(PKVM, name="pkvm-force")
    exports = replace(S390, name="in-the-clear", encrypts=False)
    theirs = {one.name: one for one in (force, exports)}
    monkeypatch.setattr(HYPERVISORS, "_known", {**HYPERVISORS._known, **MODELS, **theirs})


# -- lock step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_step_is_that_of_the_abstract_host(name: str) -> None:
    taken, broken = steps(name, "library", range(12))
    assert taken > 200
    assert not broken, broken


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_ten_thousand_steps(name: str) -> None:
    taken, seed = 0, 100
    while taken < 10_000:
        more, broken = steps(name, "library", range(seed, seed + 10))
        taken, seed = taken + more, seed + 10
        assert not broken, broken


def does(_self: Any, *_args: Any, **_more: Any) -> bool:
    return True


MISTAKES: dict[str, tuple[str, type, str, Callable[..., Any]]] = {
    "the host keeps the page": ("tiny", HostMap, "withhold", does),
    "the host does not get it back": ("tiny", ModelledStage2, "host_maps",
                                      lambda self, pfn, allowed: allowed or self._el2.host.withhold(pfn)),
    "no owner is recorded": ("tiny", ModelledStage2, "set_owner", does),
    "the guest keeps the page": ("tiny", ModelledStage2, "guest_unmap", does),
    "TLBs are not flushed": ("tiny", Maintenance, "flush_ipa", does),
    "contents stay": ("tiny", ModelledStage2, "scrub", does),
    "a refusal is taken for a failure": ("tiny", ModelledStage2, "refuse", lambda self, call, errno: -errno),
    "no page is locked": ("gunyah-model", ModelledStage2, "set_locked_in", does),
    "what the guest gave up is secret still": ("gunyah-model", ModelledStage2, "declassify", does),
    "what was forgotten is expected": ("gunyah-model", ModelledStage2, "forget", does),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_machine_is_a_difference(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    name, place, method, instead = MISTAKES[mistake]
    monkeypatch.setattr(place, method, instead)
    schedules = ((range(40), None), (range(20), ("vcpu", "vmm")))
    with pytest.raises((Diverged, KernelPanic, AssertionError)):
        [steps(name, "library", seeds, parties) for seeds, parties in schedules]


# -- what a model cannot do ----------------------------------------------------------------------------------------------


class Lent:
    """A machine with one page of a file lent to a guest."""

    def __init__(self, name: str, design: type[OurLibrary] = OurLibrary) -> None:
        self.machine = Machine(name, Config(ram=16 << 20))
        self.vm = self.machine.create_vm(4)
        self.host = EmulatedHost(self.machine, self.vm, 2)
        self.library = design(HYPERVISORS[name].ops(), 2)
        assert self.host.run(self.library.create(2)) == 0
        assert self.host.run(self.library.bind(0, 0, 2)) == 0
        assert self.host.run(self.library.guest_fault(0, 0)) == 0
        (self.page,) = self.machine.pages.values()


def test_what_tiny_does_with_real_tables() -> None:
    lent = Lent("tiny")
    driver, pa, folio = lent.machine.driver, lent.page.pa, Folio(lent.page.pa // PAGE)
    assert driver.owner(pa) == "guest"
    assert not driver.host_may(pa)
    assert driver.host_may(pa + PAGE)
    assert driver.ipa_of(lent.vm, pa) == 0
    assert list(driver.not_the_hosts()) == [(pa, pa + PAGE, "is guest by the hypervisor's record")]
    assert driver.hypercall(lent.vm, "lend", (1, folio)) == -EPERM
    assert driver.rules == frozenset()
    assert driver.hypercall(lent.vm, "take_back", (0, folio)) == -EBUSY
    assert driver.rules == {("take_back", -EBUSY)}
    lent.host.perform_by_name("vm_kill", caller="user")
    assert lent.host.run(lent.library.vm_teardown()) == 0
    lent.host.perform_by_name("vm_destroyed", caller="user")
    assert driver.owner(pa) == "host"
    assert driver.host_may(pa)
    assert list(driver.leftovers()) == []


@pytest.mark.parametrize(("name", "ends"), [
    ("tiny", "synchronous external abort: 0000000096000010"), ("fixable", "soft lockup")])
def test_the_host_is_told_of_a_withheld_page_as_the_model_says(
    monkeypatch: pytest.MonkeyPatch, name: str, ends: str,
) -> None:
    class Mapped(OurLibrary):
        def zap(self, folio: Folio) -> Any:
            yield from ()
            return 0

    monkeypatch.setattr(hostcpu, "LOCKUP", 50)
    lent = Lent(name, Mapped)
    with pytest.raises(KernelPanic, match=ends):
        lent.machine.cpu.call("plain_read", lent.machine.linear_map.va(lent.page.pa))
    other = Lent(name)
    assert read_kcore(Services(other.machine), other.page.pa, 8) == bytes(8)


def test_folios_of_many_pages_are_refused() -> None:
    lent = Lent("tiny")
    with pytest.raises(BadInput, match=r"'tiny' is given by a model of single pages: no pfn\d+"):
        lent.machine.driver.hypercall(lent.vm, "lend", (0, Folio(512, 9)))
    with pytest.raises(PluginError, match="hypervisor 'tiny' has no hypercall 'give'; it has lend, share"):
        lent.machine.driver.hypercall(lent.vm, "give", ())


def test_taking_pages_by_force_is_refused() -> None:
    with pytest.raises(BadInput, match="'pkvm-force' takes pages by force"):
        Machine("pkvm-force", Config(ram=16 << 20))
    with pytest.raises(BadInput, match="'in-the-clear' exports what the host touches"):
        Machine("in-the-clear", Config(ram=16 << 20))


def test_without_pages_for_tables_nothing_is_done() -> None:
    lent = Lent("tiny")
    pool, taken = lent.machine.el2_pool, []
    while pool.free_pages >= 8:
        taken.append(pool.alloc())
    page = lent.machine.kernel_pages.alloc()
    assert lent.machine.driver.hypercall(lent.vm, "lend", (1, Folio(page // PAGE))) == -ENOMEM
    assert lent.machine.driver.owner(page) == "host"
    for pa in taken:
        pool.free(pa)
    assert lent.machine.driver.hypercall(lent.vm, "lend", (1, Folio(page // PAGE))) == 0


def lends_badly(what: Any) -> Callable[..., Any]:
    def lend(stage2: Stage2, gfn: int, folio: Folio) -> Any:
        if isinstance(what, Exception):
            raise what
        return what

    return lend


@pytest.mark.parametrize(("what", "told"), [
    (1, "hypercall 'lend' of 'wrong' returned 1, not 0 or -errno"), (None, "returned None"), (-5000, "returned -5000"),
    (KeyError("x"), r"hypercall 'lend' of hypervisor 'wrong' raised KeyError: 'x' \(test_modelled.py:"),
])
def test_what_a_model_does_wrongly_is_told(monkeypatch: pytest.MonkeyPatch, what: Any, told: str) -> None:
    wrong = replace(TINY, name="wrong", hypercalls={**TINY.hypercalls, "lend": lends_badly(what)})
    monkeypatch.setattr(HYPERVISORS, "_known", {**HYPERVISORS._known, "wrong": wrong})
    with pytest.raises(PluginError, match=told):
        Lent("wrong")


# -- the command ---------------------------------------------------------------------------------------------------------


Gmem = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gmem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gmem:
    def run(*words: str, file: Path = EXAMPLE) -> tuple[int, str, str]:
        monkeypatch.setattr(HYPERVISORS, "_known", {h.name: h for h in (KVM, PKVM, GUNYAH)})
        monkeypatch.setattr(sys, "path", [*sys.path])           # --load appends to it
        try:
            code = main(["run", *words, "--load", str(file)])
        finally:
            sys.modules.pop(file.stem, None)
        return code, *capsys.readouterr()

    return run


def test_a_guest_runs_on_the_hypervisor_of_a_file(gmem: Gmem) -> None:
    code, said, told = gmem("hello", "--on", "emulated:arm64/tiny")
    assert (code, said) == (0, "hello from a guest\nsecret written\n"), told


SHIPPED = EXAMPLE.read_text(encoding="utf-8")
LEND = """
def bad(stage2, gfn, folio):
    {}
    return lend(stage2, gfn, folio)

TINY = __import__("dataclasses").replace(TINY, hypercalls={{**TINY.hypercalls, "lend": bad}})
"""
OPS = """
class Bad(TinyOps):
    {}

TINY = __import__("dataclasses").replace(TINY, ops=Bad)
"""
WRONG = [
    (LEND, "raise KeyError('x')", "hypercall 'lend' of hypervisor 'tiny' raised KeyError: 'x' (wrong.py:"),
    (LEND, "raise SystemExit(3)", "hypercall 'lend' of hypervisor 'tiny' raised SystemExit: 3 (wrong.py:"),
    (LEND, "return 1", "hypercall 'lend' of 'tiny' returned 1, not 0 or -errno"),
    (LEND, "gfn += 1 << 60", "is beyond 40 bits of guest address"),
    (LEND, "stage2.host_maps(1 << 40, False)", "there is no page 0x10000000000 in this machine"),
    (LEND, "stage2.set_owner(folio.pfn, 'nobody')", "an owner is host, guest, shared, borrowed"),
    (LEND, "while True: pass", "does not come back: after 5 seconds it is still at wrong.py:"),
    (OPS, "def prepare_private(self, gfn, folio):\n        yield from ()\n        while True: pass",
     "a procedure of design 'library' on 'tiny' does not come back: after 5 seconds it is still at wrong.py:"),
    (OPS, "def prepare_private(self, gfn, folio):\n        while True: yield from self.host.hyp_call('lend', gfn, folio)",
     "a procedure of design 'library' on 'tiny' does not come back: after 100,2"),
    (OPS, "def prepare_private(self, gfn, folio):\n        yield from ()\n        raise ValueError('no')",
     "raised ValueError: no (wrong.py:"),
    (OPS, "def prepare_private(self, gfn, folio):\n        return (yield from self.host.hyp_call('nosuch', gfn, folio))",
     "hypervisor 'tiny' has no hypercall 'nosuch'; it has lend, share"),
    (OPS, "def reclaim(self, gfn, folio):\n        yield from ()\n        raise ValueError('at the end')",
     "raised ValueError: at the end (wrong.py:"),
    (OPS, "def __init__(self):\n        raise ValueError('init')",
     "making design 'library' on 'tiny' raised ValueError: init"),
]


@pytest.mark.parametrize(("form", "what", "told"), WRONG, ids=[told for _, _, told in WRONG])
def test_what_it_does_wrongly_is_told_and_no_law_is_blamed(
    gmem: Gmem, tmp_path: Path, form: str, what: str, told: str,
) -> None:
    (tmp_path / "wrong.py").write_text(SHIPPED + form.format(what))
    code, _, said = gmem("hello", "--on", "emulated:arm64/tiny", file=tmp_path / "wrong.py")
    assert told in said
    assert "law" not in said
    assert code == 4


@pytest.mark.parametrize("allocation", range(8))
def test_an_allocation_of_its_that_fails_is_tried_again(gmem: Gmem, allocation: int) -> None:
    code, said, told = gmem("hello", "--on", "emulated:arm64/tiny", "--fail", f"el2:{allocation}")
    assert (code, said) == (0, "hello from a guest\nsecret written\n") or "KVM_CREATE_VM: ENOMEM" in told, told


@pytest.mark.parametrize("module", ["library", "mm", "user", "guest"])
def test_a_module_is_not_called_as_another_that_asks(module: str) -> None:
    ops = type("Ops", (TINY.ops,), {"module": module})          # type: ignore[arg-type]
    assert lacks(replace(TINY, module=module, ops=ops)) == (
        f"its module is {module!r}: that is how the laws call {CALLERS[module]}")


def test_a_stray_load_under_it_ends_the_host_without_the_library(gmem: Gmem) -> None:
    code, said, told = gmem("hello", "--on", "emulated:arm64/tiny", "--zeropad", "--design", "none")
    assert code == 2
    assert "Internal error: synchronous external abort: 0000000096000010" in said
    assert "law host-survives is broken" in told


@pytest.mark.parametrize(("words", "told"), [
    (("--on", "emulated:arm64/tyni"), "unknown host 'emulated:arm64/tyni'; did you mean 'emulated:arm64/tiny'?"),
    (("--on", "emulated:arm64/tiny", "--folio", "2M"), "hypervisor 'tiny' is given by a model of single pages"),
])
def test_what_cannot_be_run_is_told(gmem: Gmem, words: tuple[str, ...], told: str) -> None:
    code, _, said = gmem("hello", *words)
    assert code == 4
    assert told in said
