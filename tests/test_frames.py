"""What an operation does is found out once, for whoever calls it; and only where nobody else can tell the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from toy import PAGE, US, Toy, ToyLaw, end

from guest_memfd.explore.engine import automaton, place
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.naive import explore
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.words.primitives import Steps

Procedure = Callable[[], Steps[Any]]

COUNTS = Toy(folio_ref_count=lambda byte, party, args: [end(byte, byte), end(byte + 1, byte)],
             clear_folio=lambda byte, party, args: [end(None, (byte + 1) % 4)],
             lru_add_drain_all=lambda byte, party, args: [end(None, byte)])


def operation() -> Steps[int]:
    count = 0
    for _ in range(3):
        yield from US.clear_folio(PAGE)
        count += yield from US.folio_ref_count(PAGE)
    return count


def programs(*procedures: Procedure) -> list[Program]:
    return [Program(i, f"p{i}", procedure) for i, procedure in enumerate(procedures)]


def sends(monkeypatch: pytest.MonkeyPatch, tables: Tables, program: Program) -> int:
    """How often the procedure of *program* is sent a result, when it is explored on *tables*."""
    sent = []

    def counted(*arguments: Any) -> Any:
        sent.append(arguments)
        return send(*arguments)

    send = automaton.send
    with monkeypatch.context() as patch:
        patch.setattr(automaton, "send", counted)
        Explorer(tables, [program], b"\0").run()
    return len(sent)


def one() -> Steps[None]:
    yield from operation()


def other() -> Steps[None]:
    yield from US.lru_add_drain_all()
    yield from operation()
    yield from US.clear_folio(PAGE)


def test_who_calls_the_same_runs_only_what_is_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = programs(one, other)
    alone = sends(monkeypatch, Tables(COUNTS, [ToyLaw()]), second)
    tables = Tables(COUNTS, [ToyLaw()])
    assert sends(monkeypatch, tables, first) == alone - 2 == 18
    # To its own steps, and back from the operation: three counts so far, and two ways that the last one can end.
    assert sends(monkeypatch, tables, second) == 2 + 3 * 2


def test_third_parties_are_run_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Program(i, f"p{i}", each, anew=each) for i, each in enumerate((one, other)))
    alone = sends(monkeypatch, Tables(COUNTS, [ToyLaw()]), second)
    tables = Tables(COUNTS, [ToyLaw()])
    sends(monkeypatch, tables, first)
    assert sends(monkeypatch, tables, second) == alone


# -- what others can see is no one's own -------------------------------------------------------------------------------

def adds_to(found: list[int]) -> Steps[None]:
    found.append((yield from US.folio_ref_count(PAGE)))
    found = []                                          # what was added cannot be seen here any more
    yield from US.clear_folio(PAGE)


def lends_a_list() -> Steps[None]:
    found: list[int] = []
    yield from adds_to(found)
    for _ in range(sum(found) % 3):
        yield from US.clear_folio(PAGE)


def gives_a_list_away() -> Steps[None]:
    yield from adds_to([])
    yield from US.clear_folio(PAGE)


def takes(some: Iterator[int]) -> Steps[None]:
    for _ in some:
        if (yield from US.folio_ref_count(PAGE)):
            break
    some, _ = iter(()), 0                               # how many were taken cannot be seen here any more
    yield from US.clear_folio(PAGE)


def lends_an_iterator() -> Steps[None]:
    some = iter(range(4))
    yield from takes(some)
    for _ in some:
        yield from US.clear_folio(PAGE)


def gives_an_iterator_away() -> Steps[None]:
    yield from takes(iter(range(4)))


def lends_a_closure() -> Steps[None]:
    total = 0

    def add(number: int) -> None:
        nonlocal total
        total += number

    def adds(to: Callable[[int], None]) -> Steps[None]:
        for _ in range(2):
            to((yield from US.folio_ref_count(PAGE)))
            yield from US.clear_folio(PAGE)

    yield from adds(add)
    for _ in range(total % 3):
        yield from US.clear_folio(PAGE)


CALLERS = (one, other, lends_a_list, gives_a_list_away, lends_an_iterator, gives_an_iterator_away, lends_a_closure)


def same_counts(procedures: tuple[Procedure, ...]) -> bool:
    """Whether each of *procedures*, alone on tables that all share, has as many states as without any tables."""
    tables = Tables(COUNTS, [ToyLaw()])
    return all(
        (result.states, result.transitions) == explore(COUNTS, [program], b"\0")
        for program in programs(*procedures) for result in [Explorer(tables, [program], b"\0").run()])


@pytest.mark.parametrize("order", [CALLERS, CALLERS[::-1]])
def test_counts_are_those_of_the_naive_engine(order: tuple[Procedure, ...]) -> None:
    assert same_counts(order)


def test_and_would_not_be_if_everything_were_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_memfd.explore.engine.frames.keeps_to_itself", lambda generator, live: True)
    for lender, giver in ((lends_a_list, gives_a_list_away), (lends_an_iterator, gives_an_iterator_away)):
        assert not same_counts((giver, lender)), lender


def test_a_place_does_not_depend_on_when_it_was_looked_at() -> None:
    def names_one_more() -> Steps[None]:
        cell = 1

        def counts() -> int:
            return cell

        yield from US.clear_folio(PAGE)
        more = counts()
        yield from US.clear_folio(PAGE)
        assert more == cell

    keys = []
    for looked_at in (False, True):
        procedure = names_one_more()
        next(procedure)
        if looked_at:
            place.local_key(procedure)
        procedure.send(None)
        keys.append(place.local_key(procedure))
    assert keys[0] == keys[1]


# -- primitives --------------------------------------------------------------------------------------------------------

class Counted(Toy):
    """A toy that keeps footprints, and says how often it was asked."""

    footprints = True
    asked = 0

    def outcomes(self, shared: bytes, party: int, primitive: Any) -> Any:
        self.asked += 1
        return super().outcomes(shared, party, primitive)


def test_a_primitive_is_carried_out_once_for_all_places_that_ask_for_it() -> None:
    toy = Counted(**{name: does for name, does in COUNTS.does.items() if "lock_folio" not in name})
    tables = Tables(toy, [ToyLaw()])
    both = [Program(7, "p0", one), Program(7, "p1", other)]
    for program in both:
        Explorer(tables, [program], b"\0").run()
    assert toy.asked == 2 * 4                           # two primitives, four values of the byte
    toy.foreign = " of somebody"                        # type: ignore[attr-defined]
    tables = Tables(toy, [ToyLaw()])
    toy.asked = 0
    Explorer(tables, [both[1]], b"\0").run()
    assert toy.asked > 2 * 4
