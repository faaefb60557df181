"""``python -m tour``: print docs/tour.md; ``python -m tour FOLDER``: write it there, and the picture beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from guest_memfd.draw.life import life
from guest_memfd.draw.svg import picture
from tour.follow import follow
from tour.page import page
from tour.section import section


def main(arguments: list[str]) -> int:
    """Write only when all of it is known; returns 0."""
    found = life()
    text = page(follow(), section(found))
    if not arguments:
        print(text, end="")
        return 0
    folder = Path(arguments[0])
    (folder / "tour.md").write_text(text, encoding="utf-8")
    (folder / "page-life.svg").write_text(picture(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
