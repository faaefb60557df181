"""The pages in a real browser: steps, keys, filters, links, dark mode, print, no script; no error, no request.

They run where a Chromium is on the PATH. With GMEM_SCREENSHOTS set to a folder, the pictures of the documents are written
there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import PROGRAMS, Browser, browser, program
from test_html import long_run, traced
from test_html_tables import survey
from test_probe_saved import written

from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.explore.replay import replay
from guest_memfd.explore.suite.check import compare
from guest_memfd.explore.world.cost import cost
from guest_memfd.html import compare as compared
from guest_memfd.html import probe as surveyed
from guest_memfd.html.trace import page
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.probe.matrix import SurveyOf

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(program() is None, reason=f"no browser is here: one of {', '.join(PROGRAMS)} is wanted"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as there:
        yield there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pinned(folder: Path) -> Path:
    file = folder / "pinned.html"
    file.write_text(page(replay(traced("gunyah-v17", "gunyah", ("vcpu", "device"), "pins-respected"))))
    return file


@pytest.fixture(autouse=True)
def usual(tab: Browser) -> Iterator[None]:
    tab.script(True)
    tab.look()
    yield
    assert tab.console == []
    assert all(request.startswith("file://") for request in tab.requests)
    assert len({*tab.requests}) <= 1


def at(tab: Browser) -> str:
    return str(tab.js("document.querySelector('li.step.here')?.id"))


def cell(tab: Browser, name: str) -> tuple[str, str]:
    found = f"document.querySelector('[data-cell=\"{name}\"]')"
    return str(tab.js(f"{found}.textContent")), str(tab.js(f"[...{found}.classList].sort().join(' ')"))


def choose(tab: Browser, where: str, option: str) -> None:
    """Choose *option*, as a person does: the page hears of it."""
    tab.js(f"(() => {{ const it = document.querySelector('{where}'); it.value = '{option}';"
           "for (const heard of ['input', 'change']) it.dispatchEvent(new Event(heard, {bubbles: true})) })()")


def shown(tab: Browser) -> list[int]:
    found = tab.js("[...document.querySelectorAll('li.step')].filter((s) => s.checkVisibility()).map((s) => +s.id.slice(5))")
    return [int(number) for number in found]


def picture(tab: Browser, name: str) -> None:
    data = tab.picture()
    assert data[8:12] == b"WEBP"
    if folder := os.environ.get("GMEM_SCREENSHOTS"):
        (Path(folder) / f"{name}.webp").write_bytes(data)


# -- steps and keys ----------------------------------------------------------------------------------------------------


def test_it_opens_at_the_step_that_breaks_the_law(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    assert at(tab) == "step-25"
    assert cell(tab, "pfn0.owner") == ("guest", "blamed is-changed")
    assert tab.js("document.querySelector('.where').textContent") == "step 25 of 25"


def test_keys_walk_through_the_states(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.press("Home")
    assert at(tab) == "None"
    assert cell(tab, "pfn0.content") == ("junk", "")
    assert tab.js("document.querySelector('.when').textContent") == "at first"
    for key in ("j", "j", "ArrowDown", "j", "j", "j", "k", "ArrowUp", "j", "j"):
        tab.press(key)
    assert at(tab) == "step-6"
    assert cell(tab, "pfn0.content") == ("zero", "is-changed")
    assert cell(tab, "pfn0.owner") == ("host", "")
    means = str(tab.js("document.querySelector('.means').textContent"))
    assert means.startswith("folio_zero_range() through the direct map")
    tab.press("k")
    assert cell(tab, "pfn0.content") == ("junk", "")
    assert cell(tab, "pfn0.refs") == ("1 page cache, 1 lru_add batch, 1 lookup by device", "is-changed")
    tab.press("End")
    assert at(tab) == "step-25"
    tab.press("j")
    assert at(tab) == "step-25"
    assert tab.js("getComputedStyle(document.querySelector('.here')).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_a_click_goes_to_a_step_and_a_button_on(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.js("document.querySelector('#step-12 .call').click()")
    assert at(tab) == "step-12"
    tab.js("document.querySelector('[data-move=next]').click()")
    assert at(tab) == "step-13"
    assert cell(tab, "pfn0.refs") == ("1 page cache, 1 lru_add batch, 1 GUP without FOLL_PIN by device", "is-changed")


def test_a_link_names_a_step(tab: Browser, pinned: Path) -> None:
    tab.open(pinned, "#step-7")
    assert at(tab) == "step-7"
    tab.press("j")
    assert tab.js("location.hash") == "#step-8"
    tab.js("location.hash = '#step-3'")
    assert until(tab, lambda: [name for name in [at(tab)] if name != "step-8"]) == ["step-3"]
    tab.open(pinned, "#no-such-step")
    assert at(tab) == "step-25"


def test_filters_hide_steps_and_keys_skip_them(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.js("document.querySelector('input[data-lane=\"0\"]').click()")
    assert shown(tab) == list(range(1, 15))                             # the device's
    tab.press("Home")
    tab.press("End")
    assert at(tab) == "step-14"
    tab.js("document.querySelector('input[data-lane=\"0\"]').click()")
    choose(tab, "select[data-about]", "gfn0")
    assert shown(tab) == [15, 19]
    tab.press("Home")
    tab.press("j")
    assert at(tab) == "step-15"
    assert cell(tab, "pfn0.refs")[0].endswith("by device")     # what is hidden has happened all the same


def test_an_operation_folds_to_one_row_and_keys_pass_it_in_one_step(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.press("f")                                                      # the fault, 16 to 25
    assert shown(tab) == list(range(1, 16))
    assert at(tab) == "step-25"                                         # the states stay those at the cursor
    assert tab.js("document.querySelector('summary.here').textContent.includes('a page fault of the guest')")
    tab.press("k")
    assert at(tab) == "step-15"
    tab.press("j")
    assert at(tab) == "step-25"
    assert cell(tab, "pfn0.owner")[0] == "guest"
    tab.press("f")
    assert shown(tab) == list(range(1, 26))
    tab.press("F")
    assert shown(tab) == [14, 15]
    tab.press("Home")
    stops = []
    for _ in range(7):
        tab.press("j")
        stops.append(at(tab))
    assert stops == ["step-3", "step-10", "step-13", "step-14", "step-15", "step-25", "step-25"]
    tab.press("F")
    assert shown(tab) == list(range(1, 26))


def test_a_link_into_what_is_folded_opens_it(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.js("document.querySelector('[data-fold]').click()")
    assert shown(tab) == [14, 15]
    tab.js("location.hash = '#step-21'")
    assert until(tab, lambda: [name for name in [at(tab)] if name == "step-21"]) == ["step-21"]
    assert shown(tab) == list(range(14, 26))


def test_what_leads_there_goes_to_its_steps(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    links = tab.js("[...document.querySelectorAll('.story a')].map((a) => a.textContent)")
    assert links == ["step 13", "step 14", "step 21", "step 22", "step 25"]
    tab.js("document.querySelector('.story a').click()")
    assert until(tab, lambda: [name for name in [at(tab)] if name == "step-13"]) == ["step-13"]
    assert tab.js("getComputedStyle(document.querySelector('#step-14')).borderLeftColor") != tab.js(
        "getComputedStyle(document.querySelector('#step-12')).borderLeftColor")


def test_a_filter_leaves_no_heading_without_rows(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.js("document.querySelector('input[data-lane=\"0\"]').click()")
    assert tab.js("[...document.querySelectorAll('.operation')].filter((o) => o.offsetHeight).length") == 3


def test_keys_are_left_to_who_types(tab: Browser, pinned: Path) -> None:
    tab.open(pinned)
    tab.js("document.querySelector('select').focus()")
    tab.press("k")
    assert at(tab) == "step-25"


# -- how it looks ------------------------------------------------------------------------------------------------------


def contrast(tab: Browser, where: str) -> float:
    """Contrast of the text of *where* with the page (WCAG 2, relative luminance)."""
    ink, paper = (tab.js(f"getComputedStyle(document.querySelector('{what}')).{name}").strip("rgb()").split(",")
                  for what, name in ((where, "color"), ("body", "backgroundColor")))
    light, dark = sorted((0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
                          for red, green, blue in (ink, paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def linear(channel: str) -> float:
    part = float(channel) / 255
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_in_light_and_dark(tab: Browser, pinned: Path, dark: bool) -> None:
    tab.look(dark=dark)
    tab.open(pinned, "#step-25")
    red = int(str(tab.js("getComputedStyle(document.body).backgroundColor")).strip("rgb()").split(",")[0])
    assert (red < 64) if dark else (red > 192)
    for where in ("h1 .law", ".lead", ".call b", ".changed", ".facts dt", ".step.colour1 .call b", ".keys", ".why", ".came",
                  ".marked"):
        assert contrast(tab, where) >= 4.5, where
    if not dark:
        picture(tab, "explain")


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_nothing_is_wider_than_the_window(tab: Browser, pinned: Path, width: int) -> None:
    tab.look(width=width, height=800)
    tab.open(pinned)
    assert tab.js("document.documentElement.scrollWidth") <= width


def test_the_states_stay_in_sight(tab: Browser, pinned: Path) -> None:
    for width, height in ((1280, 860), (390, 844)):
        tab.look(width=width, height=height)
        tab.open(pinned)
        for key in ("Home", "j", "End"):
            tab.press(key)
            top, bottom = tab.js("(() => { const box = document.querySelector('[data-cell=\"pfn0.owner\"]')"
                                 ".getBoundingClientRect(); return [box.top, box.bottom] })()")
            assert key == "Home" or 0 < top < bottom <= height, (width, key)


def test_it_prints_without_controls_and_with_all_steps(tab: Browser, pinned: Path) -> None:
    tab.look(media="print")
    tab.open(pinned)
    assert tab.js("getComputedStyle(document.querySelector('.controls')).display") == "none"
    assert shown(tab) == list(range(1, 26))
    assert tab.printed().startswith(b"%PDF")


def test_without_script_all_steps_and_the_last_state_are_there(tab: Browser, pinned: Path) -> None:
    tab.script(False)
    tab.open(pinned)
    assert at(tab) == "None"
    assert tab.js("document.querySelector('.controls').offsetHeight") == 0
    assert shown(tab) == list(range(1, 26))
    assert cell(tab, "pfn0.owner") == ("guest", "blamed")


def test_ten_thousand_steps_stay_usable(tab: Browser, folder: Path) -> None:
    file = folder / "long.html"
    file.write_text(page(long_run(10_000)))
    tab.open(file)
    assert at(tab) == "step-10000"
    for key in ("Home", "j", "j", "k", "End", "k"):
        tab.press(key)
    assert at(tab) == "step-9999"
    assert cell(tab, "file0.invalidate_r") == ("1 by vmm", "is-changed")
    assert tab.picture()


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    pairs = [("none", "gunyah"), ("gunyah-v17", "gunyah"), ("library", "gunyah")]
    reports = compare(pairs, parties=("vcpu", "device", "zeropad"), jobs=1)
    costs = {pair: cost(DESIGNS[pair[0]], HYPERVISORS[pair[1]]) for pair in pairs}
    file = folder / "compare.html"
    file.write_text(compared.page(reports, costs, {"none": "none does nothing."}, "three parties"))
    return file


def opened(tab: Browser) -> list[str]:
    found = tab.js("[...document.querySelectorAll('article.run')].filter((a) => a.offsetHeight).map((a) => a.id)")
    return [str(name) for name in found]


def test_a_cell_opens_its_run_and_no_other(tab: Browser, table: Path) -> None:
    tab.open(table)
    assert opened(tab) == []
    tab.look(height=620)
    picture(tab, "compare")
    tab.js("document.querySelector('a[href=\"#gunyah-v17-gunyah-pins-respected\"]').click()")
    assert until(tab, lambda: opened(tab)) == ["gunyah-v17-gunyah-pins-respected"]
    tab.press("Home")
    tab.press("j")
    assert at(tab) == "gunyah-v17-gunyah-pins-respected-step-1"
    assert opened(tab) == ["gunyah-v17-gunyah-pins-respected"]
    tab.js("document.querySelector('a[href=\"#none-gunyah-host-survives\"]').click()")
    assert until(tab, lambda: [name for name in opened(tab) if "none" in name]) == ["none-gunyah-host-survives"]
    assert opened(tab) == ["none-gunyah-host-survives"]
    tab.open(table, "#none-gunyah-host-survives-step-5")
    assert opened(tab) == ["none-gunyah-host-survives"]
    assert at(tab) == "none-gunyah-host-survives-step-5"


def until(tab: Browser, found: Callable[[], list[str]]) -> list[str]:
    """What is *found*, as soon as anything is; the page hears of a new address a little later."""
    for _ in range(200):
        if there := found():
            return there
        time.sleep(0.05)
    return []


def test_without_script_a_cell_opens_its_run_as_well(tab: Browser, table: Path) -> None:
    tab.script(False)
    tab.open(table, "#none-gunyah-host-survives")
    assert opened(tab) == ["none-gunyah-host-survives"]
    tab.open(table, "#none-gunyah-host-survives-step-5")
    assert opened(tab) == ["none-gunyah-host-survives"]


@pytest.fixture(scope="module")
def survey_page(folder: Path) -> Path:
    file = folder / "probe.html"
    file.write_text(surveyed.page([SurveyOf("6.12", survey(), "", 5.0), SurveyOf("6.18", survey(bug="fixed"), "", 6.0),
                                   SurveyOf("7.0", survey(twice="EINVAL"), "", 6.0)]))
    return file


def items(tab: Browser) -> list[str]:
    found = tab.js("[...document.querySelectorAll('tr.item')].filter((r) => r.checkVisibility()).map("
                   "(r) => r.querySelector('code').textContent)")
    return [str(name) for name in found]


def test_a_survey_is_searched_and_filtered(tab: Browser, survey_page: Path) -> None:
    tab.open(survey_page)
    assert items(tab) == ["no-cloexec", "bind.twice", "bind.twice"]     # a group is open where something differs
    choose(tab, "[data-search]", "size created")
    assert items(tab) == ["stat.size"]
    choose(tab, "[data-search]", "")
    choose(tab, "[data-state]", "differs")
    assert items(tab) == ["bind.twice", "bind.twice"]
    choose(tab, "[data-state]", "fixed")
    assert items(tab) == ["no-cloexec"]
    assert tab.js("document.querySelector('.where').textContent") == "1 of 4"


def test_eight_kernels_from_files_are_a_page(tab: Browser, folder: Path) -> None:
    names = [f"6.{number}" for number in range(12, 20)]
    files = [written(folder, name, bug="present" if number < 5 else "fixed", twice="EEXIST" if number else "EINVAL")
             for number, name in enumerate(names)]
    file = folder / "eight.html"
    assert main(["probe", "--saved", *map(str, files), "--html", str(file), "-o", "/dev/null"]) == 2
    tab.open(file)
    heads = tab.js("[...document.querySelector('table.survey thead tr').cells].map((c) => c.textContent)")
    assert heads == ["bug", *names]
    verdicts = tab.js("[...document.querySelector('#bug-no-cloexec').querySelectorAll('td')].map((c) => c.className)")
    assert verdicts == ["present"] * 5 + ["fixed"] * 3
    choose(tab, "[data-state]", "varies")
    assert items(tab) == ["no-cloexec", "bind.twice", "bind.twice"]
    choose(tab, "[data-search]", "bound once")
    assert items(tab) == ["bind.twice", "bind.twice"]
    tab.look(dark=True)
    assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert tab.printed().startswith(b"%PDF-")
    tab.look(media="print")
    assert tab.js("document.querySelector('.controls').offsetHeight") == 0
    tab.look()
    tab.script(False)
    tab.open(file)
    assert {"no-cloexec", "bind.twice"} <= {*items(tab)}


@pytest.mark.parametrize("width", [390, 1280])
def test_tables_scroll_by_themselves(tab: Browser, table: Path, survey_page: Path, width: int) -> None:
    tab.look(width=width, height=800)
    for file in (table, survey_page):
        tab.open(file)
        assert tab.js("document.documentElement.scrollWidth") <= width
