"""What a suite answers: limits that were set, and per law a verdict with the shortest counterexample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from guest_memfd.errors import BadInput
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.words.scene import Scene

MOST_FAILURES = 255
"""The budget of injected failures is one byte of the state."""


@dataclass(frozen=True)
class Limits:
    """How far to go: states per scenario (counted level by level), seconds and bytes of memory for all, injected failures
    per run.

    None is no limit; for failures: as many as the scene says; for memory: nearly all that there is. Raises BadInput naming
    the limit that cannot be.
    """

    states: int | None = None
    seconds: float | None = None
    failures: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.states is not None and self.states <= 0:
            raise BadInput(f"the limit of states must be at least 1, not {self.states}")
        if self.seconds is not None and not self.seconds > 0:
            raise BadInput(f"the limit of seconds must be more than 0, not {self.seconds:g}")
        if self.memory is not None and self.memory <= 0:
            raise BadInput(f"the limit of memory must be at least 1 byte, not {self.memory}")
        if self.failures is not None and not 0 <= self.failures <= MOST_FAILURES:
            raise BadInput(f"the number of injected failures must be 0 to {MOST_FAILURES}, not {self.failures}")


@dataclass(frozen=True)
class Found:
    """One way in which a law breaks, and the shortest run to it, in the first scenario that has one as short."""

    law: str
    evidence: str
    parties: tuple[str, ...]
    finding: Finding
    scene: Scene


@dataclass(frozen=True)
class LawReport:
    """The word on one law: ``refuted`` (by the shortest counterexample), ``undetermined``, ``holds``.

    finding is None, too, where it is refuted and nobody waited for the trace. injected: how many of *steps* are failures.
    """

    law: str
    verdict: str
    steps: int | None = None
    parties: tuple[str, ...] | None = None
    evidence: str | None = None
    finding: Finding | None = None
    scene: Scene | None = None
    injected: int = 0


class Unfinished(NamedTuple):
    """A scenario that was not explored to its end, and why: ``states``, ``seconds``, ``memory`` or ``interrupted``."""

    scene: str
    parties: tuple[str, ...]
    limit: str


@dataclass(frozen=True)
class Report:
    """What became of one design under one hypervisor.

    findings: every distinct (law, evidence), shortest first. states, transitions: summed over the scenarios. limits:
    those that were reached, in words. failures: as many could be injected in one run, None: as the scenes say. seconds:
    from the first scenario to the last, the only field that differs from run to run. scenes: where it was put to the
    question; refused: those whose kernel the design will not work on, so that there was no file. missing: what should have
    happened and never did, so that nothing is proved; never: all that never happened (`explore.suite.coverage.EVENTS`).
    reductions: what was left out because it makes no difference, names of docs/explorer.md. unfinished: scenarios that
    met one of the limits.
    """

    design: str
    hypervisor: str
    verdict: str
    laws: dict[str, LawReport]
    findings: tuple[Found, ...]
    states: int
    transitions: int
    seconds: float
    scenarios: int
    limits: tuple[str, ...] = ()
    failures: int | None = None
    scenes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    reductions: tuple[str, ...] = ()
    unfinished: tuple[Unfinished, ...] = ()
