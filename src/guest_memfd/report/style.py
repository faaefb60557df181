"""Emphasis: ANSI colours where somebody looks at a terminal and wants them, plain text everywhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TextIO

WIDTH = 100
"""Columns of all reports: what fits into a mail with one level of quoting."""


@dataclass(frozen=True)
class Style:
    """How to emphasise: with colours or not at all."""

    colours: bool = False

    def good(self, text: str) -> str:
        """Kept, holds."""
        return self._in(text, "32")

    def bad(self, text: str) -> str:
        """Broken, refuted."""
        return self._in(text, "1;31")

    def doubt(self, text: str) -> str:
        """Undetermined."""
        return self._in(text, "33")

    def head(self, text: str) -> str:
        """A heading."""
        return self._in(text, "1")

    def _in(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colours else text


def style_for(stream: TextIO) -> Style:
    """Colours when *stream* is a terminal that has them, unless NO_COLOR is set (https://no-color.org)."""
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(wanted)
