"""What is changed, and what is to notice it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mutants.explore import Explored
from mutants.killer import Killer

SOURCES = Path(__file__).resolve().parent.parent.parent / "src" / "guest_memfd"
PACKAGE = "guest_memfd"


class Target(NamedTuple):
    """Files (patterns below src/guest_memfd) that are changed, and the scenarios that are to notice."""

    name: str
    files: tuple[str, ...]
    killer: Killer

    def paths(self) -> list[str]:
        """The files, as in names of mutants."""
        found = {path for pattern in self.files for path in SOURCES.glob(pattern) if path.name != "__init__.py"}
        return sorted(path.relative_to(SOURCES).as_posix() for path in found)


TARGETS: dict[str, Target] = {target.name: target for target in (
    Target("library", ("core/*.py", "hypervisors/**/*.py", "designs/ours.py"), Explored()),
)}
"""Registration (`__init__.py`) is no part of what is explored."""
