"""What is to notice a mutant: scenarios, whatever they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mutants.mutant import Mutant


class Scenario(NamedTuple):
    """One scenario: whose world it is in, what it is called, and what it finds (None: nothing is wrong).

    parties: what of the world takes part. What one of them was seen to do in an earlier scenario may have been kept, and
    is then not done again.
    """

    world: str
    label: str
    run: Callable[[], str | None]
    parties: tuple[str, ...] = ()


class Killer:
    """Where scenarios come from, and what else is known of them."""

    def scenarios(self, record: Any = None) -> Iterable[Scenario]:
        """All of them, anew, with nothing kept from before; raises when not even the scene can be set.

        *record*: what is known from before; only what no mutant can change may be taken from it.

        Whatever this imports from the package it imports when it is called: a mutant may have taken the place of a module.
        """
        return ()

    def recording(self) -> AbstractContextManager[Any]:
        """While this lasts, scenarios leave a record of what was done in them. A record can be pickled."""
        return nullcontext()

    def changed(self, record: Any, mutant: Mutant) -> Callable[[Scenario], bool]:
        """With *mutant* in place: whether a scenario may go another way than it did when *record* was made."""
        return lambda _scenario: True
