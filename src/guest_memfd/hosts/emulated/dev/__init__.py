"""Devices of the emulated machine: what a VMM opens, and the files it gets. uapi/ says what they promise.

    file.py    a guest_memfd file and its mappings, shared by all devices
    kvm/       /dev/kvm
    gunyah/    /dev/gunyah (series v17)

Rule of this package: checks in the kernel's order, then library procedures run to their end; no policy of its own.
"""

from __future__ import annotations

from errno import ENOENT
from typing import TYPE_CHECKING, Any

from guest_memfd.designs import DESIGNS
from guest_memfd.errors import SyscallFailed
from guest_memfd.hosts.uapi import gunyah as uapi

if TYPE_CHECKING:
    from guest_memfd.hosts.emulated.machine import Machine


def open_device(machine: Machine, path: str, design: str) -> Any:
    """open(2) of *path*; *design* serves the files that come from it. Raises SyscallFailed(ENOENT), UnknownName."""
    chosen = DESIGNS[design]
    if path == uapi.PATH and machine.hypervisor.name == "gunyah":
        from guest_memfd.hosts.emulated.dev.gunyah import Device

        return Device(machine, chosen)
    if path == "/dev/kvm" and machine.hypervisor.module == "kvm":
        from guest_memfd.hosts.emulated.dev.kvm import System

        return System(machine, chosen)
    raise SyscallFailed(ENOENT, f"open {path}", f"the machine runs {machine.hypervisor.name}")
