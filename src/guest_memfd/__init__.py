"""guest_memfd: the guest_memfd library of the Linux discussion of July 2024, to be run, broken, compared and proved.

These are the public names, each imported when it is first used. Public modules are `errors` and `facts` (what laws read);
`guest_memfd.uapi`, what user space sees; and `guest_memfd.testing`, the pytest plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guest_memfd import errors as errors
    from guest_memfd.asm.arm64.asm import assemble as assemble
    from guest_memfd.core.hypervisor import DATA_ABORT as DATA_ABORT
    from guest_memfd.core.hypervisor import SEA as SEA
    from guest_memfd.core.hypervisor import Hypervisor as Hypervisor
    from guest_memfd.core.hypervisor import Stage2 as Stage2
    from guest_memfd.core.ops import GuestMemfdOps as GuestMemfdOps
    from guest_memfd.core.ops import Reason as Reason
    from guest_memfd.designs import DESIGNS as DESIGNS
    from guest_memfd.designs import Design as Design
    from guest_memfd.designs.ours import OurLibrary as OurLibrary
    from guest_memfd.explore.engine.finding import step_line as step_line
    from guest_memfd.explore.suite.check import check as check
    from guest_memfd.explore.suite.check import compare as compare
    from guest_memfd.hypervisors import HYPERVISORS as HYPERVISORS
    from guest_memfd.laws import LAWS as LAWS
    from guest_memfd.laws import Law as Law
    from guest_memfd.laws import Violator as Violator
    from guest_memfd.linux import System as System
    from guest_memfd.machine.boot import Config as Config
    from guest_memfd.machine.boot import Machine as Machine
    from guest_memfd.machine.boot import boot as boot
    from guest_memfd.scenarios import PARTIES as PARTIES
    from guest_memfd.scenarios import SCENES as SCENES
    from guest_memfd.scenarios import Party as Party
    from guest_memfd.words import facts as facts
    from guest_memfd.words.primitives import Folio as Folio
    from guest_memfd.words.primitives import Host as Host
    from guest_memfd.words.primitives import Primitive as Primitive
    from guest_memfd.words.primitives import Steps as Steps
    from guest_memfd.words.scene import Kernel as Kernel
    from guest_memfd.words.scene import Scene as Scene
    from guest_memfd.words.scene import Slot as Slot
    from guest_memfd.words.units import Gfn as Gfn
    from guest_memfd.words.units import Index as Index
    from guest_memfd.words.units import Ipa as Ipa
    from guest_memfd.words.units import Pa as Pa
    from guest_memfd.words.units import Pfn as Pfn
    from guest_memfd.words.units import Va as Va

_FROM = {
    "asm.arm64.asm": ("assemble",),
    "core.ops": ("GuestMemfdOps", "Reason",),
    "designs": ("DESIGNS", "Design",),
    "designs.ours": ("OurLibrary",),
    "explore.engine.finding": ("step_line",),
    "explore.suite.check": ("check", "compare",),
    "hypervisors": ("HYPERVISORS",),
    "core.hypervisor": ("DATA_ABORT", "SEA", "Hypervisor", "Stage2",),
    "laws": ("LAWS", "Law", "Violator",),
    "linux": ("System",),
    "machine.boot": ("Config", "Machine", "boot",),
    "scenarios": ("PARTIES", "SCENES", "Party",),
    "words.primitives": ("Folio", "Host", "Primitive", "Steps",),
    "words.scene": ("Kernel", "Scene", "Slot",),
    "words.units": ("Gfn", "Index", "Ipa", "Pa", "Pfn", "Va"),
}
_MODULES = {"errors": "errors", "facts": "words.facts"}
_PLACES = {name: module for module, names in _FROM.items() for name in names}

__all__ = [*_PLACES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"guest_memfd.{_MODULES[name]}")
    if name not in _PLACES:
        raise AttributeError(f"module 'guest_memfd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"guest_memfd.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
