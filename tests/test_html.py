"""The pages: what they show is what was found, every text is escaped, and each is one file of a size to send by mail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.cli.main import main
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.trace import Trace, trace_of, write
from guest_memfd.explore.world.scenario import world
from guest_memfd.html.cells import Holders
from guest_memfd.html.trace import page, view
from guest_memfd.report.blame import offending
from guest_memfd.report.steps import lock_holders
from guest_memfd.scenarios import SCENES
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.scene import Scene

HOSTILE = "<script>alert('x')</script>\"'&\n</style><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text by the element that it is in."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.closed: list[tuple[str, dict[str, str], str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag not in self.VOID:
            self.open.append((tag, given, []))

    def handle_endtag(self, tag: str) -> None:
        name, given, texts = self.open.pop()
        assert name == tag
        self.closed.append((tag, given, "".join(texts)))

    def handle_data(self, data: str) -> None:
        for _, _, texts in self.open:
            texts.append(data)

    def texts(self, tag: str, kind: str = "") -> list[str]:
        """Texts of the elements *tag* of class *kind*, blanks made one."""
        return [" ".join(text.split()) for name, given, text in self.closed
                if name == tag and (not kind or kind in given.get("class", "").split())]

    def data(self) -> Any:
        """What the script is given."""
        return json.loads(next(text for name, given, text in self.closed if given.get("type") == "application/json"))


def traced(design: str, hypervisor: str, parties: tuple[str, ...], law: str, **more: Any) -> Trace:
    report = check(design, hypervisor, parties=parties, jobs=1, **more)
    return trace_of(report, report.laws[law])


@pytest.fixture(scope="module")
def load() -> Trace:
    return traced("none", "gunyah", ("vcpu", "zeropad"), "host-survives")


@pytest.fixture(scope="module")
def pinned() -> Trace:
    return traced("gunyah-v17", "gunyah", ("vcpu", "device"), "pins-respected")


# -- a counterexample --------------------------------------------------------------------------------------------------


def test_every_step_is_a_row_in_the_kernels_words(pinned: Trace) -> None:
    shown = Page(page(replay(pinned)))
    rows = [(given["id"], " ".join(text.split())) for tag, given, text in shown.closed
            if tag == "li" and "step" in given.get("class", "").split()]
    assert [name for name, _ in rows] == [f"step-{n}" for n in range(1, len(pinned.steps) + 1)]
    for (_, text), step in zip(rows, pinned.steps, strict=True):
        assert step.party in text
        assert step.primitive is not None
        assert step.primitive.name in text
    assert "GUP ref 0 → 1" in rows[12][1]
    assert "pins-respected is broken: a page is donated while somebody holds a reference" in rows[-1][1]
    assert shown.texts("p", "verdict") == ["pins-respected is broken: " + pinned.evidence]


def test_the_law_is_told_with_sentence_and_source(load: Trace) -> None:
    told = Page(page(replay(load))).texts("dd")
    assert "no access the kernel may make on its own ends in an abort it cannot handle" in told
    assert any("do_sea()" in text and "Feb-Mar 2024" in text for text in told)


# The oracle: the state that the replay is in, read cell by cell through the words of the reports.
def test_the_cells_follow_the_states(pinned: Trace) -> None:
    again = replay(pinned)
    given = Page(page(again)).data()
    names = lock_holders(again.steps, again.initial)
    cells = dict(given["first"])
    assert len(given["changes"]) == len(again.steps)
    for step, change in zip(again.steps, given["changes"], strict=True):
        cells.update(change)
        fields = st.fields_of(step.shared)
        for cell, text in cells.items():
            if not cell.endswith(".refs"):
                assert re.sub(" by (vcpu|device)$", "", text) == show.value(cell, fields[cell], names), cell
        for frame in range(3):
            refs = sum(int(number) for number in re.findall(r"\d+", cells[f"pfn{frame}.refs"]))
            assert refs == st.State(step.shared).frame(frame).refs()


def test_references_and_shared_locks_say_who_has_them(pinned: Trace) -> None:
    given = Page(page(replay(pinned))).data()
    told = [change.get("pfn0.refs") for change in given["changes"]]
    assert told[4] == "1 page cache, 1 lru_add batch, 1 lookup by device"
    assert told[11:13] == ["1 page cache, 1 lru_add batch, 1 GUP-fast, not sure yet by device",
                           "1 page cache, 1 lru_add batch, 1 GUP without FOLL_PIN by device"]
    assert told[16] == "1 page cache, 1 lru_add batch, 1 lookup by vcpu, 1 GUP without FOLL_PIN by device"
    assert [change.get("file0.bindings_r") for change in given["changes"]][15] == "1 by vcpu"


def test_a_reference_that_another_drops_is_not_his() -> None:
    holders = Holders()
    holders.take("vcpu", [("pfn0.lookup", 0, 1)])
    holders.take("vmm", [("pfn0.lookup", 1, 2), ("pfn1.pin", 0, 1), ("page0.attr", 0, 1)])
    assert holders.of("pfn0.lookup") == " by vcpu and vmm"
    holders.take("vmm", [("pfn0.lookup", 2, 1)])
    assert holders.of("pfn0.lookup") == " by vcpu"
    holders.take("teardown", [("pfn0.lookup", 1, 0)])
    assert (holders.of("pfn0.lookup"), holders.of("pfn1.pin"), holders.of("page0.attr")) == ("", " by vmm", "")


def test_the_tables_stand_at_the_end_for_who_runs_no_script(load: Trace) -> None:
    again = replay(load)
    shown = Page(page(again))
    cells = {given["data-cell"]: (text, given.get("class", "")) for tag, given, text in shown.closed if "data-cell" in given}
    assert cells["pfn0.owner"] == ("guest", "blamed")
    assert cells["pfn0.s1"] == ("mapped", "blamed")
    assert cells["pfn1.owner"] == ("host", "")
    blamed = {cell for cell, (_, kind) in cells.items() if kind}
    assert blamed == offending(again.finding)


def test_folios_and_leaves_are_told_of_each_frame() -> None:
    trace = traced("none", "gunyah", ("vcpu", "zeropad"), "host-survives", scenes=["large-folio"])
    again = replay(trace)
    given = Page(page(again)).data()
    cells, s2_leaves = dict(given["first"]), []
    for step, change in zip(again.steps, given["changes"], strict=True):
        cells.update(change)
        state = st.State(step.shared)
        for frame in state.frames():
            order = state.folio(frame.number).s2_leaf
            first = frame.number - frame.number % (1 << order)
            assert cells[f"pfn{frame.number}.s2_leaf"] == (f"pfn{first}-{first + 1}" if order else "single")
            head, parts = state.head(frame), state.parts(state.head(frame))
            assert cells[f"pfn{frame.number}.folio"] == (
                f"pfn{head.number}-{parts[-1].number}" if len(parts) > 1 else "single")
        s2_leaves.append(cells["pfn1.s2_leaf"])
    assert s2_leaves == ["pfn0-1"] * 7 + ["single"] * 2              # the hypercall splits the leaf


def test_the_step_that_breaks_the_law_says_since_when(load: Trace, pinned: Trace) -> None:
    told = [(it.record, it.label, it.text, it.since) for it in view(replay(load)).because]
    assert told == [("pfn0", "owner", "guest", 8), ("pfn0", "direct map", "mapped", 0),
                    ("pfn0", "host stage 2", "withheld", 8)]
    shown = Page(page(replay(pinned)))
    assert "pfn0 owner guest, since this step" in shown.texts("li")
    assert "pfn0 GUP ref (GUP without FOLL_PIN: vmsplice, /proc/pid/mem) 1, since step 13" in shown.texts("li")


def test_a_step_says_what_it_touches(pinned: Trace) -> None:
    rows = view(replay(pinned)).rows
    assert rows[0].about == ()
    assert rows[3].about == ("page0",)                                  # a lookup that finds nothing
    assert rows[5].about == ("page0", "pfn0")                           # clear_folio(pfn0), which is page 0
    assert rows[14].about == ("gfn0",)
    assert rows[-1].about == ("page0", "pfn0")


def test_an_operation_under_way_is_seen_on_its_lane(load: Trace) -> None:
    rows = view(replay(load)).rows
    assert [row.busy[0] for row in rows] == [False] + [True] * 8
    assert not any(row.busy[1] for row in rows)


def test_rows_stand_under_their_operation(pinned: Trace) -> None:
    shown = Page(page(replay(pinned)))
    assert shown.texts("summary")[:4] == [
        "device mmap(), page 0: steps 1 to 3; returns 0",
        "device a page fault in the VMM's mapping (user_fault): steps 4 to 10; done",
        "device GUP-fast (gup_fast): steps 11 to 13; done leads there: 13",
        "vcpu a page fault of the guest (guest_fault), page 0: steps 16 to 25; under way when the run ends "
        "leads there: 21, 22 breaks the law: 25"]
    assert ("details", {"open": ""}) in shown.elements                 # without a script all rows are there to be read
    starts = [given["start"] for tag, given in shown.elements if tag == "ol" and "start" in given]
    assert starts == ["1", "1", "4", "11", "16"]


def test_an_operation_that_is_cut_goes_on_below() -> None:
    shown = view(replay(traced("guestmem-rfc1", "kvm", ("vcpu", "vmm"), "all-or-nothing")))
    parts = [part for chunk in shown.chunks for part in chunk if part.operation]
    fault = [part for part in parts if part.operation and part.operation.party == "vcpu"]
    assert [part.goes_on for part in fault] == [False, *[True] * (len(fault) - 1)]
    assert len(fault) > 1
    assert [row.number for part in fault for row in part.rows] == fault[0].operation.steps if fault[0].operation else False


def test_steps_that_lead_there_are_marked_and_listed(pinned: Trace, load: Trace) -> None:
    shown = Page(page(replay(pinned)))
    marked = [given["id"] for _, given in shown.elements if "leads" in given.get("class", "").split()]
    assert marked == ["step-13", "step-14", "step-21", "step-22"]
    story = next(text for tag, given, text in shown.closed if given.get("class") == "story")
    lines = [" ".join(line.split()) for line in story.splitlines() if line.strip()]
    assert lines[0] == "What leads there"
    assert lines[3].endswith("a check, in lend_safe(): it looks at pfn0 VMM maps it, and not at pfn0 GUP ref")
    story = next(text for tag, given, text in Page(page(replay(load))).closed if given.get("class") == "story")
    assert " ".join(story.split()).endswith(
        "step 9 zeropad load_unaligned_zeropad(pfn=0) breaks the law: pfn0 owner guest, pfn0 direct map mapped "
        "(from the beginning: no step has changed it), "
        "pfn0 host stage 2 withheld")


def test_who_is_there_and_takes_no_step_has_no_lane(load: Trace) -> None:
    shown = Page(page(replay(replace(load, parties=(*load.parties, "drainer")))))
    legend = shown.texts("ul", "parties")[0]
    assert "drainer: there, and without a step in this run" in legend
    assert shown.texts("p", "lead") == ["none on gunyah, 9 steps of vcpu, zeropad"]
    assert not [given for tag, given in shown.elements if given.get("data-lane") == "2"]


def test_words_of_the_hypervisor_and_of_a_design_without_attributes_are_told(pinned: Trace, load: Trace) -> None:
    told = " ".join(Page(page(replay(pinned))).texts("dd"))
    assert "the guest has the page alone; Gunyah has two hypercalls for it, donate_to_protected and map_private" in told
    assert "this design keeps no attribute" in told
    cells = [given["data-cell"] for _, given in Page(page(replay(pinned))).elements if "data-cell" in given]
    assert "page0.attr" not in cells
    told = " ".join(Page(page(replay(load))).texts("dd"))
    assert "its attribute; to convert a page is to change that" in told
    assert "keeps no attribute" not in told
    unmade = traced("guestmem-rfc1", "kvm", ("vcpu2", "creator"), "lifetimes", scenes=["nothing-yet"])
    assert "keeps no attribute" not in " ".join(Page(page(replay(unmade))).texts("dd"))


def test_two_files_have_pages_of_their_own() -> None:
    initial = world("none", "gunyah", scene="two-vms").initial
    step = Step("vcpu", (), Primitive("filemap_get_folio", (1,), "library", 1), None, False, initial, ())
    trace = Trace("none", "gunyah", SCENES["two-vms"], 1, ("vcpu",), "progress", "it never ends", (), "0.1.0")
    (row,) = view(Replay(trace, initial, (step,))).rows
    pages = st.layout_of(initial).sizes.pages
    assert row.about == (f"page{pages + 1}",)


def test_what_breaks_before_anybody_moves_has_a_page() -> None:
    finding = Finding("nothing-lost", "it is gone", [], replay_initial())
    shown = Page(page(Replay(Trace("none", "gunyah", Scene(), 1, ("vcpu",), "nothing-lost", "it is gone", (), "0.1.0"),
                             finding.initial, ())))
    assert "before anybody moves" in " ".join(shown.texts("p"))
    assert [tag for tag, given in shown.elements if "controls" in given.get("class", "")] == []


def replay_initial() -> bytes:
    return world("none", "gunyah").initial


def test_a_trace_that_diverges_shows_how_far_it_goes_and_what_was_recorded(load: Trace) -> None:
    steps = list(load.steps)
    steps[4] = replace(steps[4], result=-12)
    other = replace(load, steps=tuple(steps), version="0.0.1")
    shown = Page(page(replay(other)))
    assert any("diverges at step 5" in text and "recorded by version 0.0.1" in text for text in shown.texts("p", "doubt"))
    rows = shown.texts("li", "step")
    assert len(rows) == 9
    assert len(shown.texts("li", "recorded")) == 5
    assert shown.texts("p", "verdict") == []
    assert len(shown.data()["changes"]) == 4


def test_what_could_not_be_taken_again_may_say_anything(load: Trace) -> None:
    strange = [Primitive("tree_store", ("bindings", 0, 7), "x"), Primitive("vma_covers", ("<b>", -1), "x"),
               Primitive("no_such", (None, (1, 2)), "x"), None]
    steps = [*load.steps[:4], *(replace(load.steps[4], primitive=each) for each in strange)]
    shown = Page(page(replay(replace(load, steps=tuple(steps)))))
    assert len(shown.texts("li", "recorded")) == 4
    assert not any(given.get("class") == "story" for _, given in shown.elements)       # of what did not happen


# -- other people's names ----------------------------------------------------------------------------------------------


def test_markup_in_names_is_text(load: Trace) -> None:
    again = replay(load)
    steps = [step._replace(choices=(f"gfn {HOSTILE}",)) for step in again.steps]
    trace = replace(load, evidence=HOSTILE, version=HOSTILE, parties=load.parties,
                    scene=replace(load.scene, title=HOSTILE, name=HOSTILE))
    text = page(Replay(trace, again.initial, tuple(steps)), commands=(("replay", (HOSTILE,)),),
                machine={3: [HOSTILE]}, machine_name=HOSTILE)
    shown = Page(text)
    assert [tag for tag, _ in shown.elements].count("script") == 2
    assert [tag for tag, _ in shown.elements].count("style") == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in given) for tag, given in shown.elements)
    assert any("<script>alert('x')</script>" in told for told in shown.texts("dd"))
    assert shown.data()["first"]


# A plugin chooses names, too: whatever it registers goes through the same templates.
PLUGIN = '''
from guest_memfd.laws import Law
from guest_memfd.scenarios import Party
from guest_memfd.words.primitives import Host

def hostile(design, hypervisor):
    host = Host("mm")
    yield from host.choose("what", "<script>alert(1)</script>")
    yield from host.load_unaligned_zeropad(0)

def judge(note):
    return "<b onmouseover='x'>&amp;</b>" if type(note).__name__ == "Access" else None

HOSTILE = Party("hostile", "<img src=x onerror=alert(2)>", hostile, fd=False)
MARKUP = Law("markup", "<i>no page is read</i>", "a <b>plugin</b>", "at <u>every</u> access", note=judge)
'''


def test_a_hostile_plugin_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(PLUGIN)

    def gmem(*argv: str) -> int:                        # in a process of its own: what is registered stays registered
        command = [sys.executable, "-m", "guest_memfd.cli.main", *argv, "--load", str(tmp_path / "hostile.py")]
        return subprocess.run(command, capture_output=True, timeout=600, check=False).returncode

    assert gmem("check", "none", "--hypervisor", "gunyah", "--parties", "vcpu,hostile", "--law", "markup",
                "--save-traces", str(tmp_path), "-q", "-j", "1") == 2
    target = tmp_path / "page.html"
    assert gmem("explain", str(tmp_path / "none-gunyah-markup.json"), "--html", str(target)) == 0
    shown = Page(target.read_text())
    assert {tag for tag, _ in shown.elements} & {"img", "b"} <= {"b"}
    assert "<i>no page is read</i>" in shown.texts("dd")
    assert any("alert(1)" in text for text in shown.texts("em"))
    assert not any(name.startswith("on") for _, given in shown.elements for name in given)


# -- one file, of a size to send -----------------------------------------------------------------------------------------


def test_a_page_asks_nobody_for_anything(load: Trace) -> None:
    shown = Page(page(replay(load)))
    links = [value for _, given in shown.elements for name, value in given.items() if name in ("src", "href", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    policy = next(given["content"] for _, given in shown.elements if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def long_run(count: int) -> Replay:
    """*count* steps of two parties, each of which takes and drops a lock."""
    initial = replay_initial()
    locked = bytearray(initial)
    locked[st.layout_of(initial).names.index("file0.invalidate_r")] = 1
    steps = []
    for number in range(count):
        name, shared = ("up_read", initial) if number % 2 else ("down_read", bytes(locked))
        party = ("vcpu", "vmm")[number // 2 % 2]
        steps.append(Step(party, (), Primitive(name, ("invalidate",), "library"), None, False, shared, ()))
    trace = Trace("none", "gunyah", Scene(), 1, ("vcpu", "vmm"), "progress", "it never ends", (), "0.1.0")
    return Replay(trace, initial, tuple(steps))


def test_a_page_of_forty_steps_is_small(pinned: Trace) -> None:
    once = replay(pinned)
    forty = Replay(pinned, once.initial, (once.steps * 2)[:40])
    assert len(page(forty).encode()) < 150_000


@pytest.mark.long
def test_ten_thousand_steps_are_a_page_in_parts() -> None:
    began = time.process_time()
    text = page(long_run(10_000))
    spent = time.process_time() - began
    shown = [given for tag, given in Page(text).elements if tag == "ol"]
    assert [given["start"] for given in shown[:3]] == ["1", "101", "201"]
    assert len(shown) == 100
    assert len(text) < 8_000_000, f"{spent:.1f} s of CPU"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(load: Trace, tmp_path: Path) -> Path:
    write(load, tmp_path / "load.json")
    return tmp_path / "load.json"


def test_explain_writes_the_page_beside_the_text(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = saved.with_name("page.html")
    assert main(["explain", str(saved), "--html", str(target)]) == 0
    assert "host-survives is broken" in capsys.readouterr().out
    text = target.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert text.endswith("</html>\n")
    assert main(["explain", str(saved), "--html", str(target)]) == 0
    assert target.read_text() == text


def test_text_and_page_may_be_neighbours_but_not_one_file(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, target = saved.with_name("text"), saved.with_name("page.html")
    assert main(["explain", str(saved), "--html", str(target), "-o", str(text)]) == 0
    assert text.read_text().startswith("host-survives is broken")
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["load.json", "page.html", "text"]
    assert main(["explain", str(saved), "--html", str(text), "-o", f"{saved.parent}/./text"]) == 4
    assert "each needs a file of its own" in capsys.readouterr().err
    assert text.read_text().startswith("host-survives is broken")


@pytest.mark.parametrize(("target", "says"), [
    ("missing/page.html", "No such file"), (".", "Is a directory"), ("load.json/page.html", "Not a directory")])
def test_a_page_that_cannot_be_written_is_told_and_nothing_is_printed(
    saved: Path, capsys: pytest.CaptureFixture[str], target: str, says: str,
) -> None:
    assert main(["explain", str(saved), "--html", str(saved.parent / target)]) == 4
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert says in told.err
    assert sorted(path.name for path in saved.parent.iterdir()) == ["load.json"]


def test_a_full_device_is_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(saved), "--html", "/dev/full"]) == 4
    assert "No space left on device" in capsys.readouterr().err


def test_a_trace_of_another_schema_leaves_no_page(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved.write_text(saved.read_text().replace("guest-memfd-trace/3", "guest-memfd-trace/99"))
    target = saved.with_name("page.html")
    assert main(["explain", str(saved), "--html", str(target)]) == 4
    assert "guest-memfd-trace/99" in capsys.readouterr().err
    assert not target.exists()


def test_the_machine_is_for_the_page(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(saved), "--on", "emulated"]) == 4
    assert "--on emulated is for --html" in capsys.readouterr().err


def test_a_page_shows_what_the_machine_did(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("unicorn")
    target = saved.with_name("page.html")
    assert main(["explain", str(saved), "--html", str(target), "--on", "emulated"]) == 0
    machine = Page(target.read_text()).texts("details", "machine")
    assert len(machine) == 2
    assert "stage 2 withheld from the host, owner guest" in machine[0]
    assert "ESR 0x96000010" in machine[1]
    assert "Kernel panic - not syncing" in machine[1]
