"""What an exploration finds: laws that broke, and the steps that led there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guest_memfd.words.primitives import Primitive

INTERRUPTED = "interrupted"
"""The limit where somebody asked for the end before the end."""


class Interrupted(Exception):  # noqa: N818 - a limit, not an error
    """Somebody has asked for the end."""


class Step(NamedTuple):
    """One line of a trace."""

    party: str
    choices: tuple[str, ...]
    primitive: Primitive | None
    result: Any
    failed: bool
    shared: bytes
    notes: tuple[Any, ...]


@dataclass
class Finding:
    """A law that broke: the evidence, and the shortest way there; of ways as short, one with the fewest failures."""

    law: str
    evidence: str
    steps: list[Step] = field(default_factory=list)
    initial: bytes = b""

    @property
    def injected(self) -> int:
        """How many of the steps are injected failures."""
        return sum(step.failed for step in self.steps)


class Sight(NamedTuple):
    """Where a finding was seen: states of one level with the steps that follow, of which one is to be told.

    tails: state, as the engine numbers them -> steps from there on. All are as good: as many steps and injected failures.
    """

    law: str
    evidence: str
    level: int
    tails: dict[int, list[Step]]


@dataclass
class Result:
    """What an exploration saw. `limit` names the limit that was reached, if one was: then nothing is proved."""

    states: int
    transitions: int
    findings: list[Finding]
    limit: str | None = None
    finals: int = 0
    depth: int = 0
    seconds: float = 0.0

    @property
    def limited_by(self) -> str | None:
        """``states``, ``seconds``, ``steps``, ``memory`` or ``interrupted``."""
        return self.limit and self.limit.rsplit(maxsplit=1)[-1]

    @property
    def verdict(self) -> str:
        """``refuted``, ``undetermined`` or ``holds``."""
        return "refuted" if self.findings else "undetermined" if self.limit else "holds"


def word(option: Any) -> str:
    """How a choice is called in a trace."""
    return " ".join(map(str, option)) if isinstance(option, tuple) and not hasattr(option, "_fields") else str(option)


def step_line(step: Step) -> str:
    """``party: [choices] primitive -> result`` of one step."""
    chosen = f"[{', '.join(step.choices)}] " if step.choices else ""
    if step.primitive is None:
        return f"{step.party}: {chosen}done"
    failed = " (injected failure)" if step.failed else ""
    result = "" if step.result is None else f" -> {step.result}"
    return f"{step.party}: {chosen}{step.primitive}{result}{failed}"
