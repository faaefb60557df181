"""Names that a design or a driver defines: what nothing calls is refused, what somebody calls is not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial, wraps
from typing import Any, ClassVar

import planted
import pytest

from guest_memfd.core import GuestMemfdOps, Reason
from guest_memfd.designs import DESIGNS, Design, misspelt
from guest_memfd.designs.design import OPERATIONS
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.designs.names import lacks as lacks_design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import PluginError
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors import names as hypervisor_names
from guest_memfd.hypervisors.gunyah.client import GUNYAH, GunyahOps
from guest_memfd.plugins.overrides import unfit
from guest_memfd.scenarios import PARTIES
from guest_memfd.words.primitives import Folio, Steps

Slip = tuple[type, str]

# -- what is refused ---------------------------------------------------------------------------------------------------


class NoFlsh(OurLibrary):
    def zap_noflsh(self, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


class Gpu(OurLibrary):
    gpu = False


class ByItselfAlone(OurLibrary):
    def restor(self, folio: Folio) -> Steps[int]:
        return (yield from self.restor(folio))


class OfABase(NoFlsh):
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


class Aside:
    def evikt(self) -> Steps[None]:
        yield from ()


class OfSomethingMixedIn(Aside, OurLibrary):
    pass


class Private(OurLibrary):
    def _make_private_lockd(self, start: int, nr: int) -> Steps[int]:
        yield from ()
        return 0


class LikeNothing(OurLibrary):
    def xyzzy(self) -> None:
        pass


class TooFew(OurLibrary):
    def zap(self) -> Steps[int]:                        # type: ignore[override]
        yield from ()
        return 0


class TooMany(OurLibrary):
    def evict(self, how: str) -> Steps[None]:           # type: ignore[override]
        yield from ()


class NothingLeftOut(OurLibrary):
    def create(self, size: int, shared: tuple[int, ...]) -> Steps[int]:     # type: ignore[override]
        yield from ()
        return 0


class ByName(OurLibrary):
    def punch_hole(self, start: int, *, nr: int) -> Steps[Any]:             # type: ignore[override]
        yield from ()


class MethodForAttribute(OurLibrary):
    def gup(self) -> bool:                              # type: ignore[override]
        return False


class MethodForTitle(OurLibrary):
    def title(self) -> str:                             # type: ignore[override]
        return "a method"


class AttributeForMethod(OurLibrary):
    flush = None                                        # type: ignore[assignment]


class PropertyOfTheClass(OurLibrary):
    @property
    def sea_fixup(self) -> bool:                        # type: ignore[override]
        return self.size > 1


SLIPS: list[Slip] = [
    (NoFlsh, "NoFlsh defines 'zap_noflsh', which nothing calls; did you mean 'zap_noflush'?"),
    (Gpu, "Gpu defines 'gpu', which nothing reads; did you mean 'gup'?"),
    (ByItselfAlone, "ByItselfAlone defines 'restor', which nothing calls; did you mean 'restore'?"),
    (OfABase, "NoFlsh defines 'zap_noflsh', which nothing calls; did you mean 'zap_noflush'?"),
    (OfSomethingMixedIn, "Aside defines 'evikt', which nothing calls; did you mean 'evict'?"),
    (Private, "Private defines '_make_private_lockd', which nothing calls; did you mean 'make_private_locked'?"),
    (LikeNothing, "LikeNothing defines 'xyzzy', which nothing calls; Design has nothing like it"),
    (TooFew, "TooFew defines 'zap', which takes (), but it is called with (folio)"),
    (TooMany, "TooMany defines 'evict', which takes (how), but it is called with ()"),
    (NothingLeftOut, "NothingLeftOut defines 'create', which takes (size, shared), but it is called with (size, shared=())"),
    (ByName, "ByName defines 'punch_hole', which takes (start, nr), but it is called with (start, nr)"),
    (MethodForAttribute, "MethodForAttribute defines 'gup', a method, but it overrides an attribute"),
    (MethodForTitle, "MethodForTitle defines 'title', a method, but it overrides an attribute"),
    (AttributeForMethod, "AttributeForMethod defines 'flush', an attribute, but it overrides a method"),
    (PropertyOfTheClass, "PropertyOfTheClass defines 'sea_fixup', a property, but it is read of the class"),
]


@pytest.mark.parametrize(("design", "words"), SLIPS, ids=[design.__name__ for design, _ in SLIPS])
def test_what_nothing_calls_or_what_does_not_fit_is_refused(design: type[Design], words: str) -> None:
    assert misspelt(design) == words


def test_a_misspelt_design_is_not_registered() -> None:
    with pytest.raises(PluginError, match="design plugin 'library': NoFlsh defines 'zap_noflsh', which nothing calls"):
        DESIGNS.add("library", NoFlsh)
    assert DESIGNS["library"] is OurLibrary


# -- what is not -------------------------------------------------------------------------------------------------------


def traced(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def inner(*args: Any) -> Any:
        return method(*args)
    return inner


def helper(design: Design) -> Any:
    return design.asked_for_beside                      # type: ignore[attr-defined]


class Busy(OurLibrary):
    """Everything here is called or read by something."""

    name = "busy"
    title = source = "a test"
    gup, power = False, "none"
    offers = ("for_a_party",)
    RETRIES = 3
    limit: ClassVar[int]
    TABLE: ClassVar[dict[str, Any]] = {"punch": "by_word"}
    asked_for_beside = True

    def zap(self, folio: Folio, *, hard: bool = False) -> Steps[int]:
        yield from self.twice(lambda: self.in_a_lambda())
        return self.RETRIES + self.of_mine + self.once

    def twice(self, what: Any) -> Steps[None]:
        yield from self.TABLE["punch"](getattr(self, "by_name"), what)      # noqa: B009

    def in_a_lambda(self) -> None:
        pass

    def by_name(self) -> None:
        pass

    def by_word(self, *_: Any) -> Steps[None]:
        yield from ()

    def for_a_party(self) -> None:
        self._unlike_anything()

    def _unlike_anything(self) -> None:
        pass

    @property
    def of_mine(self) -> int:
        return self.in_a_property()

    @staticmethod
    def in_a_property() -> int:
        return 0

    @cached_property
    def once(self) -> int:
        return self.of_the_class()

    @classmethod
    def of_the_class(cls) -> int:
        return 0

    @traced
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from self.when_traced(folios)

    def when_traced(self, *folios: Any) -> Steps[None]:
        yield from ()

    restore = partial(OurLibrary.restore)

    def create(self, *args: Any, **more: Any) -> Steps[int]:
        return (yield from super().create(*args, **more))


class Listed(OurLibrary):
    def first(self) -> None:
        pass

    def second(self) -> None:
        pass

    STEPS = (first, second)

    def evict(self) -> Steps[None]:
        for step in self.STEPS:
            step(self)
        yield from ()


def test_what_somebody_calls_is_not_refused() -> None:
    assert misspelt(Busy) is None
    assert misspelt(Listed) is None
    assert helper(Busy(GunyahOps(), 1)) is True


def test_no_design_that_there_is_is_refused() -> None:
    designs = [*(DESIGNS[name] for name in DESIGNS),
               *(thing for thing in vars(planted).values() if inspect.isclass(thing) and issubclass(thing, Design))]
    assert {design.__name__: wrong for design in designs if (wrong := misspelt(design))} == {}
    assert misspelt(GuestmemRfc1) is None               # which has a property and much of its own


# -- what a posted design keeps of our library -------------------------------------------------------------------------


def overridden(design: type[Design]) -> set[str]:
    own = [each for each in design.__mro__ if each not in Design.__mro__]
    return {name for name in OPERATIONS if any(name in vars(each) for each in own)}


@pytest.mark.parametrize("name", [name for name in DESIGNS if name != "library"])
def test_a_posted_design_says_which_operations_are_ours_and_why(name: str) -> None:
    assert {*DESIGNS[name].keeps} == {*OPERATIONS} - overridden(DESIGNS[name])


def test_every_operation_is_one_of_the_library() -> None:
    assert all(inspect.isgeneratorfunction(getattr(Design, name)) for name in OPERATIONS)


def test_what_is_kept_is_not_overridden() -> None:
    class Keeps(GuestmemRfc1):
        name = "keeps"
        keeps: ClassVar[dict[str, str]] = {"mmap": "so it says"}

    assert lacks_design(Keeps) == f"{Keeps.__qualname__} says that it keeps 'mmap', and it overrides that"


# -- hypervisors -------------------------------------------------------------------------------------------------------


class Reklaim(GunyahOps):
    def reklaim(self, gfn: int, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


class Scrub(GunyahOps):
    scrub = False


class NoReason(GunyahOps):
    def invalidate(self, gfn: int, folio: Folio, private: bool) -> Steps[int]:      # type: ignore[override]
        yield from ()
        return 0


class SaysWhy(GunyahOps):
    scrubs = False

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        return (yield from self.asked(gfn, folio))

    def asked(self, gfn: int, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


@pytest.mark.parametrize(("ops", "words"), [
    (Reklaim, "Reklaim defines 'reklaim', which nothing calls; did you mean 'reclaim'?"),
    (Scrub, "Scrub defines 'scrub', which nothing reads; did you mean 'scrubs'?"),
    (NoReason, "NoReason defines 'invalidate', which takes (gfn, folio, private), but it is called with "
               "(gfn, folio, private, reason)"),
])
def test_a_misspelt_operation_is_refused(ops: type[GuestMemfdOps], words: str) -> None:
    hypervisor = replace(GUNYAH, ops=ops)
    assert hypervisor_names.misspelt(hypervisor) == words
    with pytest.raises(PluginError) as refused:
        HYPERVISORS.add("gunyah", hypervisor)
    assert str(refused.value) == f"hypervisor plugin 'gunyah': {words}"
    with pytest.raises(PluginError, match=f"^hypervisor 'gunyah': {re.escape(words)}$"):
        World(DESIGNS["library"], hypervisor, [PARTIES["vcpu"]])       # nor handed in past the registry


def test_a_hypercall_that_is_not_there_cannot_fail() -> None:
    name, errno = next(iter(GUNYAH.fallible.items()))
    for given, meant in ((f"{name}x", f"did you mean {name!r}?"), ("", f"it has {', '.join(GUNYAH.hypercalls)}")):
        words = hypervisor_names.misspelt(replace(GUNYAH, fallible={given: errno}))
        assert words == f"{given!r} is said to be fallible and is no hypercall; {meant}"


def test_no_hypervisor_that_there_is_is_refused() -> None:
    assert {name: wrong for name in HYPERVISORS if (wrong := hypervisor_names.misspelt(HYPERVISORS[name]))} == {}
    assert unfit(SaysWhy, GuestMemfdOps) is None
    assert hypervisor_names.misspelt(replace(GUNYAH, ops=partial(SaysWhy))) is None     # what it makes cannot be seen
    assert [unfit(ops, GuestMemfdOps) for ops in (planted.UnmapWithoutSync, planted.NotUnmapped)] == [None, None]
