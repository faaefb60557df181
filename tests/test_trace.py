"""A trace in a file and out of it again: the same verdict, or the first thing that is not as recorded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, TraceError, UnknownName
from guest_memfd.explore.engine.tables import NEVER_ENDS
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.suite.check import Limits, Report, check
from guest_memfd.explore.trace import SCHEMA, Trace, TraceStep, dumps, load, loads, save, trace_of, write
from guest_memfd.scenarios import SCENES
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import Entries, Folio, Host, Locked, Lookup, Primitive, Steps
from guest_memfd.words.scene import Kernel, Scene, Slot

Json = dict[str, Any]


class NoFlush(OurLibrary):
    """Breaks laws by what is noted, and by the state that is left."""

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()


class ForgetsToPut(OurLibrary):
    """Breaks nothing-lost after the teardown."""

    def unlock_and_put(self, folio: Folio) -> Steps[None]:
        yield from self.host.unlock_folio(folio)


class LocksTwice(OurLibrary):
    """Blocks itself."""

    def munmap(self) -> Steps[None]:
        yield from self.host.down_write("invalidate")
        yield from self.host.down_write("invalidate")


class Spins(OurLibrary):
    """Never ends once the file is closed."""

    def munmap(self) -> Steps[None]:
        yield from super().munmap()
        while (yield from self.host.vma_covers(0, 1)) or True:
            pass


class SpinsUnseen(OurLibrary):
    """Never ends once the file is closed, and takes no step that others could see."""

    def munmap(self) -> Steps[None]:
        yield from super().munmap()
        while True:
            yield from self.host.begin_op("punch", 0, 1)
            yield from self.host.end_op(0)


class ReadsOnAndOn(OurLibrary):
    """Never ends once the file is closed, and does nothing but read."""

    def munmap(self) -> Steps[None]:
        yield from super().munmap()
        while (yield from self.host.tree_load("attributes", 0, 1)).count(0) == 0:
            pass


class TakesAWrongTurn(OurLibrary):
    """Never ends when the wrong option is taken."""

    def munmap(self) -> Steps[None]:
        yield from super().munmap()
        turn = yield from self.host.choose("turn", "right", "wrong")
        while turn == "wrong":
            yield from self.host.choose("now", 1, 2)


class Late(OurLibrary):
    """The library, a step later."""

    def munmap(self) -> Steps[None]:
        yield from self.host.lru_add_drain_all()
        yield from super().munmap()


class TouchesTheDirectMapToBegin(OurLibrary):
    """Breaks library-alone before anybody has done anything."""

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from Host("gunyah").set_direct_map_default_noflush(Folio(0))
        return (yield from super().bind(gfn, start, nr))


@pytest.fixture(scope="module")
def none() -> Report:
    return check("none", "gunyah", parties=("vcpu", "zeropad"))


@pytest.fixture
def trace(none: Report) -> Trace:
    return trace_of(none, none.findings[0])


def changed(trace: Trace, number: int, **fields: Any) -> Trace:
    steps = list(trace.steps)
    steps[number - 1] = dataclasses.replace(steps[number - 1], **fields)
    return dataclasses.replace(trace, steps=tuple(steps))


def why(again: Replay) -> str:
    assert not again.same
    return str(again.divergence)


# -- round trips -------------------------------------------------------------------------------------------------------


def test_a_saved_trace_replays_to_the_same_finding(none: Report, tmp_path: Path) -> None:
    for found in (none.findings[0], none.laws["host-survives"]):
        save(none, found, tmp_path / "t.json")
        again = replay(load(tmp_path / "t.json"))
        assert again.same
        assert again.finding == found.finding
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]


def test_a_trace_with_the_names_that_primitives_had_replays() -> None:
    report, seen = check("gunyah-v17", "gunyah", parties=("vcpu2", "vmm")), ""
    for found in report.findings:
        old = re.sub(r'"tree_(?=load|store|reserve|release)', '"xa_', dumps(trace_of(report, found)))
        old = old.replace('"folio_set_no_direct_map"', '"folio_set_private"')
        assert replay(loads(old)).same
        seen += old
    assert '"xa_' in seen
    assert '"folio_set_private"' in seen


@pytest.mark.parametrize(("design", "hypervisor", "parties"), [
    ("gunyah-v17", "gunyah", ("vcpu2", "vmm")), ("gunyah-v17", "gunyah", ("vcpu2", "stop")),
    ("guestmem-rfc1", "gunyah", ("vcpu2", "vmm2")), ("guestmem-rfc1", "kvm", ("vcpu2", "vmm")),
    ("guestmem-rfc2", "gunyah", ("vcpu2", "vmm2")), ("guestmem-v5", "kvm", ("vcpu2", "drainer")),
    ("guestmem-v6", "kvm", ("vcpu2", "zeropad")),
    ("secretmem", "kvm", ("vcpu2", "vmm2", "kcore")), ("none", "pkvm", ("vcpu", "page-cache-reader")),
])
def test_every_finding_of_a_posted_design_replays(design: str, hypervisor: str, parties: tuple[str, ...]) -> None:
    report = check(design, hypervisor, parties=parties)
    assert report.findings
    for found in report.findings:
        again = replay(loads(dumps(trace_of(report, found))))
        assert again.same, again.divergence
        assert again.finding == found.finding


@pytest.mark.parametrize(("design", "parties", "law"), [
    (NoFlush, ("vcpu", "kcore"), "guest-private"), (NoFlush, ("vcpu", "kcore"), "one-owner"),
    (ForgetsToPut, ("vcpu",), "nothing-lost"), (LocksTwice, ("device",), "progress"), (Spins, ("device",), "progress"),
    (SpinsUnseen, ("device",), "progress"), (ReadsOnAndOn, ("device",), "progress"),
    (TakesAWrongTurn, ("device",), "progress"),
    (TouchesTheDirectMapToBegin, ("vcpu",), "library-alone"),
])
def test_every_way_to_break_a_law_replays(design: type[Design], parties: tuple[str, ...], law: str) -> None:
    report = check(design, "kvm", parties=parties)
    recorded = trace_of(report, report.laws[law])
    assert replay(recorded, design=design).same
    assert not replay(recorded).same                    # the library itself does not break it


def test_the_kinds_of_broken_progress_are_those_that_were_meant() -> None:
    evidence = [check(design, "kvm", parties=["device"]).laws["progress"].evidence
                for design in (LocksTwice, Spins, SpinsUnseen, ReadsOnAndOn, TakesAWrongTurn)]
    assert evidence == ["deadlock: down_write invalidate", *[NEVER_ENDS] * 4]


@pytest.mark.parametrize("scene", [*SCENES.values(), Scene("mine", frames=4, failures=2, kernel=Kernel(asks_mapping=False))],
                         ids=lambda scene: scene.name)
def test_a_trace_carries_its_scene(trace: Trace, scene: Scene) -> None:
    there = dataclasses.replace(trace, scene=scene)
    assert loads(dumps(there)) == there


@pytest.mark.parametrize(("scene", "parties"), [
    ("crossed", ("patient-vcpu",)), ("both-shared", ("vcpu2",)), ("nothing-yet", ("creator", "vcpu2")),
    ("two-vms", ("vcpu2", "other-vcpu")), ("for-good", ("vcpu2",)),
])
def test_what_breaks_in_a_scene_replays_in_it(scene: str, parties: tuple[str, ...]) -> None:
    report = check(ForgetsToPut, "pkvm", scenes=[scene], parties=parties)
    recorded = trace_of(report, report.laws["nothing-lost"])
    assert recorded.scene == SCENES[scene]
    assert recorded.failures == SCENES[scene].failures
    assert replay(loads(dumps(recorded)), design=ForgetsToPut).same


def test_in_another_scene_a_trace_diverges() -> None:
    report = check(ForgetsToPut, "pkvm", scenes=["both-shared"], parties=["vcpu2"])
    recorded = trace_of(report, report.laws["nothing-lost"])
    elsewhere = dataclasses.replace(recorded, scene=Scene())
    assert why(replay(elsewhere, design=ForgetsToPut)).startswith("step ")
    stranger = dataclasses.replace(recorded, parties=("other-vcpu",))
    with pytest.raises(BadInput, match=r"'other-vcpu' cannot exist with .* under 'pkvm' in scene 'both-shared'"):
        replay(stranger)


def test_a_trace_in_a_scene_of_ones_own_replays() -> None:
    scene = Scene("mine", pages=3, frames=3, slots=(Slot(3, 1, 2),), failures=0)
    report = check("none", "gunyah", scenes=[scene], parties=("vcpu", "zeropad"))
    recorded = trace_of(report, report.laws["host-survives"])
    assert recorded.steps[0].choices == ("gfn 4",)      # page 1 is shared
    again = replay(loads(dumps(recorded)))
    assert again.same
    assert again.finding == report.findings[0].finding


def test_a_step_says_which_file_it_is_about_unless_it_is_the_first() -> None:
    report = check(ForgetsToPut, "kvm", scenes=["two-vms"], parties=("vcpu2", "other-vcpu"))
    text = dumps(trace_of(report, report.laws["nothing-lost"]))
    steps = json.loads(text)["steps"]
    others = [step for step in steps if step["party"] == "other-vcpu"]
    assert all(step["file"] == 1 for step in others)
    assert not any("file" in step for step in steps if step["party"] == "vcpu2")
    assert {step.primitive.file for step in loads(text).steps if step.primitive} <= {0, 1}


@pytest.mark.parametrize("value", [
    None, True, False, 0, 1, -12, "ok", "", Folio(2), Folio(0, 9), Lookup(Folio(1), 0), Locked(None, True, False, True),
    (), (1, "a", None), ((Folio(0), Folio(1)), 3), STAY, Entries(2, 1 << 28), Entries(3, 2, 1),
])
def test_values_survive_json(trace: Trace, value: Any) -> None:
    there = changed(trace, 1, result=value, primitive=Primitive("tree_store", ("provided", value), "user"))
    back = loads(dumps(there))
    assert back == there
    assert type(back.steps[0].result) is type(value)


def test_a_value_that_json_has_not_is_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"1.5 \(float\) cannot be written to a trace"):
        write(changed(trace, 1, result=1.5), tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_is_about(trace: Trace) -> None:
    top = json.loads(dumps(trace))
    assert list(top) == ["schema", "version", "design", "hypervisor", "scene", "failures", "parties", "law", "sentence",
                         "evidence", "steps"]
    assert top["schema"] == "guest-memfd-trace/3"
    assert list(top["scene"]) == [field.name for field in dataclasses.fields(Scene)]
    assert top["scene"]["slots"] == [{"gfn": 0, "start": 0, "nr": 2}]
    assert top["scene"]["kernel"]["init_on_free"] is True
    assert top["sentence"] == "no access the kernel may make on its own ends in an abort it cannot handle"
    assert list(top["steps"][0]) == ["party", "choices", "primitive", "caller", "args", "result", "failed"]


def test_the_same_finding_is_the_same_file(trace: Trace) -> None:
    again = check("none", "gunyah", parties=("vcpu", "zeropad"))
    assert dumps(trace_of(again, again.findings[0])) == dumps(trace)


def test_a_law_that_did_not_break_has_no_trace(none: Report, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no trace: 'none' does not break law 'nothing-lost'"):
        save(none, none.laws["nothing-lost"], tmp_path / "t.json")


@pytest.mark.parametrize("place", ["missing/t.json", "."])
def test_where_nothing_can_be_written_is_said(none: Report, tmp_path: Path, place: str) -> None:
    with pytest.raises(BadInput, match=r"cannot write trace '.*': (No such file or directory|Is a directory)"):
        save(none, none.findings[0], tmp_path / place)
    assert list(tmp_path.iterdir()) == []


# -- divergence --------------------------------------------------------------------------------------------------------


def test_another_result_is_named(trace: Trace) -> None:
    assert why(replay(changed(trace, 1, result="ok"))) == (
        "step 1: guest_access(0, True) of vcpu returns fault, recorded ok")


def test_a_result_of_another_type_is_another_result(trace: Trace) -> None:
    number, step = next((n, s) for n, s in enumerate(trace.steps, 1) if s.result == 0 and type(s.result) is int)
    assert "returns 0, recorded False" in why(replay(changed(trace, number, result=False)))
    assert step.primitive is not None


def test_another_primitive_is_named(trace: Trace) -> None:
    other = Primitive("guest_access", (1, True), "guest")
    assert why(replay(changed(trace, 1, primitive=other))) == (
        "step 1: expected vcpu to do guest_access(1, True), it does guest_access(0, True)")


def test_another_caller_is_named(trace: Trace) -> None:
    first = trace.steps[0].primitive
    assert first is not None
    assert why(replay(changed(trace, 1, primitive=first._replace(caller="user")))) == (
        "step 1: expected vcpu to do guest_access(0, True) as user, it does guest_access(0, True) as guest")


@pytest.mark.parametrize(("choices", "words"), [
    (("gfn 7",), "vcpu chooses 'gfn' of 0, 1; recorded 'gfn 7'"),
    ((), "vcpu has to choose 'gfn', and no choice is recorded"),
    (("gfn 0", "page 1"), "expected vcpu to choose 'page 1', it does guest_access(0, True)"),
])
def test_another_choice_is_named(trace: Trace, choices: tuple[str, ...], words: str) -> None:
    assert why(replay(changed(trace, 1, choices=choices))) == f"step 1: {words}"


def test_a_failure_that_cannot_be_is_named(trace: Trace) -> None:
    assert "step 1: guest_access(0, True) of vcpu cannot fail here" in why(replay(changed(trace, 1, failed=True)))


def test_a_missing_step_is_named(trace: Trace) -> None:
    short = dataclasses.replace(trace, steps=trace.steps[:1] + trace.steps[2:])
    assert why(replay(short)).startswith("step 2: expected vcpu to do ")


def test_a_trace_that_ends_early_no_longer_breaks_the_law(trace: Trace) -> None:
    short = dataclasses.replace(trace, steps=trace.steps[:-1])
    assert why(replay(short)).startswith(f"step {len(short.steps)}: law host-survives no longer breaks (")


def test_a_trace_that_goes_on_is_named(trace: Trace) -> None:
    long = dataclasses.replace(trace, steps=(*trace.steps, trace.steps[0]))
    assert why(replay(long)) == f"step {len(trace.steps)}: law host-survives breaks here, before the end of the trace"


def test_other_evidence_is_named(trace: Trace) -> None:
    again = why(replay(dataclasses.replace(trace, evidence="a meteorite")))
    assert "law host-survives no longer breaks (a meteorite), but host-survives: load_unaligned_zeropad" in again


def test_a_step_of_somebody_else_is_named(trace: Trace) -> None:
    assert why(replay(changed(trace, 1, party="vmm"))) == "step 1: party 'vmm' is not of this scenario (vcpu, zeropad)"


def test_a_teardown_before_the_end_is_named(trace: Trace) -> None:
    assert why(replay(changed(trace, 2, party="teardown"))).startswith("step 2: expected the teardown, but vcpu is in ")


def test_who_is_done_is_named(trace: Trace) -> None:
    load = dataclasses.replace(trace.steps[-1], choices=("next to 0",), result="ok")
    assert why(replay(dataclasses.replace(trace, steps=(load, load)))) == (
        "step 2: expected zeropad to do load_unaligned_zeropad(0), but it is done")


def test_another_design_diverges_where_it_differs() -> None:
    report = check(LocksTwice, "kvm", parties=["device"])
    recorded = trace_of(report, report.laws["progress"])
    again = replay(recorded, design=Late)
    assert again.divergence is not None
    assert again.divergence.why == "expected device to do down_write(invalidate), it does lru_add_drain_all()"


def test_who_goes_round_and_round_is_named() -> None:
    report = check(TakesAWrongTurn, "kvm", parties=["device"])
    again = replay(trace_of(report, report.laws["progress"]), design=SpinsUnseen)
    assert "expected device to choose 'turn wrong', it does" in why(again)


def test_who_is_blocked_is_named() -> None:
    report = check(LocksTwice, "kvm", parties=["device"])
    recorded = trace_of(report, report.laws["progress"])
    waits = TraceStep("device", (), Primitive("down_write", ("invalidate",), "library"), None, False)
    again = replay(dataclasses.replace(recorded, steps=(*recorded.steps, waits)), design=LocksTwice)
    assert "device is blocked in down_write(invalidate)" in why(again)


def test_a_trace_of_another_version_says_so_when_it_diverges(trace: Trace) -> None:
    old = dataclasses.replace(trace, version="0.0.1")
    assert replay(old).same
    assert " (recorded by version 0.0.1, this is " in why(replay(changed(old, 1, result="ok")))


def test_after_a_panic_nobody_goes_on(trace: Trace) -> None:
    other = dataclasses.replace(trace, evidence="something else", steps=(*trace.steps, trace.steps[0]))
    assert why(replay(other)) == (
        f"step {len(other.steps)}: expected vcpu to go on, but the kernel has panicked")


# -- bad files ---------------------------------------------------------------------------------------------------------


def broken(edit: Callable[[Json], Any]) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        top = json.loads(text)
        edit(top)
        return json.dumps(top)

    return spoil


NO_SCENE = "has a field 'scene' that is none; an object with name, title, pages, frames, shared, slots, kernel, "
BAD: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text[:200], "is truncated: it ends in line "),
    (lambda text: text[:-3], "is truncated: it ends in line "),
    (lambda text: "", "is not JSON: "),
    (lambda text: "law: broken", "is not JSON: "),
    (lambda text: "[" * 100_000, "is not JSON: "),
    (lambda text: "[]", f'is no trace: an object with "schema": {SCHEMA!r} is wanted'),
    (lambda text: "{}", f'is no trace: an object with "schema": {SCHEMA!r} is wanted'),
    (lambda text: text.replace(SCHEMA, "guest-memfd-trace/2"),
     f"is of schema 'guest-memfd-trace/2'; this program reads {SCHEMA!r}"),
    (broken(lambda top: top.pop("steps")), "lacks field 'steps'"),
    (broken(lambda top: top.pop("evidence")), "lacks field 'evidence'"),
    (broken(lambda top: top.update(design=7)), "has a field 'design' that is not a string"),
    (broken(lambda top: top.update(parties="vcpu")), "has a field 'parties' that is not a list"),
    (broken(lambda top: top.update(parties=[1])), "has a field 'parties' that is not a list of strings"),
    (broken(lambda top: top.update(failures=True)), "has a field 'failures' that is not an integer"),
    (broken(lambda top: top.update(failures=-1)), "has a field 'failures' that is not 0 to 255"),
    (broken(lambda top: top.pop("scene")), "lacks field 'scene'"),
    (broken(lambda top: top.update(scene="crossed")), NO_SCENE), (broken(lambda top: top.update(scene=[1])), NO_SCENE),
    (broken(lambda top: top["scene"].pop("slots")), NO_SCENE),
    (broken(lambda top: top["scene"].update(slots=[7])), NO_SCENE),
    (broken(lambda top: top["scene"].update(weather="fine")), NO_SCENE),
    (broken(lambda top: top["scene"]["kernel"].update(old=True)), NO_SCENE),
    (broken(lambda top: top["scene"].update(pages=9)),
     "has a scene that cannot be: scene 'two-pages': pages must be 1 to 4, not 9"),
    (broken(lambda top: top["scene"].update(frames=True)),
     "has a scene that cannot be: scene 'two-pages': frames must be 1 to 6, not True"),
    (broken(lambda top: top["scene"].update(shared=[5])),
     "has a scene that cannot be: scene 'two-pages': page 5 cannot be shared, the file has 2 pages"),
    (broken(lambda top: top.update(law="gravity")), "names a law there is not: 'gravity'"),
    (broken(lambda top: top["steps"].insert(1, 3)), "has something else than an object for all of step 2"),
    (broken(lambda top: top["steps"][1].pop("result")), "lacks field 'result' of step 2"),
    (broken(lambda top: top["steps"][0].update(file="1")), "has a field 'file' of step 1 that is not an integer"),
    (broken(lambda top: top["steps"][0].update(file=-1)), "has a field 'file' of step 1 that is not 0 to 255"),
    (broken(lambda top: top["steps"][0].update(failed=0)), "has a field 'failed' of step 1 that is not true or false"),
    (broken(lambda top: top["steps"][0].update(primitive=None)),
     "has a caller or arguments of step 1, which has no primitive"),
    (broken(lambda top: top["steps"][0].update(args=[{"folio": [1, 2, 3]}])),
     "has a value in 'args' of step 1 that means nothing: {\"folio\": [1, 2, 3]}"),
    (broken(lambda top: top["steps"][0].update(args=[{"entries": [1, "2", 0]}])),
     "has a value in 'args' of step 1 that means nothing: {\"entries\": [1, \"2\", 0]}"),
    (broken(lambda top: top["steps"][0].update(result=1.5)), "has a value in 'result' of step 1 that means nothing: 1.5"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_a_bad_file_is_refused_in_one_line(
    trace: Trace, tmp_path: Path, spoil: Callable[[str], str], words: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(spoil(dumps(trace)))
    with pytest.raises(TraceError) as refused:
        load(file)
    assert str(refused.value).startswith(f"trace {str(file)!r} {words}")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read trace '.*nowhere': No such file or directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TraceError, match=r"trace '.*bytes' is no text: invalid start byte at byte 0"):
        load(tmp_path / "bytes")


@pytest.mark.parametrize(("fields", "words"), [
    ({"design": "nome"}, "unknown design 'nome'; did you mean 'none'?"),
    ({"hypervisor": "gunja"}, "unknown hypervisor 'gunja'; did you mean 'gunyah'?"),
    ({"parties": ("vcpu", "zeropat")}, "unknown party 'zeropat'; did you mean 'zeropad'?"),
])
def test_unknown_names_in_a_trace_are_refused(trace: Trace, fields: Json, words: str) -> None:
    with pytest.raises(UnknownName) as refused:
        replay(dataclasses.replace(trace, **fields))
    assert str(refused.value) == words


def test_a_trace_with_other_limits_replays_under_its_own(trace: Trace) -> None:
    assert trace.failures == 1                          # the scene's own number
    report = check("none", "gunyah", parties=("vcpu", "zeropad"), limits=Limits(failures=0))
    assert replay(trace_of(report, report.findings[0])).trace.failures == 0
    report = check("none", "gunyah", scenes=["two-vms"], parties=("vcpu", "zeropad"))
    assert trace_of(report, report.findings[0]).failures == SCENES["two-vms"].failures == 0


def test_a_file_that_is_not_there_diverges(trace: Trace) -> None:
    first = trace.steps[0].primitive
    assert first is not None
    assert why(replay(changed(trace, 1, primitive=first._replace(file=1)))) == (
        "step 1: expected vcpu to do file1.guest_access(0, True), it does guest_access(0, True)")
