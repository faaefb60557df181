"""Following the run: which calls were made, and what was said of the page when it came to each stop.

What is not seen in the run is not told. A stop that the run does not come to is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from tour.look import Look, frame, look
from tour.ride import Ride, ride
from tour.stops import STOPS, Stop


class NotOnTheWay(Exception):  # noqa: N818 - it says what is wrong with the stop
    """The run does not come to a stop, or not in this order."""


class Been(NamedTuple):
    """A stop that the run came to: the arguments of its functions, what was said of the page then, and at the next stop."""

    stop: Stop
    given: tuple[Mapping[str, Any], ...]
    before: Look
    after: Look


class _Follower:
    # Waits for one point after the other; those of one stop come before those of the next.

    def __init__(self, run: Ride, pa: int, stops: Sequence[Stop]) -> None:
        self.run, self.pa = run, pa
        self.points = [(stop, point) for stop in stops for point in stop.points]
        self.given: list[Mapping[str, Any]] = []
        self.looks: list[Look] = []

    def __call__(self, called: FrameType, event: str, _argument: object) -> None:
        if event == "call" and len(self.given) < len(self.points):
            arguments = called.f_locals
            if self.points[len(self.given)][1].is_call(called.f_code, arguments):
                self.given.append(dict(arguments))
                self.look()

    def look(self) -> None:
        self.looks.append(look(self.run, self.pa))

    def been(self, stops: Sequence[Stop]) -> Iterator[Been]:
        at = 0
        for stop in stops:
            end = at + len(stop.points)
            yield Been(stop, tuple(self.given[at:end]), self.looks[at], self.looks[end])
            at = end


def follow(design: str = "library", stops: Sequence[Stop] = STOPS) -> list[Been]:
    """Ride with *design* past *stops*; raises NotOnTheWay at the first that the run does not come to."""
    followers: list[_Follower] = []
    pa = _frame(design)

    @contextmanager
    def watching(run: Ride) -> Iterator[None]:
        followers.append(_Follower(run, pa, stops))
        sys.setprofile(followers[0])
        try:
            yield
        finally:
            sys.setprofile(None)
        followers[0].look()
        assert frame(run) == pa, "two runs of one design differ"

    ride(watching, design)
    (follower,) = followers
    if len(follower.given) < len(follower.points):
        stop, point = follower.points[len(follower.given)]
        raise NotOnTheWay(f"{stop.title}: the run of design {design!r} does not call {point.name} from here on")
    return list(follower.been(stops))


# Every run is the same, so a first one tells which frame the page will have.
def _frame(design: str) -> int:
    found: list[int] = []

    @contextmanager
    def watching(run: Ride) -> Iterator[None]:
        yield
        found.append(frame(run))

    ride(watching, design)
    return found[0]
