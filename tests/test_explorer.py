"""The engine on machines of one byte, where everything it should say can be counted by hand."""

from __future__ import annotations

import re

import pytest
from toy import PAGE, PANIC, US, Toy, ToyLaw, end, explorer, run

from guest_memfd.errors import DesignRaised, NotAPrimitive
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Finding, Result, step_line
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import NEVER_ENDS, Tables
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import Primitive, Steps


def nothing() -> Steps[None]:
    yield from ()


def once() -> Steps[None]:
    yield from US.clear_folio(PAGE)


def critical() -> Steps[None]:
    yield from US.lock_folio(PAGE)
    yield from US.unlock_folio(PAGE)


def lines(finding: Finding) -> list[str]:
    return [step_line(step) for step in finding.steps]


COUNTER = Toy(clear_folio=lambda byte, party, args: [end(None, byte + 1)])


# -- counting ----------------------------------------------------------------------------------------------------------


def test_parties_that_do_nothing_have_one_state() -> None:
    result = run(Toy(), nothing, nothing)
    assert (result.states, result.transitions, result.finals, result.verdict) == (1, 0, 1, "holds")


def test_two_single_steps_interleave_to_four_states() -> None:
    result = run(COUNTER, once, once)
    assert (result.states, result.transitions, result.finals, result.depth) == (4, 4, 1, 2)


def test_a_lock_keeps_one_party_out() -> None:
    # Both outside, one in and the other before or behind (2 x 2), one through (2), both through.
    result = run(Toy(), critical, critical)
    assert (result.states, result.transitions, result.verdict) == (8, 8, "holds")


def test_outcomes_that_lead_to_one_state_are_one_transition() -> None:
    machine = Toy(folio_ref_count=lambda byte, party, args: [end(1, 0), end(2, 0)])

    def counts() -> Steps[None]:
        yield from US.folio_ref_count(PAGE)

    assert run(machine, counts).transitions == 1


def test_results_decide_where_a_party_goes() -> None:
    machine = Toy(folio_ref_count=lambda byte, party, args: [end(1, 0), end(2, 0)],
                  clear_folio=lambda byte, party, args: [end(None, 7)])

    def counts() -> Steps[None]:
        if (yield from US.folio_ref_count(PAGE)) == 2:
            yield from US.clear_folio(PAGE)

    assert run(machine, counts).states == 4


def test_true_is_not_one() -> None:
    machine = Toy(fd_close=lambda byte, party, args: [end(True, 0), end(1, 1)],
                  clear_folio=lambda byte, party, args: [end(None, 9)])

    def closes() -> Steps[None]:
        if (yield from US.fd_close()) is True:
            yield from US.clear_folio(PAGE)

    assert run(machine, closes).finals == 2


# -- what takes no step of its own -------------------------------------------------------------------------------------


def choosing() -> Steps[None]:
    for _ in range((yield from US.choose("times", 1, 2))):
        yield from US.clear_folio(PAGE)


def test_a_choice_is_fused_with_the_step_behind_it() -> None:
    result = run(COUNTER, choosing, law=ToyLaw(states=(2,)))
    assert (result.states, result.depth) == (4, 2)
    assert lines(result.findings[0]) == ["p0: [times 2] clear_folio(pfn0)", "p0: clear_folio(pfn0)"]


def test_a_last_choice_is_a_step_of_its_own() -> None:
    def ends() -> Steps[None]:
        yield from US.choose("how", "so", "otherwise")

    result = run(Toy(), ends, law=ToyLaw(ends=(0,)))
    assert result.transitions == 1
    assert lines(result.findings[0]) == ["p0: [how so] done"]


def test_ghosts_are_fused_and_their_notes_are_judged() -> None:
    machine = Toy(begin_op=lambda byte, party, args: [end(None, byte, "began")],
                  clear_folio=lambda byte, party, args: [end(None, byte + 1)])

    def operation() -> Steps[None]:
        yield from US.begin_op("punch", 0, 1)
        yield from US.clear_folio(PAGE)

    result = run(machine, operation, law=ToyLaw(notes=("began",)))
    assert result.states == 2
    assert lines(result.findings[0]) == ["p0: clear_folio(pfn0)"]


def test_who_stays_has_moved_all_the_same() -> None:
    # 0: free, 1: held, 2: held, and somebody is in the queue, 4: free for him, 3: he has had it.
    machine = Toy(
        lock_folio=lambda byte, party, args: [end(None, 1)] if byte in (0, 3) else [],
        unlock_folio=lambda byte, party, args: [end(None, 0 if byte == 1 else 4)],
        down_write=lambda byte, party, args: {
            0: [end(None, 3)], 1: [end(STAY, 2)], 4: [end(None, 3, "queued")]}.get(byte, []))

    def writer() -> Steps[None]:
        yield from US.down_write("invalidate")

    result = run(machine, critical, writer, law=ToyLaw(notes=("queued",)))
    (finding,) = result.findings
    assert lines(finding) == [
        "p0: lock_folio(pfn0)", "p1: down_write(invalidate) -> waits", "p0: unlock_folio(pfn0)",
        "p1: down_write(invalidate)"]


# -- round and round without a step of its own -----------------------------------------------------------------------


def again_or_on() -> Steps[None]:
    while (yield from US.choose("again", True, False)):
        pass
    yield from US.clear_folio(PAGE)


def for_ever() -> Steps[None]:
    while True:
        yield from US.choose("which", 1, 2)


def test_a_loop_of_loads_that_nobody_ends_is_a_livelock() -> None:
    def reads() -> Steps[None]:
        while (yield from US.tree_load("attributes", 0, 1)) == (0,):
            pass

    machine = Toy(tree_load=lambda byte, party, args: [end((byte,), byte)],
                  clear_folio=lambda byte, party, args: [end(None, 1)])
    (finding,) = run(machine, reads).findings
    assert (finding.law, finding.evidence, finding.steps) == ("progress", NEVER_ENDS, [])
    assert run(machine, reads, once).verdict == "holds"


def test_a_loop_of_choices_that_can_be_left_is_no_livelock() -> None:
    result = run(COUNTER, again_or_on)
    assert (result.states, result.transitions, result.verdict) == (2, 1, "holds")


def test_a_loop_of_choices_that_leads_to_a_wait_is_that_wait() -> None:
    def waits() -> Steps[None]:
        yield from again_or_on()
        yield from US.lock_folio(PAGE)

    (finding,) = run(Toy(clear_folio=lambda byte, party, args: []), again_or_on).findings
    assert finding.evidence == "deadlock: clear_folio"
    assert run(COUNTER, waits).findings[0].evidence == "deadlock: lock_folio"


def test_a_loop_of_choices_that_cannot_be_left_is_a_livelock() -> None:
    result = run(COUNTER, for_ever, once)
    (finding,) = result.findings
    assert (finding.law, finding.evidence, finding.steps) == ("progress", NEVER_ENDS, [])
    assert result.states == 2                           # and the other party is heard all the same


def test_a_loop_that_a_choice_leads_into_comes_with_that_choice() -> None:
    def wrong_turn() -> Steps[None]:
        yield from US.clear_folio(PAGE)
        if (yield from US.choose("turn", "right", "wrong")) == "wrong":
            yield from for_ever()
        yield from US.clear_folio(PAGE)

    result = run(COUNTER, wrong_turn)
    (finding,) = result.findings
    assert lines(finding) == ["p0: clear_folio(pfn0)", "p0: [turn wrong] choose(which, 1, 2)"]
    assert result.states == 4                           # the start, the turn, the end, and round and round
    assert explorer(COUNTER, wrong_turn).run(max_steps=1).findings[0].evidence == NEVER_ENDS


def test_what_is_noted_on_the_way_round_is_judged() -> None:
    def operates() -> Steps[None]:
        while (yield from US.choose("again", True, False)):
            yield from US.begin_op("punch", 0, 1)
        yield from US.clear_folio(PAGE)

    machine = Toy(begin_op=lambda byte, party, args: [end(None, byte, "began")],
                  clear_folio=lambda byte, party, args: [end(None, 1)])
    (finding,) = run(machine, operates, law=ToyLaw(notes=("began",))).findings
    assert lines(finding) == ["p0: [again True, again False] clear_folio(pfn0)"]


def test_a_teardown_that_goes_round_and_round_is_found() -> None:
    found = run(COUNTER, once, teardown=for_ever).findings
    assert NEVER_ENDS in {finding.evidence for finding in found}


# -- laws --------------------------------------------------------------------------------------------------------------


def test_of_two_ways_the_shortest_is_told() -> None:
    def long_way() -> Steps[None]:
        yield from US.lock_folio(PAGE)
        yield from US.unlock_folio(PAGE)
        yield from US.fd_close()

    def short_way() -> Steps[None]:
        yield from US.fd_close()

    machine = Toy(fd_close=lambda byte, party, args: [end(True, byte, "closed")])
    for order in ([long_way, short_way], [short_way, long_way]):
        (finding,) = run(machine, *order, law=ToyLaw(notes=("closed",))).findings
        assert (finding.law, finding.evidence, len(finding.steps)) == ("toy", "note closed", 1)


def test_what_is_broken_from_the_start_takes_no_steps() -> None:
    (finding,) = run(COUNTER, once, law=ToyLaw(states=(0,))).findings
    assert (finding.evidence, finding.steps) == ("byte 0", [])


def test_after_the_last_party_the_world_is_torn_down_and_judged() -> None:
    (finding,) = run(COUNTER, once, law=ToyLaw(ends=(2,)), teardown=once).findings
    assert lines(finding) == ["p0: clear_folio(pfn0)", "teardown: clear_folio(pfn0)"]


def test_of_several_ends_the_shortest_way_through_the_teardown_counts() -> None:
    # With one step behind it the teardown takes five more, with two it takes one.
    def teardown() -> Steps[None]:
        for _ in range((yield from US.folio_ref_count(PAGE))):
            yield from US.lru_add_drain_all()

    machine = Toy(clear_folio=lambda byte, party, args: [end(None, byte + 1)],
                  folio_ref_count=lambda byte, party, args: [end(4 if byte == 1 else 0, 100)],
                  lru_add_drain_all=lambda byte, party, args: [end(None, 100)])
    (finding,) = run(machine, choosing, law=ToyLaw(ends=(100,)), teardown=teardown).findings
    assert len(finding.steps) == 3


def test_a_panic_stops_everybody_and_is_no_deadlock() -> None:
    machine = Toy(clear_folio=lambda byte, party, args: [end(None, PANIC)])
    result = run(machine, once, critical, law=ToyLaw(ends=(PANIC,)))
    assert result.verdict == "holds"
    assert result.states == 6


# -- progress ----------------------------------------------------------------------------------------------------------


def test_a_deadlock_is_found_and_named() -> None:
    first, second = 0b01, 0b10
    machine = Toy(lock_folio=lambda byte, party, args: [] if byte & args[0] else [end(None, byte | args[0])],
                  unlock_folio=lambda byte, party, args: [end(None, byte & ~args[0])])

    def both(one: int, other: int) -> Steps[None]:
        yield from US.lock_folio(one)                   # type: ignore[arg-type]
        yield from US.lock_folio(other)                 # type: ignore[arg-type]
        yield from US.unlock_folio(other)               # type: ignore[arg-type]
        yield from US.unlock_folio(one)                 # type: ignore[arg-type]

    result = run(machine, lambda: both(first, second), lambda: both(second, first))
    (finding,) = result.findings
    assert (finding.law, finding.evidence) == ("progress", "deadlock: lock_folio")
    assert lines(finding) == ["p0: lock_folio(1)", "p1: lock_folio(2)"]
    assert run(machine, lambda: both(first, second), lambda: both(first, second)).verdict == "holds"


def test_a_livelock_is_found() -> None:
    machine = Toy(lock_folio=lambda byte, party, args: [end(None, 2)],
                  folio_mapped=lambda byte, party, args: [end(byte == 2, byte)])

    def waits_for_nobody() -> Steps[None]:
        while not (yield from US.folio_mapped(PAGE)):
            pass
        yield from US.choose("it", "ends")

    def never() -> Steps[None]:
        while True:
            yield from US.folio_mapped(PAGE)

    assert run(machine, waits_for_nobody, lambda: US.lock_folio(PAGE)).verdict == "holds"
    (finding,) = run(machine, never, lambda: US.lock_folio(PAGE)).findings
    assert (finding.law, finding.evidence, finding.steps) == ("progress", NEVER_ENDS, [])


def test_a_livelock_that_has_to_be_reached_comes_with_the_way_there() -> None:
    machine = Toy(folio_mapped=lambda byte, party, args: [end(byte == 0, byte)],
                  clear_folio=lambda byte, party, args: [end(None, 1)])

    def polls() -> Steps[None]:
        while not (yield from US.folio_mapped(PAGE)):
            pass

    (finding,) = run(machine, polls, once).findings
    assert finding.evidence == NEVER_ENDS
    assert lines(finding) == ["p1: clear_folio(pfn0)"]


def test_a_teardown_that_waits_or_does_not_end_is_found() -> None:
    def forever() -> Steps[None]:
        while True:
            yield from US.lru_add_drain_all()

    machine = Toy(lru_add_drain_all=lambda byte, party, args: [end(None, byte)])
    assert run(machine, nothing, teardown=forever).findings[0].evidence == "teardown does not end"
    (finding,) = run(Toy(), lambda: US.lock_folio(PAGE), teardown=critical).findings
    assert finding.evidence == "teardown waits for ever in lock_folio(pfn0)"


# -- limits ------------------------------------------------------------------------------------------------------------


def many() -> Steps[None]:
    for _ in range((yield from US.choose("times", *range(1, 30)))):
        yield from US.clear_folio(PAGE)


def test_a_limit_makes_the_verdict_undetermined() -> None:
    whole = explorer(COUNTER, many, many).run()
    for named, limit in (("states", {"max_states": 50}), ("seconds", {"max_seconds": 0}), ("steps", {"max_steps": 2})):
        result = explorer(COUNTER, many, many).run(**limit)
        assert result.verdict == "undetermined"
        assert re.fullmatch(rf"more than \d+ {named}", result.limit or "")
        assert result.states < whole.states
    assert whole.verdict == "holds"


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    whole = explorer(COUNTER, many).run()
    assert explorer(COUNTER, many).run(max_states=whole.states).limit is None
    assert explorer(COUNTER, many).run(max_states=whole.states - 1).limit is not None


def test_what_breaks_before_a_limit_is_refuted() -> None:
    assert explorer(COUNTER, many, law=ToyLaw(states=(1,))).run(max_states=2).verdict == "refuted"


def test_what_breaks_within_so_many_steps_is_found() -> None:
    for steps, found in ((3, 0), (5, 1)):
        engine = explorer(COUNTER, many, law=ToyLaw(states=(5,)))
        assert len(engine.run(max_steps=steps).findings) == found


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_kept_from_another_scenario_change_no_number() -> None:
    one = explorer(COUNTER, many, once, law=ToyLaw(states=(3,), ends=(4,)))
    fresh = one.run()
    programs = one.programs
    kept = one.tables
    for parties in ([programs[1]], [programs[1], programs[0]], programs):
        again = type(one)(kept, parties, one.initial).run()
    assert (again.states, again.transitions) == (fresh.states, fresh.transitions)
    assert [(f.evidence, len(f.steps)) for f in again.findings] == [(f.evidence, len(f.steps)) for f in fresh.findings]


def numbers(result: Result) -> tuple[int, int, list[tuple[str, int]]]:
    return result.states, result.transitions, [(f.evidence, len(f.steps)) for f in result.findings]


def test_of_runs_as_long_the_one_with_fewer_failures_is_told() -> None:
    # Bytes 10 and more have spent a failure; both ways break the law in the second step, the failing one is tried first.
    class Spends(Toy):
        def spared(self, shared: bytes) -> int:
            return int(shared[0] < 10)

    def twice() -> Steps[None]:
        yield from US.clear_folio(PAGE)
        yield from US.folio_mark_uptodate(PAGE)

    machine = Spends(
        clear_folio=lambda byte, party, args: [end(-1, 10, failed=True), end(0, 1)],
        folio_mark_uptodate=lambda byte, party, args: [end(0, byte + 1, "broken")],
    )
    law = ToyLaw(notes=("broken",))
    finding, = Explorer(Tables(machine, [law]), [Program(0, "a", twice)], b"\0").run().findings
    assert (len(finding.steps), finding.injected) == (2, 0)


def test_programs_of_one_number_have_tables_of_their_own() -> None:
    machine = Toy(clear_folio=lambda byte, party, args: [end(None, byte + 1, party)])

    def thrice() -> Steps[None]:
        for _ in range(3):
            yield from US.clear_folio(PAGE)

    law = ToyLaw(states=(3,), notes=(1,))
    other = Program(0, "other", once)
    variants = [Program(1, f"variant{n}", start) for n, start in enumerate((once, thrice, critical))]
    kept = Tables(machine, [law])
    for _round in range(2):
        for variant in variants:
            fresh = Explorer(Tables(machine, [law]), [other, variant], b"\0").run()
            again = Explorer(kept, [other, variant], b"\0").run()
            assert numbers(again) == numbers(fresh), variant.name
    assert {(party, note) for party, note in kept.facts} == {("other", 0), ("variant0", 1), ("variant1", 1)}


def test_tables_are_right_for_every_initial_state() -> None:
    machine = Toy(clear_folio=lambda byte, party, args: [end(None, byte + 1)])
    law = ToyLaw(states=(4,), ends=(3,))
    programs = [Program(0, "critical", critical), Program(1, "many", choosing), Program(2, "once", once)]
    tables = Tables(machine, [law])
    seen = set()
    for _round in range(2):
        for byte in (0, 1, 2, 3, 4):
            fresh = Explorer(Tables(machine, [law]), programs, bytes([byte])).run()
            again = Explorer(tables, programs, bytes([byte])).run()
            assert numbers(again) == numbers(fresh), byte
            seen.add(str(numbers(fresh)))
    assert len(seen) == 5                               # so that one cannot pass for another


def test_an_end_is_judged_after_the_teardown_of_its_own_scenario() -> None:
    law = ToyLaw(ends=(2,))
    tables = Tables(COUNTER, [law])
    program = Program(0, "once", once)
    for teardown, verdict in ((None, "holds"), (Program(13, "teardown", once), "refuted"), (None, "holds")):
        assert Explorer(tables, [program], b"\0", teardown).run().verdict == verdict


# -- bad parties -------------------------------------------------------------------------------------------------------


def test_what_is_no_primitive_is_named_with_file_and_line() -> None:
    def confused() -> Steps[None]:
        yield from US.lock_folio(PAGE)
        yield "unlock"                                  # type: ignore[misc]

    with pytest.raises(NotAPrimitive, match=r"party 'p0' yielded 'unlock' at test_explorer.py:\d+ in .*confused"):
        explorer(Toy(), confused).run()


def test_a_party_that_raises_is_told_with_the_way_there() -> None:
    def careless() -> Steps[None]:
        yield from US.lock_folio(PAGE)
        count = yield from US.folio_ref_count(PAGE)
        yield from US.unlock_folio((PAGE, PAGE)[count])

    machine = Toy(folio_ref_count=lambda byte, party, args: [end(1, byte), end(2, byte)])
    with pytest.raises(DesignRaised) as raised:
        explorer(machine, critical, careless).run()
    text = str(raised.value)
    assert re.match(r"party 'p1' raised IndexError: tuple index out of range \(test_explorer.py:\d+ in .*careless\)", text)
    assert text.splitlines()[1:] == ["  1. p1: lock_folio(pfn0)"]


def test_a_party_that_raises_in_the_teardown_is_told_with_the_way_there() -> None:
    def breaks() -> Steps[None]:
        yield from US.lru_add_drain_all()
        raise RuntimeError("no more")

    machine = Toy(lru_add_drain_all=lambda byte, party, args: [end(None, byte)])
    with pytest.raises(DesignRaised, match=r"party 'teardown' raised RuntimeError: no more(.|\n)*1. p0: lock_folio"):
        explorer(machine, critical, teardown=breaks).run()


def test_a_machine_that_raises_is_told_as_the_primitives_fault() -> None:
    with pytest.raises(DesignRaised, match=r"clear_folio\(pfn0\), asked for by user, raised ZeroDivisionError"):
        explorer(Toy(clear_folio=lambda byte, party, args: [end(1 // 0, 0)]), once).run()


def test_a_procedure_that_is_none_is_told() -> None:
    with pytest.raises(DesignRaised, match=r"^party 'p0' is no procedure: it is None; one that"):
        explorer(Toy(), lambda: None).run()             # type: ignore[arg-type, return-value]


# -- where a party stands ----------------------------------------------------------------------------------------------


def test_the_iterator_of_a_loop_is_part_of_where_a_party_stands() -> None:
    result = run(COUNTER, choosing)
    assert (result.states, result.finals) == (4, 2)


def test_half_evaluated_expressions_are_part_of_where_a_party_stands() -> None:
    machine = Toy(folio_ref_count=lambda byte, party, args: [end(1, 0), end(2, 0)],
                  clear_folio=lambda byte, party, args: [end(None, byte + 1)])

    def adds() -> Steps[None]:
        for _ in range((yield from US.folio_ref_count(PAGE)) + (yield from US.folio_ref_count(PAGE))):
            yield from US.clear_folio(PAGE)

    assert run(machine, adds).depth == 6


def test_closures_made_anew_are_the_same_place() -> None:
    def polls() -> Steps[None]:
        def done(seen: int) -> bool:
            return seen == 1

        while not done((yield from US.folio_ref_count(PAGE))):
            pass

    machine = Toy(folio_ref_count=lambda byte, party, args: [end(byte, byte)],
                  clear_folio=lambda byte, party, args: [end(None, byte + 1)])
    assert run(machine, polls, once).states == 5


def test_state_kept_outside_of_the_procedure_is_refused() -> None:
    class Outside:
        calls = 0

    def counts() -> Steps[None]:
        Outside.calls += 1
        yield from US.lru_add_drain_all()
        yield Primitive("clear_folio", (Outside.calls,), "user")

    machine = Toy(lru_add_drain_all=lambda byte, party, args: [end(None, 0), end(True, 1)],
                  clear_folio=lambda byte, party, args: [end(None, byte)])
    with pytest.raises(DesignRaised, match="keep loop state in local variables"):
        explorer(machine, counts).run()


def test_a_local_variable_without_a_hash_is_refused() -> None:
    def keeps() -> Steps[None]:
        buffer = bytearray(1)
        yield from US.clear_folio(PAGE)
        buffer.clear()

    with pytest.raises(DesignRaised, match="party 'p0' keeps what has no hash"):
        explorer(COUNTER, keeps).run()


def test_places_without_end_between_two_steps_are_refused() -> None:
    def counts() -> Steps[None]:
        reads = 0
        while (yield from US.tree_load("attributes", 0, 1)) == (0,):
            reads += 1

    with pytest.raises(DesignRaised, match=r"'p0' goes on and on .*, at tree_load\(attributes, 0, 1\)"):
        explorer(Toy(tree_load=lambda byte, party, args: [end((0,), byte)]), counts).run()
