"""What third parties register is looked at, field by field, and their procedures for a `yield from` that is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from guest_memfd.core import GuestMemfdOps, Reason
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs import names as designs
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import DesignRaised, PluginError, PluginLeftOut
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS, Hypervisor
from guest_memfd.hypervisors import names as hypervisors
from guest_memfd.hypervisors.kvm.default import KVM, KvmOps
from guest_memfd.laws import LAWS, Law
from guest_memfd.laws import law as laws
from guest_memfd.plugins.forgotten import beside, in_class
from guest_memfd.plugins.registry import Registry
from guest_memfd.scenarios import PARTIES, Party
from guest_memfd.scenarios import party as parties
from guest_memfd.words.primitives import Bound, Folio, Host, Steps

USER = Host("user")


def opens(_design: Design, _hypervisor: Hypervisor) -> Steps[None]:
    yield from USER.fd_open()


def design(**its: Any) -> type[Design]:
    return type("Theirs", (OurLibrary,), {"name": "theirs", "title": "a test", "source": "a test", **its})


PARTY = Party("theirs", "a test", opens)
LAW = Law("theirs", "a test", "a test", "always", note=lambda _note: None)
WORDS: list[Any] = ["", " ", "two\nlines", "\x1b[2J", None, 7, b"x", ["x"]]
NAME_NOT: list[Any] = ["", "a b", "a,b", "a/b", "../x", None, 7, ("x",), "x\n"]
FLAG_NOT: list[Any] = [None, 0, 1, "no"]

WRONG: dict[str, dict[str, list[Any]]] = {
    "design": {
        "name": NAME_NOT, "title": WORDS, "source": WORDS, "sea_fixup": FLAG_NOT, "gup": FLAG_NOT, "no_direct_map": FLAG_NOT,
        "converts": FLAG_NOT, "large": FLAG_NOT, "promises": ["no-direct-map", [1], ("a b",)],
        "splits": FLAG_NOT, "order": [-1, "0", None, True], "power": ["notifer", None], "offers": ["x", [1], (1,), ("a b",)],
        "hypervisors": ["gunyah", (), ["kvm"], ("kvm", 7), 7], "keeps": [None, {"punsh": "ours"}, {"punch_hole": 7}],
        "bounds": [None, {"punsh": Bound()}, {"punch": 7}, {"punch": Bound("x")}, {7: Bound()}],     # type: ignore[arg-type]
        "errnos": [None, {"punsh": (12,)}, {"punch": 12}, {"punch": (-12,)}, {"punch": ("ENOMEM",)}], "scene": ["two-pages"],
        "resumes": [None, "to_private", ["to_private"], ("punch",), ([],)],
    },
    "hypervisor": {
        "name": NAME_NOT, "title": WORDS, "module": NAME_NOT, "ops": [None, 7, KvmOps()],
        "hypercalls": [None, {"x": 7}, {7: len}],
        "fallible": [None, {"a": "x"}, {"a": 12}, {"a": 0}, {"a": -10 ** 30}, {7: -12}],
        "final": [None, {"share_guest": True}], "abort": ["synchronous externa abort", "", 0], "tracks_owner": FLAG_NOT,
        "consents": ["", 7], "guest_consents": [None, len], "guest_touches": [None, lambda: 0], "force_reclaim": [None, "x"],
        "exports": [None, "x"],
        "pfn_cache": FLAG_NOT, "large": FLAG_NOT, "encrypts": FLAG_NOT, "guards": ["reads", None, 1],
        "errnos": [{"punsh": (5,)}, {"punch": (0,)}], "driver": [7, object(), {"mmap": len}],
        "lending": ["", 7],
    },
    "party": {
        "name": NAME_NOT, "title": WORDS, "procedure": [None, "x", lambda: 0, lambda a, b, c: 0], "task": FLAG_NOT,
        "exists": [None, True, lambda design: True], "file": [-1, "0", None, True], "role": ["a b", None, 7],
        "fd": FLAG_NOT,
    },
    "law": {
        "name": NAME_NOT, "sentence": WORDS, "source": WORDS, "when": WORDS, "state": ["x", lambda: None],
        "note": ["x", lambda a, b: None], "end": ["x"], "promised": FLAG_NOT,
    },
}
MADE: dict[str, tuple[Registry[Any], Callable[[Any], str | None], Callable[..., Any]]] = {
    "design": (DESIGNS, designs.lacks, design),
    "hypervisor": (HYPERVISORS, hypervisors.lacks, lambda **its: replace(KVM, **({"name": "theirs"} | its))),
    "party": (PARTIES, parties.lacks, lambda **its: replace(PARTY, **its)),
    "law": (LAWS, laws.lacks, lambda **its: replace(LAW, **its)),
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, its in WRONG.items() for field in its])
def test_a_field_that_is_something_else_is_refused_by_name(kind: str, field: str) -> None:
    registry, lacks, made = MADE[kind]
    assert lacks(made()) is None
    for value in WRONG[kind][field]:
        words = f"its {field} is .*, and has to be "
        assert re.match(words, str(lacks(made(**{field: value})))), value
        with pytest.raises(PluginError, match=rf"^{kind} plugin 'theirs': {words}"):
            registry.add("theirs", made(**{field: value}))
    assert "theirs" not in registry


def test_every_field_is_looked_at() -> None:
    for kind, of in (("hypervisor", Hypervisor), ("party", Party)):
        assert {field.name for field in fields(of)} == {*WRONG[kind]}
    assert {field.name for field in fields(Law)} - {"broken_by"} == {*WRONG["law"]}
    assert {*designs.FIELDS} == {*WRONG["design"]}
    known = {name for each in Design.__mro__[:-1] for name in vars(each).get("__annotations__", {})}
    assert known - {"host", "ops", "size", "lender"} <= {*WRONG["design"]}


def test_what_is_handed_in_past_the_registry_is_looked_at_as_well() -> None:
    with pytest.raises(PluginError, match=r"^design 'theirs': its title is 7, and has to be a line of words$"):
        World(design(title=7), KVM, [])
    with pytest.raises(PluginError, match=r"^hypervisor 'kvm': its abort is 'SEA', and has to be 'synchronous ext"):
        World(OurLibrary, replace(KVM, abort="SEA"), [])
    with pytest.raises(PluginError, match=r"^party 'theirs': its task is 1, and has to be True or False$"):
        World(OurLibrary, KVM, [replace(PARTY, task=1)])        # type: ignore[arg-type]


def test_a_driver_is_the_modules_that_it_says() -> None:
    other = type("Other", (KvmOps,), {"module": "kvn"})
    assert hypervisors.lacks(replace(KVM, ops=other)) == "its module is 'kvm', and that of Other is 'kvn': it is the same"
    assert hypervisors.lacks(replace(KVM, ops=dict)) == (       # type: ignore[arg-type]
        "its ops are dict, which is no subclass of GuestMemfdOps")
    assert hypervisors.lacks(replace(KVM, final={"none": -5})) == (
        f"'none' is said to be final and is no hypercall; it has {', '.join(KVM.hypercalls)}")


def test_a_party_works_on_a_file_that_is_there() -> None:
    with pytest.raises(DesignRaised, match=r"answered True in scene 'two-pages', which has no file 3, the one that"):
        World(OurLibrary, KVM, [replace(PARTY, file=3)])


def test_who_asks_for_all_is_told_what_is_left_out() -> None:
    some: Registry[Law] = Registry("law", "no.such.group", {"mine": LAW})
    some._looked, some._broken = True, {"yours": "law plugin 'yours': it is broken"}
    assert some["mine"] is LAW
    with pytest.warns(PluginLeftOut, match="^left out: law plugin 'yours': it is broken$"):
        assert [*some] == ["mine"]
    assert len(some) == 1                               # once


# -- yield from --------------------------------------------------------------------------------------------------------


class Forgets(OurLibrary):
    """One procedure for each way to forget it."""

    def dropped(self, folio: Folio) -> Steps[int]:
        yield from ()
        self.zap(folio)
        return 0

    def of_the_host(self, folio: Folio) -> Steps[None]:
        host = self.host
        host.unlock_folio(folio)
        yield from ()

    def of_the_driver(self, folio: Folio) -> Steps[int]:
        ret = self.ops.reclaim(0, folio)
        if ret == 0:
            yield from self.flush((folio,))
        return 0

    def returned(self, folio: Folio) -> Steps[int]:
        yield from ()
        return self.zap(folio)                          # type: ignore[return-value]

    def asked(self, folio: Folio) -> Steps[int]:
        if not self.host.folio_mapped(folio):
            yield from ()
        return 0

    def unpacked(self, index: int) -> Steps[int]:
        (bound,) = self.host.tree_load("bindings", index, 1)
        yield from ()
        return int(bound)                               # type: ignore[call-overload, no-any-return]

    def yielded(self) -> Steps[None]:
        yield self.host.fput()                          # type: ignore[misc]

    def of_the_base(self, folio: Folio) -> Steps[None]:
        yield from ()
        super().flush((folio,))

    def no_procedure(self) -> None:
        self.host.fput()

    def asks_a_function(self) -> Steps[None]:
        yield from ()
        opens(self, KVM)


@pytest.mark.parametrize(("name", "called"), [
    ("dropped", "self.zap"), ("of_the_host", "host.unlock_folio"), ("of_the_driver", "self.ops.reclaim"),
    ("returned", "self.zap"), ("asked", "self.host.folio_mapped"), ("unpacked", "self.host.tree_load"),
    ("yielded", "self.host.fput"), ("of_the_base", "super().flush"), ("no_procedure", "self.host.fput"),
    ("asks_a_function", "opens"),
])
def test_a_forgotten_yield_from_is_told_with_its_line(name: str, called: str) -> None:
    words = rf"test_fields.py:(\d+) in Forgets.{name} calls {re.escape(called)}\(\) without 'yield from', so it is not done"
    one = type("One", (OurLibrary,), {"name": "theirs", "title": "a test", "source": "a test", name: vars(Forgets)[name]})
    found = re.fullmatch(words, str(in_class(one)))
    assert found is not None
    with open(__file__, encoding="utf-8") as source:
        assert f"{called}(" in source.readlines()[int(found[1]) - 1]
    if name == "dropped":
        with pytest.raises(PluginError, match=f"^design 'theirs': {words}$"):
            World(type("Two", (one,), {"offers": (name,)}), KVM, [])


class Remembers(OurLibrary):
    """What only looks so."""

    def handed_on(self, folio: Folio) -> Steps[int]:
        return self.zap(folio)

    def kept(self, folio: Folio) -> Steps[int]:
        steps = self.zap(folio)
        return (yield from steps)

    def listed(self, folio: Folio) -> Steps[None]:
        for each in (self.zap(folio), self.restore(folio)):
            yield from each

    def given(self, folio: Folio) -> Steps[Any]:
        return (yield from self.run_it(self.zap(folio)))

    def run_it(self, steps: Steps[Any]) -> Steps[Any]:
        return (yield from steps)

    def by_lambda(self, folio: Folio) -> Steps[Any]:
        def later() -> Steps[int]:
            return self.zap(folio)

        return (yield from (lambda: self.restore(folio))()) or (yield from later())

    def of_something_else(self, lock: Any) -> Steps[None]:
        lock.release()
        lock.zap(1)
        yield from ()


class Kept(KvmOps):
    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        return super().invalidate(gfn, folio, private, reason)


def test_what_is_meant_is_not_refused() -> None:
    assert in_class(Remembers) is None
    assert in_class(Kept) is None
    assert issubclass(Kept, GuestMemfdOps)
    assert beside(opens) is None


def test_of_a_party_as_well() -> None:
    def forgetful(design: Design, _hypervisor: Hypervisor) -> Steps[None]:
        yield from USER.fd_open()
        design.allocate(0, 1)

    words = r"test_fields.py:\d+ in .*forgetful calls design.allocate\(\) without 'yield from', so it is not done$"
    assert re.match(words, str(beside(forgetful)))


def test_an_override_that_is_no_procedure_is_told() -> None:
    def zap(self: Design, folio: Folio) -> Any:
        return 0

    def flush(self: Design, folios: Any) -> None:
        pass

    words = "which is no procedure: one that has nothing to ask for says 'yield from ()'"
    assert designs.misspelt(design(zap=zap)) == f"Theirs defines 'zap', {words}"
    assert designs.misspelt(design(flush=flush)) == f"Theirs defines 'flush', {words}"


def test_a_design_that_is_handed_in_is_looked_at_before_it_is_used() -> None:
    theirs = type("Theirs", (OurLibrary,), {"name": "theirs", "title": "a design", "hypervisors": int})
    with pytest.raises(PluginError, match="its hypervisors is"):
        check(theirs, "kvm", parties=["vcpu2"])
