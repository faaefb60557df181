"""Text that comes from elsewhere, made so that a terminal shows it and obeys nothing in it."""

from __future__ import annotations


def printable(text: str, but: str = "") -> str:
    """*text* with every character that does not print, except those of *but*, as Python's escape of it."""
    return "".join(each if each.isprintable() or each in but else repr(each)[1:-1] for each in text)
