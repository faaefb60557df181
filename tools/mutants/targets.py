"""What is changed, and what is to notice it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mutants.explore import Explored
from mutants.killer import Killer
from mutants.tested import Tested
from mutants.vocabulary import ABSTRACTION

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
PARTS = ("hw/arm64", "hypcalls", "el2", "linux", "primitives")

BESIDE_THE_SUITE = Tested(
    "test_folios.py", "test_asked_hypervisor.py", "test_drivers.py", "test_hypercalls.py", "test_library.py",
    "test_power.py", "test_large_files.py", "test_gunyah_device.py", "test_gunyah_start.py", "test_large.py",
    "test_large_folios.py", "test_large_hypercalls.py", "test_lending_driver.py", "test_on_demand.py", "test_s390.py",
    "test_splits_of_a_file.py",
)
"""Scripted answers, folios of more than one page, and calls that the library never makes: no scene has them."""

ON_THE_MACHINE = Tested(
    "test_abstraction*.py", "test_refinement*.py", "test_planted_machine.py", "test_planted_blocks.py", "test_machine_*.py",
    "test_emulated_parts.py",
    "test_arm64_*.py", "test_cpu.py", "test_asm.py", "test_mem_abort.py", "test_oops.py", "test_linear_map.py",
    "test_kernel_power.py", "test_module_loader.py", "test_gunyah_*.py", "test_kvm_*.py", "test_pkvm_*.py",
    "test_large_files.py", "test_large_machine.py", "test_modelled.py",
)
"""Lock step with the abstract host, and the tests of the machine's parts."""

IN_LOCK_STEP = Tested("test_abstraction*.py", "test_refinement*.py", "test_planted_machine.py", "test_planted_blocks.py",
                      "test_machine_*.py")
"""The tests that compare a machine with what it stands for."""

TARGETS: dict[str, Target] = {target.name: target for target in (
    Target("library", LIBRARY, (Explored(), BESIDE_THE_SUITE)),
    Target("machine", tuple(f"machine/{part}/**/*.py" for part in PARTS), (ON_THE_MACHINE,)),
    Target("abstraction", (ABSTRACTION,), (IN_LOCK_STEP,)),
)}
"""Registration (`__init__.py`) is no part of what is explored."""
