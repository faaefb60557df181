"""What a party chose, as a sentence: ``VMM to_private, range 1 1`` is *converts page 1 to private*.

A trace file keeps the choices as they are; a party of someone else says what it likes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DOES = {
    "map": "maps", "munmap": "unmaps", "touch": "touches", "allocate": "allocates", "punch": "punches",
    "to_private": "converts {} to private", "to_shared": "converts {} to shared", "bind": "binds", "unbind": "unbinds",
    "close": "closes the file", "stop": "ends", "keep": "keeps the file",
}
_RANGE = re.compile(r"range (-?\d+) (-?\d+)")
_ASKED = ("VMM", "thread", "odd", "then")


def sentence(choices: Sequence[str]) -> str:
    """*choices*, each ``what option``, in words; one that is not known as it is."""
    said: list[str] = []
    for choice in choices:
        what, _, option = choice.partition(" ")
        place = _place(what, option)
        if what in _ASKED and option in _DOES:
            said.append(_DOES[option])
        elif place is not None and said and said[-1] in _DOES.values():
            said[-1] = said[-1].replace("{}", place) if "{}" in said[-1] else f"{said[-1]} {place}"
        elif place is not None:
            said.append(place)
        else:
            said.append(choice)
    return ", ".join(words.replace("{} ", "") for words in said)


# Pages of a range, a page, a gfn; None for what is no place.
def _place(what: str, option: str) -> str | None:
    asked = _RANGE.fullmatch(f"{what} {option}")
    if asked is None:
        return f"{what} {option}" if what in ("page", "gfn") else None
    first, count = map(int, asked.groups())
    if count < 1:
        return f"{count} pages from {first} on"
    return f"page {first}" if count == 1 else f"pages {first} to {first + count - 1}"
