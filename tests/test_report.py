"""What the reports say, on the smallest findings there are: words for numbers, marks, sentences, tables, bars."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest

from guest_memfd.check.cost import Cost
from guest_memfd.check.explorer import Finding, Step
from guest_memfd.check.suite import check
from guest_memfd.check.survived import survived
from guest_memfd.check.verdict import LawReport, Report
from guest_memfd.hosts.abstract import show
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.host import EAGAIN, Entries, Folio, Locked, Primitive
from guest_memfd.laws import LAWS
from guest_memfd.report import counterexample, ktap, progress, steps, table
from guest_memfd.report.blame import offending
from guest_memfd.report.sentence import sentence
from guest_memfd.report.style import WIDTH, Style
from guest_memfd.scenarios import PARTIES


@pytest.fixture(scope="module")
def load() -> Finding:
    """The finding that started it all: the zero-padding load under Gunyah with nothing done about it."""
    report = check("none", "gunyah", parties=("vcpu", "zeropad"), jobs=1)
    return report.findings[0].finding


# -- words for numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "number", "words"), [
    ("pfn0.owner", st.GUEST, "guest"), ("pfn1.content", st.SECRET, "secret"), ("pfn0.s1", 0, "zapped"),
    ("pfn0.s2", 0, "withheld"), ("pfn0.gmap", 2, "gfn1"), ("pfn0.slot", 0, "none"), ("pfn0.lock", 0, "free"),
    ("pfn0.lock", 3, "party 2"), ("pfn0.provided", 2, "2"), ("page0.provided", 2, "pfn0 lent"),
    ("page1.expect", st.ANY, "anything"), ("page1.attr", st.PRIVATE_PAGE, "private"), ("vm", st.DYING, "dying"),
    ("panic", 1, "yes"), ("gpc", 3, "pfn2"), ("failures", 1, "1"),
])
def test_numbers_go_by_their_names(field: str, number: int, words: str) -> None:
    assert show.value(field, number) == words


def test_every_field_of_a_state_can_be_shown() -> None:
    for number in range(256):
        for field in show.fields_of(bytes(st.SIZE)):
            assert show.value(field, number)
            assert show.label(field)


def test_changes_leave_out_the_laws_own_notes() -> None:
    state = st.State()
    before = state.save()
    state.frame(1).owner = st.GUEST
    state.frame(1).lock = 3
    state.ghost(2).op = 1
    state.panic = 1
    assert show.changed(before, state.save(), {2: "vmm"}) == [
        "pfn1: owner host -> guest, folio lock free -> vmm", "kernel stopped no -> yes"]


def test_a_beginning_fits_on_three_lines(load: Finding) -> None:
    lines = show.overview(load.initial)
    assert len(lines) == 3
    assert all(len(line) + 2 <= WIDTH for line in lines)
    assert "pfn0-pfn2 free, owner host, direct map mapped" in lines[1]


# -- steps -------------------------------------------------------------------------------------------------------------


def test_bare_numbers_and_flags_are_named() -> None:
    assert steps.call(Primitive("guest_access", (1, True), "guest")) == "guest_access(gfn=1, write=yes)"
    assert steps.call(Primitive("hypercall", ("mmu_map", 0, Folio(2)), "kvm")) == "hypercall(mmu_map, 0, pfn2)"
    assert steps.call(Primitive("xa_store", ("attributes", 0, Entries(2, 2)), "library")) == (
        "xa_store(attributes, start=0, [2 x 2])")
    assert steps.call(Primitive("flush_tlb_kernel_range", ((Folio(0), Folio(1)),), "mm")) == (
        "flush_tlb_kernel_range([pfn0, pfn1])")


def test_results_are_said_as_the_kernel_says_them() -> None:
    assert steps.result(-EAGAIN) == "-EAGAIN"
    assert steps.result(Locked(1, True, False, False)) == "pgoff=1 uptodate"
    assert (steps.result(True), steps.result(0), steps.result(None)) == ("yes", "0", "")


def test_lock_holders_are_known_by_what_they_did(load: Finding) -> None:
    assert "vcpu" in steps.lock_holders(load.steps, load.initial).values()


# -- the screen --------------------------------------------------------------------------------------------------------


def screen(finding: Finding, style: Style = Style(), folder: str | None = None) -> list[str]:  # noqa: B008 - frozen
    again = counterexample.commands("none", "gunyah", ("vcpu", "zeropad"), finding.law, failures=1, folder=folder)
    example = counterexample.Counterexample("none", "gunyah", ("vcpu", "zeropad"), finding, again)
    return list(counterexample.screen(example, style))


def test_a_counterexample_fits_on_one_screen(load: Finding) -> None:
    lines = screen(load)
    text = "\n".join(lines)
    assert len(lines) <= 45
    assert all(len(line) <= WIDTH for part in lines for line in part.splitlines())
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


def test_a_law_on_states_blames_what_would_have_to_be_otherwise() -> None:
    state = st.State()
    for frame in state.frames():
        frame.s1 = frame.s2 = 1
    initial = state.save()
    state.files = 1
    (evidence,) = filter(None, [LAWS["nothing-lost"].at_end(state.save())])
    step = Step("teardown", (), None, None, False, state.save(), ())
    assert offending(Finding("nothing-lost", evidence, [step], initial)) == {"files"}


def test_a_deadlock_blames_the_locks_that_are_held() -> None:
    state = st.State()
    initial = state.save()
    state.invalidate_r = 1
    state.frame(0).lock = 1
    state.failures = 1
    step = Step("vmm", (), None, None, False, state.save(), ())
    assert offending(Finding("progress", "deadlock: ...", [step], initial)) == {"invalidate_r", "pfn0.lock"}


def test_what_breaks_before_anybody_moves_has_a_screen_too(load: Finding) -> None:
    assert screen(Finding("progress", "deadlock", [], load.initial))


# -- the table and the sentences ---------------------------------------------------------------------------------------


def report(
    hypervisor: str = "gunyah", verdict: str = "holds", broken: Sequence[LawReport] = (), limits: tuple[str, ...] = (),
    failures: int = 1,
) -> Report:
    """A report that says what it is told to say."""
    other = "undetermined" if limits else "holds"
    laws = {name: LawReport(name, other) for name in LAWS} | {"bounded-cost": LawReport("bounded-cost", "reported")}
    laws |= {law.law: law for law in broken}
    return Report("mine", hypervisor, verdict, laws, (), 1000, 2000, 0.5, 55, limits, failures)


PAIRS = "every pair of parties"
DEAD = LawReport("host-survives", "refuted", 8, ("vcpu", "zeropad"), "the load takes an abort")
LEAK = LawReport("guest-private", "refuted", 3, ("kcore",), "the scan reads a secret")


def test_the_sentence_says_what_was_found_and_under_whom() -> None:
    reports = [report(verdict="refuted", broken=[DEAD]), report("kvm"), report("pkvm")]
    assert sentence("mine", "a title", reports, PAIRS) == (
        "mine (a title) breaks host-survives on gunyah: after 8 steps of vcpu and zeropad, the load takes an abort; "
        "it keeps all 9 laws on kvm and pkvm, in every interleaving of every pair of parties with one injected failure "
        "(2,000 states).")


def test_the_sentence_quotes_the_gravest_of_several() -> None:
    said = sentence("mine", "a title", [report(verdict="refuted", broken=[LEAK, DEAD])], PAIRS)
    assert "breaks 2 of 9 laws on gunyah, first host-survives: after 8 steps" in said


def test_the_sentence_does_not_make_a_pass_of_a_limit() -> None:
    said = sentence("mine", "a title", [report(verdict="undetermined", limits=("more than 3 states",))], PAIRS)
    assert said == (
        "mine (a title) was not explored to the end on gunyah, so nothing is proved there (more than 3 states).")


@pytest.mark.parametrize(("failures", "words"), [
    (0, "no injected failure "), (1, "one injected failure "), (2, "2 injected failures ")])
def test_the_sentence_counts_failures(failures: int, words: str) -> None:
    assert words in sentence("mine", "a title", [report(failures=failures)], PAIRS)


def test_cells_are_short_and_letters_unique() -> None:
    strange = LawReport("one-owner", "refuted", 5, ("vcpu", "vax"), "...")
    letters = table.letters_for([report(verdict="refuted", broken=[DEAD, strange])])
    assert table.cell(DEAD, letters) == "8 V+Z"
    assert len(set(letters.values())) == len(letters) == 3
    others = [table.cell(LawReport("x", v), {}) for v in ("holds", "undetermined", "reported")]
    assert others == ["kept", "?", "counted"]


def test_every_party_has_a_letter_of_its_own() -> None:
    assert set(PARTIES) <= table.LETTERS.keys()
    assert len(set(table.LETTERS.values())) == len(table.LETTERS)


def test_the_table_never_gets_wider_than_a_mail() -> None:
    many = [report(verdict="refuted", broken=[DEAD]) for _ in range(20)]
    lines = list(table.tables(many, {"gunyah": "x " * 100}, PAIRS, Style()))
    assert max(map(len, lines)) <= WIDTH
    assert sum("host-survives" in line for line in lines) > 1


def test_the_cost_table_puts_like_with_like_and_names_what_is_over_the_bound() -> None:
    cheap, dear = Cost(2, 1, 1, 2), Cost(9, 1, 1, 2)
    counted = {("a", "kvm"): cheap, ("a", "pkvm"): cheap, ("b", "kvm"): dear, ("c", "kvm"): None}
    lines = list(table.costs(counted, Style()))
    assert sum(line.startswith("a on kvm, pkvm") for line in lines) == 1
    assert [line.partition(" ")[0] for line in lines if "!9" in line] == ["b"]
    assert not any(line.startswith("c on") for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_ktap_counts_add_up() -> None:
    doubtful = report(limits=("a limit",), verdict="undetermined")
    lines = list(ktap.ktap([report(verdict="refuted", broken=[DEAD]), doubtful]))
    assert lines[1] == "1..20"
    assert lines[-1] == "# Totals: pass:8 fail:10 xfail:0 xpass:0 skip:2 error:0"


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


def test_the_estimate_is_the_rest_at_the_pace_so_far() -> None:
    assert progress.left(1, 4, 30.0) == "1:30 left"
    assert progress.left(0, 4, 30.0) == ""
