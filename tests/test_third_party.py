"""Code of third parties: whatever it does is told as its doing, by name and line, and never ends in "holds"."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from toy import PAGE, US, Toy, explorer

from guest_memfd.core import GuestMemfdOps
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, DesignRaised, NotAPrimitive, describe, shown
from guest_memfd.explore.engine.program import MOST_OPTIONS
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.world.cost import cost
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors.kvm.default import KVM, KvmOps
from guest_memfd.hypervisors.kvm.pkvm import PKVM
from guest_memfd.laws import Law
from guest_memfd.plugins import guard
from guest_memfd.scenarios import PARTIES, Party
from guest_memfd.words.primitives import Folio, Primitive, Steps

Does = Callable[[], object]


class Mute(BaseException):
    def __str__(self) -> str:
        raise ValueError("no words")


class Muter(BaseException):
    def __str__(self) -> str:
        raise Muter


ENDS: list[type[BaseException]] = [
    SystemExit, GeneratorExit, KeyboardInterrupt, MemoryError, StopIteration, Mute, Muter, BaseException]
OF, ON_H = "of design 'theirs' on 'kvm'", "of design 'library' on 'h'"


def design(**methods: Any) -> type[Design]:
    return type("Theirs", (OurLibrary,), {"name": "theirs", "title": "a test", "source": "a test", **methods})


def raises(kind: type[BaseException]) -> Callable[..., Any]:
    def thrown(*_: Any) -> Any:
        raise kind
    return thrown


def zapping(does: Callable[[Design], Steps[Any]]) -> type[Design]:
    """The library, and before it takes a page out of the direct map, *does*."""
    def zap(self: OurLibrary, folio: Folio) -> Steps[int]:
        yield from does(self)
        return (yield from OurLibrary.zap(self, folio))
    return design(zap=zap)


def told(of: type[Design], hypervisor: Hypervisor = KVM, parties: tuple[str, ...] = ("vcpu",), **more: Any) -> str:
    """What `check` refuses *of* with; the words alone, without the trace."""
    with pytest.raises(BadInput) as refused:
        check(of, hypervisor, parties=parties, jobs=1, **more)
    return str(refused.value).partition(", after\n")[0]


# -- whatever it raises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENDS)
def test_what_ends_the_process_is_told(kind: type[BaseException]) -> None:
    def does(self: Design) -> Steps[None]:
        yield from self.host.can_set_direct_map()
        raise kind

    name = "RuntimeError" if kind is StopIteration else kind.__name__       # PEP 479
    assert re.match(rf"party 'vcpu' {OF} raised {name}.* \(test_third_party.py:\d+ in ", told(zapping(does)))
    made = told(design(__init__=raises(kind)))
    assert re.match(rf"making design 'theirs' on 'kvm' raised {kind.__name__}.*test_third_party.py:\d+ in raises", made)
    hypervisor = replace(KVM, name="h", ops=type("Ops", (KvmOps,), {"__init__": raises(kind)}))
    assert told(OurLibrary, hypervisor).startswith(f"making design 'library' on 'h' raised {kind.__name__}")
    calls = replace(KVM, name="h", hypercalls=dict.fromkeys(KVM.hypercalls, raises(kind)))
    assert re.match(rf"hyp_call\(.*\), asked for by kvm {ON_H}, raised {kind.__name__}", told(OurLibrary, calls))
    never = Party("never", "a test", lambda _design, _hypervisor: US.fd_open(), exists=raises(kind))
    with pytest.raises(DesignRaised, match=rf"^`exists` of party 'never' of design .* raised {kind.__name__}"):
        World(OurLibrary, KVM, [never])
    law = Law("mine", "a test", "a test", "always", state=raises(kind))
    with pytest.raises(BadInput, match=f"^law 'mine', asked about a State, raised {kind.__name__}"):
        World(OurLibrary, KVM, [PARTIES["vcpu"]], laws=[law])


def test_the_interrupt_of_the_one_who_runs_it_is_nobodys_doing() -> None:
    def does(self: Design) -> Steps[None]:
        signal.raise_signal(signal.SIGINT)
        yield from ()

    with pytest.raises(KeyboardInterrupt):
        check(zapping(does), "kvm", parties=["vcpu"], jobs=1)


def test_what_a_signal_handler_raises_is_nobodys_doing() -> None:
    class Over(SystemExit):
        pass

    def over(_number: int, _frame: Any) -> None:
        raise Over

    def does(self: Design) -> Steps[None]:
        signal.raise_signal(signal.SIGUSR1)
        yield from ()

    before = signal.signal(signal.SIGUSR1, over)
    try:
        with pytest.raises(Over):
            check(zapping(does), "kvm", parties=["vcpu"], jobs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_has_no_words_has_a_type() -> None:
    class Nothing:
        def __repr__(self) -> str:
            raise SystemExit

    assert describe(Mute()) == "Mute: (its __str__ raises)"
    assert shown(Nothing()) == "a Nothing"
    assert len(describe(ValueError("x" * 10_000))) < 400
    assert len(shown("x\n" * 10_000)) < 400


def test_a_place_is_where_the_author_has_to_look() -> None:
    def does(self: Design) -> Steps[None]:
        yield from self.host.can_set_direct_map()
        re.compile("(")                                 # raises in the library of Python

    assert re.search(r"raised error: missing .* \(test_third_party.py:\d+ in .*does\)$", told(zapping(does)))


# -- does not come back ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "TICK", 0.02)


def goes_round(*_: Any) -> Any:
    while True:
        pass


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("stays", [goes_round, lambda *_: time.sleep(1e6)])
def test_what_never_comes_back_is_stopped_and_told_with_its_line(stays: Callable[..., Any]) -> None:
    def does(self: Design) -> Steps[None]:
        yield from self.host.can_set_direct_map()
        stays()

    still = r"does not come back: after 0.1 seconds it is still at test_third_party.py:\d+ in "
    assert re.search(f"^party 'vcpu' of design 'theirs' on 'kvm' {still}", told(zapping(does)))
    assert re.search(f"^making design 'theirs' on 'kvm' {still}", told(design(__init__=stays)))
    calls = replace(KVM, name="h", hypercalls=dict.fromkeys(KVM.hypercalls, stays))
    assert re.search(f"of design 'library' on 'h', {still}", told(OurLibrary, calls))
    with pytest.raises(BadInput, match=f"^law 'mine', asked about a State, {still}"):
        World(OurLibrary, KVM, [PARTIES["vcpu"]], laws=[Law("mine", "a test", "a test", "always", state=stays)])


def counts(self: Design) -> Steps[None]:
    n = 0
    while (yield from self.host.can_set_direct_map()) or True:
        n += 1


def polls(self: Design) -> Steps[None]:
    while True:
        yield from self.host.can_set_direct_map()


def looks_up(self: Design) -> Steps[None]:
    while True:
        yield from self.host.filemap_get_folio(0)


def flushes(self: Design) -> Steps[None]:
    while True:
        yield from self.host.flush_tlb_kernel_range((Folio(0),))


@pytest.mark.parametrize(("loops", "law", "words"), [
    (looks_up, "host-survives", "filemap_get_folio(0) takes more than 255 references, and puts none"),
    (flushes, "progress", "")])
def test_what_is_counted_without_end_is_refuted(loops: Callable[[Design], Steps[None]], law: str, words: str) -> None:
    (found,) = World(zapping(loops), KVM, [PARTIES["vcpu"]]).explorer(["vcpu"]).run().findings
    assert found.law == law
    assert words in found.evidence


@pytest.fixture
def short_of_breath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_memfd.explore.engine.automaton.MOST_STEPS", 100)
    monkeypatch.setattr("guest_memfd.explore.world.scenario.MOST_ALONE", 100)


@pytest.mark.usefixtures("short_of_breath")
def test_what_counts_without_end_is_told_with_its_line() -> None:
    assert re.match(r"party 'vcpu' of design 'theirs' on 'kvm' goes on and on: 100 steps have led to no end, .*"
                    r" at can_set_direct_map\(\); does it count", told(zapping(counts)))


@pytest.mark.usefixtures("short_of_breath")
@pytest.mark.parametrize("loops", [counts, polls])
def test_what_costs_without_end_has_no_cost(loops: Callable[[Design], Steps[None]]) -> None:
    assert cost(zapping(loops), KVM) is None


@pytest.mark.usefixtures("short_of_breath")
@pytest.mark.parametrize(("loops", "words"), [
    (counts, "party 'scene' of design 'theirs' on 'kvm' goes on and on: "),
    (polls, "party 'scene' of design 'theirs' on 'kvm' goes round for ever, at can_set_direct_map() (test_third_party.py:"),
])
def test_a_scene_that_is_never_set_is_told(loops: Callable[[Design], Steps[None]], words: str) -> None:
    def bind(self: Design, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from loops(self)
        return 0

    assert told(design(bind=bind)).startswith(words)


def test_too_many_options_are_told() -> None:
    def wavers() -> Steps[None]:
        yield from US.choose("one of", *range(MOST_OPTIONS))

    words = rf"^party 'p0' offers {MOST_OPTIONS} options to choose from at test_third_party.py:\d+ in .*wavers; at most"
    with pytest.raises(DesignRaised, match=words):
        explorer(Toy(), wavers).run()


# -- is not deterministic ----------------------------------------------------------------------------------------------

ONCE: list[object] = []


def at_random(self: Design) -> bool:
    return random.random() < 0.5


def counted(self: Any) -> bool:
    self.times = getattr(self, "times", 0) + 1
    return self.times % 3 == 0


def the_first_time(self: Design) -> bool:
    ONCE.append(1)
    return len(ONCE) == 1


def the_first_time_of_an_instance(self: Any) -> bool:
    first = not hasattr(self, "done")
    self.done = True
    return first


def by_identity(self: Any) -> bool:
    ONCE.append(self)
    return self is ONCE[0]


@pytest.mark.parametrize("whether", [at_random, counted, the_first_time, the_first_time_of_an_instance, by_identity])
def test_what_is_not_deterministic_is_told(whether: Callable[[Design], bool]) -> None:
    ONCE.clear()

    def does(self: Design) -> Steps[None]:
        if whether(self):
            yield from self.host.can_set_direct_map()

    assert re.match(r"party 'vcpu' of design 'theirs' on 'kvm' is not deterministic: after the same \d+ results it did "
                    r"\w+\(.*\) and then did \w+\(.*\) \(\w+.py:\d+ in .*\); what it does must follow from the results",
                    told(zapping(does)))


def test_state_that_is_kept_from_scene_to_scene_is_told() -> None:
    def bind(self: Any, gfn: int, start: int, nr: int) -> Steps[int]:
        if the_first_time_of_an_instance(type(self)):
            yield from self.host.can_set_direct_map()
        return (yield from OurLibrary.bind(self, gfn, start, nr))

    assert "party 'scene' of design 'theirs' on 'kvm' is not deterministic: after the same " in told(design(bind=bind))


def test_a_hypercall_that_is_not_deterministic_is_told() -> None:
    calls = []

    def wrapped(code: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(1)
            return code(*args) if len(calls) % 2 else -16
        return call

    hypervisor = replace(KVM, name="h", hypercalls={name: wrapped(code) for name, code in KVM.hypercalls.items()})
    assert re.match(rf"hyp_call\(.*\), asked for by kvm {ON_H}, is not deterministic: in the same state it "
                    r"returned 0 and then returned -16$", told(OurLibrary, hypervisor))


def test_exists_and_laws_are_asked_twice() -> None:
    answers = iter([True, False])
    wavers = Party("wavers", "a test", lambda _design, _hypervisor: US.fd_open(), exists=lambda *_: next(answers))
    with pytest.raises(DesignRaised, match=r"^`exists` of party 'wavers' .* is not deterministic: it answered True and "):
        World(OurLibrary, KVM, [wavers])
    words = iter(f"for the {n}. time" for n in range(1000))
    law = Law("counts", "a test", "a test", "always", state=lambda _state: next(words))
    with pytest.raises(BadInput, match=r"^law 'counts', .* is not deterministic: it answered 'for the 0. time' and "):
        World(OurLibrary, KVM, [PARTIES["vcpu"]], laws=[law])


PROCESS = os.getpid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is one process")
def test_what_another_process_does_otherwise_is_told() -> None:
    def does(self: Design) -> Steps[None]:
        if os.getpid() == PROCESS:
            yield from self.host.can_set_direct_map()

    with pytest.raises(DesignRaised, match=r"deterministic: after the same 11 results it did can_set_direct_map.. and"):
        check(zapping(does), "kvm", parties=["vcpu"], scenes=["two-pages", "both-private"], jobs=2)


def test_what_is_deterministic_is_not_refused() -> None:
    def does(self: Design) -> Steps[None]:
        for nr in sorted({"a": 1, "b": 2}.values()):
            yield from self.host.warn(f"{nr}")

    assert check(zapping(does), "kvm", parties=["vcpu2"], jobs=1).verdict != "undetermined"
    ours, same = (world(each, "kvm").explorer(["vcpu", "zeropad"]).run() for each in (OurLibrary, design()))
    assert (ours.states, ours.transitions) == (same.states, same.transitions)


# -- what it gives -----------------------------------------------------------------------------------------------------


class Odd:
    def __repr__(self) -> str:
        raise SystemExit(0)


@pytest.mark.parametrize(("asked", "words"), [
    (lambda host: host.lock_folio(None), "lock_folio() is given None for folio, which is a Folio"),
    (lambda host: host.lock_folio(Odd()), "lock_folio() is given a Odd for folio, which is a Folio"),
    (lambda host: host.lock_folio(Folio(Odd())), "lock_folio() is given a Folio for folio, which is a Folio"),
    (lambda host: host.end_op("x"), "end_op() is given 'x' for ret, which is a whole number"),
    (lambda host: host.end_op(1 << 99), f"end_op() is given {1 << 99} for ret, which is a whole number"),
    (lambda host: host.end_op(-1, 0.5), "end_op() is given 0.5 for error_index, which is a whole number or None"),
    (lambda host: host.down_read("invalid"), "down_read() is given 'invalid' for sem, which is 'invalidate' or 'bindings'"),
    (lambda host: host.tree_store("attributes", 0, [1]), "tree_store() is given [1] for values, which is a Entries"),
    (lambda host: host.flush_tlb_kernel_range([PAGE]),
     "flush_tlb_kernel_range() is given [Folio(pfn=0, order=0)] for folios, which is a tuple of Folio"),
    (lambda host: host.hyp_call("lend", [1]), "hyp_call() is given [1]; numbers, words and tuples of them can be told"),
    (lambda host: host.choose("what", 1, Odd()), "choose() is given a Odd; numbers, words and tuples"),
    (lambda host: (yield Primitive("fput", (1, 2), "user")), "fput() takes 0 arguments, , and is given 2"),
    (lambda host: host.end_op(host.fput()), "end_op() is given <generator object Host._do at "),
])
def test_a_primitive_is_given_what_it_takes(asked: Callable[[Any], Steps[Any]], words: str) -> None:
    with pytest.raises(NotAPrimitive) as refused:
        check(zapping(lambda self: asked(self.host)), "kvm", parties=["vcpu"], jobs=1)
    assert str(refused.value).startswith(f"party 'vcpu' of design 'theirs' on 'kvm': {words}")
    assert "(test_third_party.py:" in str(refused.value)


@pytest.mark.long
def test_every_primitive_of_the_library_is_what_it_takes() -> None:
    everybody = world(design(), "pkvm")                 # whose code is watched
    for party in everybody.programs:
        everybody.explorer([party]).run()


@pytest.mark.parametrize(("result", "words"), [
    (10 ** 30, f"returned 1{'0' * 30}, not 0 or -errno"), (1, "returned 1, not"), (None, "returned None, not"),
    (True, "returned True, not"), ("x", "returned 'x', not"), (-5000, "returned -5000, not"), (Odd(), "returned a Odd, not"),
])
def test_a_hypercall_returns_0_or_an_errno(result: Any, words: str) -> None:
    hypervisor = replace(KVM, name="h", hypercalls=dict.fromkeys(KVM.hypercalls, lambda *_: result))
    assert words in told(OurLibrary, hypervisor)


@pytest.mark.parametrize("answer", [None, 1, "yes", Odd()])
def test_yes_or_no_is_true_or_false(answer: Any) -> None:
    maybe = Party("maybe", "a test", lambda _design, _hypervisor: US.fd_open(), exists=lambda *_: answer)
    with pytest.raises(DesignRaised, match=r"^`exists` of party 'maybe' .* answered .*, not True or False$"):
        World(OurLibrary, KVM, [maybe])
    hypervisor = replace(PKVM, name="h", force_reclaim=lambda *_: answer)
    assert re.search("force_reclaim of 'h' returned .*, not True or False",
                     told(world_without_a_design(), hypervisor, ("vcpu", "power")))
    hypervisor = replace(PKVM, name="h", exports=lambda *_: answer)
    assert re.search("exports of 'h' returned .*, not True or False",
                     told(world_without_a_design(), hypervisor, ("vcpu", "power")))


def world_without_a_design() -> type[Design]:
    from guest_memfd.designs.none import NoDesign

    return NoDesign


def test_ops_are_operations() -> None:
    assert told(OurLibrary, replace(KVM, name="h", ops=lambda: Odd())) == (  # type: ignore[arg-type, return-value]
        "hypervisor 'h': its ops make a Odd, which is no GuestMemfdOps")
    assert issubclass(KvmOps, GuestMemfdOps)


@pytest.mark.parametrize("result", [("x", None), "x", None, 10 ** 30])
def test_what_an_operation_returns_is_looked_at(result: Any) -> None:
    def guest_fault(self: Design, gfn: int, index: int) -> Steps[Any]:
        yield from ()
        return result

    assert told(design(guest_fault=guest_fault)).startswith(
        f"party 'vcpu' of design 'theirs' on 'kvm': op_returned() is given {shown(result)} for ret, which is a whole number")


def test_a_yield_without_from_is_told() -> None:
    def does(self: Design) -> Steps[None]:
        yield self.host.fput()                          # type: ignore[misc]

    assert re.search(r"yielded <generator .*> at test_third_party.py:\d+ in .*does; that is a procedure: write 'yield from'",
                     told(zapping(does)))


def test_nothing_of_this_is_asked_of_what_is_ours() -> None:
    assert not guard.foreign(OurLibrary, KVM.ops, *KVM.hypercalls.values(), PARTIES["vcpu"].procedure)
    assert guard.foreign(design())
    assert world("library", "kvm").programs["vcpu"].anew is None
