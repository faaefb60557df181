"""A virtual machine as the hypervisor has it: address space, extents, vCPUs. A dead VM never runs again.

The extents and the capabilities for the host are those that demand paging needs (Linux series v17, patch 20): memory in
`guest_private` is the guest's alone, memory in `guest_shared` both may map.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.compat import override
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace
from guest_memfd.machine.el2.gunyah.capabilities import CapabilitySpace, ExtentRight, SpaceRight, VcpuRight
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.memextent import RWX, Extent, ExtentMapping
from guest_memfd.machine.el2.gunyah.vcpu import GunyahGuestCpu, GunyahHypVcpu, GunyahRun, VcpuState
from guest_memfd.words.units import Ipa, Pa

if TYPE_CHECKING:
    from guest_memfd.machine.el2.gunyah.el2 import Gunyah

PRIVATE_HOST_RIGHTS = ExtentRight.MAP | ExtentRight.LOOKUP | ExtentRight.DONATE | ExtentRight.PROTECTED_HOST
PRIVATE_GUEST_RIGHTS = ExtentRight.MAP_PRIVATE | ExtentRight.LOOKUP | ExtentRight.DONATE | ExtentRight.PROTECTED_GUEST
SHARED_RIGHTS = ExtentRight.MAP | ExtentRight.LOOKUP | ExtentRight.DONATE
SPACE_RIGHTS = SpaceRight.MAP | SpaceRight.MAP_PROTECTED | SpaceRight.LOOKUP


class Exit(IntEnum):
    """Why a VM no longer runs, as VM_EXITED reports it."""

    VM_EXIT = 0
    PLATFORM_OFF = 1
    PLATFORM_RESET = 2
    PSCI_SYSTEM_RESET2 = 3
    WATCHDOG = 4
    SW_ERR = 5
    HW_ERR = 6
    STOP_FORCED = 7


class HostCaps(NamedTuple):
    """What the host holds of a VM; *host_private* and *host_shared* are one capability."""

    host_private: int
    host_shared: int
    guest_private: int
    guest_shared: int
    addrspace: int


class Psci(IntEnum):
    """Function ids (Arm DEN 0022)."""

    SMCCC_VERSION = 0x8000_0000
    VERSION = 0x8400_0000
    CPU_OFF = 0x8400_0002
    SYSTEM_OFF = 0x8400_0008
    SYSTEM_RESET = 0x8400_0009


_VERSION_1_1 = 1 << 16 | 1


class GunyahHypVm:
    """One VM. *running*: whether its vCPUs may run; pages it has locked stay with it exactly as long.

    *on_exit* is told why it stopped. Raises HypRefused, and nothing of it exists: NOMEM, CSPACE_FULL.
    """

    def __init__(self, el2: Gunyah, name: str, vmid: int, running: bool = True) -> None:
        self._el2, self.name, self.vmid, self.running = el2, name, vmid, running
        self.exit: Exit | None = None
        self.on_exit: Callable[[Exit], None] | None = None
        self.space = AddressSpace(el2.ram, el2.memdb, el2.source, el2.tlbs, vmid, name, lambda: self.running,
                                  el2.relock, el2.modify_flags)
        self.cspace = CapabilitySpace()
        self.vcpus: list[GunyahHypVcpu] = []
        self.vcpu_caps: list[int] = []
        self.guest_private = Extent(f"{name}.private", parent=el2.host_extent, alone=self.space)
        self.guest_shared = Extent(f"{name}.shared", parent=el2.root_extent)
        # This record is what makes a shared page stay the host's to use: a donation from the host's extent finds the
        # same mapping on both sides.
        self.guest_shared.record(ExtentMapping(el2.hlos, Ipa(0), RWX))
        self.caps = self._grant()

    # All of them or none.
    def _grant(self) -> HostCaps:
        cspace, host = self._el2.cspace, self._el2.host_cap
        granted: list[int] = []
        try:
            for thing, rights in ((self.guest_private, PRIVATE_GUEST_RIGHTS), (self.guest_shared, SHARED_RIGHTS),
                                  (self.space, SPACE_RIGHTS)):
                granted.append(cspace.grant(thing, rights))
        except HypRefused:
            # Half a set of capabilities would be a VM that can be named and not used.
            for cap in granted:
                cspace.revoke(cap)
            self.space.destroy()
            raise
        return HostCaps(host, host, *granted)

    @override
    def __repr__(self) -> str:
        return f"<VM {self.name}, VMID {self.vmid:#x}>"

    def add_vcpu(self, cpu: GunyahGuestCpu, budget: float | None = None) -> int:
        """Give it a vCPU; the host's capability for VCPU_RUN. *budget*: seconds per run, None: until something happens."""
        vcpu = GunyahHypVcpu(self, cpu, budget)
        self.vcpus.append(vcpu)
        cap = self._el2.cspace.grant(vcpu, VcpuRight.RUN)
        self.vcpu_caps.append(cap)
        return cap

    # -- questions -----------------------------------------------------------------------------------------------

    def ipa_of(self, pa: Pa) -> Ipa | None:
        """The guest address that maps the page at *pa*, if any."""
        return self.space.maps(pa)

    def locked(self, ipa: Ipa) -> bool:
        """Whether *ipa* is a private page that the guest holds on to."""
        return self.space.locked(ipa)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the vCPUs run."""
        self.running = True

    def kill(self, why: Exit = Exit.STOP_FORCED) -> None:
        """No vCPU runs any more, for good; memory stays where it is until it is reclaimed."""
        # The first reason counts. A VM that switched itself off and is then stopped by the host has switched itself
        # off.
        if self.exit is None:
            self.exit, self.running = why, False
            if self.on_exit is not None:
                self.on_exit(why)

    def destroy(self) -> None:
        """Take it apart: what it holds is sanitised and given back to the host, its capabilities are revoked.

        Raises HypRefused(NOMEM); it is dead then, but still there.
        """
        self.kill()
        self._el2.take_back(self)
        for cap in (*self.caps[2:], *self.vcpu_caps):
            self._el2.cspace.revoke(cap)
        self._el2.forget(self)

    # -- the guest's own calls -----------------------------------------------------------------------------------

    def guest_call(self, regs: list[int]) -> GunyahRun | None:
        """An HVC or SMC of a vCPU, SMCCC in *regs*; None: answered there, the vCPU goes on."""
        number = regs[0] & 0xFFFF_FFFF
        if number == Psci.CPU_OFF:
            return GunyahRun(VcpuState.POWERED_OFF)
        if number == Psci.SYSTEM_OFF:
            self.kill(Exit.PLATFORM_OFF)
            return GunyahRun(VcpuState.POWERED_OFF)
        if number == Psci.SYSTEM_RESET:
            self.kill(Exit.PLATFORM_RESET)
            return GunyahRun(VcpuState.PSCI_SYSTEM_RESET)
        if number in (Psci.VERSION, Psci.SMCCC_VERSION):
            regs[0] = _VERSION_1_1
        else:
            self._el2.hypercalls.call(regs, self.cspace, self.space)
        return None
