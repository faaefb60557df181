"""The pages of a comparison and of surveys: every cell is what was found, and what is said beside it is true."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_html import HOSTILE, Page

from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.explore.suite.check import compare
from guest_memfd.explore.suite.verdict import Limits, Report
from guest_memfd.explore.world.cost import cost
from guest_memfd.html import compare as compared
from guest_memfd.html import probe as surveyed
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.probe.matrix import SurveyOf

PAIRS = [("none", "gunyah"), ("gunyah-v17", "gunyah"), ("library", "gunyah"), ("none", "pkvm"), ("library", "pkvm")]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return compare(PAIRS, parties=("vcpu", "device", "zeropad"), limits=Limits(), jobs=1)


@pytest.fixture(scope="module")
def table(reports: list[Report]) -> Page:
    costs = {pair: cost(DESIGNS[pair[0]], HYPERVISORS[pair[1]]) for pair in PAIRS}
    return Page(compared.page(reports, costs, {"none": "none does nothing."}, "three parties"))


def cells(shown: Page) -> dict[str, list[str]]:
    """Row -> its cells, of all tables of verdicts, each row's one after the other."""
    found: dict[str, list[str]] = {}
    name = ""
    for tag, _, text in shown.closed:
        if tag == "th":
            name = text
        elif tag == "td":
            found.setdefault(name, []).append(" ".join(text.split()))
    return found


def test_every_cell_is_what_became_of_the_law(table: Page, reports: list[Report]) -> None:
    rows = cells(table)
    of_gunyah = [report for report in reports if report.hypervisor == "gunyah"]
    of_pkvm = [report for report in reports if report.hypervisor == "pkvm"]
    for law in reports[0].laws:
        told = [report.laws[law] for report in (*of_gunyah, *of_pkvm)]
        for text, known in zip(rows[law], told, strict=True):
            if known.verdict == "refuted":
                assert re.match(rf"{known.steps} [A-Z]", text), (law, text)
            else:
                assert text == "kept"


def test_a_broken_cell_opens_its_shortest_run(table: Page, reports: list[Report]) -> None:
    links = [given["href"][1:] for tag, given in table.elements if tag == "a" and "step" not in given["href"]]
    ids = [given["id"] for _, given in table.elements if "id" in given]
    assert len(ids) == len({*ids})
    broken = {f"{report.design}-{report.hypervisor}-{law.law}": law for report in reports for law in report.laws.values()
              if law.verdict == "refuted"}
    assert "gunyah-v17-gunyah-pins-respected" in broken
    assert {*links} - {"table"} == {*broken}
    for name, law in broken.items():
        steps = [given for _, given in table.elements if given.get("id", "").startswith(f"{name}-step-")]
        assert len(steps) == law.steps


def test_limits_scenes_and_what_kept_means_are_said(table: Page, reports: list[Report]) -> None:
    told = " ".join(table.texts("section"))
    assert "does not mean that a kernel with this design cannot crash" in told
    assert "three parties" in told
    for report in reports:
        assert f"{report.states:,}" in told
    assert "two-pages: a private page and a shared one" in told


def test_a_limit_is_no_pass() -> None:
    (report,) = compare([("none", "pkvm")], parties=("vcpu", "zeropad"), limits=Limits(states=1), jobs=1)
    shown = Page(compared.page([report], {}, {}, "two parties"))
    assert {text for row, texts in cells(shown).items() if row in report.laws for text in texts} == {"?"}
    assert any("more than 1 states" in text for text in shown.texts("td"))


def test_bars_are_as_long_as_their_part(table: Page) -> None:
    widths = [int(given["width"].rstrip("%")) for tag, given in table.elements if tag == "rect"]
    counts = [[int(text) for text in row[-4:]] for row in zip(*[iter(costs_of(table))] * 5, strict=True)]
    assert len(widths) == 4 * len(counts)
    for column in zip(*counts, strict=True):
        assert max(column) > 0
    for number, row in enumerate(counts):
        for column, count in enumerate(row):
            assert widths[4 * number + column] == 100 * count // max(each[column] for each in counts)


def costs_of(table: Page) -> list[str]:
    """The cells of the table of costs: hypervisors and four numbers a row."""
    within = next(text for tag, given, text in table.closed if tag == "table" and given.get("class") == "costs")
    assert "TLB flushes" in within
    texts = [" ".join(text.split()) for tag, _, text in table.closed if tag == "td"]
    start = next(at for at, text in enumerate(texts) if text in ("gunyah", "pkvm", "gunyah, pkvm"))
    end = next(at for at, text in enumerate(texts) if at > start and text in ("refuted", "holds")) - 1
    return texts[start:end]


def test_compare_writes_the_page_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "table.html"
    argv = ["compare", "none", "library", "--hypervisor", "gunyah", "--parties", "vcpu,zeropad", "-q", "-j", "1"]
    assert main([*argv, "--html", str(target)]) == 0
    assert "9 V+Z" in capsys.readouterr().out
    shown = Page(target.read_text())
    assert cells(shown)["host-survives"] == ["9 V+Z", "kept"]
    assert main([*argv, "--html", str(tmp_path / "no" / "table.html")]) == 4
    assert "cannot write" in capsys.readouterr().err
    assert main([*argv, "--html", "/dev/full"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


# -- surveys -----------------------------------------------------------------------------------------------------------


def survey(**results: str) -> Mapping[str, Any]:
    """A survey with a bug, two rows, and the given *results*."""
    verdict, twice = results.get("bug", "present"), results.get("twice", "EEXIST")
    return {
        "behaviour": [
            {"id": "bind.twice", "says": "pages are bound once", "result": twice, "expected": "EEXIST",
             "verdict": "expected" if twice == "EEXIST" else "differs", "why": ""},
            {"id": "stat.size", "says": "the size is as created", "result": "4096", "expected": "4096",
             "verdict": "skipped" if "skip" in results else "expected", "why": results.get("skip", "")}],
        "known_bugs": [{"id": "no-cloexec", "title": "it stays open", "severity": "trap", "verdict": verdict,
                        "seen": f"it is {verdict}", "commit": "a fix", "means": results.get("means", "close it")}],
    }


@pytest.fixture
def kernels() -> Page:
    return Page(surveyed.page([
        SurveyOf("6.12", survey(), "", 5.0), SurveyOf("6.18", survey(bug="fixed", twice="EINVAL"), "", 6.0),
        SurveyOf("7.0", survey(skip="no KVM"), "", 6.0), SurveyOf("7.1", None, "it has not booted")]))


def test_kernels_stand_side_by_side(kernels: Page) -> None:
    rows = {re.sub(r"\W.*", "", row.replace("-", "_")): answers for row, answers in cells(kernels).items()}
    assert rows["no_cloexec"] == ["present", "fixed", "present"]
    assert rows["bind"][-3:] == ["EEXIST", "EINVAL", "EEXIST"]
    assert cells(kernels)["6.18"] == ["1", "1", "0", "0", "6"]
    assert any("7.1: it has not booted" in text for text in kernels.texts("p", "doubt"))


def test_a_bug_says_what_it_means_for_a_vmm(kernels: Page) -> None:
    assert "For a VMM: close it" in kernels.texts("p")
    assert kernels.texts("li") == ["6.12: it is present", "6.18: it is fixed", "7.0: it is present", "a fix"]


def test_what_differs_among_kernels_is_found(kernels: Page) -> None:
    states = [given["data-states"].split() for tag, given in kernels.elements if "data-states" in given]
    bug, varying, *groups = states
    assert bug == ["present", "fixed", "varies"]
    assert varying == ["expected", "differs", "varies"]
    assert groups == [varying, ["expected", "skipped"]]                  # what is skipped says nothing


def test_a_kernel_chooses_no_markup() -> None:
    shown = Page(surveyed.page([SurveyOf(HOSTILE, survey(twice=HOSTILE, bug="fixed", means=HOSTILE), HOSTILE, 1.0)] * 2))
    assert [tag for tag, _ in shown.elements].count("script") == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in given) for tag, given in shown.elements)


def test_probe_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "here.html"
    assert main(["probe", "--part", "offers,bugs", "--json", "--html", str(target)]) in (0, 5)
    told = json.loads(capsys.readouterr().out)
    shown = Page(target.read_text())
    rows = cells(shown)
    for bug in told["known_bugs"]:
        (row,) = (row for row in rows if row.startswith(bug["id"] + " "))
        assert rows[row] == [bug["verdict"]]


def test_a_page_of_other_kernels_is_of_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["probe", "--kernel", "7.3", "--html", str(tmp_path / "page.html"), "--json"]) == 4
    assert "--html excludes --json" in capsys.readouterr().err
