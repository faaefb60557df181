"""What a run leaves behind: descriptors, children, mappings of this process, VMs, and the direct map that it has split.

It counts, and does not clean up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from guest_memfd.probe.offers import direct_map

_OURS = ("kvm-", "secretmem", "kvm_gmem", "guest_memfd")
DEBUGFS = Path("/sys/kernel/debug/kvm")
"""A directory per VM, called after the process and the descriptor that made it (kvm_create_vm_debugfs())."""


@dataclass(frozen=True)
class Count:
    """Of this process: descriptors, children, mappings of guest memory; and kilobytes of the direct map by leaf.

    *orphans*: VMs whose process is gone, although something keeps them; None where debugfs does not tell.
    """

    descriptors: int
    children: int
    mappings: int
    direct_map: Mapping[str, int]
    orphans: int | None = None


def count() -> Count:
    """What there is now; all zeros where /proc cannot be read."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        children = " ".join((task / "children").read_text() for task in Path("/proc/self/task").iterdir()).split()
        return Count(len(os.listdir("/proc/self/fd")), len(children),
                     sum(any(name in line for name in _OURS) for line in maps), direct_map(), _orphans())
    except OSError:
        # No /proc, or no descriptor to read it with: then nothing is said to be left either.
        return Count(0, 0, 0, {})


# The rows' VMs are made by children, none of which outlives its row.
def _orphans() -> int | None:
    try:
        makers = [entry.name.partition("-")[0] for entry in DEBUGFS.iterdir() if entry.is_dir()]
    except OSError:
        return None
    return sum(maker.isdecimal() and not Path("/proc", maker).exists() for maker in makers)


@dataclass(frozen=True)
class Left:
    """What is there now and was not before; *split*: kilobytes of the direct map that changed, by leaf size.

    The direct map is the whole machine's: others may have split it meanwhile. *vms* None: debugfs does not tell.
    """

    descriptors: int
    children: int
    mappings: int
    split: Mapping[str, int]
    vms: int | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing is left of what a process owns."""
        return max(self.descriptors, self.children, self.mappings, self.vms or 0) <= 0


def since(before: Count) -> Left:
    """What has come since *before*."""
    now = count()
    changed = {size: kb - before.direct_map.get(size, kb) for size, kb in now.direct_map.items()}
    return Left(now.descriptors - before.descriptors, now.children - before.children, now.mappings - before.mappings,
                {size: kb for size, kb in changed.items() if kb},
                None if now.orphans is None or before.orphans is None else now.orphans - before.orphans)
