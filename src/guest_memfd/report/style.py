"""Emphasis and width: colours and all columns of a terminal; elsewhere plain text that is as wide as a mail."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

WIDTH = 100
"""Columns where there is no terminal: what fits into a mail with one level of quoting."""
NARROWEST = 40
"""Columns below which nothing is made to fit."""


@dataclass(frozen=True)
class Style:
    """How to emphasise, with colours or not at all, and how many columns a line may have."""

    colours: bool = False
    width: int = WIDTH

    def good(self, text: str) -> str:
        """The emphasis for what holds: green."""
        return self._in(text, "32")

    def bad(self, text: str) -> str:
        """The emphasis for what is broken or refuted: bold red."""
        return self._in(text, "1;31")

    def doubt(self, text: str) -> str:
        """The emphasis for what is undetermined: yellow."""
        return self._in(text, "33")

    def head(self, text: str) -> str:
        """The emphasis for a heading: bold."""
        return self._in(text, "1")

    def _in(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colours else text

    def wrap(self, text: str, first: str = "", following: str | None = None) -> list[str]:
        """*text* after *first*, wrapped at words to the width; continuation lines after *following* (as wide)."""
        indent = " " * len(first) if following is None else following
        return textwrap.wrap(text, self.width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False,
                             break_long_words=False) or [first.rstrip()]

    def lead(self, head: str, emphasis: Callable[[str], str], text: str, following: str = "  ") -> list[str]:
        """*head*, with *emphasis*, and *text* after it, wrapped as by `wrap`; a head that is itself wrapped has none."""
        first, *rest = self.wrap(head + text, "", following)
        return [emphasis(head) + first.removeprefix(head) if first.startswith(head) else first, *rest]


def style_for(stream: TextIO) -> Style:
    """Colours when *stream* is a terminal that has them, unless NO_COLOR is set (https://no-color.org); its `columns`."""
    # Set and not empty, as the convention has it. "dumb" is what editors and logs call themselves: codes would be shown.
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(wanted, columns(stream))


def columns(stream: TextIO) -> int:
    """COLUMNS of the environment if it is set, those of the terminal that *stream* is, or WIDTH; NARROWEST at least."""
    given = os.environ.get("COLUMNS", "")
    # Where COLUMNS is set the caller knows better than the terminal: watch(1), a pipe, a test.
    wide = int(given) if given.isdecimal() and len(given) < 6 else 0
    if not wide and stream.isatty():
        try:
            wide = os.get_terminal_size(stream.fileno()).columns
        except OSError:
            wide = 0
    return max(wide or WIDTH, NARROWEST)
