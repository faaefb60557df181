"""What the reports say, on the smallest findings there are: words for numbers, marks, sentences, tables, bars."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from errno import EAGAIN
from typing import Any, get_args, get_type_hints

import pytest

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.designs.none import NoDesign
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.suite.survived import survived
from guest_memfd.explore.suite.verdict import Found, LawReport, Report
from guest_memfd.explore.world.cost import DesignCost
from guest_memfd.explore.world.scenario import world
from guest_memfd.laws import LAWS, Law
from guest_memfd.report import blame, counterexample, ktap, progress, steps, table, terminal
from guest_memfd.report.blame import offending
from guest_memfd.report.choices import sentence as chosen
from guest_memfd.report.counterexample import length
from guest_memfd.report.filling import FillingTable
from guest_memfd.report.sentence import sentence
from guest_memfd.report.style import WIDTH, Style
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ALIVE, ANY, DESTROYED, DYING, GONE, GUEST, PRIVATE_PAGE, SECRET, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Folio, Locked, Primitive, Steps
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import Gfn, Index, Pfn

SIZES = st.Sizes(frames=3, pages=2, gfns=3, files=2, vms=2, parties=4)


class LeavesItLocked(NoDesign):
    """A deadlock in every scene: no kernel is one that it will not work on."""

    def unlock_and_put(self, folio: Folio) -> Steps[None]:
        yield from self.host.folio_put(folio)


@pytest.fixture(scope="module")
def load() -> Finding:
    """The finding that started it all: the zero-padding load under Gunyah with nothing done about it."""
    report = check("none", "gunyah", parties=("vcpu", "zeropad"), jobs=1)
    return report.findings[0].finding


# -- words for numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "number", "words"), [
    ("pfn0.owner", GUEST, "guest"), ("pfn1.content", SECRET, "secret"), ("pfn0.s1", 0, "zapped"),
    ("pfn0.s2", 0, "withheld"), ("pfn0.gmap", 2, "gfn1"), ("pfn0.slot", 0, "none"), ("pfn0.lock", 0, "free"),
    ("pfn0.lock", 3, "party 2"), ("pfn0.provided", 2, "2"), ("gfn0.provided", 2, "pfn0 lent"),
    ("page1.expect", ANY, "anything"), ("page1.attr", PRIVATE_PAGE, "private"), ("vm0.vm", DYING, "dying"),
    ("panic", 1, "yes"), ("vm0.gpc", 3, "pfn2"), ("failures", 1, "1"), ("file0.inode", DESTROYED, "destroyed"),
    ("file1.evictor", 3, "party 2"), ("file0.fd", 1, "open"),
])
def test_numbers_go_by_their_names(field: str, number: int, words: str) -> None:
    assert show.value(field, number) == words


def test_every_field_of_a_state_can_be_shown() -> None:
    for number in range(256):
        for field in show.fields_of(st.State.empty(SIZES).save()):
            assert show.value(field, number)
            assert show.label(field)


def test_changes_leave_out_the_laws_own_notes() -> None:
    state = st.State.empty(SIZES)
    before = state.save()
    state.frame(1).owner = GUEST
    state.frame(1).lock = 3
    state.ghost(2).op = 1
    state.panic = 1
    assert show.changed(before, state.save(), {2: "vmm"}) == [
        "kernel stopped no -> yes", "pfn1: owner host -> guest, folio lock free -> vmm"]


def test_a_beginning_fits_on_three_lines(load: Finding) -> None:
    lines = show.overview(load.initial)
    assert len(lines) == 3
    assert all(len(line) + 2 <= WIDTH for line in lines)
    assert "pfn0-pfn2 free, owner host, direct map mapped" in lines[1]


def test_two_files_are_told_apart_where_there_are_two() -> None:
    initial = world("library", "kvm", scene="two-vms").initial
    pages, frames, around = show.overview(initial)
    assert pages == "pages   page0-page1 private, bound to gfn0, not allocated"
    assert frames.startswith("frames  pfn0-pfn2 free, ")
    assert "file refs 2, " in around
    assert "file1: file refs 2, " in around
    state = st.State(initial)
    state.file(1).files = 1
    state.file(0).fd = 0
    assert show.changed(initial, state.save()) == ["fd open -> closed", "file1: file refs 2 -> 1"]


# -- steps -------------------------------------------------------------------------------------------------------------


def test_bare_numbers_and_flags_are_named() -> None:
    assert steps.call(Primitive("guest_access", (1, True), "guest")) == "guest_access(gfn=1, write=yes)"
    assert steps.call(Primitive("hyp_call", ("mmu_map", 0, Folio(2)), "kvm")) == "hyp_call(mmu_map, 0, pfn2)"
    assert steps.call(Primitive("tree_store", ("attributes", 0, Entries(2, 2)), "library")) == (
        "tree_store(attributes, start=0, [2 x 2])")
    assert steps.call(Primitive("flush_tlb_kernel_range", ((Folio(0), Folio(1)),), "mm")) == (
        "flush_tlb_kernel_range([pfn0, pfn1])")


def test_results_are_said_as_the_kernel_says_them() -> None:
    assert steps.result(-EAGAIN) == "-EAGAIN"
    assert steps.result(Locked(1, True, False, False)) == "pgoff=1 uptodate"
    assert (steps.result(True), steps.result(0), steps.result(None)) == ("yes", "0", "")


def test_lock_holders_are_known_by_what_they_did(load: Finding) -> None:
    assert "vcpu" in steps.lock_holders(load.steps, load.initial).values()


# -- the screen --------------------------------------------------------------------------------------------------------


def screen(
    finding: Finding, style: Style = Style(), folder: str | None = None, scene: Scene = Scene()     # noqa: B008 - frozen
) -> list[str]:
    again = counterexample.commands("none", "gunyah", scene, ("vcpu", "zeropad"), finding.law, failures=None, folder=folder)
    example = counterexample.Counterexample("none", "gunyah", scene, ("vcpu", "zeropad"), finding, again)
    return list(counterexample.screen(example, style))


def test_a_counterexample_fits_on_one_screen(load: Finding) -> None:
    lines = screen(load)
    text = "\n".join(lines)
    assert len(lines) <= 45
    assert all(len(line) <= WIDTH for part in lines for line in part.splitlines())
    assert "  scene    two-pages: a private page and a shared one, gfn i bound to page i\n" in text
    assert LAWS["host-survives"].sentence in text
    assert LAWS["host-survives"].source in " ".join(text.split())
    assert "gmem replay traces/none-gunyah-host-survives.json" in text


def test_the_fields_that_break_the_law_are_marked(load: Finding) -> None:
    assert offending(load) == {"pfn0.owner", "pfn0.s1", "pfn0.s2"}
    text = " ".join(" ".join(screen(load)).split())
    assert "*owner guest, *direct map mapped, *host stage 2 withheld" in text


def test_colours_add_nothing_but_colours(load: Finding) -> None:
    import re

    coloured = screen(load, Style(colours=True))
    assert [re.sub("\033\\[[0-9;]*m", "", line) for line in coloured] == screen(load)
    assert coloured != screen(load)


def test_a_saved_trace_need_not_be_saved_again(load: Finding) -> None:
    assert "--save-traces" in "\n".join(screen(load))
    saved = "\n".join(screen(load, folder="here"))
    assert "--save-traces" not in saved
    assert "gmem replay here/none-gunyah-host-survives.json" in saved


def test_what_saves_the_trace_says_the_scene_and_the_failures(load: Finding) -> None:
    assert "--scene" not in "\n".join(screen(load))
    assert "--hypervisor gunyah --scene crossed --parties" in "\n".join(screen(load, scene=SCENES["crossed"]))
    plain = counterexample.commands("none", "kvm", Scene(), ("vcpu",), "progress", failures=None, folder=None)
    some = counterexample.commands("none", "kvm", Scene(), ("vcpu",), "progress", failures=2, folder=None)
    assert "--failures" not in " ".join(plain[0][1])
    assert "--law progress --failures 2 --save-traces" in " ".join(some[0][1])


def test_what_breaks_before_anybody_moves_has_a_screen_without_steps(load: Finding) -> None:
    lines = screen(Finding("library-alone", "module kvm changes the direct map itself", [], load.initial))
    assert lines[0] == "library-alone is broken: none on gunyah, before anybody moves"
    assert "initially" in lines
    assert "then" not in lines
    assert not any(line.startswith("finally") for line in lines)
    assert lines[-1].startswith("  export   gmem explain ")


@pytest.mark.parametrize("scene", list(SCENES))
def test_every_scene_has_a_screen(scene: str) -> None:
    there = SCENES[scene]
    parties = ("creator", "vcpu2") if not there.made else ("vcpu2", "other-vcpu") if there.vms > 1 else ("vcpu2", "vmm2")
    (found, *_) = check(LeavesItLocked, "kvm", scenes=[scene], parties=parties, laws=["progress"], jobs=1).findings
    lines = screen(found.finding, scene=found.scene)
    assert any(line.startswith(f"  scene    {scene}: ") for line in lines)
    assert all(len(line) <= WIDTH for part in lines for line in part.splitlines())
    assert "*" in "\n".join(lines[lines.index("then"):])


# -- who is to blame ---------------------------------------------------------------------------------------------------


def test_a_law_on_states_blames_what_would_have_to_be_otherwise() -> None:
    state = st.State.empty(SIZES)
    for frame in state.frames():
        frame.s1 = frame.s2 = 1
    initial = state.save()
    state.file(1).files = 1
    (evidence,) = filter(None, [LAWS["nothing-lost"].at_end(state.save())])
    step = Step("teardown", (), None, None, False, state.save(), ())
    assert offending(Finding("nothing-lost", evidence, [step], initial)) == {"file1.files"}


def test_a_deadlock_blames_the_locks_that_are_held() -> None:
    state = st.State.empty(SIZES)
    initial = state.save()
    state.file().invalidate_r = 1
    state.frame(0).lock = 1
    state.failures = 1
    step = Step("vmm", (), None, None, False, state.save(), ())
    assert offending(Finding("progress", "deadlock: ...", [step], initial)) == {"file0.invalidate_r", "pfn0.lock"}


def after(note: Any, file: int = 0, **fields: int) -> Step:
    """A step that leaves *note*, about *file*, and a state in which *fields* (dots as underscores) are not 0."""
    state = st.State.empty(SIZES)
    names = st.layout_of(state.save()).names
    for field, number in fields.items():
        state.raw[names.index(field.replace("__", "."))] = number
    return Step("vcpu", (), Primitive("end_op", (0,), "library", file), None, False, state.save(), (note,))


ACCESS = facts.Access("kernel", "copy_from_kernel_nofault", "direct map", pfn=1, write=False, content="secret", guests=True,
                      held=True, pgoff=0, expect=None, free=False, broken=False)
NOTHING = facts.Cost(0, 0, 0)
ENDED = facts.Ended(op="to_private", ret=0, error_index=None, scope=(0,), toggled=(), removed=(), left=(0,),
                    attrs=(SHARED_PAGE,), bound=(1,), batched=(), mapped=(), reasons=(), places=(), gfn=None,
                    cost=NOTHING, documented=(), bound_of_cost=None)


@pytest.mark.parametrize(("law", "step", "blamed"), [
    ("guest-private", after(ACCESS, pfn1__s1=1), {"pfn1.owner", "pfn1.content", "pfn1.s1"}),
    ("free-memory", after(ACCESS._replace(what="gup user", free=True, via="user mapping"), pfn1__user=1),
     {"pfn1.owner", "pfn1.content", "pfn1.allocated", "pfn1.user"}),
    ("poison-contained", after(ACCESS._replace(who="VMM", broken=True, via="user mapping"), pfn1__user=2, pfn1__poison=1),
     {"pfn1.owner", "pfn1.content", "pfn1.poison", "pfn1.user"}),
    ("poison-contained", after(facts.Given("the guest", 2), pfn2__gmap=1, pfn2__poison=1, pfn2__handled=1),
     {"pfn2.gmap", "pfn2.poison", "pfn2.handled"}),
    ("poison-contained", after(facts.Contained(0, "delayed", ("the kernel",), ()), pfn0__poison=1, vm1__gpc=1, vm0__gpc=2),
     {"pfn0.poison", "vm1.gpc"}),
    ("lifetimes", after(facts.UseAfterFree("the inode, in down_read"), 1, file1__inode=DESTROYED, file0__inode=ALIVE),
     {"file1.inode"}),
    ("lifetimes", after(facts.UseAfterFree("the VM, in hypercall"), 1, vm1__vm=GONE), {"vm1.vm"}),
    ("pins-respected", after(facts.MadePrivate("donated", 1, 0, True), vm1__gpc=2), {"pfn1.owner", "vm1.gpc"}),
    ("all-or-nothing", after(ENDED, page0__cached=1, page0__attr=SHARED_PAGE), {"page0.attr", "page0.cached"}),
    ("all-or-nothing", after(ENDED, 1, page2__cached=1, page2__attr=SHARED_PAGE), {"page2.attr", "page2.cached"}),
    ("fault-served", after(ENDED._replace(op="fault"), page0__cached=2, page0__binding=1),
     {"page0.cached", "page0.binding"}),
    ("no-false-refusal", after(facts.Returned("punch", 0, 1, 0, None, 2, facts.HowEnded("punch", -16))), set()),
    ("host-survives", after(facts.Broken("BUG_ON()"), panic=1), {"panic"}),
])
def test_a_law_on_facts_blames_what_the_fact_is_about(law: str, step: Step, blamed: set[str]) -> None:
    (evidence,) = filter(None, map(LAWS[law].on_note, step.notes))
    assert offending(Finding(law, evidence, [step], st.State.empty(SIZES).save())) == blamed


@pytest.mark.parametrize("kind", get_args(facts.Note), ids=lambda kind: kind.__name__)
def test_any_fact_can_be_blamed_and_told(kind: type) -> None:
    hints = get_type_hints(kind)
    note = kind(**{name: EXAMPLES[str(hint)] for name, hint in hints.items()})
    step = after(note, 1, panic=1)
    blind = Law("blind", "nothing is right", "a test", "always", note=lambda _note: "it is so")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blame, "LAWS", {"blind": blind})
        blamed = offending(Finding("blind", "it is so", [step], st.State.empty(SIZES).save()))
    assert blamed <= st.fields_of(step.shared).keys()
    assert all(steps.told_of(step, step.shared))


EXAMPLES: dict[str, Any] = {
    "<class 'str'>": "words", "<class 'int'>": 1, "<class 'bool'>": True, "tuple[int, ...]": (0, 1),
    "tuple[str, ...]": ("a failure",), "int | None": 0, "str | None": "zero", str(facts.Cost): NOTHING,
    **dict.fromkeys((str(Pfn), str(Gfn), str(Index)), 1), **dict.fromkeys((str(Gfn | None), str(Index | None)), 0),
    str(tuple[Index, ...]): (0, 1),
    "guest_memfd.words.primitives.Bound | None": None, "guest_memfd.words.facts.HowEnded | None": facts.HowEnded("punch", 0),
}
"""Type of a field of a fact -> something of that type."""


# -- the table and the sentences ---------------------------------------------------------------------------------------


def report(
    hypervisor: str = "gunyah", verdict: str = "holds", broken: Sequence[LawReport] = (), limits: tuple[str, ...] = (),
    failures: int | None = None, scenes: Sequence[str] = ("two-pages",), refused: Sequence[str] = (), design: str = "mine",
) -> Report:
    """A report that says what it is told to say."""
    other = "undetermined" if limits else "holds"
    laws = {name: LawReport(name, other) for name in LAWS} | {law.law: law for law in broken}
    return Report(design, hypervisor, verdict, laws, (), 1000, 2000, 0.5, 55, limits, failures, scenes=tuple(scenes),
                  refused=tuple(refused))


def broken(law: str, evidence: str, steps: int, *parties: str, scene: Scene | None = None, failed: int = 0, torn: int = 0,
           ) -> LawReport:
    """A law that breaks in so many steps; *failed* of them are injected failures, the last *torn* those of the teardown."""
    run = [Step("teardown" if n >= steps - torn else parties[0], (), None, None, n < failed, b"", ()) for n in range(steps)]
    return LawReport(law, "refuted", steps, parties, evidence, Finding(law, evidence, run), scene)


PAIRS = "every pair of parties"
ALL = len(LAWS)
DEAD = broken("host-survives", "the load takes an abort", 8, "vcpu", "zeropad")
LEAK = broken("guest-private", "the scan reads a secret", 3, "kcore")
CROSSED = broken("fault-served", "the fault is for ever", 5, "patient-vcpu", scene=SCENES["crossed"])
AT_ONCE = broken("library-alone", "the module does it itself", 0, "vcpu", scene=Scene())


@pytest.mark.parametrize(("choices", "words"), [
    (["gfn 0"], "gfn 0"),
    (["VMM to_private", "range 1 1"], "converts page 1 to private"),
    (["VMM to_shared", "range 0 2"], "converts pages 0 to 1 to shared"),
    (["VMM punch", "range 2 -1"], "punches -1 pages from 2 on"),
    (["VMM map", "page 0", "then punch"], "maps page 0, punches"),
    (["thread to_private"], "converts to private"),
    (["VMM close"], "closes the file"),
    (["then stop"], "ends"),
    (["range 0 x"], "range 0 x"),
    (["FOLL_PIN True", "next to 0"], "FOLL_PIN True, next to 0"),
])
def test_choices_read_as_sentences(choices: list[str], words: str) -> None:
    assert chosen(choices) == words


def test_the_step_that_breaks_a_law_says_who_reached_what_and_how(load: Finding) -> None:
    access = ACCESS._replace(who="kernel", via="stale TLB entry", content="secret", guests=True, write=False, pfn=1)
    reads = Step("kcore", (), Primitive("copy_from_kernel_nofault", (1,), "mm"), None, False, load.initial, (access,))
    told = [line for line in steps.lines([reads, reads], load.initial, Style()) if "~" in line]
    assert told == ["     ~ kernel reads secret from pfn1, which is the guest's alone, through the stale TLB entry"]


def test_the_length_of_a_run_says_whose_steps_and_which_failures_it_has() -> None:
    def told(steps: int, **how: int) -> str:
        finding = broken("progress", "...", steps, "vcpu", "vmm", **how).finding        # type: ignore[arg-type]
        assert finding is not None
        return length(finding.steps, ("vcpu", "vmm"))

    assert told(0) == "before anybody moves"
    assert told(9) == "9 steps of vcpu, vmm"
    assert told(9, torn=4) == "5 steps of vcpu, vmm and 4 of the teardown"
    assert told(9, failed=1) == "9 steps of vcpu, vmm, one an injected failure"
    assert told(9, torn=1, failed=2) == "8 steps of vcpu, vmm and 1 of the teardown, 2 of them injected failures"


def test_the_sentence_says_what_was_found_and_under_whom() -> None:
    reports = [report(verdict="refuted", broken=[DEAD]), report("kvm"), report("pkvm")]
    assert sentence("mine", "a title", reports, PAIRS) == (
        "mine (a title) breaks host-survives on gunyah: after 8 steps of vcpu and zeropad, the load takes an abort; "
        f"it keeps all {ALL} laws on kvm and pkvm, in every interleaving of every pair of parties, with one injected "
        "failure (2,000 states).")


def test_the_sentence_quotes_the_gravest_of_several() -> None:
    said = sentence("mine", "a title", [report(verdict="refuted", broken=[LEAK, DEAD])], PAIRS)
    assert f"breaks 2 of {ALL} laws on gunyah, first host-survives: after 8 steps" in said


def test_the_sentence_does_not_make_a_pass_of_a_limit() -> None:
    said = sentence("mine", "a title", [report(verdict="undetermined", limits=("more than 3 states",))], PAIRS)
    assert said == (
        "mine (a title) was not explored to the end on gunyah, so nothing is proved there (more than 3 states).")


def test_the_sentence_names_a_scene_that_is_not_the_plainest() -> None:
    assert "fault-served on gunyah: after 5 steps of patient-vcpu in scene crossed, the fault is for ever" in (
        sentence("mine", "a title", [report(verdict="refuted", broken=[CROSSED])], PAIRS))


def test_the_sentence_has_no_steps_where_there_are_none() -> None:
    assert "library-alone on gunyah: before anybody moves, the module does it itself" in (
        sentence("mine", "a title", [report(verdict="refuted", broken=[AT_ONCE])], PAIRS))


@pytest.mark.parametrize(("failures", "scenes", "words"), [
    (0, ["two-pages"], "no injected failure "), (1, ["two-pages", "for-good"], "one injected failure "),
    (2, ["two-pages"], "2 injected failures "), (None, ["two-pages"], "one injected failure "),
    (None, ["for-good", "two-vms"], "no injected failure "), (None, ["crossed", "unbound"], "one injected failure "),
    (None, ["two-pages", "for-good"], "as many injected failures as each scene has "),
    (None, ["somebody-elses"], "as many injected failures as each scene has "),
])
def test_the_sentence_counts_failures(failures: int | None, scenes: list[str], words: str) -> None:
    assert f" with {words}" in sentence("mine", "a title", [report(failures=failures, scenes=scenes)], PAIRS)


def test_cells_are_short_and_letters_unique() -> None:
    strange = LawReport("one-owner", "refuted", 5, ("vcpu", "vax"), "...")
    letters = table.letters_for([report(verdict="refuted", broken=[DEAD, strange])])
    assert table.cell(DEAD, letters) == "8 V+Z"
    assert len(set(letters.values())) == len(letters) == 3
    assert [table.cell(LawReport("x", v), {}) for v in ("holds", "undetermined")] == ["kept", "?"]


def test_a_cell_says_what_is_special_about_a_run(load: Finding) -> None:
    letters = table.letters_for([report(verdict="refuted", broken=[CROSSED, AT_ONCE])])
    assert letters == {"patient-vcpu": table.LETTERS["patient-vcpu"]}      # nobody has to be there for what breaks at once
    assert table.cell(CROSSED, letters) == "5 X'"
    assert table.cell(AT_ONCE, letters) == "0"
    failed = Finding("progress", "...", [load.steps[0]._replace(failed=True)])
    assert table.cell(LawReport("progress", "refuted", 1, ("vcpu",), "...", failed, Scene(), 1), {"vcpu": "V"}) == "1 V*"


def test_every_party_has_a_letter_of_its_own() -> None:
    shipped = {name for name in PARTIES if PARTIES[name].procedure.__module__.startswith("guest_memfd.scenarios.")}
    assert len(shipped) == 30
    assert shipped == table.LETTERS.keys()
    assert len(set(table.LETTERS.values())) == len(table.LETTERS)


def test_parties_of_others_get_letters_that_are_free() -> None:
    names = tuple(f"party{n:02}" for n in range(40))
    letters = table.letters_for([report(verdict="refuted", broken=[LawReport("progress", "refuted", 1, names, "...")])])
    assert list(letters) == list(names)
    assert len(set(letters.values())) == len(names)
    assert not set(letters.values()) & set(table.LETTERS.values())


def test_a_scene_that_is_not_the_plainest_is_named_below_the_table() -> None:
    reports = [report(verdict="refuted", broken=[DEAD, CROSSED]), report("kvm", "refuted", [CROSSED])]
    lines = list(table.tables(reports, {"gunyah": "one", "kvm": "another"}, PAIRS, Style()))
    assert "' in scene crossed: fault-served of mine on gunyah, kvm." in lines
    assert not any(line.startswith("' in") for line in table.tables([report()], {"gunyah": "one"}, PAIRS, Style()))


def test_the_table_never_gets_wider_than_a_mail() -> None:
    many = [report(verdict="refuted", broken=[DEAD]) for _ in range(20)]
    lines = list(table.tables(many, {"gunyah": "x " * 100}, PAIRS, Style()))
    assert max(map(len, lines)) <= WIDTH
    assert sum("host-survives" in line for line in lines) > 1
    long = dataclasses.replace(many[0], laws={"a-law-of-somebody-who-likes-long-names": DEAD, **many[0].laws})
    rows = list(table.tables([long] * 20, {"gunyah": "x"}, PAIRS, Style()))
    assert max(map(len, rows)) <= WIDTH
    assert all(row[39:42] in ("8 V", "kep") for row in rows if row.startswith(tuple(long.laws)))


def test_the_amount_says_which_scenes_were_seen_and_which_refused() -> None:
    reports = [report(scenes=SCENES, refused=["no-direct-map-changes"]), report("kvm", scenes=SCENES),
               report("kvm", scenes=SCENES, refused=["no-direct-map-changes"], design="other")]
    lines = list(terminal.amount(reports, PAIRS, Style()))
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    assert f"explored: {PAIRS}, 165 scenarios, as many injected failures as each scene has" in text
    assert f"scenes: {', '.join(SCENES)}" in text
    assert text.endswith("refused: no file in scene no-direct-map-changes: mine on gunyah; other on kvm")
    assert not any(line.startswith(("scenes", "refused")) for line in terminal.amount([report()], PAIRS, Style()))


def test_laws_and_other_ways_say_scene_and_steps(load: Finding) -> None:
    finding = Finding("fault-served", "another way", [], load.initial)
    found = Found("fault-served", "another way", ("vcpu",), finding, SCENES["unbound"])
    told = dataclasses.replace(report(verdict="refuted", broken=[DEAD, CROSSED, AT_ONCE]), findings=(found,))
    lines = list(terminal.check(told, [], Style(), explored=PAIRS, folder=None, verbose=False))
    assert lines[0] == f"mine on gunyah: refuted, 3 of {ALL} laws broken"
    assert "  host-survives    broken in 8 steps of vcpu, zeropad" in lines
    assert "  fault-served     broken in 5 steps of patient-vcpu in scene crossed" in lines
    assert "  library-alone    broken before anybody moves" in lines
    assert "  fault-served     before anybody moves in scene unbound: another way" in lines


def test_the_cost_table_puts_like_with_like() -> None:
    cheap, dear = DesignCost(2, 1, 1, 2), DesignCost(9, 1, 1, 2)
    counted = {("a", "kvm"): cheap, ("a", "pkvm"): cheap, ("b", "kvm"): dear, ("c", "kvm"): None}
    lines = list(table.costs(counted, Style()))
    assert sum(line.startswith("a on kvm, pkvm") for line in lines) == 1
    assert [line.split()[0] for line in lines if line.endswith("9            1            1                 2")] == ["b"]
    assert not any(line.startswith("c on") for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_ktap_counts_add_up() -> None:
    doubtful = report(limits=("a limit",), verdict="undetermined")
    lines = list(ktap.ktap([report(verdict="refuted", broken=[DEAD]), doubtful]))
    assert lines[1] == f"1..{2 * ALL}"
    assert lines[-1] == f"# Totals: pass:{ALL - 1} fail:{ALL + 1} xfail:0 xpass:0 skip:0 error:0"
    assert f"ok {ALL} mine.gunyah.{[*LAWS][-1]}" in lines


# -- survived ----------------------------------------------------------------------------------------------------------


def test_survived_aborts_are_named_once_with_the_reason() -> None:
    (event,) = survived("none", "pkvm", [("vcpu", "zeropad")])
    assert (event.party, event.what, event.stage) == ("zeropad", "load_unaligned_zeropad", 2)
    assert "exception table" in event.why
    assert survived("none", "gunyah", [("vcpu", "zeropad")]) == []


# -- progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_a_terminal_and_for_patience_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, pipe = Terminal(), io.StringIO()
    for quiet, to in ((False, stream), (True, stream), (False, pipe)):
        with progress.Progress(quiet=quiet, stream=to) as bar:
            bar(1, 2, "now")
    assert (stream.getvalue(), pipe.getvalue()) == ("", "")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.Progress(quiet=True, stream=stream) as quiet_bar, progress.Progress(stream=pipe) as piped:
        quiet_bar(1, 2, "now")
        piped(1, 2, "now")
    assert (stream.getvalue(), pipe.getvalue()) == ("", "")


@pytest.mark.parametrize("rich", [True, False])
def test_the_bar_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    if rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "100")
    else:
        monkeypatch.setattr(progress, "_rich_bar", lambda: None)
    stream = Terminal()
    with progress.Progress(stream=stream) as bar:
        bar(1, 4, "vcpu, vmm")
        bar(4, 4, "power")
    text = stream.getvalue()
    assert "25%" in text
    assert "vcpu, vmm" in text
    assert "0:00 left" in text


ALL_DESIGNS = [(design, on) for on in ("kvm", "pkvm", "gunyah")
         for design in ("none", "gunyah-v17", "fixup", "secretmem", "guestmem-rfc1", "library")]


def test_the_table_fills_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for name, size in (("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, size)
    stream = Terminal()
    with progress.Progress(stream=stream, table=FillingTable(ALL_DESIGNS, LAWS)) as bar:
        bar.found("none", "gunyah", {"host-survives": 12})
        bar(1, 4, "none on gunyah")
        bar.found("none", "gunyah", {"host-survives": 9})
        bar.found("none", "gunyah", {"host-survives": 14})
        bar(2, 4, "none on gunyah")
    plain = re.sub("\033\\[[\\d;]*m", "", stream.getvalue())
    rows = [re.findall(r"\d+", row) for row in re.findall("host-survives.*", plain)]
    assert rows[0] == ["12"]
    assert rows[-1] == ["9"]


def test_the_table_fits_into_80_columns_and_has_a_cell_for_each_design() -> None:
    filling = FillingTable(ALL_DESIGNS, LAWS)
    filling.take("none", "pkvm", {"progress": 17})
    lines = [head.ljust(17) + "".join(text for text, _ in cells) for head, cells in filling.lines()]
    assert filling.width == max(map(len, lines)) <= 80
    assert filling.fits(80, 24)
    assert len({*filling.letters.values()}) == 6
    column = lines[1].index("n", lines[0].index("pkvm"))
    row = next(line for line in lines if line.startswith("progress"))
    assert row[column:column + 2] == "17"
    assert sum("17" in line for line in lines) == 1


def test_a_table_that_does_not_fit_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for columns, rows in (("60", "50"), ("120", "12")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("LINES", rows)
        stream = Terminal()
        with progress.Progress(stream=stream, table=FillingTable(ALL_DESIGNS, LAWS)) as bar:
            bar(1, 4, "none")
        assert "host-survives" not in stream.getvalue()
        assert "25%" in stream.getvalue()


def test_the_estimate_is_the_rest_at_the_pace_so_far() -> None:
    assert progress.left(1, 4, 30.0) == "1:30 left"
    assert progress.left(0, 4, 30.0) == ""
