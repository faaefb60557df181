"""One run of the probe: ask, try every row, look for every bug, count what is left.

One thing is done after another, so that what one does to the machine is not taken for another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from guest_memfd.errors import BadInput
from guest_memfd.probe.ask.batch import together
from guest_memfd.probe.ask.child import TIMEOUT, Slate, perform
from guest_memfd.probe.ask.here import Here
from guest_memfd.probe.ask.row import Judged, KernelFeatures, Row, RowOutcome, judge, missing
from guest_memfd.probe.bugs import BUGS, Bug, BugFound, find
from guest_memfd.probe.left import Left, count, since
from guest_memfd.probe.offers import Offers, look
from guest_memfd.probe.rows import ROWS
from guest_memfd.uapi.kvm import PATH

SCHEMA = "guest-memfd-probe/1"
"""Name and version of a survey as JSON."""
PARTS = ("offers", "behaviour", "bugs")


@dataclass(frozen=True)
class Survey:
    """What was found; *behaviour* and *bugs* are empty where they were not asked for. *seconds*: of it all."""

    parts: tuple[str, ...]
    offers: Offers
    behaviour: tuple[Judged, ...]
    bugs: tuple[BugFound, ...]
    left: Left
    seconds: float

    @property
    def absent(self) -> bool:
        """Neither KVM nor memfd_secret is there."""
        return "kvm" not in self.offers.features and "secretmem" not in self.offers.features

    @property
    def differing(self) -> bool:
        """Whether a row differs."""
        return any(judged.verdict == "differs" for judged in self.behaviour)


def survey(
    path: str = PATH, *, parts: Sequence[str] = PARTS, globs: Sequence[str] = ("*",), rows: Sequence[Row] = ROWS,
    bugs: Sequence[Bug] = BUGS, timeout: float = TIMEOUT, patience: float = 1, expendable: bool = False,
) -> Survey:
    """Probe this kernel; *path*: KVM's device node; *globs*: which rows; *timeout*: seconds per row, times *patience*.

    expendable: the machine is made for this, so what could break it is tried, and rows share processes (ask/batch.py).
    Raises BadInput when one of *globs* matches no row.
    """
    for glob in globs:
        if not any(fnmatchcase(row.id, glob) for row in rows):
            raise _no_row(glob, rows)
    chosen = [row for row in rows if any(fnmatchcase(row.id, glob) for glob in globs)]
    start, before = time.monotonic(), count()
    slate = Slate(patience)
    try:
        offers = look(path, slate, expendable=expendable)
        # What the rows do to the direct map would be taken for what the bug has done.
        first = {bug.id: find(bug, slate, path, offers.features) for bug in bugs if bug.first and "bugs" in parts}
        todo = chosen if "behaviour" in parts else []
        quick = _in_batches(todo, slate, path, offers.features, timeout) if expendable else {}
        judged = [quick.get(row.id) or judge(row, _try(row, slate, path, offers.features, timeout), offers.features)
                  for row in todo]
        found = [first.get(bug.id) or find(bug, slate, path, offers.features) for bug in bugs] if "bugs" in parts else []
    finally:
        slate.close()
    return Survey(tuple(parts), offers, tuple(judged), tuple(found), since(before), time.monotonic() - start)


def _no_row(glob: str, rows: Sequence[Row]) -> BadInput:
    groups = list(dict.fromkeys(f"{row.id.partition('.')[0]}.*" for row in rows))
    near = [f"{glob}.*"] if f"{glob}.*" in groups else get_close_matches(glob, [row.id for row in rows], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"groups: {', '.join(groups)}"
    return BadInput(f"no row is called {glob!r}; {hint}")


_BATCH = 40
"""Rows that share a process, at most."""


# Those that came to what is expected; all others are for `_try`.
def _in_batches(rows: Sequence[Row], slate: Slate, path: str, features: KernelFeatures, timeout: float) -> dict[str, Judged]:
    def acting(row: Row) -> Callable[[Slate], object]:
        return lambda page: row.act(Here(page, path, features), *row.given)

    left = [row for row in rows if not missing(row, features) and _shares(row.expected(features))]
    found: dict[str, Judged] = {}
    while left:
        batch = left[:_BATCH]
        said = together([acting(row) for row in batch], slate, timeout)
        for row, result in zip(batch, said, strict=False):
            judged = None if result is None else judge(row, RowOutcome(result=result), features)
            if judged is not None and judged.verdict == "expected":
                found[row.id] = judged
        left = left[len(said):]
    return found


# Not what ends in a signal, whose code and place only a tracer sees.
def _shares(expected: str | None) -> bool:
    return expected is not None and "SIG" not in expected


def _try(row: Row, slate: Slate, path: str, features: KernelFeatures, timeout: float) -> RowOutcome:
    why = missing(row, features)
    if why:
        return RowOutcome(unfit=why)
    return perform(lambda page: row.act(Here(page, path, features), *row.given), slate, timeout)
