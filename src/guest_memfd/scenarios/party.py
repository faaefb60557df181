"""What a party is: somebody who does something to guest memory while others do something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor

Procedure = Callable[[Design, Hypervisor], Steps[None]]


def _always(_design: Design, _hypervisor: Hypervisor) -> bool:
    return True


@dataclass(frozen=True)
class Party:
    """A party: its procedure, and whether it can exist under a given design and hypervisor, in the design's scene.

    task: it is a task that freezing stops (a kernel thread or a device is not).
    file: number of the file it works on, and so of its VM.
    role: whoever has the same role is never in a scenario together with it: they are one task that does different things.
    """

    name: str
    title: str
    procedure: Procedure
    task: bool = True
    exists: Callable[[Design, Hypervisor], bool] = _always
    file: int = 0
    role: str = ""
