"""What Linux's drivers do around a hypercall: registers in, errno out. Rule of this package: no policy, that is core/'s.

    driver.py   what every driver offers to the machine, and the vCPU that executes single accesses
    kvm.py      plain KVM: calls into its own MMU code
    pkvm.py     hypercalls of protected KVM
    gunyah.py   hypercalls of Gunyah, as drivers/virt/gunyah issues them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_memfd.errors import UnknownName
from guest_memfd.hosts.emulated.drivers.driver import Driver

if TYPE_CHECKING:
    from guest_memfd.hosts.emulated.machine import Machine

NAMES = ("kvm", "pkvm", "gunyah")


def driver_for(name: str, machine: Machine) -> Driver:
    """The driver of hypervisor *name*, with its EL2 started; raises UnknownName."""
    if name == "kvm":
        from guest_memfd.hosts.emulated.drivers.kvm import KvmDriver

        return KvmDriver(machine)
    if name == "pkvm":
        from guest_memfd.hosts.emulated.drivers.pkvm import PkvmDriver

        return PkvmDriver(machine)
    if name == "gunyah":
        from guest_memfd.hosts.emulated.drivers.gunyah import GunyahDriver

        return GunyahDriver(machine)
    raise UnknownName("hypervisor of the emulated machine", name, NAMES)
