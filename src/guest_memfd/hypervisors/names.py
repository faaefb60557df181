"""Names in a hypervisor: operations of its driver, and hypercalls that can fail, must be ones that there are."""

from __future__ import annotations

import difflib

from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.overrides import unfit


def misspelt(hypervisor: Hypervisor) -> str | None:
    """What *hypervisor* names that nothing will ever call, or that does not fit what calls it; None if all is well."""
    for name in hypervisor.fallible:
        if name not in hypervisor.hypercalls:
            near = difflib.get_close_matches(name, hypervisor.hypercalls, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(hypervisor.hypercalls) or 'none'}"
            return f"{name!r} is said to be fallible and is no hypercall; {meant}"
    ops = hypervisor.ops
    return unfit(ops, GuestMemfdOps) if isinstance(ops, type) and issubclass(ops, GuestMemfdOps) else None
