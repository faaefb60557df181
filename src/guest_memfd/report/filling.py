"""The table of a comparison while it fills: for who waits at a terminal, above the bar; the last word comes at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

OPEN = "·"
"""Of a law that nothing has broken so far."""
NARROW = 3
"""Columns of a cell: the steps of the shortest run that breaks the law, as far as is known."""


class FillingTable:
    """Laws x (design, hypervisor); a design is a letter, which is told below. *pairs* in the order of the columns."""

    def __init__(self, pairs: Sequence[tuple[str, str]], laws: Iterable[str]) -> None:
        self.laws = list(laws)
        self.hypervisors = {name: [design for design, on in pairs if on == name]
                            for name in dict.fromkeys(on for _, on in pairs)}
        self.letters = _letters(dict.fromkeys(design for design, _ in pairs))
        self._steps: dict[tuple[str, str, str], int] = {}

    def take(self, design: str, hypervisor: str, broken: Mapping[str, int]) -> None:
        """*broken*: law -> steps of a run of *design* that breaks it."""
        for law, steps in broken.items():
            place = (design, hypervisor, law)
            self._steps[place] = min(steps, self._steps.get(place, steps))

    def lines(self) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
        """A row each: its head, and its cells, as wide as they are to be, with whether they are broken."""
        yield "", [(name.ljust(sum(self._widths(name))), False) for name in self.hypervisors]
        columns = [(name, design, width) for name, designs in self.hypervisors.items()
                   for design, width in zip(designs, self._widths(name), strict=True)]
        yield "", [(self.letters[design].ljust(width), False) for _, design, width in columns]
        for law in self.laws:
            steps = [self._steps.get((design, name, law)) for name, design, _ in columns]
            yield law, [((OPEN if found is None else str(found)).ljust(width), found is not None)
                        for found, (_, _, width) in zip(steps, columns, strict=True)]

    # Wide enough for the hypervisor's name above them.
    def _widths(self, hypervisor: str) -> list[int]:
        count = len(self.hypervisors[hypervisor])
        return [max(NARROW, -(-(len(hypervisor) + 1) // count))] * count

    @property
    def _first(self) -> int:
        return max(map(len, self.laws), default=0) + 1

    @property
    def width(self) -> int:
        """Columns that it takes."""
        return self._first + sum(sum(self._widths(name)) for name in self.hypervisors)

    def fits(self, columns: int, rows: int) -> bool:
        """Whether a terminal of *columns* and *rows* has room for it, for a legend of two lines, and for the bar."""
        return self.width <= columns and len(self.laws) + 6 <= rows

    def legend(self) -> str:
        """Which letter stands for which design, and what a number is."""
        said = ", ".join(f"{letter} {design}" for design, letter in self.letters.items())
        return f"{said}; 12: broken in 12 steps, so far"

    def text(self) -> Any:
        """All of it for rich; 80 columns wide with the designs that come with the package."""
        from rich.text import Text

        shown = Text()
        for head, cells in self.lines():
            shown.append(head.ljust(self._first))
            for text, broken in cells:
                shown.append(text, style="bold red" if broken else "")
            shown.append("\n")
        return shown.append(self.legend(), style="dim")


# The first letter of its name that is no other's, else a digit.
def _letters(designs: Iterable[str]) -> dict[str, str]:
    letters: dict[str, str] = {}
    for number, design in enumerate(designs):
        free = (each for each in design if each.isalpha() and each not in letters.values())
        letters[design] = next(free, str(number % 10))
    return letters
