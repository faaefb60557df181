"""`gmem probe --saved`: surveys from files side by side, in tables and as a page; what is no survey is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_html import HOSTILE, Page
from test_html_tables import cells, survey

from guest_memfd.cli.main import main
from guest_memfd.probe.survey import SCHEMA


def written(folder: Path, name: str, **changed: Any) -> Path:
    file = folder / f"{name}.json"
    results = {key: changed.pop(key) for key in ("bug", "twice", "skip") if key in changed}
    file.write_text(json.dumps({"schema": SCHEMA, **survey(**results), "seconds": 7.5, **changed}))
    return file


def test_what_was_saved_stands_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [written(tmp_path, "6.12"), written(tmp_path, "6.18", bug="fixed", twice="EINVAL"),
             written(tmp_path, "7.0", skip="no KVM")]
    page = tmp_path / "page.html"
    assert main(["probe", "--saved", *map(str, files), "--html", str(page)]) == 2          # of 6.18 a row differs
    table = capsys.readouterr().out
    assert "| no-cloexec | PRESENT | fixed | PRESENT |" in table
    assert "| bind.twice | EEXIST | EINVAL * | EEXIST |" in table
    rows = cells(Page(page.read_text()))
    assert rows["6.18"] == ["1", "1", "0", "0", "8"]
    (bug,) = (answers for row, answers in rows.items() if row.startswith("no-cloexec"))
    assert bug == ["present", "fixed", "present"]


def test_a_real_survey_comes_back_under_its_kernels_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.json"
    code = main(["probe", "--part", "offers,bugs", "--json", "-o", str(file)])
    if code == 5:
        pytest.skip("nothing can be probed here")
    assert code in (0, 2)                               # what this kernel does may be news
    kernel = json.loads(file.read_text())["offers"]["kernel"]
    capsys.readouterr()
    assert main(["probe", "--saved", str(file), "--html", str(tmp_path / "page.html")]) == 0
    assert f"| {kernel} |" in capsys.readouterr().out
    assert f"what {kernel} offers" in Page((tmp_path / "page.html").read_text()).texts("summary")


def test_the_words_of_a_file_are_text(tmp_path: Path) -> None:
    spoiled = survey(bug="fixed", twice=HOSTILE, means=HOSTILE)
    file = written(tmp_path, "x", behaviour=spoiled["behaviour"], known_bugs=spoiled["known_bugs"])
    page = tmp_path / "page.html"
    assert main(["probe", "--saved", str(file), "--html", str(page)]) == 2
    shown = Page(page.read_text())
    assert [tag for tag, _ in shown.elements].count("script") == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in given) for tag, given in shown.elements)


BUG = dict(survey()["known_bugs"][0])
ROW = dict(survey()["behaviour"][0])


@pytest.mark.parametrize(("text", "says"), [
    ("{", "is not JSON"), ("[]", "is no survey"), (json.dumps({"schema": "guest-memfd-trace/3"}), "is no survey"),
    (json.dumps({"schema": SCHEMA, "behaviour": {}}), "its behaviour is no list"),
    (json.dumps({"schema": SCHEMA, "behaviour": [7]}), "something else than objects"),
    (json.dumps({"schema": SCHEMA, "behaviour": [ROW | {"says": 7}]}), "has no 'says'"),
    (json.dumps({"schema": SCHEMA, "known_bugs": [BUG | {"verdict": "maybe"}]}), "a verdict other than present, fixed"),
    (json.dumps({"schema": SCHEMA, "offers": 7}), "what it offers is not as gmem probe writes it")])
def test_what_is_no_survey_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str,
) -> None:
    file, page = tmp_path / "bad.json", tmp_path / "page.html"
    file.write_text(text)
    assert main(["probe", "--saved", str(written(tmp_path, "good")), str(file), "--html", str(page)]) == 4
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert says in told.err
    assert str(file) in told.err
    assert not page.exists()


@pytest.mark.parametrize("more", [["--kernel", "7.3"], ["--json"], ["--ktap"], ["--part", "bugs"], ["--against", "x"]])
def test_what_is_saved_is_not_chosen_from(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main(["probe", "--saved", str(written(tmp_path, "x")), *more]) == 4
    assert f"--saved and {more[0]} exclude each other" in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--saved", "/no/such/file"]) == 4
    assert "--saved '/no/such/file': No such file" in capsys.readouterr().err
