"""Designs, hypervisors, parties and laws of somebody else with something wrong in a field or in what they answer."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

from fuzz.kind import Kind
from guest_memfd.core.hypervisor import Stage2
from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.suite.verdict import Limits
from guest_memfd.hypervisors import HYPERVISORS, Hypervisor
from guest_memfd.scenarios import PARTIES, Party
from guest_memfd.words.primitives import PRIMITIVES, Host, Steps

LONGEST = 2000
"""Characters of an error; the way to it is told line by line."""


class Rude:
    """An object that does nothing as it should."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        raise SystemExit(0)

    def __hash__(self) -> int:
        raise GeneratorExit

    def __bool__(self) -> bool:
        raise KeyError


VALUES: tuple[Any, ...] = (None, True, -1, 0, 10 ** 30, 1.5, "", "x", b"x", (), [], {}, ("x", None), object(), Rude(),
                           float("nan"), lambda: None, int, Exception)
OPERATIONS = ("guest_fault", "user_fault", "allocate", "punch_hole", "make_private", "make_shared", "bind", "unbind",
              "create", "vm_teardown", "grab_folio", "flush", "zap", "restore", "mmap", "munmap", "close", "evict")


class Plugins(Kind):
    """Explored in one short scenario: a verdict, or BadInput that says whose fault it is."""

    name = "plugins"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """No other exception comes out, SystemExit and the like included."""
        kind = choose.choice((self._design, self._design, self._hypervisor, self._hypercall, self._party))
        try:
            design, hypervisor, parties = kind(choose, said)
            report = check(design, hypervisor, parties=parties, limits=Limits(states=400), jobs=1)
        except BadInput as error:
            words = str(error)
            return f"an error of {len(words)} characters" if len(words) > LONGEST else None
        finally:
            PARTIES._known.pop("theirs", None)          # for nobody else
        return None if report.verdict in ("holds", "refuted", "undetermined") else f"verdict {report.verdict!r}"

    @staticmethod
    def _does(choose: random.Random, said: list[str]) -> Any:
        raised = (SystemExit(0), GeneratorExit(), RuntimeError(Rude()), StopIteration(3), KeyError("x"), BaseException("x"))
        if choose.random() < 0.3:
            error = choose.choice(raised)
            said.append(f"raises {type(error).__name__}")
            return lambda *_args: _raise(error)
        value = choose.choice(VALUES)
        said.append(f"answers {type(value).__name__}")
        return lambda *_args: value

    def _design(self, choose: random.Random, said: list[str]) -> tuple[Any, Any, Any]:
        name = choose.choice(OPERATIONS)
        said.append(f"design: {name}")
        does, primitive = self._does(choose, said), choose.choice(list(PRIMITIVES))
        mode = choose.choice(("plain", "steps", "primitive"))
        said.append(mode)

        def operation(self: Any, *args: Any) -> Any:
            return does()

        def procedure(self: Any, *args: Any) -> Steps[Any]:
            if mode == "primitive":
                yield from getattr(Host("library"), primitive)(*choose.sample(VALUES, len(args) % 3))
            else:
                yield from ()
            return does()

        body: dict[str, Any] = {"name": "theirs", "title": "a design", name: operation if mode == "plain" else procedure}
        if choose.random() < 0.2:
            field = choose.choice(("name", "title", "hypervisors", "bounds", "errnos", "power", "order", "no_direct_map"))
            body[field] = choose.choice(VALUES)
            said.append(f"{field} {type(body[field]).__name__}")
        made: type[Design] = type("Theirs", (OurLibrary,), body)
        return made, "kvm", ["vcpu2", "vmm2"]

    def _hypervisor(self, choose: random.Random, said: list[str]) -> tuple[Any, Any, Any]:
        field, value = choose.choice(fields(Hypervisor)).name, choose.choice(VALUES)
        said.append(f"hypervisor: {field} {type(value).__name__}")
        return "library", replace(HYPERVISORS["pkvm"], **{field: value}), ["vcpu2", "stop"]

    def _hypercall(self, choose: random.Random, said: list[str]) -> tuple[Any, Any, Any]:
        base = HYPERVISORS["pkvm"]
        name = choose.choice(list(base.hypercalls))
        said.append(f"hypercall: {name}")
        does = self._does(choose, said)

        def call(stage2: Stage2, *args: Any) -> Any:
            return does()

        return "library", replace(base, hypercalls={**base.hypercalls, name: call}), ["vcpu2", "stop"]

    def _party(self, choose: random.Random, said: list[str]) -> tuple[Any, Any, Any]:
        does = self._does(choose, said)

        def procedure(design: Design, hypervisor: Hypervisor) -> Steps[None]:
            yield from Host("user").choose("x", *choose.sample(VALUES, 2))
            does()

        party = Party("theirs", "a party", procedure)
        if choose.random() < 0.5:
            field, value = choose.choice(fields(Party)).name, choose.choice(VALUES)
            said.append(f"party: {field} {type(value).__name__}")
            party = replace(party, **{field: value})
        PARTIES.add("theirs", party)
        return "library", "kvm", ["theirs"]


def _raise(error: BaseException) -> None:
    raise error
