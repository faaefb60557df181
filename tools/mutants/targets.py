"""What is changed, and what is to notice it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mutants.explore import Explored
from mutants.killer import Killer
from mutants.tested import Tested

SOURCES = Path(__file__).resolve().parent.parent.parent / "src" / "guest_memfd"
PACKAGE = "guest_memfd"


class Target(NamedTuple):
    """Files (patterns below src/guest_memfd) that are changed, and who is to notice: the next if the one before did not."""

    name: str
    files: tuple[str, ...]
    killers: tuple[Killer, ...]

    def paths(self) -> list[str]:
        """The files, as in names of mutants."""
        found = {path for pattern in self.files for path in SOURCES.glob(pattern) if path.name != "__init__.py"}
        return sorted(path.relative_to(SOURCES).as_posix() for path in found)


LIBRARY = ("core/*.py", "hypervisors/gunyah/*.py", "hypervisors/kvm/*.py", "designs/ours.py")
MACHINE = tuple(f"hosts/emulated/{part}/**/*.py" for part in ("arm64", "kernel", "gunyah", "kvm", "primitives"))
ABSTRACTION = ("hosts/emulated/abstraction.py",)

LOCK_STEP = Tested("test_refinement.py")
BESIDE_THE_SUITE = Tested(
    "test_folios.py", "test_drivers.py", "test_hypercalls.py", "test_library.py", "test_power.py", "test_large_files.py",
    "test_gunyah_device.py",
)

TARGETS: dict[str, Target] = {target.name: target for target in (
    Target("library", LIBRARY, (Explored(), BESIDE_THE_SUITE)),
)}
"""Registration (`__init__.py`) is no part of what is explored. Folios of more than one page are on the machine only."""
