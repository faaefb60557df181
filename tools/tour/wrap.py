"""Text in lines of a fixed width: paragraphs and lists are filled, everything else stays as it is."""

from __future__ import annotations

import re
import textwrap

WIDTH = 120

_FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)


def wrapped(text: str) -> str:
    """*text* of Markdown, filled."""
    return "".join(piece if piece.startswith("```") else _filled(piece) for piece in _FENCED.split(text))


def _filled(piece: str) -> str:
    return "\n\n".join(_paragraph(each) for each in piece.split("\n\n"))


def _paragraph(text: str) -> str:
    words = text.strip("\n")
    if not words or words.startswith(("|", "#", "!")):
        return text
    body = "\n".join(_line(item) for item in re.split(r"\n(?=- )", words))
    begin, end = text[:len(text) - len(text.lstrip("\n"))], text[len(text.rstrip("\n")):]
    return f"{begin}{body}{end}"


def _line(item: str) -> str:
    return textwrap.fill(" ".join(item.split()), WIDTH, subsequent_indent="  " if item.startswith("- ") else "",
                         break_long_words=False, break_on_hyphens=False)
