"""What is wrong with a hypervisor of someone else's: with its fields, or with names that nothing calls.

Operations of its driver, and hypercalls that can fail, must be ones that there are.
"""

from __future__ import annotations

import difflib

from guest_memfd.core.hypervisor import DATA_ABORT, GPF, RMP_FAULT, SEA, SECURE_STORAGE, Hypervisor
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.errors import shown
from guest_memfd.plugins.fields import ERRNOS, FLAG, LINE, MINUS_ERRNO, NAME, Kind, one_of, table, takes, wrong
from guest_memfd.plugins.forgotten import in_class
from guest_memfd.plugins.overrides import unfit

CALLERS = {"library": "the library", "mm": "memory management", "user": "a VMM", "guest": "a guest"}
"""Who asks a host for something, beside hypervisors' modules."""


DRIVES = ("demand_page", "mmap", "unbind", "abandon")


def _drives(value: object) -> bool:
    return value is None or all(callable(getattr(value, name, None)) for name in DRIVES)


FIELDS = {
    "name": NAME, "title": LINE, "module": NAME, "ops": Kind("a subclass of GuestMemfdOps", callable),
    "hypercalls": table("names", Kind("functions of a Stage2 and arguments", callable)),
    "fallible": table("hypercalls", MINUS_ERRNO), "final": table("hypercalls", MINUS_ERRNO),
    "abort": one_of(SEA, DATA_ABORT, RMP_FAULT, GPF, SECURE_STORAGE, None), "tracks_owner": FLAG, "consents": LINE.or_none(),
    "guest_consents": takes(2), "guest_touches": takes(2), "force_reclaim": takes(2), "exports": takes(2),
    "pfn_cache": FLAG, "large": FLAG,
    "guards": one_of("accesses", "writes"), "encrypts": FLAG, "errnos": ERRNOS,
    "lending": LINE.or_none(),
    "driver": Kind(f"procedures {', '.join(DRIVES)}, or None", _drives),
}


def misspelt(hypervisor: Hypervisor) -> str | None:
    """What *hypervisor* names that nothing will ever call, or that does not fit what calls it; None if all is well."""
    for what, names in (("fallible", hypervisor.fallible), ("final", hypervisor.final)):
        for name in names:
            if name not in hypervisor.hypercalls:
                near = difflib.get_close_matches(name, hypervisor.hypercalls, n=1, cutoff=0.5)
                meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(hypervisor.hypercalls) or 'none'}"
                return f"{name!r} is said to be {what} and is no hypercall; {meant}"
    ops = hypervisor.ops
    return unfit(ops, GuestMemfdOps) if isinstance(ops, type) and issubclass(ops, GuestMemfdOps) else None


def lacks(thing: object) -> str | None:
    """What is wrong with *thing* as a hypervisor; None if nothing is."""
    if not isinstance(thing, Hypervisor):
        return f"{shown(thing)} is no guest_memfd.core.hypervisor.Hypervisor"
    return wrong(thing, FIELDS) or _taken(thing) or misspelt(thing) or _ops(thing)


# The laws know by these names who has asked for something.
def _taken(hypervisor: Hypervisor) -> str | None:
    if hypervisor.module not in CALLERS:
        return None
    return f"its module is {hypervisor.module!r}: that is how the laws call {CALLERS[hypervisor.module]}"


# What makes the operations may be any function; of a class it can be seen what it makes.
def _ops(hypervisor: Hypervisor) -> str | None:
    ops = hypervisor.ops
    if not isinstance(ops, type):
        return None
    if not issubclass(ops, GuestMemfdOps):
        return f"its ops are {ops.__qualname__}, which is no subclass of GuestMemfdOps"
    module = getattr(ops, "module", None)
    if module != hypervisor.module:
        return f"its module is {hypervisor.module!r}, and that of {ops.__qualname__} is {shown(module)}: it is the same"
    return wrong(ops, {"scrubs": FLAG}) or in_class(ops)
