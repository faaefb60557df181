"""The tour: docs/tour.md and its picture are what the run and the explorer say today, and neither can be told otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from tour.follow import Been, NotOnTheWay, follow  # noqa: E402
from tour.page import page  # noqa: E402
from tour.quote import LINES, quote  # noqa: E402
from tour.ride import Ride, ride  # noqa: E402
from tour.section import section  # noqa: E402
from tour.stops import STOPS, Point, Stop  # noqa: E402
from tour.wrap import WIDTH as COLUMNS  # noqa: E402
from tour.wrap import wrapped  # noqa: E402

from guest_memfd.core import fault  # noqa: E402
from guest_memfd.core.library import Library  # noqa: E402
from guest_memfd.draw.life import Life, life  # noqa: E402
from guest_memfd.draw.svg import picture  # noqa: E402
from guest_memfd.machine.hw.arm64 import tlbi  # noqa: E402

POINTS = [point for stop in STOPS for point in stop.points]
NEW = "write it anew: make tour"


@cache
def known_life() -> Life:
    return life()


def stop_with(function: Any) -> int:
    return next(number for number, stop in enumerate(STOPS) if any(point.function is function for point in stop.points))


# -- the documents are current ----------------------------------------------------------------------------------------


def test_the_tour_is_what_the_run_says_today() -> None:
    assert (ROOT / "docs" / "tour.md").read_text(encoding="utf-8") == page(follow(), section(known_life())), NEW


def test_the_picture_is_what_the_explorer_says_today() -> None:
    assert (ROOT / "docs" / "page-life.svg").read_text(encoding="utf-8") == picture(known_life()), NEW


def test_the_tour_of_another_run_is_another() -> None:
    been = follow()
    other = been[-1]._replace(after={**been[-1].after, "TLB, guest": "2"})
    assert page(been, "") != page([*been[:-1], other], "")


# -- the run, seen by somebody else -----------------------------------------------------------------------------------


class Executed(NamedTuple):
    """Calls in their order, with their arguments; lines that were executed, by file."""

    calls: list[tuple[CodeType, dict[str, Any]]]
    lines: set[tuple[str, int]]


@cache
def executed(design: str) -> Executed:
    """A ride, written down by sys.settrace(): nothing of the tour's own following is used."""
    seen = Executed([], set())
    codes = {point.code for point in POINTS}

    def inside(frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            seen.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return inside

    def outside(frame: FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code not in codes:
            return None
        seen.calls.append((frame.f_code, dict(frame.f_locals)))
        return inside

    @contextmanager
    def watching(_run: Ride) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(outside)
        try:
            yield
        finally:
            sys.settrace(before)

    ride(watching, design)
    return seen


def passed(calls: list[tuple[CodeType, dict[str, Any]]]) -> list[Point]:
    """The points that *calls* come by, one after the other."""
    left = iter(calls)
    found = []
    for point in POINTS:
        wanted = (point.argument, point.value)
        if not any(code is point.code and (not point.argument or (point.argument, given[point.argument]) == wanted)
                   for code, given in left):
            break
        found.append(point)
    return found


def test_the_run_passes_every_stop_in_this_order() -> None:
    assert passed(executed("library").calls) == POINTS


def test_without_the_direct_map_the_run_passes_less() -> None:
    last = passed(executed("none").calls)[-1]
    assert last.function is fault.give_private


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_lines_that_are_shown_are_there_and_were_executed(point: Point) -> None:
    found = quote(point)
    lines = (ROOT / found.file).read_text(encoding="utf-8").splitlines()
    shown = [line.strip() for line in found.text.splitlines() if line.strip() != "..."]
    there = [line.strip() for line in lines]
    assert [line for line in shown if line not in there] == []
    assert len(shown) <= LINES
    ran = {number for file, number in executed("library").lines if Path(file) == ROOT / found.file}
    assert ran & {*range(found.first, found.last + 1)}


# -- what is wrong is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["none", "fixup", "secretmem"])
def test_a_design_that_goes_another_way_is_told(design: str) -> None:
    with pytest.raises(NotOnTheWay, match=f"design '{design}' does not call .*zap_noflush from here on"):
        follow(design)


def test_a_flush_that_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(self: Library, folios: Any) -> Iterator[None]:
        yield from ()

    monkeypatch.setattr(Library, "flush", flush)
    with pytest.raises(NotOnTheWay, match=r"The TLBs forget: .*tlbi\.vaale1is"):
        follow()


def test_a_stop_out_of_order_is_told() -> None:
    at = stop_with(tlbi.vaale1is)
    with pytest.raises(NotOnTheWay, match=STOPS[at].title):
        follow(stops=(*STOPS[:at], STOPS[at + 1], STOPS[at], *STOPS[at + 2:]))


def test_a_stop_that_is_never_called_is_told() -> None:
    with pytest.raises(NotOnTheWay, match=r"Elsewhere: .*user_fault"):
        follow(stops=(*STOPS, Stop("Elsewhere", (Point(fault.user_fault),), "")))


def test_a_call_about_another_page_does_not_count() -> None:
    stop = STOPS[-1]
    with pytest.raises(NotOnTheWay, match=stop.title):
        follow(stops=(*STOPS[:-1], replace(stop, points=(replace(stop.points[0], value=stop.points[0].value + 4096),))))


def test_a_quote_whose_beginning_has_gone_is_told() -> None:
    with pytest.raises(LookupError, match=r"give_private holds 'no such line'"):
        quote(Point(fault.give_private, begin="no such line"))


# -- the story is true ------------------------------------------------------------------------------------------------


def changed(been: Been) -> dict[str, tuple[str, str]]:
    return {row: (been.before[row], been.after[row]) for row in been.before if been.before[row] != been.after[row]}


def test_each_change_is_told_once_and_none_is_left_out() -> None:
    been = follow()
    assert all(one.after == two.before for one, two in pairwise(been))
    rows = [row for one in been for row in changed(one)]
    assert sorted(rows) == sorted([*{*rows}, "TLB, kernel"]), "the kernel's TLB entries come and go; all else changes once"
    assert {*rows} == {*been[0].before}


def test_the_host_has_let_go_before_the_guest_has_it() -> None:
    for one in follow():
        if one.after["EL2's record"] == "guest" or one.after["guest stage 2"] != one.before["guest stage 2"]:
            assert (one.before["TLB, kernel"], one.before["mark"]) == ("0", "set")
            assert "invalid" in one.before["direct map"]


def test_the_flush_drops_what_the_zap_left() -> None:
    been = follow()[stop_with(tlbi.vaale1is)]
    assert changed(been) == {"TLB, kernel": ("2", "0")}


def test_another_design_has_another_section() -> None:
    with pytest.raises(StopIteration):
        section(life("none", [("two-pages", ("vcpu",))]))


# -- lines ------------------------------------------------------------------------------------------------------------


def test_text_is_filled_and_the_rest_is_left_alone() -> None:
    table, code = "| a | b |\n| --- | --- |", f"```python\n{'x' * 200}\n```"
    text = "\n\n".join(["# A", "word " * 40, "- one\n- " + "two " * 40, table, code, "| c |\n"])
    lines = wrapped(text).splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == ["x" * 200]
    assert [line.replace(" two", "") for line in lines if line.startswith(("#", "|", "`", "- "))] == [
        "# A", "- one", "-", *table.splitlines(), "```python", "```", "| c |"]
    assert wrapped(text).split() == text.split()
