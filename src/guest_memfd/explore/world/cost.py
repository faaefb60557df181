"""What a design costs: operations counted while one folio is lent to the guest and taken back, no one else around.

That is a comparison of designs. What an operation may cost at most in any run is stated by the design itself
(`Design.bounds`), and law bounded-cost judges it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import Design
from guest_memfd.errors import DesignRaised, NotAPrimitive
from guest_memfd.explore.world.scenario import World, run_alone
from guest_memfd.scenarios import PARTIES
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import Primitive


@dataclass(frozen=True)
class DesignCost:
    """Operations per folio of order 0, lent and taken back by teardown; splits are those of a folio alone in its leaf."""

    direct_map_writes: int
    flushes: int
    splits: int
    hypercalls: int


@dataclass(frozen=True)
class FolioCost(DesignCost):
    """Operations on a file with folios of some size, counted on a machine that has real tables (vmm/folio_costs.py).

    splits are those of the direct map. table_pages are taken for all tables: a split of a leaf of the guest, or of the
    host's stage 2, takes one.
    """

    table_pages: int


def cost(design: type[Design], hypervisor: Hypervisor) -> DesignCost | None:
    """Count; None where the design was not posted for this hypervisor, or does not survive being alone."""
    if design.hypervisors is not None and hypervisor.name not in design.hypervisors:
        return None
    world = World(design, hypervisor, [PARTIES["vcpu2"]], failures=0)
    counted: Counter[str] = Counter()

    def count(primitive: Primitive, _outcome: Outcome) -> None:
        counted[primitive.name] += 1

    try:
        lent, _ = run_alone(world.machine, world.programs["vcpu2"], world.initial, count)
        run_alone(world.machine, world.teardown, lent, count)
    except (DesignRaised, NotAPrimitive):
        return None
    writes = counted["set_direct_map_invalid_noflush"] + counted["set_direct_map_default_noflush"]
    return DesignCost(writes, counted["flush_tlb_kernel_range"], int(writes > 0), counted["hyp_call"])
