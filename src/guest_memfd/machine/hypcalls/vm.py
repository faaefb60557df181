"""A virtual machine as Linux keeps it: what EL2 knows it by, whether it lives, and its kernel mapping of a guest page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.words.pagestate import RUNNING


@dataclass(eq=False)
class Vm:
    """`handle` is EL2's own object; `vmid` tags its TLB entries; `state` is RUNNING, DYING or GONE."""

    handle: Any
    vmid: int
    state: int = RUNNING
    gpc: LinuxFolio | None = None                             # what its gfn_to_pfn_cache maps
    gpc_fresh: bool = False                             # no invalidation since it sampled mmu_invalidate_seq
    gpc_readers: int = 0
    slots_lock: int | None = None                       # the task that has it
    mmu_lock: Rwsem = field(default_factory=Rwsem)      # a rwlock; nothing that it keeps out can tell
    srcu: int = 0                                       # readers of memslots
    seq: int = 0                                        # how often mmu_invalidate_seq has moved on from a sampled value
    sampled: bool = False                               # one of them has sampled it as it is now
    invalidated: range = range(0)                       # gfns that are being invalidated
    begun: Counter[int] = field(default_factory=Counter)    # invalidations by task: mmu_invalidate_in_progress is their sum
