"""A row of the behaviour table, and what its result means on this kernel.

Expectations are data. A row expects what is confirmed on 6.18; where a kernel with some feature does otherwise, a rule of
the row says so, and rules come before releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Act = Callable[..., object]
"""What a row does: takes a `Here` and the row's input; returns None for ``ok``, a value, or raises OSError."""

SETTLED = "6.18 to 7.3"
"""The feature of kernels for which `Row.expect` of guest_memfd holds: from 6.18 to the merge of in-place conversion."""

SINCE_6_1 = "6.1 to 7.3"
"""The same of memfd_secret and of VM types, which were as they are before; what has changed is seen (`offers`)."""


@dataclass(frozen=True)
class KernelFeatures:
    """What rows need and are judged by: names that this machine *has*, why it *lacks* others, *release* of its kernel."""

    release: str
    has: frozenset[str] = frozenset()
    lacks: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.has

    def why(self, name: str) -> str:
        """Why *name* is not here."""
        return self.lacks.get(name, f"no {name}")


@dataclass(frozen=True)
class Row:
    """*act* of *given*, and what that comes to.

    expect: the result on 6.18: an errno's name, ``ok``, a value, a signal with code and place; ``a | b``: either.
    needs: features (`offers.Features`) without which the row is skipped.
    rules: (feature, result), first match wins: what a kernel with that feature answers; None: no one has said.
    settled: the feature of kernels for which *expect* holds.
    """

    id: str
    says: str
    act: Act
    given: tuple[Any, ...] = ()
    expect: str | None = "ok"
    needs: tuple[str, ...] = ()
    rules: tuple[tuple[str, str | None], ...] = ()
    settled: str = SETTLED

    def expected(self, features: KernelFeatures) -> str | None:
        """What a kernel with *features* answers; None where that is not known."""
        for feature, result in self.rules:
            if feature in features:
                return result
        return self.expect if self.settled in features else None


@dataclass(frozen=True)
class RowOutcome:
    """What came of a row: *result*, or the reason it could not be tried (*unfit*). *late*: no answer came in time."""

    result: str | None = None
    unfit: str | None = None
    late: bool = False


@dataclass(frozen=True)
class Judged:
    """A row with its result. *verdict*: expected, differs, unknown or skipped; *why*: of what was skipped."""

    row: Row
    result: str | None
    expected: str | None
    verdict: str
    why: str = ""


def judge(row: Row, outcome: RowOutcome, features: KernelFeatures) -> Judged:
    """Compare *outcome* with what is expected of a kernel with *features*."""
    result, expected = outcome.result, row.expected(features)
    if result is None:
        return Judged(row, None, expected, "skipped", outcome.unfit or "")
    if expected is None:
        return Judged(row, result, None, "unknown", f"nothing is known of release {features.release}")
    # Before anything is excused: EPERM or ENOMEM may be the very answer that is expected.
    wanted = expected.split(" | ")
    if result in wanted:
        return Judged(row, result, expected, "expected")
    refused = _refused(result, features)
    if refused:
        return Judged(row, result, expected, "skipped", refused)
    if "ptrace" not in features and any(want.partition(" ")[0] == result for want in wanted):
        return Judged(row, result, expected, "expected", f"code and address not seen: {features.why('ptrace')}")
    return Judged(row, result, expected, "differs")


# A filter in front of the kernel, and what this process may use up, say nothing about the kernel. Without a filter EPERM is
# the kernel's own answer, and so is ENOMEM without a limit.
def _refused(result: str, features: KernelFeatures) -> str:
    if result == "ENOSYS":
        return "the system call is not there, or refused by a filter (ENOSYS)"
    if result.startswith(("EMFILE", "ENFILE")):
        return "no descriptor left"
    if result.startswith("ENOMEM") and "enough memory" not in features:
        return f"no memory: {features.why('enough memory')}"
    if result == "EPERM" and "unfiltered" not in features:
        return f"refused (EPERM): {features.why('unfiltered')}"
    return ""


def missing(row: Row, features: KernelFeatures) -> str:
    """Why *row* cannot run here, or nothing."""
    return next((features.why(need) for need in row.needs if need not in features), "")


def among(needs: tuple[str, ...], rows: Iterable[Row]) -> list[Row]:
    """*rows*, all of which need *needs* as well; what is said of a memfd_secret alone holds from 6.1 on."""
    settled = SINCE_6_1 if needs == ("secretmem",) else SETTLED
    return [replace(row, needs=tuple(dict.fromkeys((*needs, *row.needs))), settled=settled) for row in rows]
