"""What kinds of input have in common."""

from __future__ import annotations

import random
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple


class Failure(NamedTuple):
    """An input that was answered wrongly."""

    kind: str
    number: int
    why: str
    what: str


class Kind(ABC):
    """One kind of input. `try_one` returns what is wrong with the answer, None if nothing is; what it raises is wrong, too.

    *said* is the input in words, and is added to on the way.
    """

    name: str

    @abstractmethod
    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """Make an input, put it, judge the answer."""

    def run(self, numbers: range) -> Iterator[Failure]:
        """Those of *numbers* that fail."""
        for number in numbers:
            said: list[str] = []
            try:
                why = self.try_one(random.Random(f"{self.name} {number}"), said)
            except BaseException as error:              # a plugin, or main(), may raise anything
                if isinstance(error, KeyboardInterrupt):
                    raise
                why = "".join(traceback.format_exception(error)[-4:])
            if why is not None:
                yield Failure(self.name, number, why, "\n".join(said))
