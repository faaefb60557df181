"""The Resource Manager and Linux's end of its channel, for tests."""

from __future__ import annotations

from guest_memfd.machine.el2.gunyah.el2 import FIRST_VMID, HLOS_VMID, Gunyah
from guest_memfd.machine.el2.gunyah.rm.client import RmClient
from guest_memfd.machine.el2.gunyah.rm.lifecycle import Auth, VmState
from guest_memfd.machine.el2.gunyah.rm.payloads import Acl, Id, Sgl
from guest_memfd.machine.el2.gunyah.rm.server import ResourceManager
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

GIB, MIB = 1 << 30, 1 << 20
POOL = 16 * MIB
BASE = 0x8000_0000
R, RX, RW, RWX = 4, 5, 6, 7


class Machine:
    """RAM, EL2, the Resource Manager, and Linux's end of its channel."""

    def __init__(self) -> None:
        self.ram = Ram(2 * GIB)
        self.pool = Buddy(self.ram, self.ram.end - POOL, POOL)
        self.el2 = Gunyah(self.ram, self.pool, [Tlb()], reserved=[(self.ram.end - POOL, POOL)])
        self.rm = ResourceManager(self.el2)
        self.linux = RmClient(self.rm.channels[HLOS_VMID], lambda: self.rm.serve(HLOS_VMID))

    def guest(self, vmid: int) -> RmClient:
        """A VM's end."""
        return RmClient(self.rm.connect(vmid), lambda: self.rm.serve(vmid))

    def lend(self, vmid: int, *sgl: Sgl, rights: int = RWX) -> tuple[int, int]:
        return self.linux.mem_share((Acl(vmid, rights),), sgl)

    def share(self, vmid: int, *sgl: Sgl, rights: int = RWX) -> tuple[int, int]:
        return self.linux.mem_share((Acl(vmid, rights), Acl(HLOS_VMID, RWX)), sgl)

    def vm(self, until: VmState = VmState.RUNNING, *, paging: tuple[Sgl, ...] = (Sgl(BASE, GIB),), share: bool = False,
           auth: Auth = Auth.NONE, base: int = BASE) -> tuple[int, int]:
        """As Linux starts a VM, up to a state: its VMID, and the handle of its image (one block of 2 MiB)."""
        linux, vmid = self.linux, self.linux.alloc_vmid()
        assert vmid >= FIRST_VMID
        ret, handle = (self.share if share else self.lend)(vmid, Sgl(self.ram.base, 2 * MIB))
        assert ret == 0
        if until == VmState.LOAD:
            return vmid, handle
        assert linux.vm_configure(vmid, auth, handle, 0, PAGE) == 0
        if until == VmState.AUTH:
            return vmid, handle
        if auth != Auth.NONE:
            assert linux.vm_call(Id.VM_AUTH_IMAGE, vmid) == 0
        if until == VmState.INIT:
            return vmid, handle
        assert linux.vm_set_demand_paging(vmid, paging) == 0
        assert linux.vm_set_address_layout(vmid, base, 2 * MIB) == 0
        assert linux.vm_call(Id.VM_INIT, vmid) == 0
        if until == VmState.READY:
            return vmid, handle
        assert linux.vm_call(Id.VM_START, vmid) == 0
        if until == VmState.EXITED:
            assert linux.vm_stop(vmid) == 0
        return vmid, handle

    def state(self, vmid: int) -> VmState:
        state = self.rm.vms[vmid].state
        assert self.linux.status[vmid] == state
        return state
