"""What is to notice a mutant: scenarios, whatever they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mutants.mutant import Mutant, Place

Member = tuple[str, str]
"""A world and a party of it."""

Seen = Mapping[Member, set["Place"]]
"""The statements that each party was seen to reach, in whatever scenario."""


class Scenario(NamedTuple):
    """One scenario: whose world it is in, what it is called, and what it finds (None: nothing is wrong).

    parties: what of the world takes part.
    """

    world: str
    label: str
    run: Callable[[], str | None]
    parties: tuple[str, ...] = ()


class Tried:
    """The scenarios of a killer with a mutant in place."""

    def __init__(self, scenarios: Iterable[Scenario]) -> None:
        self.scenarios = {scenario.label: scenario for scenario in scenarios}

    def changed(self, scenario: Scenario) -> bool:
        """Whether *scenario* may go another way than it does without the mutant."""
        return True


class Killer:
    """Where scenarios come from, and what else is known of them. *name*: what its scenarios are, for the report.

    Whatever this imports from the package it imports when it is called: a mutant may have taken the place of a module.
    """

    name = "scenarios"
    depends_on_import = False
    """Whether scenarios that hold may fail when the package is imported a second time, as it is for a mutated value."""

    def within(self, work: Callable[[], None]) -> None:
        """Do *work* where scenarios can be run."""
        work()

    def scenarios(self) -> Iterable[Scenario]:
        """All of them, anew, with nothing kept from before; raises when not even the scene can be set."""
        return ()

    def looking_at(self, module: str) -> set[str]:
        """Worlds that look at values of *module*, whether or not they reach a function of it."""
        return set()

    def watching(self, seen: set[Place]) -> AbstractContextManager[Seen]:
        """While this lasts, what a party reaches is taken out of *seen* and kept as its own."""
        return nullcontext({})

    def prepare(self) -> None:
        """Run all scenarios once without a mutant, if anything of that saves work with one."""

    def against(self, mutant: Mutant, seen: Seen) -> Tried:
        """The scenarios with *mutant* in place."""
        return Tried(self.scenarios())
